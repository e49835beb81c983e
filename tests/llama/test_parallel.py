"""One model over several processes: each has its part and no more, and what they compute is what one computes alone."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import several
import torch
import torch.distributed as dist
from conftest import SMALL, random_model, write_shards
from support import ALL

from llama import (
    KVCache,
    Llama,
    ModelArgs,
    Transformer,
    adapters,
    checkpoint,
    cli,
    lora,
    memory,
    parallel,
    processes,
    quantization,
)
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.processes import ALONE, World
from llama.quantization import Quantization
from llama.speculative import ModelDraft, PromptLookup, Speculation, is_form_of

UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False)
# Whose matrices several processes share evenly, and nothing else about them is even: ffn_dim is 4 * 19.
ODD = ModelArgs(dim=75, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=6, vocab_size=4 * 51).with_ffn_dim(76)
GROUPED = dataclasses.replace(SMALL, dim=128, n_heads=8, n_kv_heads=4, n_layers=2, multiple_of=128)
DRAFT = ModelArgs(dim=30, n_layers=1, n_heads=3, vocab_size=SMALL.vocab_size).with_ffn_dim(31)  # shared by nobody
CODES = {
    "int8": Quantization(8),
    "int8 in groups": Quantization(8, 32),
    "int4": Quantization(4, 32),
    "int4 with zero-points": Quantization(4, 32, zero_points=True),
    "int4, some int8": Quantization(4, 32, int8=("layers.0.attention.wo", "layers.1.feed_forward.w2")),
}
LENGTHS = (1, 9, 30)  # of prompts in one batch


def written(directory: Path, args: ModelArgs, config: Quantization | None = None, seed: int = 0) -> Path:
    model = random_model(args, seed)
    if config is not None:
        quantization.quantize(model, config)
    checkpoint.save(model, directory)
    return directory


def with_adapter(directory: Path) -> Path:
    """A checkpoint, with an adapter of all projections beside it, as after some training: B is not zero."""
    model, config = random_model(checkpoint.read_args(directory)), LoRAConfig(5, targets=ALL)
    lora.apply(model, config)
    for module in lora.layers(model).values():
        module.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapters.save(model, config, directory / "adapter", "")
    return directory


def load(directory: Path, me: World) -> Transformer:
    model = checkpoint.load(directory, torch.float32, me=me)
    if (directory / "adapter").exists():
        adapters.load(model, directory / "adapter", me=me)
    return model


def ids(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def in_chunks(model: Transformer, tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Logits through the cache, so many positions at once."""
    cache = KVCache(model.args, *tokens.shape, model.dtype, "cpu")
    pos = torch.arange(tokens.shape[1]).expand(tokens.shape)
    parts = zip(tokens.split(size, 1), pos.split(size, 1), strict=True)
    return torch.cat([model(part, where, cache) for part, where in parts], 1)


@torch.no_grad()
def logits_of(model: Transformer) -> dict[str, torch.Tensor]:
    tokens = ids(2, 24, below=model.args.vocab_size)
    return {"without a cache": model(tokens)} | {f"chunks of {n}": in_chunks(model, tokens, n) for n in (1, 7)}


def texts_of(model: Transformer, draft: Transformer | None, n: int) -> dict[str, Any]:
    """Texts of `n` tokens for prompts of unequal length, in every way to generate them."""
    prompts = [ids(length, below=model.args.vocab_size).tolist() for length in LENGTHS]
    llama, int8 = (Llama(model, None, max_seq_len=n + 40, cache_dtype=kind) for kind in ("auto", "int8"))
    sampled, greedy = {"temperature": 0.8, "top_p": 0.95, "seed": 3}, {"temperature": 0.0}
    texts = {
        "greedy": llama.generate(prompts, n, **greedy)[0],
        "greedy without a cache": llama.generate(prompts, min(n, 32), **greedy, use_cache=False)[0],
        "sampled": llama.generate(prompts, n, **sampled)[0],
        "streamed": list(llama.stream(prompts[1], n, **sampled)),
        "int8 cache": int8.generate(prompts, min(n, 32), **greedy)[0],
        "lookup": llama.generate(prompts, n, **greedy, speculation=Speculation(PromptLookup()))[0],
    }
    if draft is not None:
        for name, how in (("greedy draft", greedy), ("sampled draft", sampled)):
            texts[name] = llama.generate(prompts, n, **how, speculation=Speculation(ModelDraft(draft), 3))[0]
    return texts


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, int]]]:
    """What is sent meanwhile: the function of torch.distributed, and the bytes that it is given."""
    sent = []
    kinds = ("all_", "barrier", "broadcast", "gather", "reduce", "scatter", "send", "recv", "isend", "irecv", "batch_")
    usual = {name: f for name, f in vars(dist).items() if name.startswith(kinds) and callable(f)}

    def watch(name: str) -> None:
        def call(*given: Any, **options: Any) -> Any:
            sent.append((name, sum(x.nbytes for x in given if isinstance(x, torch.Tensor))))
            return usual[name](*given, **options)

        setattr(dist, name, call)

    for name in usual:
        watch(name)
    yield sent
    for name, function in usual.items():
        setattr(dist, name, function)


