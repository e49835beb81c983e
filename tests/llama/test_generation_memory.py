"""The memory that a generation is said to take is what it takes; where that lacks, nothing is read."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, random_model

from llama import Llama, ModelArgs, checkpoint, memory, quantization
from llama import device as devices
from llama.decoding import CACHES
from llama.errors import EnvironmentFailure
from llama.memory import Memory
from llama.quantization import Quantization
from llama.training.memory import Tracker

MB = 10**6
WIDE = ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=512)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_weights_and_cache_are_counted_to_the_byte(tmp_path, bits, cache_dtype):
    model = checkpoint.load(TINY)
    if bits is not None:
        quantization.quantize(model, Quantization(bits))
    checkpoint.save(model, tmp_path / "m")
    for dtype in (torch.float32, torch.bfloat16):
        needed = memory.estimate(checkpoint.open_source(tmp_path / "m"), dtype, cache_dtype, 3, 70)
        loaded = checkpoint.load(tmp_path / "m", dtype)
        assert needed.weights == sum(weight.nbytes for weight in loaded.state_dict().values())
        with Llama(loaded, None, cache_dtype=cache_dtype).decoder.start(3, 70) as run:
            assert needed.cache == sum(getattr(run.cache, name).nbytes for name in run.cache.parts)


@pytest.mark.parametrize(
    ("n", "length", "dtype", "settings"),
    [
        (1, 60, "float32", {}),
        (9, 100, "bfloat16", {}),
        (1, 3000, "float32", {}),
        (2, 2500, "float32", {"cache_dtype": "int8"}),
        (1, 1500, "float32", {"use_cache": False}),
        (9, 100, "float32", {"use_cache": False}),
    ],
)
def test_activations_are_estimated_from_above_and_not_by_far(tmp_path, n, length, dtype, settings):
    """Against every tensor of a generation. What is between is the copies that kernels make inside themselves."""
    model = random_model(WIDE).to(getattr(torch, dtype))
    checkpoint.save(model, tmp_path / "m")
    settings = {"cache_dtype": "auto", "use_cache": True} | settings
    needed = memory.estimate(
        checkpoint.open_source(tmp_path / "m"), model.dtype, n_sequences=n, length=length, **settings
    )
    llama = Llama(model, None, 4096, decoding="eager", cache_dtype=settings["cache_dtype"])
    with Tracker(model) as tracker:
        llama.generate([[1] * (length - 2)] * n, 2, 0, use_cache=settings["use_cache"])
    took = tracker.footprint().peak - needed.weights - needed.cache
    assert took <= needed.activations <= 2 * took


def test_the_line_is_readable():
    assert str(Memory(2_472_000_000, 134_000_000, 640_000)) == "weights 2,472 MB, cache 134 MB, activations 0.6 MB"


def test_what_a_machine_lacks_is_refused_with_a_remedy_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000 * MB)
    plain = checkpoint.open_source(TINY)
    model = checkpoint.load(TINY)
    quantization.quantize(model, Quantization(8))
    checkpoint.save(model, tmp_path / "q")
    coded = checkpoint.open_source(tmp_path / "q")
    cpu, cuda, half = torch.device("cpu"), torch.device("cuda"), torch.float16

    def refusal(*needed, source=plain, dtype=half, cache_dtype="auto", device=cuda) -> str:
        with pytest.raises(EnvironmentFailure) as error:
            memory.require(Memory(*(size * MB for size in needed)), source, dtype, cache_dtype, device)
        start, _, remedy = str(error.value).partition("; use ")
        held = str(Memory(*(size * MB for size in needed)))
        assert start == f"{device} has 1,000 MB of memory free, and this takes {held}"
        return remedy

    shorter = "fewer or shorter texts (max_batch_size, max_seq_len)"
    assert refusal(900, 90, 11) == f"cache_dtype=int8, {shorter}"
    assert refusal(900, 90, 11, cache_dtype="int8") == shorter
    assert refusal(900, 90, 11, dtype=torch.float32) == f"dtype=bfloat16 or float16, cache_dtype=int8, {shorter}"
    assert refusal(1001, 9, 9) == "a checkpoint that compress.py has quantized"
    assert refusal(1001, 9, 9, source=coded) == "a smaller model"
    assert refusal(0, 990, 11, device=cpu) == f"cache_dtype=int8, {shorter}"
    assert refusal(1001, 9, 9, device=cpu) == "a checkpoint that compress.py has quantized"
    for needed, source, dtype, device in (
        ((900, 90, 10), plain, half, cuda),
        ((1001, 9, 9), plain, torch.bfloat16, cpu),  # as they are stored: the file is mapped
        ((1001, 9, 9), coded, half, cpu),
    ):
        memory.require(Memory(*(size * MB for size in needed)), source, dtype, "auto", device)


def test_what_is_free_is_asked_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert devices.free_bytes(torch.device("cuda", 1)) == 5
    assert devices.free_bytes(torch.device("cpu")) > 50 * MB
