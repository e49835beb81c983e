"""Adapters on disk: the logits that PEFT gives, whatever its configuration says, or a refusal by field."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
import shutil
import time
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from conftest import SMALL, random_model
from support import ALL, mutant
from transformers import LlamaForCausalLM

from llama import Transformer, adapters, checkpoint, lora
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.tokenizer import find_tokenizer

TOKENS = torch.randint(0, SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
BASE = "f" * 64  # stands for a fingerprint
SMALL_LORA = LoRAConfig(r=4, dropout=0.0)


def adapted(config: LoRAConfig = SMALL_LORA, seed: int = 1) -> Transformer:
    """A small model with adapters, as after some training: B is not zero."""
    model = random_model()
    lora.apply(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in lora.layers(model).values():
        module.lora_B.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory) -> LlamaForCausalLM:
    folder = tmp_path_factory.mktemp("hf")
    checkpoint.save(random_model(), folder / "base", "hf")
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def of_peft(hf_base: LlamaForCausalLM, folder: Path, seed: int = 0, **fields) -> None:
    """An adapter that PEFT wrote, with random matrices."""
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    theirs = peft.get_peft_model(copy.deepcopy(hf_base), peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in theirs.named_parameters():
        if ".lora_" in name:
            weight.data.normal_(std=0.1, generator=generator)
    theirs.save_pretrained(folder)


def logits_of_peft(hf_base: LlamaForCausalLM, folder: Path) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(copy.deepcopy(hf_base), folder).eval()(TOKENS).logits


def change(folder: Path, **fields) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# PEFT's configuration. A field is in one of these tables at least, with values that are not its default.

EQUAL = [  # fields that PEFT writes an adapter with
    {"r": 3, "lora_alpha": 5},
    {"lora_dropout": 0.3},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, r"layers\.[12]\.self_attn.v_proj": 6}},
    {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 64, "v_proj": 3}},
    {"use_rslora": True, "rank_pattern": {"layers.1.*": 9}, "alpha_pattern": {"q_proj": 2, "proj": 5}},
    {"target_modules": r".*\.(q_proj|v_proj)"},
    {"target_modules": r"(?:.*?(?:language|text).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp|attn)\.(?:(?:up_proj)))"},
    {"target_modules": ["self_attn.q_proj", "model.layers.2.mlp.down_proj", "nothing"]},
    {"target_modules": "all-linear"},
    {"target_modules": None},
    {"exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"]},
    {"exclude_modules": r".*\.[0-2]\..*q_proj"},
    {"layers_to_transform": [0, 3, 9]},
    {"layers_to_transform": 2, "layers_pattern": "layers"},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"task_type": None},
    {"fan_in_fan_out": True},
    {"ensure_weight_tying": True},
    {"qalora_group_size": 4},
]
UNREAD = {  # changed in the file afterwards, and PEFT's logits stay as they were
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "peft_version": "99.0",
    "base_model_name_or_path": "org/model",
    "revision": "main",
    "inference_mode": False,
    "runtime_config": None,
    "init_lora_weights": "eva",
    "eva_config": {"rho": 2.0},
    "megatron_core": "other",
}
REFUSED = {
    "peft_type": ["IA3", None, 3],
    "task_type": ["SEQ_CLS", "FEATURE_EXTRACTION"],
    "bias": ["all", "lora_only", None],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "later", None, 1],
    "r": [0, None, "4", True, 1 << 40, -(10**400)],
    "lora_alpha": [None, 0, -1, "x", math.inf, math.nan, 10**400],
    "lora_dropout": ["x", None, 1, -0.5],
    "use_rslora": ["yes", None],
    "rank_pattern": [{"q_proj": "x"}, {"q_proj": 0}, {"(": 4}, {"(?P<a>q)": 4}, ["q_proj"], {"q{9999}": 4}],
    "alpha_pattern": [{"q_proj": None}, 5],
    "target_modules": [[], ["nothing"], ["q_proj", "lm_head"], ".*embed_tokens", "(?!x).*", {}, [3], ["../q_proj"]],
    "exclude_modules": [["q_proj", "v_proj"], 3],
    "layers_to_transform": [[77], "all", [0.5], [True]],
    "layers_pattern": ["h"],
    "modules_to_save": [["lm_head"]],
    "trainable_token_indices": [[1]],
    "loftq_config": [{"loftq_bits": 4}],
    "corda_config": [{"x": 1}],
    "lora_ga_config": [{"x": 1}],
    "megatron_config": [{"x": 1}],
    "use_dora": [True],
    "velora_config": [{"x": 1}],
    "alora_invocation_tokens": [[1, 2]],
    "use_qalora": [True],
    "monteclora_config": [{"x": 1}],
    "layer_replication": [[[0, 2]]],
    "lora_bias": [True],
    "target_parameters": [["q_proj.weight"]],
    "use_bdlora": [{"x": 1}],
    "arrow_config": [{"x": 1}],
    "kasa_config": [{"x": 1}],
    "a_later_option": [True, 7, "x"],
}


def test_every_field_of_peft_is_tested():
    known = {name for fields in EQUAL for name in fields} | UNREAD.keys() | REFUSED.keys()
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("fields", EQUAL, ids=str)
def test_logits_equal_those_of_peft(hf_base, tmp_path, fields):
    with warnings.catch_warnings(action="ignore"):
        of_peft(hf_base, tmp_path / "a", **fields)
        theirs = logits_of_peft(hf_base, tmp_path / "a")
    model = random_model()
    config = adapters.load(model, tmp_path / "a")
    torch.testing.assert_close(model(TOKENS), theirs, rtol=0, atol=1e-5)
    assert (model(TOKENS) - random_model()(TOKENS)).abs().max() > 1e-2
    # and as we write it, PEFT and we read it again
    adapters.save(model, config, tmp_path / "b", BASE)
    torch.testing.assert_close(logits_of_peft(hf_base, tmp_path / "b"), theirs, rtol=0, atol=1e-5)
    again = random_model()
    assert adapters.load(again, tmp_path / "b") == config and torch.equal(again(TOKENS), model(TOKENS))


def test_what_says_nothing_about_the_weights_is_not_read(hf_base, tmp_path):
    of_peft(hf_base, tmp_path)
    theirs = logits_of_peft(hf_base, tmp_path)
    for name, value in UNREAD.items():
        change(tmp_path, **{name: value})
        with warnings.catch_warnings(action="ignore"):
            assert torch.equal(logits_of_peft(hf_base, tmp_path), theirs), name
        adapters.load(model := random_model(), tmp_path)
        torch.testing.assert_close(model(TOKENS), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(tmp_path, field):
    adapters.save(adapted(), SMALL_LORA, tmp_path / "a", "")
    content, model = (tmp_path / "a" / adapters.CONFIG).read_text(), random_model()
    for value in REFUSED[field]:
        change(tmp_path / "a", **{field: value})
        named = "target_modules" if field in ("exclude_modules", "layers_to_transform") else field
        with pytest.raises(InputError, match=f"{adapters.CONFIG}:({field}|{named}): ") as error:
            adapters.load(model, tmp_path / "a")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        (tmp_path / "a" / adapters.CONFIG).write_text(content)
    assert not lora.layers(model)


@pytest.mark.parametrize("pattern", ["(?:(.|..)+)+[zQ]", "(.*)" * 500 + "[zQ]", "(?:.*.*)+" * 200 + "[zQ]", "(" * 5000])
def test_a_pattern_that_backtracks_without_end_is_refused(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(adapters, "MATCH_SECONDS", 0.05)
    adapters.save(adapted(), SMALL_LORA, tmp_path / "a", "")
    for field in ("target_modules", "rank_pattern"):
        change(tmp_path / "a", **{field: pattern if field == "target_modules" else {pattern: 4}})
        began = time.monotonic()
        with pytest.raises(InputError, match=f"{field}: .* list the modules by name"):
            adapters.load(random_model(), tmp_path / "a")
        assert time.monotonic() - began < 5
        change(tmp_path / "a", target_modules=["q_proj", "v_proj"], rank_pattern={})


def test_missing_fields_have_pefts_defaults(hf_base, tmp_path):
    """torchtune writes five."""
    of_peft(hf_base, tmp_path / "a", r=8, lora_alpha=16)
    few = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    (tmp_path / "a" / adapters.CONFIG).write_text(json.dumps(few | {"base_model_name_or_path": "org/model"}))
    adapters.load(model := random_model(), tmp_path / "a")
    torch.testing.assert_close(model(TOKENS), logits_of_peft(hf_base, tmp_path / "a"), rtol=0, atol=1e-5)


def test_names_and_files_of_older_versions(hf_base, tmp_path):
    """adapter_model.bin, the adapter's name inside the tensors' names, a model without a head around the layers."""
    of_peft(hf_base, tmp_path)
    adapters.load(model := random_model(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / adapters.WEIGHTS)
    (tmp_path / adapters.WEIGHTS).unlink()
    for old, new in (
        (".weight", ".default.weight"),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.", "_orig_mod.base_model._orig_mod."),
    ):
        torch.save({name.replace(old, new): t.half() for name, t in tensors.items()}, tmp_path / adapters.PICKLED)
        adapters.load(again := random_model(), tmp_path)
        torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=1e-2)
    torch.save(Path("x"), tmp_path / adapters.PICKLED)
    with pytest.raises(InputError, match="might run code"):
        adapters.load(random_model(), tmp_path)


def test_pissa_is_read_once_peft_has_converted_it(hf_base, tmp_path):
    """Plain LoRA of twice the rank then, whose base is the original; PEFT's own logits before the conversion."""
    theirs = peft.get_peft_model(
        copy.deepcopy(hf_base), peft.LoraConfig(r=4, init_lora_weights="pissa", task_type="CAUSAL_LM")
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(1.5)
    wanted = theirs.eval()(TOKENS).logits
    theirs.save_pretrained(tmp_path / "raw")
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    with pytest.raises(InputError, match="init_lora_weights: 'pissa' is not supported"):
        adapters.load(random_model(), tmp_path / "raw")
    config = adapters.load(model := random_model(), tmp_path / "converted")
    assert config.r == 8
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-5)
    assert (random_model()(TOKENS) - wanted).abs().max() > 1e-2


