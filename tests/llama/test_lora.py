"""Adapters: nothing at the start, exactly (alpha / r) B A afterwards."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from conftest import SMALL, random_model
from torch import nn

from llama import Transformer, checkpoint, lora
from llama.config import PRESETS
from llama.errors import InputError, NonFinite
from llama.lora import LoRAConfig, LoRALinear
from llama.surgery import replace_modules

ALL = tuple(lora.META_NAMES)
TOKENS = torch.randint(0, SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


SMALL_LORA = LoRAConfig(r=4, dropout=0.0)


def adapted(
    config: LoRAConfig = SMALL_LORA, is_trained: bool = True, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A small model with adapters, as after some training: B is not zero."""
    model = random_model().to(dtype)
    lora.apply(model, config)
    if is_trained:
        generator = torch.Generator().manual_seed(1)
        for module in lora.layers(model).values():
            module.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def bytes_of(model: nn.Module) -> str:
    tensors = [(name, w) for name, w in model.state_dict().items() if ".lora_" not in name]
    return hashlib.sha256(b"".join(name.encode() + w.numpy().tobytes() for name, w in tensors)).hexdigest()


def test_at_the_start_an_adapted_model_is_its_base_to_the_bit():
    for targets in (("wq", "wv"), ALL):
        model = adapted(LoRAConfig(targets=targets), is_trained=False).train()
        assert torch.equal(model(TOKENS), random_model()(TOKENS))


def test_what_is_trained_of_the_real_shape():
    """Hu et al.'s count: r (in + out) for each adapted matrix; the tied table counts once."""
    with torch.device("meta"):
        model = Transformer(PRESETS["llama3.2-1b"])
    names = lora.apply(model, LoRAConfig())
    assert names == [f"layers.{i}.attention.{w}" for i in range(16) for w in ("wq", "wv")]
    trained, whole = lora.trainable_share(model)
    assert (trained, whole) == (1_703_936, 1_235_814_400 + 1_703_936)
    assert trained == 16 * 16 * ((2048 + 2048) + (2048 + 512))
    assert f"{trained / whole:.4%}" == "0.1377%"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{matrix}" for name in names for matrix in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("alpha", [8.0, 32.0, 0.5])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_output_is_the_papers_formula(alpha, r):
    generator = torch.Generator().manual_seed(r)
    linear = nn.Linear(24, 40, bias=False, dtype=torch.float64)
    module = LoRALinear(linear, LoRAConfig(r=r, alpha=alpha, dropout=0.0), generator)
    module.lora_B.data.normal_(generator=generator)
    x = torch.randn(3, 5, 24, dtype=torch.float64, generator=generator)
    formula = x @ (linear.weight + alpha / r * module.lora_B @ module.lora_A).T
    torch.testing.assert_close(module(x), formula, rtol=0, atol=1e-12)


def test_dropout_is_on_the_adapters_input_alone_and_only_in_training():
    module = LoRALinear(nn.Linear(64, 8, bias=False), LoRAConfig(r=8, alpha=8, dropout=0.5))
    nn.init.normal_(module.lora_B)
    x = torch.ones(2000, 64)
    base = x @ module.weight.T
    torch.manual_seed(0)
    drawn = module.train()(x) - base
    assert drawn.std(0).min() > 0.01  # differs from row to row
    torch.testing.assert_close(drawn.mean(0), (module.eval()(x) - base)[0], rtol=0.1, atol=0.05)  # unbiased
    assert (module.eval()(x) - base).std(0).max() < 1e-6


def test_a_half_precision_base_has_fp32_adapters():
    model = random_model().to(torch.bfloat16)
    lora.apply(model, LoRAConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(TOKENS).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "targets", "tolerance"), [(torch.float32, ("wq", "wv"), 1e-6), (torch.float64, ALL, 1e-12)]
)
def test_merge_equals_unmerged(dtype, targets, tolerance):
    """With all projections adapted as strongly as they are here, fp32 alone would round to 1.2e-6."""
    model = adapted(LoRAConfig(r=4, dropout=0.0, targets=targets), dtype=dtype)
    before, logits = bytes_of(model), model(TOKENS)
    lost = lora.merge(model)
    assert lost < 10 * tolerance and bytes_of(model) != before
    assert (model(TOKENS) - logits).norm() <= tolerance * logits.norm()
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(model)


def test_merging_into_16_bits_says_what_it_loses():
    for size, least, most in ((0.0, 0.0, 0.0), (1e-6, 0.9, 1.1), (1.0, 0.0, 0.05)):
        model = random_model().to(torch.bfloat16)
        lora.apply(model, LoRAConfig(r=4, dropout=0.0))
        for module in lora.layers(model).values():
            module.lora_B.data.fill_(size)
        assert least <= lora.merge(model) <= most


def test_merging_into_16_bits_rounds_once():
    model = adapted().to(torch.bfloat16)
    exact = {}
    for name, module in lora.layers(model).items():
        module.lora_A.data, module.lora_B.data = module.lora_A.data.float(), module.lora_B.data.float()
        exact[name] = (module.weight.float() + module.update()).bfloat16()
    lora.merge(model)
    assert all(torch.equal(module.weight, exact[name]) for name, module in lora.layers(model).items())


def test_a_merge_that_is_not_finite_changes_nothing():
    model = adapted()
    before = bytes_of(model)
    list(lora.layers(model).values())[-1].lora_A.data[0, 0] = math.nan
    with pytest.raises(NonFinite, match=r"layers\.3\.attention\.wv: .* not finite"):
        lora.merge(model)
    assert bytes_of(model) == before


def test_removed_adapters_leave_a_plain_model_that_every_path_takes(tmp_path):
    model = adapted()
    logits = model(TOKENS)
    lora.merge(model)
    lora.remove(model)
    assert model.state_dict().keys() == random_model().state_dict().keys()
    checkpoint.save(model, tmp_path / "merged")
    torch.testing.assert_close(checkpoint.load(tmp_path / "merged")(TOKENS), logits, rtol=0, atol=1e-5)
    stored = torch.load(tmp_path / "merged" / "consolidated.00.pth", weights_only=True)
    assert stored["output.weight"].data_ptr() == stored["tok_embeddings.weight"].data_ptr()  # tied: stored once
    with pytest.raises(ValueError, match="nothing to merge"):
        lora.merge(model)


def test_an_adapted_model_is_not_adapted_again_nor_a_misspelt_target_accepted():
    with pytest.raises(ValueError, match="already"):
        lora.apply(adapted(), LoRAConfig())
    with pytest.raises(ValueError, match="no module matches"):
        replace_modules(random_model(), lambda name, _: name == "layers.0.attention.wx", nn.Identity)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in (0, -1, 1.5, True, None, "4")),
        *(("alpha", value) for value in (0, -2, math.nan, math.inf, None, "8")),
        *(("dropout", value) for value in (-0.1, 1.0, math.nan, None)),
        *(("targets", value) for value in ((), ("wq", "wq"), ("wx",), ("",))),
    ],
)
def test_bad_configurations_name_the_field(field, value):
    with pytest.raises(InputError, match=f"^{field}="):
        LoRAConfig(**{field: value})
