"""Training through the rounding to codes: what is computed, what the gradients are, and what is written at the end."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model
from support import batches, gap, gradients, hard_rows, samples, widened
from torch import nn

from llama import checkpoint, quantization
from llama.calibration import calibrate
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.quantization import Quantization, rounded
from llama.surgery import plain_linear
from llama.training import qat
from llama.training.options import Settings
from llama.training.step import Trainer, evaluate

TOKENS = torch.arange(40).view(2, 20)
SETTINGS = Settings(optimizer="adamw", lr=1e-2)
FINE = Quantization(4, 32, zero_points=True)
bits_of = pytest.mark.parametrize("bits", qat.FORMATS)


def rounded_model(bits: int = 4):
    model = random_model().requires_grad_(True)
    qat.begin(model, qat.FORMATS[bits])
    return model


def layer_of(config: Quantization, n_columns: int = 96) -> qat.RoundedLinear:
    """Of hard rows, whose last group of 64 is a shorter one."""
    weight = torch.nn.Parameter(hard_rows(n_columns=n_columns))
    return qat.RoundedLinear(weight, rounded(plain_linear(weight), "", config), config)


def layers(model) -> dict[str, qat._Rounded]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, qat._Rounded)}


def trained(bits: int, n_steps: int = 5, **changes) -> tuple[Trainer, list]:
    trainer = Trainer(rounded_model(bits), Settings(**{**vars(SETTINGS), **changes}), n_steps)
    (window,) = [batches([samples(3, seed=7)])]
    return trainer, [trainer.step(window) for _ in range(n_steps)]


@bits_of
def test_it_starts_as_the_quantized_model(bits):
    """Each matrix to the bit, in fp32 and in bf16."""
    model, twin = rounded_model(bits), random_model()
    quantization.quantize(twin, qat.FORMATS[bits])
    assert len(layers(model)) == 7 * SMALL.n_layers + 1
    for name, layer in layers(model).items():
        for dtype in (torch.float32, torch.bfloat16):
            there = twin.get_submodule(name)
            assert torch.equal(
                layer.value(dtype), there.widen(slice(None), torch.empty(layer.weight.shape, dtype=dtype))
            )
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), twin(TOKENS), atol=1e-5, rtol=1e-5)


def calibrated_model():
    model = random_model()
    calibrate(model, FINE, torch.randint(SMALL.vocab_size, (4, 32), generator=torch.Generator().manual_seed(3)))
    return model


def test_it_starts_from_the_codes_of_a_quantized_model(monkeypatch):
    """To the bit; weights move to the value of the code that they get, and only those that another one is closer to."""
    monkeypatch.setattr(qat, "SLAB", 300)  # a few rows at a time
    start, model, untouched = calibrated_model(), random_model(), random_model()
    qat.begin(model, FINE, start)
    n_moved = 0
    for name, layer in layers(model).items():
        codes, before = start.get_submodule(name), untouched.get_submodule(name).weight
        moved = layer.weight != before
        if layer.scales is None:  # the table: what calibration chose for it is within a code of the nearest
            assert not moved.any()
        else:
            assert torch.equal(layer.value(torch.float32), widened(codes).float())
            value, scale = layer.value(torch.float32), layer.scales.repeat_interleave(FINE.group_size, 1)
            assert not moved[(before - value).abs() <= 0.498 * scale[:, : value.shape[1]]].any()
            assert torch.equal(layer.weight[moved], value[moved])
        n_moved += moved.sum().item()
    assert 0 < n_moved < 0.3 * SMALL.n_params()
    with pytest.raises(InputError, match="the codes to start from are not those of this weight"):
        qat.begin(random_model(seed=1), FINE, start)


@bits_of
def test_gradients_are_those_by_the_rounded_weights(bits):
    """Of every weight, the tied table included: as in a plain model whose weights are the values."""
    model, twin = rounded_model(bits), random_model().requires_grad_(True)
    with torch.no_grad():
        for name, layer in layers(model).items():
            twin.get_submodule(name).weight.copy_(layer.value(torch.float32))
    for one in (model, twin):
        F.cross_entropy(one(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    straight = {name: grad for name, grad in gradients(model).items() if not name.endswith(("scales", "offsets"))}
    assert gap(straight, gradients(twin)) < 1e-6


@pytest.mark.parametrize("config", [qat.FORMATS[4], Quantization(4, 32), Quantization(8, 64)], ids=lambda c: c.name)
def test_scales_and_offsets_have_the_gradients_of_the_papers(monkeypatch, config):
    """By autograd through round(u) = u + (round(u) - u), its second term held, in fp64; also where codes are cut."""
    monkeypatch.setattr(qat, "SLAB", 300)  # a few rows at a time
    layer = layer_of(config)
    with torch.no_grad():
        layer.scales *= 0.7
    dv = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    layer.rounded(dv).backward(dv)
    scales, offsets = (None if part is None else part.detach().double() for part in layer._stored())
    parts = [part.requires_grad_() for part in (scales, offsets) if part is not None]
    of_columns = [part.repeat_interleave(config.group_size, 1)[:, : dv.shape[1]] for part in parts]
    offset = of_columns[1] if len(parts) == 2 else 0.0
    u = (layer.weight.detach().double() - offset) / of_columns[0]
    cut = u.clamp(config.grid.low, config.grid.high)
    assert (cut != u).any()
    q = cut + (cut.round() - cut).detach()
    (q * of_columns[0] + offset).backward(dv.double())
    for ours, theirs in zip((layer.scales, layer.offsets), parts, strict=False):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-3, rtol=1e-4)
    assert torch.equal(layer.weight.grad, dv)


@bits_of
def test_training_changes_codes_and_what_is_written_is_what_was_computed(bits, tmp_path):
    """Values are those of the exported codes to the bit; the loss is that of the exported checkpoint."""
    trainer, reports = trained(bits)
    assert reports[-1].loss < reports[0].loss - 0.1
    model, config = trainer.model, qat.FORMATS[bits]
    last = batches([samples(1, seed=7)])
    loss, values = (
        evaluate(trainer, last).loss,
        {name: layer.value(torch.float32) for name, layer in layers(model).items()},
    )
    start = {name: layer.value(torch.float32) for name, layer in layers(rounded_model(bits)).items()}
    weights = {name: layer.weight for name, layer in layers(model).items()}
    qat.finish(model, config)
    checkpoint.save(model, tmp_path / "out")
    found = checkpoint.load(tmp_path / "out")
    assert quantization.quantization_of(found) == dataclasses.replace(config, method=quantization.TRAINED)
    for name, value in values.items():
        assert torch.equal(widened(found.get_submodule(name)).float(), value) and not torch.equal(value, start[name])
        assert not torch.equal(weights[name], value)
    found.norm.requires_grad_(True)  # a trainer wants something to train
    assert evaluate(Trainer(found, SETTINGS, 1), last).loss == pytest.approx(loss, rel=1e-6)


def test_values_are_made_once_for_each_step(monkeypatch):
    """Whatever moves a weight, a scale or an offset, they are made anew; and not without."""
    layer, x = layer_of(qat.FORMATS[4]), torch.randn(3, 96)
    made, make = [], layer.codes
    monkeypatch.setattr(layer, "codes", lambda: made.append(1) or make())
    layer(x), layer(x), layer(x).sum().backward()
    assert len(made) == 1
    for number, weight in enumerate((layer.weight, layer.scales, layer.offsets), 2):
        before = layer(x).detach()
        torch.optim.AdamW([weight], 0.1).step()
        assert not torch.equal(layer(x), before) and len(made) == number
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and len(made) == 5
    layer(x)
    assert len(made) == 5


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_restored_training_continues_to_the_same_bits(amp):
    whole, expected = trained(4, 4, amp=amp)
    half, _ = trained(4, 2, amp=amp)
    kept = copy.deepcopy(half.snapshot())
    again = Trainer(rounded_model(), half.settings, 4)
    again.model(TOKENS)  # values of the start, which must not outlive it
    again.restore(kept)
    window = batches([samples(3, seed=7)])
    reports = [again.step(window) for _ in range(2)]
    assert [report.loss for report in reports] == [report.loss for report in expected[2:]]
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name])


def adapted_model(bits: int = 4, targets=("wq", "wv", "w2")):
    model = rounded_model(bits)
    qat.adapt(model, LoRAConfig(r=2, alpha=8.0, dropout=0.0, targets=targets), seed=1)
    return model


@bits_of
def test_an_update_is_rounded_with_its_weight(bits):
    """Its gradients are those by B and A of a plain matrix W + (alpha / r) B A, at the value of the codes."""
    model, x = adapted_model(bits), torch.randn(5, SMALL.dim)
    layer = model.layers[0].attention.wq
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        w = layer.weight + 4 * layer.lora_B @ layer.lora_A
        codes = rounded(plain_linear(nn.Parameter(w)), "", layer.config)
        if bits == 8:  # scales follow from the row; groups of 4 bits keep those that are trained
            assert torch.equal(layer.value(torch.float32), widened(codes).float())
        assert (layer.value(torch.float32) - w).norm() < 0.2 * w.norm() < (layer.weight - w).norm()
    a, b = (part.detach().clone().requires_grad_(True) for part in (layer.lora_A, layer.lora_B))
    straight = layer.weight + 4 * b @ a
    (F.linear(x, straight + (layer.value(torch.float32) - straight).detach()).square().sum()).backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, a.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.lora_B.grad, b.grad, atol=1e-4, rtol=1e-5)


@bits_of
def test_adapters_start_as_the_quantized_model_and_all_else_keeps_its_codes(bits, tmp_path):
    """Trained are B, A and the numbers of their groups; what is written is what was computed."""
    model, twin, start = adapted_model(bits), rounded_model(bits), random_model()
    quantization.quantize(start, qat.FORMATS[bits])
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), twin(TOKENS), atol=1e-5, rtol=1e-5)
    numbers = {"lora_A", "lora_B"} | ({"scales", "offsets"} if bits == 4 else set())
    trainer = Trainer(model, SETTINGS, 5)
    assert {tuple(name.split(".")[-2:]) for name in trainer.weights} == {
        (layer, number) for layer in ("wq", "wv", "w2") for number in numbers
    }
    (window,) = [batches([samples(3, seed=7)])]
    reports = [trainer.step(window) for _ in range(5)]
    assert reports[-1].loss < reports[0].loss - 0.02
    with torch.no_grad():
        logits = model(TOKENS)
    qat.finish(model, qat.FORMATS[bits])
    checkpoint.save(model, tmp_path / "out")
    found = checkpoint.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS), logits, atol=1e-5, rtol=1e-5)
    before, after = (dict(model.named_modules())["layers.0.attention.wk"].weight for model in (start, found))
    assert torch.equal(before, after)
    assert not torch.equal(start.layers[0].attention.wq.weight, found.layers[0].attention.wq.weight)


def test_what_is_quantized_is_not_trained():
    model = random_model()
    quantization.quantize(model, Quantization(8))
    with pytest.raises(ValueError, match="quantized already"):
        qat.begin(model, qat.FORMATS[4])