def test_several_adapters_are_the_sum_of_their_updates(hf_base, tmp_path):
    """Each with its own configuration; in PEFT, two active adapters."""
    of_peft(hf_base, tmp_path / "a", r=3, use_rslora=True)
    of_peft(hf_base, tmp_path / "b", seed=1, target_modules=["v_proj", "up_proj"], layers_to_transform=[1, 2])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf_base), tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["a", "b"])
    model = random_model()
    config = adapters.load(model, f"{tmp_path}/a,{tmp_path}/b")
    torch.testing.assert_close(model(TOKENS), theirs.eval()(TOKENS).logits, rtol=0, atol=1e-5)
    adapters.save(model, config, tmp_path / "sum", BASE)
    torch.testing.assert_close(logits_of_peft(hf_base, tmp_path / "sum"), model(TOKENS), rtol=0, atol=1e-5)
    before = model(TOKENS)
    assert lora.merge(model) < 1e-5
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [("wq", "wv"), ALL])
def test_adapters_round_trip_and_load_in_peft(hf_base, tmp_path, targets):
    config = LoRAConfig(r=4, alpha=10.0, dropout=0.1, targets=targets)
    model = adapted(config).eval()
    adapters.save(model, config, tmp_path / "adapter", BASE)
    again = random_model()
    assert adapters.load(again, tmp_path / "adapter", lambda: BASE) == config
    for name, tensor in lora.state_dict(model).items():
        assert torch.equal(tensor, lora.state_dict(again)[name])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf_base), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)
    # and what peft writes of it is, tensor for tensor, what we wrote
    theirs.save_pretrained(tmp_path / "theirs")
    ours, written = (safetensors.torch.load_file(tmp_path / n / adapters.WEIGHTS) for n in ("adapter", "theirs"))
    assert ours.keys() == written.keys() and all(torch.equal(ours[name], written[name]) for name in ours)
    third = random_model()
    assert adapters.load(third, tmp_path / "theirs") == config
    assert all(torch.equal(t, lora.state_dict(third)[name]) for name, t in lora.state_dict(model).items())


