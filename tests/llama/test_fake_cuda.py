"""What runs on a GPU, on tensors without content that say they are on one: dispatch, dtypes, and no waiting for it.

A tensor without content has no values to look at, so every `.item()`, every branch on a tensor and every shape that
depends on values raises here: on a GPU the host would wait for the device. PyTorch builds for CPUs cannot index even
such tensors on "cuda", so these are on the CPU, and say otherwise to whoever asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from conftest import SMALL
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama import KVCache, Transformer, decoding, lora, quantization
from llama import device as devices
from llama.kernels import gpu
from llama.lora import LoRAConfig
from llama.quantization import Quantization
from llama.sampling import Sampling, next_token
from llama.training import memory
from llama.training.batch import Batch
from llama.training.loss import cross_entropy_sum
from llama.training.memory import Shape
from llama.training.options import Settings
from llama.training.step import Trainer

CARDS = {"P100": (6, 0), "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0)}
ARGS = dataclasses.replace(SMALL, n_layers=2, dim=128, n_heads=8, n_kv_heads=2, head_dim=16)
CUDA = torch.device("cuda")


class Pretend(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU; `moved` are the functions that asked for the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.is_inside = [], False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        if func is torch.Tensor.cpu or any(isinstance(x, (str, torch.device)) and str(x) == "cpu" for x in given):
            self.moved.append(func)
        here = {name: self.here(value) for name, value in (kwargs or {}).items()}
        was, self.is_inside = self.is_inside, True
        try:
            return func(*map(self.here, args), **here)
        finally:
            self.is_inside = was

    @staticmethod
    def here(value):
        return torch.device("cpu") if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value


class FakeGenerator:
    """A real one would be of a real device."""

    def __init__(self, device) -> None: ...

    def manual_seed(self, seed) -> None: ...


class Seen(TorchDispatchMode):
    """The dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.dtypes |= {tensor.dtype for tensor in results if isinstance(tensor, torch.Tensor)}
        return result


