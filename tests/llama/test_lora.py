"""Adapters: nothing at the start, exactly (alpha / r) B A afterwards, and the same in PEFT's files and code."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import peft
import pytest
import safetensors.torch
import torch
from conftest import SMALL, random_model
from torch import nn
from transformers import LlamaForCausalLM

from llama import Transformer, checkpoint, lora
from llama.config import PRESETS
from llama.errors import InputError
from llama.lora import LoRAConfig, LoRALinear
from llama.surgery import replace_modules

ALL = tuple(lora.META_NAMES)
TOKENS = torch.randint(0, SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


BASE = "f" * 64  # stands for a fingerprint
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


def test_a_merge_that_is_not_finite_changes_nothing():
    model = adapted()
    before = bytes_of(model)
    list(lora.layers(model).values())[-1].lora_A.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.3\.attention\.wv: .* not finite"):
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


# Files


def hf_model(model: Transformer, folder) -> LlamaForCausalLM:
    checkpoint.save(model, folder, "hf")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("targets", [("wq", "wv"), ALL])
def test_adapters_round_trip_and_load_in_peft(tmp_path, monkeypatch, targets):
    monkeypatch.setattr(lora, "fingerprint", lambda base: base)
    config = LoRAConfig(r=4, alpha=10.0, dropout=0.1, targets=targets)
    model, base = adapted(config), random_model()
    lora.save(model, config, tmp_path / "adapter", BASE)
    again = random_model()
    assert lora.load(again, tmp_path / "adapter", BASE) == config
    for name, tensor in lora.state_dict(model).items():
        assert torch.equal(tensor, lora.state_dict(again)[name])
    theirs = peft.PeftModel.from_pretrained(hf_model(base, tmp_path / "hf"), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)
    # and what peft writes of it is, tensor for tensor, what we wrote
    theirs.save_pretrained(tmp_path / "theirs")
    ours, written = (safetensors.torch.load_file(tmp_path / n / lora.WEIGHTS) for n in ("adapter", "theirs"))
    assert ours.keys() == written.keys() and all(torch.equal(ours[name], written[name]) for name in ours)
    third = random_model()
    assert lora.load(third, tmp_path / "theirs") == config
    assert all(torch.equal(t, lora.state_dict(third)[name]) for name, t in lora.state_dict(model).items())


def test_an_adapter_file_holds_what_it_should(tmp_path):
    model = adapted()
    lora.save(model, SMALL_LORA, tmp_path / "a", BASE)
    tensors = safetensors.torch.load_file(tmp_path / "a" / lora.WEIGHTS)
    assert len(tensors) == 2 * 2 * SMALL.n_layers
    n_values = sum(t.numel() for t in tensors.values())
    assert n_values == lora.trainable_share(model)[0]
    assert 4 * n_values < (tmp_path / "a" / lora.WEIGHTS).stat().st_size < 4 * n_values + 6000  # and a header
    with safetensors.safe_open(tmp_path / "a" / lora.WEIGHTS, "pt") as file:
        assert file.metadata()["base_sha256"] == BASE
    lora.load(random_model(), tmp_path / "a")
    lora.save(model, SMALL_LORA, tmp_path / "b", BASE)
    with pytest.raises(InputError, match="already exists"):
        lora.save(model, SMALL_LORA, tmp_path / "b", BASE)


def test_an_adapter_of_another_base_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "fingerprint", lambda base: base)
    other = random_model(seed=1)
    lora.save(adapted(), SMALL_LORA, tmp_path / "a", BASE)
    with pytest.raises(InputError, match="different base") as error:
        lora.load(other, tmp_path / "a", "e" * 64)
    assert BASE[:12] in str(error.value) and "e" * 12 in str(error.value)
    assert not lora.layers(other)


def test_a_fingerprint_is_that_of_the_values(tmp_path):
    """One for both layouts and for all stored dtypes that hold the values; another one for any other value."""
    model = random_model().to(torch.bfloat16)
    found = []
    for layout in ("meta", "hf"):
        for dtype in (torch.bfloat16, torch.float32):
            directory = tmp_path / f"{layout}-{dtype}"
            checkpoint.save(model.to(dtype), directory, layout)
            found.append(checkpoint.fingerprint(directory))
    assert len(set(found)) == 1
    model.norm.weight.data[3] += 1
    checkpoint.save(model, tmp_path / "other")
    assert checkpoint.fingerprint(tmp_path / "other") != found[0]
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.fingerprint(tmp_path / "none")


CONFIG_FAULTS = {
    "peft_type": "IA3",
    "bias": "all",
    "use_rslora": True,
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 8},
    "target_modules": ["q_proj", "lm_head"],
    "r": 0,
    "lora_alpha": None,
    "lora_dropout": "x",
}


@pytest.mark.parametrize("field", CONFIG_FAULTS)
def test_unsupported_adapter_configurations_are_named(tmp_path, field):
    lora.save(adapted(), SMALL_LORA, tmp_path / "a", "")
    path = tmp_path / "a" / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), field: CONFIG_FAULTS[field]}))
    model = random_model()
    with pytest.raises(InputError, match=f"{lora.CONFIG}:{field.removeprefix('lora_')}|{lora.CONFIG}:{field}"):
        lora.load(model, tmp_path / "a")
    assert not lora.layers(model)


def tensor_faults() -> dict:
    first = f"{lora.PREFIX}.layers.0.self_attn.q_proj.lora_A.weight"

    def change(name, make):
        return lambda tensors: {**tensors, name: make(tensors.get(name))}

    return {
        "missing": (lambda t: {k: v for k, v in t.items() if k != first}, "is missing"),
        "extra": (change("x.lora_A.weight", lambda _: torch.zeros(1)), "is not expected"),
        "renamed": (lambda t: {k.replace("q_proj", "k_proj"): v for k, v in t.items()}, "is not expected|is missing"),
        "rank": (change(first, lambda t: t[:2].contiguous()), r"has shape \[2, 64\], expected \[4, 64\]"),
        "NaN": (change(first, lambda t: t * math.nan), "not finite"),
        "integers": (change(first, lambda t: t.long()), "not finite numbers"),
    }


@pytest.mark.parametrize("case", tensor_faults())
def test_damaged_adapters_are_refused(tmp_path, case):
    change, message = tensor_faults()[case]
    lora.save(adapted(), SMALL_LORA, tmp_path / "a", "")
    path = tmp_path / "a" / lora.WEIGHTS
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(change(tensors), path)
    model = random_model()
    with pytest.raises(InputError, match=message):
        lora.load(model, tmp_path / "a")
    assert not lora.layers(model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="truncated"):
        lora.load(model, tmp_path / "a")


def test_gradients_equal_those_of_peft(tmp_path):
    """The same adapters, one backward pass: the gradients of A and B, dropout off."""
    model, config = adapted(), LoRAConfig(r=4, dropout=0.0)
    lora.save(model, config, tmp_path / "a", "")
    theirs = peft.PeftModel.from_pretrained(
        hf_model(random_model(), tmp_path / "hf"), tmp_path / "a", is_trainable=True
    )
    model(TOKENS).logsumexp(-1).sum().backward()
    theirs(TOKENS).logits.logsumexp(-1).sum().backward()
    wanted = copy.deepcopy(model)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in wanted.named_parameters():
        if parameter.requires_grad:
            parameter.data = gradients[name]
    lora.save(wanted, config, tmp_path / "gradients", "")
    ours = safetensors.torch.load_file(tmp_path / "gradients" / lora.WEIGHTS)
    found = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == found.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], found[name], rtol=1e-4, atol=1e-4)