def test_an_adapter_file_holds_what_it_should(tmp_path):
    model = adapted()
    adapters.save(model, SMALL_LORA, tmp_path / "a", BASE, "the base")
    tensors = safetensors.torch.load_file(tmp_path / "a" / adapters.WEIGHTS)
    assert len(tensors) == 2 * 2 * SMALL.n_layers
    n_values = sum(t.numel() for t in tensors.values())
    assert n_values == lora.trainable_share(model)[0]
    assert 4 * n_values < (tmp_path / "a" / adapters.WEIGHTS).stat().st_size < 4 * n_values + 6000  # and a header
    with safetensors.safe_open(tmp_path / "a" / adapters.WEIGHTS, "pt") as file:
        assert file.metadata()["base_sha256"] == BASE
    config = json.loads((tmp_path / "a" / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "the base"
    assert (config["r"], config["lora_alpha"]) == (SMALL_LORA.r, SMALL_LORA.alpha)
    with pytest.raises(InputError, match="already exists"):
        adapters.save(model, SMALL_LORA, tmp_path / "a", BASE)
    for i in range(8):  # the library alone writes one of two files, as chance has it
        adapters.save(model, SMALL_LORA, tmp_path / str(i), BASE, "the base")
        assert adapters.fingerprint(tmp_path / str(i)) == adapters.fingerprint(tmp_path / "a")


def test_an_adapter_of_another_base_is_refused_unless_any_will_do(tmp_path):
    adapters.save(adapted(), SMALL_LORA, tmp_path / "a", BASE, "its-base")
    model = random_model(seed=1)
    with pytest.raises(InputError, match=r"different base .*'its-base', .*any_base=True") as error:
        adapters.load(model, tmp_path / "a", lambda: "e" * 64)
    assert BASE[:12] in str(error.value) and "e" * 12 in str(error.value)
    assert not lora.layers(model)
    adapters.load(model, tmp_path / "a")
    with pytest.raises(InputError, match=r"has shape .* made for 'its-base'"):  # shapes are never waived
        adapters.load(random_model(dataclasses.replace(SMALL, head_dim=None, dim=128)), tmp_path / "a")


def test_an_adapter_is_found_from_a_file_in_it_and_named_from_above(tmp_path):
    adapters.save(adapted(), SMALL_LORA, tmp_path / "run,1" / "adapter", "")
    path = tmp_path / "run,1" / "adapter"
    assert adapters.folders(path / adapters.WEIGHTS) == adapters.folders(path) == [path]
    with pytest.raises(InputError, match=re.escape(f"holds no {adapters.CONFIG}; look at {path}")):
        adapters.folders(path.parent)
    shutil.copytree(path, other := tmp_path / "other")
    assert adapters.folders(f"{other}, {other},") == [other, other]
    for nothing in ("", " ,"):
        with pytest.raises(InputError, match=f"adapter={nothing} names no directory"):
            adapters.folders(nothing)
    with pytest.raises(InputError, match="this is an adapter: pass it as adapter=DIR"):  # before weights are looked for
        find_tokenizer(other)


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


def tensor_faults() -> dict:
    first = f"{adapters.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"

    def change(name, make):
        return lambda tensors: {**tensors, name: make(tensors.get(name))}

    return {
        "missing": (lambda t: {k: v for k, v in t.items() if k != first}, "is missing"),
        "extra": (change("x.lora_A.weight", lambda _: torch.zeros(1)), "is not expected"),
        "renamed": (lambda t: {k.replace("q_proj", "k_proj"): v for k, v in t.items()}, "is not expected|is missing"),
        "rank": (change(first, lambda t: t[:2].contiguous()), r"has shape \[2, 64\], expected \[4, 64\]"),
        "NaN": (change(first, lambda t: t * math.nan), "not finite"),
        "twice": (change(first.replace(".weight", ".x.weight"), lambda _: torch.zeros(4, 64)), "stands twice, as"),
        "escaping": (change("../../x", lambda _: torch.zeros(1)), "is not expected"),
        "integers": (change(first, lambda t: t.long()), "not finite numbers"),
    }


@pytest.mark.parametrize("case", tensor_faults())
def test_damaged_adapters_are_refused(tmp_path, case):
    change, message = tensor_faults()[case]
    adapters.save(adapted(), SMALL_LORA, tmp_path / "a", "")
    path = tmp_path / "a" / adapters.WEIGHTS
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(change(tensors), path)
    model = random_model()
    with pytest.raises(InputError, match=message):
        adapters.load(model, tmp_path / "a")
    assert not lora.layers(model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="truncated"):
        adapters.load(model, tmp_path / "a")


def test_gradients_equal_those_of_peft(hf_base, tmp_path):
    """The same adapters, one backward pass: the gradients of A and B, dropout off."""
    model, config = adapted(), LoRAConfig(r=4, dropout=0.0)
    adapters.save(model, config, tmp_path / "a", "")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf_base), tmp_path / "a", is_trainable=True)
    model(TOKENS).logsumexp(-1).sum().backward()
    theirs(TOKENS).logits.logsumexp(-1).sum().backward()
    wanted = copy.deepcopy(model)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in wanted.named_parameters():
        if parameter.requires_grad:
            parameter.data = gradients[name]
    adapters.save(wanted, config, tmp_path / "gradients", "")
    ours = safetensors.torch.load_file(tmp_path / "gradients" / adapters.WEIGHTS)
    found = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == found.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], found[name], rtol=1e-4, atol=1e-4)