@torch.no_grad()
def sent_by(model: Transformer) -> dict[str, list[tuple[str, int]]]:
    """In the prefill of a prompt of 7 tokens, and in two decode steps after it."""
    llama, sent = Llama(model, None), {}
    with llama.start_session() as session:
        with watched() as sent["prefill"]:
            session.read([1, 2, 3, 4, 5, 6, 7])
        for step in (7, 8):
            with watched() as sent[f"step {step}"]:
                session.step(torch.tensor([[9]]), torch.tensor([[step]]))
    return sent


def work(directories: dict[Path, int], draft: Path) -> list[dict[str, Any]]:
    """What this process's part of each checkpoint gives, with texts of so many tokens."""
    me, results = processes.start(), []
    proposer = checkpoint.load(draft, torch.float32)
    for directory, n_tokens in directories.items():
        model = load(directory, me)
        fitting = proposer if proposer.args.vocab_size == model.args.vocab_size else None
        texts = texts_of(model, fitting, n_tokens) if n_tokens else {}
        results.append({"logits": logits_of(model), "texts": texts, "sent": sent_by(model)})
    return results


def assert_equal(whole: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Tokens of all processes to the bit those of one; logits within 1e-5, and the same bits in each process."""
    for name, expected in whole["logits"].items():
        for part in parts:
            gap = (part["logits"][name] - expected).abs().max() / expected.abs().max()
            assert gap < 1e-5 and torch.equal(part["logits"][name], parts[0]["logits"][name]), (name, gap)
    for part in parts:
        assert part["texts"] == whole["texts"]


@pytest.mark.parametrize(
    ("n", "n_tokens", "shapes"),
    [
        (2, 16, (SMALL, ODD)),
        pytest.param(2, 200, (SMALL, UNTIED, ODD, GROUPED), marks=pytest.mark.slow),
        pytest.param(4, 60, (ODD, GROUPED), marks=pytest.mark.slow),  # as many as key/value heads
    ],
)
def test_several_processes_compute_what_one_does(tmp_path, n, n_tokens, shapes):
    """Logits, with the cache and without; texts, greedy, sampled, streamed, with drafts, an int8 cache; all formats.

    The same with an adapter, over weights and over codes, with which no more is sent.
    """
    directories = {written(tmp_path / f"{i}", args): n_tokens for i, args in enumerate(shapes)}
    directories |= {written(tmp_path / name, GROUPED, config): 0 for name, config in CODES.items()}
    directories[with_adapter(written(tmp_path / "adapted", shapes[-1]))] = min(n_tokens, 16)
    for name in ("int8", "int4, some int8"):
        directories[with_adapter(written(tmp_path / f"adapted {name}", GROUPED, CODES[name]))] = 0
    write_shards(random_model(GROUPED), tmp_path / "shards", 2, 0)
    given = directories | {tmp_path / "shards": 0}, written(tmp_path / "draft", DRAFT, seed=1)
    parts = several.run(n, work, *given, limit=600)
    for i, whole in enumerate(work(*given)):
        assert_equal(whole, [part[i] for part in parts])
        assert not whole["sent"]["prefill"]
    for part in parts:
        for (directory, _), result in zip(given[0].items(), part, strict=True):
            assert_sends_little(checkpoint.read_args(directory), result["sent"], n)


@torch.no_grad()
def beside_fairscale(shards: Path) -> dict[str, torch.Tensor]:
    """Logits of the layers that Meta's code is made of, each with the weights of this rank's shard; and of our part."""
    from fairscale.nn.model_parallel import initialize
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    me, ours = processes.start(), checkpoint.open_source(shards)
    initialize.initialize_model_parallel(me.size)
    args, whole = ours.args, Transformer(ours.args)
    whole.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim)
    whole.output = ColumnParallelLinear(args.dim, args.vocab_size, bias=False)
    width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    for block in whole.layers:
        for name, n_out in (("wq", width), ("wk", kv_width), ("wv", kv_width)):
            setattr(block.attention, name, ColumnParallelLinear(args.dim, n_out, bias=False, gather_output=False))
        block.attention.wo = RowParallelLinear(width, args.dim, bias=False, input_is_parallel=True)
        for name in ("w1", "w3"):
            part = ColumnParallelLinear(args.dim, args.ffn_dim, bias=False, gather_output=False)
            setattr(block.feed_forward, name, part)
        block.feed_forward.w2 = RowParallelLinear(args.ffn_dim, args.dim, bias=False, input_is_parallel=True)
    whole.load_state_dict(torch.load(shards / f"consolidated.{me.rank:02d}.pth", weights_only=True))
    tokens = ids(2, 24, below=args.vocab_size)
    return {"fairscale": whole(tokens), "ours": checkpoint.load(ours, me=me)(tokens)}


def test_logits_equal_those_of_fairscale(tmp_path):
    if importlib.util.find_spec("fairscale") is None:
        pytest.skip("needs fairscale: pip install --no-deps fairscale==0.4.13")
    model = random_model(UNTIED)
    write_shards(model, tmp_path / "shards", 2, 0)
    with torch.no_grad():
        expected = model(ids(2, 24, below=UNTIED.vocab_size))
    for logits in several.run(2, beside_fairscale, tmp_path / "shards"):
        for name in ("fairscale", "ours"):
            assert (logits[name] - expected).abs().max() < 1e-5 * expected.abs().max(), name
        assert (logits["ours"] - logits["fairscale"]).abs().max() < 1e-5 * expected.abs().max()


def assert_sends_little(args: ModelArgs, sent: dict[str, list[tuple[str, int]]], n: int) -> None:
    """In a forward pass two sums per layer and that of the embedding, then the logits of one position."""
    assert sent["step 7"] == sent["step 8"]
    for name, n_positions in (("prefill", 7), ("step 7", 1)):
        *sums, logits = sent[name]
        assert sums == [("all_reduce", n_positions * args.dim * 4)] * (2 * args.n_layers + 1)
        assert logits == ("all_gather", args.vocab_size * 4 // n)


def test_one_process_starts_no_group_and_has_plain_modules(tiny):
    assert not dist.is_initialized() and processes.start() == processes.ALONE
    roles = (parallel.Summed, parallel.Gathered, parallel.Table)
    assert not [module for module in tiny.model.modules() if isinstance(module, roles)]
    tiny.generate([[1, 2, 3]], 3)
    assert not dist.is_initialized()


def parts_of(directory: Path, n: int) -> list[Transformer]:
    """What each of `n` processes loads; loading sends nothing, so one process can be all of them in turn."""
    return [checkpoint.load(directory, torch.float32, me=World(rank, n)) for rank in range(n)]


def assert_parts_make_the_whole(whole: Transformer, parts: list[Transformer]) -> None:
    """Side by side they are the whole, to the bit; norms, and scales of whole rows of wo and w2, each has."""
    for name, expected in whole.state_dict().items():
        stored = [part.state_dict()[name] for part in parts]
        if len(parts) == 1 or stored[0].shape == expected.shape:
            assert name.endswith(("norm.weight", "wo.scales", "w2.scales")) or len(parts) == 1
            assert all(torch.equal(each, expected) for each in stored)
        else:
            axis = int(".wo." in name or ".w2." in name)
            assert torch.equal(torch.cat(stored, axis), expected)
            assert len({each.shape for each in stored}) == 1


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("config", [None, *CODES.values()], ids=lambda config: config and config.name)
def test_parts_make_the_whole_and_are_what_was_estimated(tmp_path, config, n):
    directory = written(tmp_path / "model", GROUPED, config)
    whole, parts = checkpoint.load(directory, torch.float32), parts_of(directory, n)
    assert_parts_make_the_whole(whole, parts)
    for rank, part in enumerate(parts):
        args = part.args
        assert (args.n_heads, args.n_kv_heads, args.ffn_dim) == (8 // n, 4 // n, whole.args.ffn_dim // n)
        assert (args.dim, args.head_dim, args.vocab_size) == (128, 16, 512)
        sizes = (checkpoint.open_source(directory), torch.float32, "auto", 3, 70)
        needed, alone = memory.estimate(*sizes, me=World(rank, n)), memory.estimate(*sizes)
        assert needed.weights == sum(weight.nbytes for weight in part.state_dict().values())
        assert needed.cache * n == alone.cache and needed.activations < alone.activations


def test_an_adapter_is_cut_as_its_model_and_refused_by_the_whole_shape(tmp_path):
    directory = with_adapter(written(tmp_path / "model", GROUPED))
    whole, *parts = (lora.state_dict(load(directory, me)) for me in (ALONE, World(0, 2), World(1, 2)))
    for name, expected in whole.items():
        *_, leaf, matrix = name.split(".")
        axis = {"lora_A": 1, "lora_B": 0}[matrix]
        is_cut = (leaf in ("wo", "w2")) == (matrix == "lora_A")
        made = torch.cat([part[name] for part in parts], axis) if is_cut else parts[1][name]
        assert torch.equal(made, expected), name
    written(tmp_path / "odd", ODD)
    with pytest.raises(InputError, match=r"q_proj\S*: has shape \[5, 128\], expected \[5, 75\]"):
        adapters.load(checkpoint.load(tmp_path / "odd", me=World(0, 2)), directory / "adapter", me=World(0, 2))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(("n_shards", "embedding_axis"), [(1, 0), (2, 0), (2, 1), (4, 0)])
def test_metas_shards_are_cut_for_any_number_of_processes(tmp_path, n, n_shards, embedding_axis):
    model = random_model(dataclasses.replace(GROUPED, tie_word_embeddings=False))
    write_shards(model, tmp_path / "shards", n_shards, embedding_axis)
    assert_parts_make_the_whole(model, parts_of(tmp_path / "shards", n))


def test_a_process_reads_its_own_shard_alone(tmp_path, monkeypatch):
    """Of Llama 3's shards nothing is put together where there is one for each process."""
    write_shards(random_model(GROUPED), tmp_path / "shards", 2, 0)
    source = checkpoint.open_source(tmp_path / "shards")
    with source.open_part(World(1, 2)) as read, monkeypatch.context() as patch:
        patch.setattr(torch, "cat", None)
        for name in source.shapes:
            own = torch.load(tmp_path / "shards" / "consolidated.01.pth", weights_only=True)[name]
            assert torch.equal(read(name), own)
    with source.open_part(World(1, 4)) as read, monkeypatch.context() as patch:
        patch.setattr(torch, "cat", None)
        with pytest.raises(TypeError):
            read("tok_embeddings.weight")


@pytest.mark.parametrize(
    ("n", "args", "named"),
    [
        (4, SMALL, "n_kv_heads=2"),
        (4, dataclasses.replace(SMALL, n_heads=6, head_dim=8), "n_kv_heads=2"),
        (3, dataclasses.replace(SMALL, n_heads=6, n_kv_heads=6, head_dim=8), "vocab_size=512"),
        (4, ODD.with_ffn_dim(78), "ffn_dim=78"),
        (4, dataclasses.replace(ODD, vocab_size=206), "vocab_size=206"),
    ],
)
def test_what_processes_cannot_share_is_named(n, args, named):
    with torch.device("meta"):
        model = Transformer(args)
    with pytest.raises(InputError, match=rf"^{n} processes cannot share {named} evenly; start fewer$"):
        parallel.split(model, World(1, n))


def test_groups_of_codes_that_processes_cannot_share_are_named(tmp_path):
    directory = written(tmp_path / "model", GROUPED, Quantization(4, 64))
    with pytest.raises(InputError, match=r"^4 processes .* the 128 columns of wo in groups of 64; .* smaller"):
        checkpoint.load(directory, me=World(0, 4))


def test_a_model_with_fewer_heads_is_no_form_of_a_part(tmp_path):
    """It must not draft on the part's cache, though its norms and the shape of its keys and values are the part's."""
    [part, _] = parts_of(written(tmp_path / "model", GROUPED), 2)
    fewer = random_model(dataclasses.replace(GROUPED, n_heads=4, n_kv_heads=2, head_dim=16))
    fewer.load_state_dict({k: w for k, w in part.state_dict().items() if k.endswith("norm.weight")}, strict=False)
    assert fewer.args.n_kv_heads == part.args.n_kv_heads and not is_form_of(fewer, part)


@dataclasses.dataclass(frozen=True)
class Nothing(cli.Options):
    """Of a script that several processes may run."""

    ON_SEVERAL = True


def fail(options: Nothing) -> None:
    atexit.register(os.abort)  # as torch's own threads may, where an exchange has not ended
    raise InputError("the text that one process says")


def run_and_fail() -> None:
    sys.argv = ["script.py"]
    cli.run(fail)


def test_a_run_that_fails_keeps_its_exit_code_and_its_line_whatever_torch_does_at_the_end():
    with pytest.raises(AssertionError, match="ended with 2") as error:
        several.run(2, run_and_fail)
    assert "ended with -6" not in str(error.value) and str(error.value).count("the text that one") == 1