@pytest.fixture(params=CARDS)
def capability(request, monkeypatch) -> Iterator[tuple[int, int]]:
    """Of a card, on which plain PyTorch runs: kernels of Triton are launched on real ones alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: CARDS[request.param])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_load", lambda _: (None, "not launched here"))
    usual = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, *given, **named: usual("cpu", *given, **named))
    memory.estimate.cache_clear()
    yield CARDS[request.param]
    memory.estimate.cache_clear()


@pytest.fixture
def card(capability, monkeypatch) -> Iterator[Pretend]:
    usual = FakeTensor.device.fget
    with FakeTensorMode(allow_non_fake_inputs=True), Pretend() as pretend:
        # PyTorch's own code is told the truth.
        says = property(lambda tensor: usual(tensor) if pretend.is_inside else CUDA)
        monkeypatch.setattr(FakeTensor, "device", says)
        yield pretend
    assert pretend.moved == []


def network(card: Pretend, dtype: torch.dtype, config: Quantization | None = None) -> Transformer:
    with unset_fake_temporarily(), torch._C.DisableTorchFunction(), torch.device("meta"):
        model = Transformer(ARGS)
        if config is not None:
            quantization.lay_out(model, config)
        model.to(dtype)
    model = model.to_empty(device=CUDA).eval()
    card.moved.clear()  # a model is made on the CPU
    return model


def test_a_look_at_a_value_would_be_noticed(card):
    one = torch.ones(1, device=CUDA)
    assert one.device == CUDA
    for look in (lambda: one.item(), lambda: bool(one > 0), lambda: one.tolist(), lambda: one.nonzero().shape[0] > 0):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            look()
    one.cpu()
    one.to("cpu")
    assert len(card.moved) == 2
    card.moved.clear()


SAMPLED = Sampling(0.6, 0.9, top_k=50, min_p=0.01)
FORMATS = [None, Quantization(8), Quantization(4, 32, zero_points=True)]


@pytest.mark.parametrize(("config", "sampling"), [(None, Sampling(0.0)), *((config, SAMPLED) for config in FORMATS)])
def test_prefill_decode_and_sampling_never_wait(card, capability, config, sampling):
    half = devices.half_dtype(CUDA)
    assert half == (torch.bfloat16 if capability >= (8, 0) else torch.float16)
    model = network(card, half, config)
    cache = KVCache(ARGS, 3, 40, half, CUDA)
    run = decoding.Generation(model, cache, decoding.EagerStep(model, cache), False)
    tokens, last = (torch.zeros(shape, dtype=torch.int64, device=CUDA) for shape in ((3, 8), 3))
    with torch.no_grad(), Seen() as seen:
        token = next_token(run.last_logits(tokens, last), sampling)[:, None]
        for n in (1, 1, 4):  # of speculative decoding, several at once
            logits = run.step(token.expand(3, n), torch.zeros(3, n, dtype=torch.int64, device=CUDA))
            token = next_token(logits[:, -1], sampling)[:, None]
        assert logits.dtype == half
    assert torch.bfloat16 not in seen.dtypes or capability >= (8, 0)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("amp", ["none", "16 bits"])
def test_forward_and_backward_never_wait(card, capability, monkeypatch, lean, amp):
    name = "none" if amp == "none" else "bf16" if capability >= (8, 0) else "fp16"
    model = network(card, torch.float32)
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    lora.apply(model, LoRAConfig(dropout=0.1))
    trainer = Trainer(model.train(), Settings(amp=name, lean=lean), 1)
    tokens = torch.zeros(2, 24, dtype=torch.int64, device=CUDA)
    batch = Batch(tokens, None, *torch.zeros(2, 5, dtype=torch.int64, device=CUDA))
    with Seen() as seen:
        with trainer.autocast():
            loss = trainer.loss_sum(batch)
        loss.backward()
    half = {torch.float16, torch.bfloat16} & seen.dtypes
    assert half == (set() if amp == "none" else {torch.bfloat16 if capability >= (8, 0) else torch.float16})


def test_estimates_count_repeated_heads_where_the_card_repeats_them(capability):
    args = dataclasses.replace(ARGS, n_heads=8, n_kv_heads=1)
    half = devices.half_dtype(CUDA)
    sizes = (args, half, LoRAConfig(), Settings(), Shape(4, 512, 8))
    plain, cuda = (memory.estimate(*sizes, device_type=name).peak for name in ("cpu", "cuda"))
    repeated = 2 * 4 * 512 * 8 * 16 * 2  # bytes of K and V of one layer with all heads
    if capability >= (8, 0):
        assert cuda == plain
    else:
        assert cuda >= plain + repeated


# Sixteen bits end at 65,504: what a P100 computes in fp16 must not.


@pytest.mark.parametrize("bits", [8, 4])
def test_fp16_products_with_codes_sum_beyond_what_a_code_product_holds(bits):
    """2,048 products of 100 with codes of up to 127 add up to 26 million; the result is 20,000."""
    linear = torch.nn.Linear(2048, 4, bias=False)
    torch.nn.init.constant_(linear.weight, 0.1)
    module = quantization.rounded(linear.half(), "w1", Quantization(bits, 32 if bits == 4 else None))
    y = module(torch.full((1, 2048), 100.0, dtype=torch.float16))
    assert torch.allclose(y.float(), torch.full((1, 4), 20480.0), rtol=0.02)


def test_fp16_loss_and_probabilities_of_large_logits():
    h, labels = torch.full((300, 8), 100.0, dtype=torch.float16), torch.zeros(300, dtype=torch.int64)
    head = torch.zeros(50, 8, dtype=torch.float16)
    head[1] = 60.0  # logits of 0 and of 48,000: a sum of 14 million nats
    loss = cross_entropy_sum(lambda x: x @ head.T, h, labels)
    assert loss == pytest.approx(300 * 48000.0)
    logits = torch.tensor([[6.5e4, -6.5e4, 0.0]], dtype=torch.float16)
    probs = Sampling(1e-3).probs(logits)
    assert probs.tolist() == [[1, 0, 0]] and probs.dtype == torch.float32
