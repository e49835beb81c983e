"""int8 and int4: bounds on what rounding loses, and layers equal to plain ones with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_model
from support import hard_rows, make_layer, widened
from torch import nn

from llama import Transformer
from llama.errors import InputError
from llama.quantization import (
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Quantization,
    lay_out,
    pack,
    quantization_of,
    quantize,
    quantize_groups,
    quantize_rows,
)

CONFIGS = [Quantization(8), Quantization(4), Quantization(4, 64)]
IDS = ["int8", "int4-g32", "int4-g64"]
TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_loses_at_most_half_a_step(dtype):
    """To the last bit: in fp64 the codes times the scale are exact."""
    w = hard_rows(dtype).clamp(-6e4, 6e4)
    codes, scales = quantize_rows(w)
    assert codes.dtype is torch.int8 and scales.dtype is torch.float32 and codes.abs().max() == 127
    error = (codes.double() * scales.double()[:, None] - w.double()).abs()
    assert (error <= scales.double()[:, None] / 2).all()
    assert scales[1] == 1 and not codes[1].any()
    assert ((codes.abs().amax(1) == 127) | (w.double().abs().amax(1) < 1e-35)).all()  # the range of the codes is used


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_bounded_and_better_than_rounding(group_size):
    """Codes within the range are off by at most half a step; a group never by more than rounding without a search."""
    w = hard_rows()
    codes, scales = quantize_groups(w, group_size)
    assert codes.min() == -8 and codes.max() == 7 and scales.dtype is torch.bfloat16 and scales.isfinite().all()
    groups = w.double().unflatten(1, (-1, group_size))
    q, s = codes.double().unflatten(1, (-1, group_size)), scales.double()[..., None]
    error = (q * s - groups).abs()
    inside = (q > -8) & (q < 7)
    assert (error <= s.abs() / 2 * (1 + 1e-6))[inside].all()
    largest = groups.abs().amax(-1, keepdim=True)
    plain = (largest / 7).bfloat16().double().clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (groups / plain).round().clamp(-8, 7) * plain
    squared, reference = error.square().sum(-1), (rounded - groups).square().sum(-1)
    assert (squared <= reference * (1 + 1e-5) + 1e-80).all()
    assert squared[9:].sum() < 0.85 * reference[9:].sum()
    assert (scales[1] == 1).all() and not codes[1].any()


def test_int4_reaches_the_best_scale_that_there_is():
    """Against a search over thousands of scales, the squared error of normal weights is at most 2 % above the least."""
    groups = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize_groups(groups, 32)
    found = (codes * scales.float() - groups).square().sum()
    grid = groups.abs().amax(1)[:, None, None] / torch.linspace(5, 10, 400)[:, None] * torch.tensor([1.0, -1.0])
    tried = grid.flatten(1)[..., None]
    least = ((groups[:, None] / tried).round().clamp(-8, 7) * tried - groups[:, None]).square().sum(-1).amin(1).sum()
    assert found <= 1.02 * least


def test_packing_is_what_the_layout_says():
    codes = torch.randint(-8, 8, (3, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes)
    assert packed.shape == (3, 32) and packed.dtype is torch.uint8
    for n in range(3):
        for k in range(64):
            byte = packed[n, k // 32 * 16 + k % 16].item()
            assert (byte >> 4 if k % 32 >= 16 else byte & 15) - 8 == codes[n, k]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256)])
def test_a_layer_equals_the_dequantized_linear(config, shape, device):
    """y and the gradient of x, 1e-5 in fp32; the weights get none. 300 rows are several slabs with a rest."""
    layer = make_layer(config)
    linear = nn.Linear(256, 300, bias=False, dtype=torch.float64)
    linear.weight.data = widened(layer)
    layer, linear = layer.to(device), linear.to(device)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, wanted = layer(x), linear(wide)
    dy = torch.randn(wanted.shape, generator=generator).to(device)
    y.backward(dy)
    wanted.backward(dy.double())
    size = linear.weight.abs().amax(1)  # of a row: one of them is 1e4
    torch.testing.assert_close(y.double() / size.clamp_min(1), wanted / size.clamp_min(1), rtol=0, atol=1e-5)
    assert ((x.grad - wide.grad).abs() <= 1e-5 * wide.grad.abs().amax(-1, keepdim=True) + 1e-5).all()
    assert y.dtype is torch.float32 and not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_like_a_linear_of_theirs(config, dtype):
    """No overflow in fp16 where codes of 127 add up to more than it holds, no loss in fp64."""
    layer = make_layer(config)
    x = torch.full((4, 256), 3.0, dtype=dtype)
    x[1] = torch.randn(256, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = (x.double() @ widened(layer).t()).clamp(-6e4, 6e4)
    info = torch.finfo(dtype)
    underflow = info.tiny * info.eps * x.double().abs().sum(-1, keepdim=True)
    tolerance = 4 * info.eps * (x.double().abs() @ widened(layer).abs().t()) + underflow
    assert ((layer(x).double().clamp(-6e4, 6e4) - wanted).abs() <= tolerance).all()


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("rows", [1, 40])
def test_fp16_overflows_only_where_the_result_does(config, rows):
    """4,096 weights of 0.01 by activations of 100 are 4,096; by their codes, all the largest, far beyond the range."""
    w = torch.full((3, 4096), 0.01)
    layer = Int8Linear(*quantize_rows(w))
    if config.bits == 4:
        codes, scales = quantize_groups(w, config.group_size)
        layer = Int4Linear(pack(codes), scales, config.group_size)
    y = layer(torch.full((rows, 4096), 100.0, dtype=torch.float16))
    assert y.dtype is torch.float16 and ((y - 4096).abs() <= 16).all()


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_model_keeps_its_keys_and_its_scales(config):
    """model.to(dtype) changes what it computes in, never codes or scales."""
    model = random_model()
    keys, tied = set(model.state_dict()), copy.deepcopy(model)
    errors = quantize(model, config)
    assert quantization_of(model) == config and quantization_of(tied) is None
    assert set(errors) == {name.removesuffix(".weight") for name in keys if "norm" not in name}
    assert all(0 < error < (0.02 if config.bits == 8 else 0.15) for name, error in errors.items() if name[0] == "l")
    matrices = {key for key in keys if "norm" not in key}
    assert set(model.state_dict()) == keys | {key.replace("weight", "scales") for key in matrices}
    assert type(model.tok_embeddings) is Int8Embedding
    before = copy.deepcopy(model.state_dict())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert model.to(dtype)(TOKENS).dtype is model.tok_embeddings(TOKENS).dtype is dtype
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype is before[key].dtype for key in matrices)
    assert all(torch.equal(after[key], before[key]) for key in before if key.endswith("scales"))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_model_equals_the_one_with_its_weights(config):
    """Also the lookup and the tied head, which share the codes."""
    model = random_model()
    quantize(model, config)
    plain = random_model()
    for name, module in plain.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data = widened(model.get_submodule(name)).float()
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused_by_name(value):
    model = random_model()
    model.layers[2].feed_forward.w2.weight.data[3, 7] = value
    with pytest.raises(InputError, match=r"layers\.2\.feed_forward\.w2\.weight: holds values that are not finite"):
        quantize(model, Quantization(4))
    assert quantization_of(model) is None  # nothing was changed


def test_impossible_settings():
    model = random_model()
    with pytest.raises(InputError, match=r"groups of 128 do not divide 64 columns"):
        quantize(model, Quantization(4, 128))
    for arguments, message in {
        (16,): "bits=16",
        (True,): "bits",
        (8, 32): "no effect",
        (4, 48): "group_size=48",
        (4, True): "group_size",
    }.items():
        with pytest.raises(ValueError, match=message):
            Quantization(*arguments)
    quantize(model, Quantization(8))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, Quantization(8))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_quantizing_is_deterministic_and_lays_out_what_it_says(config):
    one, two = random_model(), random_model()
    quantize(one, config)
    quantize(two, config)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    with torch.device("meta"):
        empty = Transformer(one.args)
    lay_out(empty, config)
    described = [{k: (v.shape, v.dtype) for k, v in model.state_dict().items()} for model in (one, empty)]
    assert described[0] == described[1] and quantization_of(empty) == config


@pytest.mark.parametrize("offset", [0, 1, 8, 16, 24])
@pytest.mark.parametrize("n_rows", [1, 3, 4, 32])
def test_weights_may_begin_at_any_byte(offset, n_rows):
    """As a memory-mapped checkpoint places them; PyTorch's kernel for int8 on a CPU crashed at some places."""
    layer = make_layer(Quantization(8))
    x = torch.randn(n_rows, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = layer(x)
    moved = torch.empty(layer.weight.numel() + 64, dtype=torch.int8)
    start = -moved.data_ptr() % 64 + offset
    layer.weight.data = moved[start : start + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
    assert layer.weight.data_ptr() % 64 == offset
    assert torch.allclose(layer(x).float(), expected.float(), rtol=0.02, atol=0.02 * expected.abs().max().item())
