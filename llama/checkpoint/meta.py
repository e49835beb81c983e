"""Meta's layout: params.json and consolidated.00.pth, .01.pth, ..., one file for each model-parallel rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llama import files, parallel
from llama.checkpoint import tokenizer_files
from llama.checkpoint.source import EMBEDDING, HEAD, Source, naming, unwrapped
from llama.config import ModelArgs
from llama.errors import EnvironmentFailure, InputError
from llama.model import Transformer
from llama.processes import World

PARAMS = "params.json"
WEIGHTS = ("consolidated.*.pth",)
SHARDED_ON_INPUT = ("attention.wo.weight", "feed_forward.w2.weight")


class MetaSource(Source):
    """Each rank has a part of every matrix and a copy of every norm. Two ranks, as they are put together:

        wq wk wv w1 w3 output: by rows      wo w2: by columns      norms

               +---------+                  +----+----+            +---+   +---+
               | rank 0  |                  |    |    |            | 0 | = | 1 |
               +---------+                  | 0  | 1  |            +---+   +---+
               | rank 1  |                  |    |    |
               +---------+                  +----+----+

    The embedding table is cut by columns in Llama 2, by rows in Llama 3.
    """

    def __init__(self, directory: Path) -> None:
        self.paths = _shard_paths(directory)
        self.where = self.paths[0] if len(self.paths) == 1 else directory / "consolidated.*.pth"
        shards = _shard_shapes(self.paths)
        params = files.read_json(directory / PARAMS)
        with naming(directory / PARAMS):
            self.args = ModelArgs.from_params(params)
            self.shapes = {key: self._merged_shape(key, [shard[key] for shard in shards]) for key in shards[0]}
            self._complete_args(is_tie_declared=params.get("tie_word_embeddings") is not None)

    def _complete_args(self, is_tie_declared: bool) -> None:
        """Fill in what the weights say about the vocabulary, and check what they say about the head."""
        if self.args.vocab_size == -1:
            if len(self.shapes.get(EMBEDDING, ())) != 2:
                raise ValueError(f"vocab_size: is -1, and {self.where} holds no {EMBEDDING} to take it from")
            self.args = dataclasses.replace(self.args, vocab_size=self.shapes[EMBEDDING][0])
        if not self.args.tie_word_embeddings and HEAD not in self.shapes and not is_tie_declared:
            raise ValueError(
                f"tie_word_embeddings: {self.where} holds no {HEAD}; set it to true if the head is the embedding table"
            )
        if self.has_other_head():
            raise ValueError(
                f"tie_word_embeddings: the head is tied, but {HEAD} differs from {EMBEDDING} in {self.where}"
            )

    def _axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension along which ranks hold different parts; None where each holds the whole."""
        if len(shape) < 2:
            return None
        if name == EMBEDDING:
            return 0 if shape[1] == self.args.dim else 1
        return 1 if name.endswith(SHARDED_ON_INPUT) else 0

    def _merged_shape(self, name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        first, axis = shapes[0], self._axis(name, shapes[0])
        others = [size for i, size in enumerate(first) if i != axis]  # these are equal in every shard
        for path, shape in zip(self.paths, shapes, strict=True):
            if len(shape) != len(first) or others != [size for i, size in enumerate(shape) if i != axis]:
                raise InputError(f"{path}:{name}: shape {list(shape)} does not fit {list(first)} of the first shard")
        return tuple(sum(shape[i] for shape in shapes) if i == axis else size for i, size in enumerate(first))

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Map the shards; a matrix of several is a copy, the rest lies in the files."""
        shards = [_read_shard(path) for path in self.paths]

        def read(name: str) -> Tensor:
            parts = [shard[name] for shard in shards]
            axis = self._axis(name, tuple(parts[0].shape))
            if len(parts) > 1 and axis is not None:
                return torch.cat(parts, axis)
            if not all(torch.equal(part, parts[0]) for part in parts[1:]):
                raise InputError(f"{self.place(name)}: the shards hold different copies; they are of several models")
            return parts[0]

        yield read

    @contextmanager
    def open_part(self, me: World) -> Iterator[Callable[[str], Tensor]]:
        """Straight from the shard of process `me`, where there is one for each and both are cut alike."""
        mine = _read_shard(self.paths[me.rank]) if me.size == len(self.paths) else {}

        with super().open_part(me) as cut:

            def read(name: str) -> Tensor:
                is_mine = mine and parallel.axis_of(name) is not None
                if is_mine and parallel.axis_of(name) == self._axis(name, tuple(mine[name].shape)):
                    return mine[name]
                return cut(name)

            yield read


def _shard_paths(directory: Path) -> list[Path]:
    paths = sorted(directory.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or [path.name for path in paths] != expected:
        names = ", ".join(path.name for path in paths) or "none"
        raise InputError(f"{directory}: expected shards consolidated.00.pth, 01, ... without a gap; found {names}")
    return paths


def _shard_shapes(paths: list[Path]) -> list[dict[str, tuple[int, ...]]]:
    """The shape of each tensor of each shard; all hold the same keys."""
    shards = [{key: tuple(tensor.shape) for key, tensor in _read_shard(path).items()} for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.keys() != shards[0].keys():
            odd = sorted(shard.keys() ^ shards[0].keys())[0]
            raise InputError(f"{path}: its keys differ from those of {paths[0].name}, first at {odd}")
    return shards


def _read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, by Meta's names."""
    state = read_pth(path)
    named = dict(zip(unwrapped(list(state)), state.values(), strict=True))
    if len(named) < len(state):
        raise InputError(f"{path} holds a weight twice, once under a wrapper's name; a weight may stand once")
    return named


def read_pth(path: Path) -> dict[str, Tensor]:
    """Map a file of torch.save. Only tensors are unpickled; anything else in it is refused before it runs."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise EnvironmentFailure(
            f"torch {torch.__version__} can be made to run code by a .pth file; install torch >= 2.10"
        )
    files.require_no_device(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch raises a different type for each kind of damage; all mean the same to the user
        if type(error).__name__ != "UnpicklingError" or files.stand_in(path):
            raise files.damaged(path, "PyTorch checkpoint") from error
        raise InputError(
            f"{path} holds more than tensors and might run code; download it again from a source you trust"
        ) from error
    plain = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        for key, t in state.items()
    )
    if not plain:
        raise InputError(f"{path} must hold a flat dictionary of plain tensors")
    # One stored number can stand for a tensor of any size. Twice the file: a tied head may be the table once more.
    if sum(tensor.nbytes for tensor in state.values()) > 2 * path.stat().st_size:
        raise InputError(f"{path} holds tensors that are larger than the file; save them as they are, with .clone()")
    return state


def write(model: Transformer, directory: Path, tokenizer_path: Path | None, shards: int = 1) -> None:
    """One shard for each of so many processes, cut as in Llama 3.

    The head is there under its own name even where it is the table: Meta's code needs the key. Raises InputError where
    the model has no so many equal parts.
    """
    parallel.part_of(model.args, shards)
    state = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    if model.args.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]  # torch.save stores shared memory once
    files.write_json(directory / PARAMS, model.args.to_params())
    try:
        for rank in range(shards):
            parts = {name: parallel.shard(name, weight, World(rank, shards)) for name, weight in state.items()}
            if shards > 1:  # a part of a tensor would be stored with all of it
                parts = {name: part.clone() for name, part in parts.items()}
            torch.save(parts, directory / f"consolidated.{rank:02d}.pth")
    except RuntimeError as error:  # how torch's writer reports that a write failed
        raise OSError(str(error)) from error
    tokenizer_files.copy(tokenizer_path, directory)
