"""Calibration: what it says of each matrix is so, none is worse than with the nearest codes, and budgets are kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import SMALL, random_model
from support import FORMATS, hard_rows, linear_of, same_weights, widened
from torch import nn

from llama import calibration, checkpoint
from llama.calibration import affordable, calibrate
from llama.errors import InputError, NonFinite
from llama.quantization import (
    CALIBRATED,
    Int4Linear,
    Int8Linear,
    Quantization,
    quantization_of,
    quantize,
)
from llama.surgery import plain_linear

TOKENS = torch.randint(0, SMALL.vocab_size, (6, 48), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "int8": Quantization(8),
    "int8-g32": Quantization(8, 32),
    "int4": Quantization(4),
    "zero": Quantization(4, 64, True),
}
ODD = dataclasses.replace(SMALL, n_layers=2, multiple_of=4, ffn_dim_multiplier=0.8, tie_word_embeddings=False)


@pytest.mark.parametrize("args", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_matrix_loses_what_it_says_and_less_than_with_the_nearest_codes(name, args, monkeypatch):
    """Measured at the inputs that it has once all codes are there; the head, at those in the unquantized model."""
    monkeypatch.setattr(calibration, "TOKENS", 96)  # several parts
    model, original = random_model(args), random_model(args)
    outcomes = calibrate(model, CONFIGS[name], TOKENS)
    head = "output" if model.output is not None else "tok_embeddings"
    assert len(outcomes) == 7 * args.n_layers + 1 and quantization_of(model).method == CALIBRATED
    seen: dict[str, torch.Tensor] = {}
    for path in outcomes.keys() - {head}:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, given, path=path: seen.update({path: given[0].double()}))
    model(TOKENS)
    seen[head] = original.hidden(TOKENS).double()
    nearest = random_model(args)
    quantize(nearest, CONFIGS[name])
    for path, outcome in outcomes.items():
        x, w = seen[path].flatten(0, 1), original.get_submodule(path).weight.double()
        whole = (x @ w.t()).norm()
        for layers, said in ((model, outcome.chosen), (nearest, outcome.nearest)):
            assert ((x @ (widened(layers.get_submodule(path)) - w).t()).norm() / whole).item() == pytest.approx(
                said, 1e-3
            )
        assert outcome.chosen < outcome.nearest
    change = [(other(TOKENS) - original(TOKENS)).norm() for other in (model, nearest)]
    assert change[0] < 0.9 * change[1]


@pytest.mark.parametrize("config", FORMATS, ids=lambda config: f"{config.name} {config.group_size}")
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 33), (40, 172), (400, 7)])
def test_a_matrix_never_loses_more_than_without_calibration(config, n_tokens, width):
    """Few tokens or many, one input 1,000 times as large as others, one always 0; weights that are hard to round."""
    generator = torch.Generator().manual_seed(n_tokens)
    for x in (torch.randn(n_tokens, width, generator=generator), torch.ones(n_tokens, width)):
        x[:, 2], x[:, 3] = 1000 * x[:, 2], 0
        weight = hard_rows(n_columns=width).clamp(-6e4, 6e4)
        linear = plain_linear(nn.Parameter(weight, requires_grad=False))
        choice = calibration._Choice(config, {})
        chosen, nearest = choice.layer("a matrix", linear, x.t() @ x), linear_of(weight, config)
        lost = [((widened(one) - weight.double()) @ x.double().t()).norm().item() for one in (chosen, nearest)]
        assert lost[0] <= lost[1] * (1 + 1e-3)  # the Hessian is a sum in fp32
        outcome = choice.outcomes["a matrix"]
        assert outcome.chosen <= outcome.nearest


def test_it_is_deterministic_and_survives_the_disk(tmp_path):
    one, two = random_model(), random_model()
    for model in (one, two):
        calibrate(model, CONFIGS["zero"], TOKENS)
    assert same_weights(one, two)
    checkpoint.save(one, tmp_path / "q")
    loaded = checkpoint.load(tmp_path / "q")
    assert same_weights(one, loaded) and torch.equal(one(TOKENS), loaded(TOKENS))
    assert checkpoint.read_quantization(tmp_path / "q") == quantization_of(one) == quantization_of(loaded)


@pytest.mark.parametrize("bits", [4.5, 5.0, 7.9])
def test_a_budget_is_spent_on_whole_matrices_and_never_overdrawn(bits, tmp_path):
    model, plain = random_model(), random_model()
    outcomes = calibrate(model, CONFIGS["zero"], TOKENS, bits)
    calibrate(plain, CONFIGS["zero"], TOKENS)
    kept = quantization_of(model).int8
    layers = {name: model.get_submodule(name) for name in outcomes if name.startswith("layers.")}
    assert {name for name, layer in layers.items() if type(layer) is Int8Linear} == set(kept)
    sizes = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    average = 4 + 4 * sum(sizes[name] for name in kept) / sum(sizes.values())
    assert bits - 4 * min(sizes.values()) / sum(sizes.values()) < average <= bits
    wide = random_model()
    quantize(wide, Quantization(8))
    for name, layer in layers.items():
        other = (wide if name in kept else plain).get_submodule(name)
        assert torch.equal(widened(layer), widened(other))
        assert (outcomes[name].chosen < 0.02) == (name in kept)
    checkpoint.save(model, tmp_path / "q")
    assert (
        same_weights(model, checkpoint.load(tmp_path / "q"))
        and checkpoint.read_quantization(tmp_path / "q").int8 == kept
    )


def test_what_costs_most_per_weight_comes_first_and_what_does_not_fit_is_passed_over():
    sizes = {"a": 100, "b": 10, "c": 50, "d": 40}
    costs = {"a": 1000.0, "b": 1.0, "c": 100.0, "d": 40.0}
    assert affordable(costs, sizes, 4.0) == ()
    assert affordable(costs, sizes, 4.5) == ("b",)  # 25 weights
    assert affordable(costs, sizes, 5.0) == ("c",)
    assert affordable(costs, sizes, 6.0) == ("a",)
    assert affordable(costs, sizes, 7.99) == ("a", "c", "d")


def test_slopes_are_the_derivatives_of_the_loss_by_what_a_matrix_computes():
    """Against autograd, by a zero that is added to it; the model is left as it was."""
    model, name = random_model().double(), "layers.1.feed_forward.w3"
    found = calibration._slopes(model, TOKENS)
    assert len(found) == 7 * SMALL.n_layers and all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    squares = []
    for tokens in TOKENS:
        zero = torch.zeros(1, len(tokens) - 1, model.args.ffn_dim, dtype=torch.float64, requires_grad=True)
        hook = model.get_submodule(name).register_forward_hook(lambda _module, _given, out, zero=zero: out + zero)
        loss = nn.functional.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="sum")
        squares.append(torch.autograd.grad(loss, zero)[0].square().sum((0, 1)))
        hook.remove()
    torch.testing.assert_close(found[name].double(), sum(squares) / TOKENS.numel(), rtol=1e-5, atol=0)


def test_a_matrix_whose_inputs_are_zero_keeps_its_nearest_codes():
    model, plain = random_model(), random_model()
    for network in (model, plain):
        network.layers[1].feed_forward.w3.weight.data.zero_()  # so nothing reaches w2
    outcomes = calibrate(model, CONFIGS["zero"], TOKENS)
    quantize(plain, CONFIGS["zero"])
    w2 = "layers.1.feed_forward.w2"
    assert outcomes[w2] == (0.0, 0.0) and torch.equal(
        widened(model.get_submodule(w2)), widened(plain.get_submodule(w2))
    )
    assert all(
        type(module) is Int4Linear for name, module in model.layers.named_modules(prefix="layers") if name in outcomes
    )


def test_what_is_not_finite_is_refused_by_name():
    model = random_model()
    model.layers[2].attention.wv.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.2\.attention\.wv\.weight: holds values that are not finite"):
        calibrate(model, CONFIGS["zero"], TOKENS)
    model = random_model()
    model.layers[1].ffn_norm.weight.data[5] = torch.inf
    with pytest.raises(NonFinite, match=r"layers\.1\.feed_forward\.w1: its inputs are not finite"):
        calibrate(model, CONFIGS["zero"], TOKENS)