ODD = [
    None,
    True,
    0,
    -1,
    10**30,
    1e300,
    "",
    "(",
    ".*",
    "q" * 9999,
    [],
    [[]],
    ["q_proj"],
    {},
    {"q": 1},
    {"(": 4},
    {"": []},
]


def damage(folder: Path, rng: random.Random) -> None:
    """Some bytes of a file are others, or some values of the configuration."""
    if rng.random() < 0.4:
        fields = rng.sample([field.name for field in dataclasses.fields(peft.LoraConfig)], rng.randint(1, 3))
        change(folder, **{field: rng.choice(ODD) for field in fields})
    else:
        path = rng.choice(sorted(folder.iterdir()))
        path.write_bytes(mutant(path.read_bytes(), rng))


@pytest.mark.slow
def test_mutants_of_an_adapter_are_refused_in_one_line_or_read(tmp_path):
    adapters.save(adapted(), SMALL_LORA, tmp_path / "a", BASE)
    good = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    tensors, refused = safetensors.torch.load_file(tmp_path / "a" / adapters.WEIGHTS), 0
    torch.save(tensors, tmp_path / "pickled")
    for seed in range(2500):
        rng = random.Random(seed)
        for path in (tmp_path / "a").iterdir():
            path.unlink()
        for name, content in good.items():
            (tmp_path / "a" / name).write_bytes(content)
        if seed % 2:
            (tmp_path / "a" / adapters.WEIGHTS).unlink()
            (tmp_path / "a" / adapters.PICKLED).write_bytes((tmp_path / "pickled").read_bytes())
        damage(tmp_path / "a", rng)
        model = random_model()
        try:
            adapters.load(model, tmp_path / "a", lambda: BASE)
        except InputError as error:
            refused += 1
            assert str(tmp_path) in str(error) and len(str(error)) < 2000, seed
            assert not lora.layers(model), seed
        except Exception as error:
            raise AssertionError(f"mutant {seed}") from error
    assert refused > 1500
