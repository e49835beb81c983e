"""int8 and int4: bounds on what rounding loses, and layers equal to plain ones with the same weights."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from gguf import GGMLQuantizationType as Kind
from support import FORMATS, hard_rows, linear_of, make_layer, needs_kernel, widened
from torch import nn

from llama import Transformer
from llama.codes import INT4, INT4_ZERO_POINTS, INT8_GROUPS, pack, quantize_groups, quantize_rows
from llama.errors import InputError
from llama.quantization import Int8Embedding, Int8Linear, Quantization, lay_out, quantization_of, quantize, slow_reason

CONFIGS = [Quantization(8), Quantization(8, 64), Quantization(4), Quantization(4, 64)]
CONFIGS += [Quantization(4, 32, True), Quantization(4, 128, True)]
IDS = ["int8", "int8-g64", "int4-g32", "int4-g64", "int4-g32-zero", "int4-g128-zero"]
MIXED = Quantization(4, 64, True, int8=("layers.1.attention.wq", "layers.3.feed_forward.w2"))
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
def test_int8_in_groups_loses_little_more_than_half_a_step(group_size):
    w = hard_rows(n_columns=300)
    codes, scales, _ = quantize_groups(w, group_size, INT8_GROUPS)
    assert codes.dtype is torch.int8 and codes.abs().max() == 127
    assert scales.dtype is torch.float16 and scales.shape == (64, -(-300 // group_size))
    steps = scales.double().repeat_interleave(group_size, 1)[:, :300]
    assert ((codes * steps - w.double()).abs() <= 0.57 * steps).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_with_zero_points_is_bounded_and_better_than_rounding(group_size):
    """Codes within the range are off by at most half a step; a group never by more than rounding without a search."""
    w = hard_rows()
    codes, scales, offsets = quantize_groups(w, group_size, INT4_ZERO_POINTS)
    assert codes.min() == 0 and codes.max() == 15 and scales.min() > 0
    assert scales.dtype is offsets.dtype is torch.float16 and scales.isfinite().all() and offsets.isfinite().all()
    groups = w.double().unflatten(1, (-1, group_size))
    q, s, o = codes.double().unflatten(1, (-1, group_size)), scales.double()[..., None], offsets.double()[..., None]
    error = (q * s + o - groups).abs()
    inside = (q > 0) & (q < 15)
    assert (error <= s / 2 * (1 + 1e-5) + 1e-6 * o.abs())[inside].all()
    low = groups.amin(-1, keepdim=True)
    width = ((groups.amax(-1, keepdim=True) - low) / 15).half().double().clamp_min(2**-24)
    plain = ((groups - low.half()) / width).round().clamp(0, 15) * width + low.half()
    squared, reference = error.square().sum(-1), (plain - groups).square().sum(-1)
    assert (squared <= reference * (1 + 1e-4) + 1e-12).all()
    assert squared[9:].sum() < 0.85 * reference[9:].sum()
    assert (codes * scales.repeat_interleave(group_size, 1) + offsets.repeat_interleave(group_size, 1))[1].eq(0).all()


def test_what_a_gguf_file_holds_is_kept_to_the_bit():
    """Groups of 32 of Q4_1 with zero-points, of Q8_0 in 8 bits: their own scales and offsets, in fp16."""
    w = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    w[3, :32], w[4] = 0.25, 0
    for kind, config in ((Kind.Q4_1, Quantization(4, 32, True)), (Kind.Q8_0, Quantization(8, 32))):
        stored = torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind))
        assert torch.equal(widened(linear_of(stored, config)).float(), stored) and not torch.equal(stored, w)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_bounded_and_better_than_rounding(group_size):
    """Codes within the range are off by at most half a step; a group never by more than rounding without a search."""
    w = hard_rows()
    codes, scales, _ = quantize_groups(w, group_size, INT4)
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
    codes, scales, _ = quantize_groups(groups, 32, INT4)
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


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("width", "group_size"), [(172, 32), (172, 128), (7, 32), (576, 128), (1504, 64), (33, 64)])
def test_groups_need_not_divide_a_row(width, group_size, zero_points):
    """The last group is quantized like any other, and stored in a block that is filled up with nibbles of 0."""
    w = hard_rows(n_columns=width)
    layer = linear_of(w, Quantization(4, group_size, zero_points))
    assert layer.weight.shape == (64, -(-width // 32) * 16) and layer.scales.shape == (64, -(-width // group_size))
    start = width // group_size * group_size
    last = linear_of(w[:, start:], Quantization(4, group_size, zero_points))
    assert torch.equal(widened(layer)[:, start:], widened(last))
    if width % 32 == 7:
        assert not (layer.weight[:, -16:] >> 4).any() and not layer.weight[:, -9:].any()


@pytest.mark.parametrize("config", FORMATS, ids=lambda config: f"{config.name} {config.group_size}")
@pytest.mark.parametrize("width", [7, 33, 96, 172, 300])
def test_codes_stand_for_exactly_what_the_formula_says(config, width):
    """code * scale (+ offset), read here from the stored tensors; a product with the identity is that of the twin."""
    layer = linear_of(hard_rows(n_columns=width), config)
    stored, columns = layer.weight, torch.arange(width)
    codes = stored.double()
    if config.bits == 4:
        byte = stored[:, columns // 32 * 16 + columns % 16].int()
        codes = torch.where(columns % 32 >= 16, byte >> 4, byte & 15).double() - (0 if config.zero_points else 8)
    of_columns = columns // (config.group_size or width)
    scales = (layer.scales if config.group_size else layer.scales[:, None])[:, of_columns]
    offsets = layer.offsets[:, of_columns].double() if config.zero_points else 0
    twin = codes * scales.double() + offsets
    assert torch.equal(widened(layer), twin)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = twin.clamp(-6e4, 6e4).float().to(dtype)  # once more than fp32 itself does
        assert torch.equal(layer.widen(slice(None), torch.empty_like(rounded)).clamp(-6e4, 6e4), rounded)
    assert torch.equal(layer(torch.eye(width)).t(), F.linear(torch.eye(width), twin.float()).t())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256), (2, 172), (5, 7)])
def test_a_layer_equals_the_dequantized_linear(config, shape, device):
    """y and the gradient of x, 1e-5 in fp32; the weights get none. 300 rows are several slabs with a rest."""
    layer = make_layer(config, k=shape[-1])
    linear = nn.Linear(shape[-1], 300, bias=False, dtype=torch.float64)
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
    layer = linear_of(w, config)
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
    added = {key.replace("weight", "scales") for key in matrices}
    added |= {key.replace("weight", "offsets") for key in matrices if config.zero_points and key[0] == "l"}
    assert set(model.state_dict()) == keys | added
    assert type(model.tok_embeddings) is Int8Embedding
    before = copy.deepcopy(model.state_dict())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert model.to(dtype)(TOKENS).dtype is model.tok_embeddings(TOKENS).dtype is dtype
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype is before[key].dtype for key in matrices)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype is before[key].dtype for key in added)


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


@pytest.mark.parametrize("config", [Quantization(4, 32, True), Quantization(8, 32)])
def test_what_fp16_does_not_hold_is_refused_by_name(config):
    model = random_model()
    model.layers[2].feed_forward.w2.weight.data[3, 7] = 1e5
    with pytest.raises(InputError, match=r"layers\.2\.feed_forward\.w2\.weight: values exceed float16, which scales"):
        quantize(model, config)
    quantize(model, Quantization(config.bits))


def test_some_matrices_of_four_bits_may_have_eight():
    """Those that are named: with the codes that they have in a model of 8, and found again in params.json."""
    model, wide = random_model(), random_model()
    quantize(model, MIXED)
    quantize(wide, Quantization(8))
    kept = {name for name, module in model.layers.named_modules(prefix="layers") if type(module) is Int8Linear}
    assert kept == set(MIXED.int8) and quantization_of(model) == MIXED
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, wide.get_submodule(name).weight)
        assert model.get_submodule(name).scales.shape == wide.get_submodule(name).scales.shape
    assert MIXED.of("layers.1.attention.wq") == Quantization(8) and MIXED.of("layers.0.attention.wq") is MIXED
    assert Quantization.from_params(MIXED.to_params()) == MIXED
    for names in (("layers.4.attention.wq",), ("output",), ("tok_embeddings",), ("layers.0.attention",)):
        with pytest.raises(ValueError, match=r"quantization\.int8: the blocks have no matrix"):
            lay_out(random_model(), Quantization(4, int8=names))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused_by_name(value):
    model = random_model()
    model.layers[2].feed_forward.w2.weight.data[3, 7] = value
    with pytest.raises(InputError, match=r"layers\.2\.feed_forward\.w2\.weight: holds values that are not finite"):
        quantize(model, Quantization(4))
    assert quantization_of(model) is None  # nothing was changed


def test_impossible_settings():
    model = random_model()
    for arguments, message in {
        (16,): "bits=16",
        (True,): "bits",
        (8, 32, True): "no effect",
        (4, 32, 1): "zero_points=1",
        (4, 48): "group_size=48",
        (8, 48): "group_size=48",
        (4, True): "group_size",
        (8, None, False, "least-squares"): "method",
        (4, 32, False, "absmax"): "method",
        (4, 32, False, 1): "method",
        (8, None, False, None, ("layers.0.attention.wq",)): "int8",
        (4, 32, False, None, "layers.0.attention.wq"): "int8",
        (4, 32, False, None, (1,)): "int8",
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


@pytest.mark.parametrize(
    ("n_rows", "offset", "is_packed"), [(1, 0, True), (3, 8, True), (32, 0, True), (33, 0, False), (4, 8, False)]
)
def test_a_few_rows_of_bfloat16_go_through_pytorchs_kernel_for_int8(monkeypatch, n_rows, offset, is_packed):
    layer, calls, usual = make_layer(Quantization(8)), [], torch._weight_int8pack_mm
    moved = torch.empty(layer.weight.numel() + 64, dtype=torch.int8)
    start = -moved.data_ptr() % 64 + offset
    layer.weight.data = moved[start : start + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *given: calls.append(1) or usual(*given))
    x = torch.randn(n_rows, layer.in_features, generator=torch.Generator().manual_seed(0))
    for dtype, packed in ((torch.bfloat16, is_packed), (torch.float32, False)):
        calls.clear()
        layer(x.to(dtype))
        assert bool(calls) == packed


@needs_kernel
def test_codes_that_are_widened_before_each_product_on_a_cpu_are_warned_of():
    model = random_model()
    quantize(model, Quantization(4, 32))
    assert "int4 weights save memory here and no time: the C step" in slow_reason(model)
    assert slow_reason(model.bfloat16()) is None
    model.layers[0].register_forward_hook(print)
    assert "the model has layers that the C step does not have, so they are widened" in slow_reason(model)
