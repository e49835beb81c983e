"""Hugging Face folders as people have them, against `transformers`: configurations, files of weights, real widths."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, SMALL, TINY, random_model
from support import mutant, same_weights

from llama import Llama, ModelArgs, checkpoint
from llama.checkpoint import hf, hf_config
from llama.errors import InputError, Notice
from llama.model import rope_table

UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False)
TOKENS = torch.randint(SMALL.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def saved(tmp_path, model):
    checkpoint.save(model, tmp_path / "m", "hf")
    return tmp_path / "m"


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def their_logits(directory, tokens):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = json.loads((directory / "config.json").read_text())
    heads = settings.pop("num_attention_heads")
    config = LlamaConfig(**settings, num_attention_heads=1)
    config.return_dict = True  # without, its own causal model cannot call its base model
    config.num_attention_heads = heads  # so, for it refuses some numbers of heads that it can compute with
    theirs = LlamaForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32)
    with torch.no_grad():
        return theirs.eval()(tokens).logits


def assert_logits_equal(directory, tokens=TOKENS):
    model = checkpoint.load(directory, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), their_logits(directory, tokens), atol=1e-5, rtol=0)


# Widths of models that people bring, with few layers, few words, a narrow feed-forward: heads that are no power of two,
# a head size that no kernel has a multiple of, one that is not dim / heads.
NARROW = {"vocab_size": 100, "ffn_dim_multiplier": 0.1}
WIDTHS = {
    "SmolLM2 135M": ModelArgs(576, 2, 9, 3, **NARROW, rope_theta=100_000.0, max_seq_len=8192),
    "TinyLlama 1.1B": ModelArgs(2048, 1, 32, 4, **NARROW, max_seq_len=2048),
    "OpenLLaMA 3B, 8 of 32 heads": ModelArgs(800, 2, 8, **NARROW, norm_eps=1e-6, max_seq_len=2048),
    "24 heads of 128 on 1792": ModelArgs(1792, 1, 24, 8, 128, **NARROW, rope_theta=500_000.0),
    "linear RoPE": ModelArgs(128, 2, 4, 2, **NARROW, rope_linear_factor=4.0, max_seq_len=16384),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_real_widths_equal_transformers(tmp_path, name):
    model = random_model(WIDTHS[name], std=0.02)
    checkpoint.save(model, tmp_path / "m", "hf")
    loaded = checkpoint.load(tmp_path / "m")
    assert loaded.args.trained_context == model.args.trained_context and same_weights(model, loaded)
    tokens = TOKENS % 100
    assert_logits_equal(tmp_path / "m", tokens)
    checkpoint.save(model, tmp_path / "m.gguf", "gguf")
    assert same_weights(model, checkpoint.load(tmp_path / "m.gguf"))
    prompts = tokens[:, :8].tolist()
    cached, _ = Llama(loaded, None, 64, 4, decoding="auto").generate(prompts, 6, 0)
    uncached, _ = Llama(loaded, None, 64, 4, decoding="eager").generate(prompts, 6, 0, use_cache=False)
    assert cached == uncached
    narrow = Llama(loaded.bfloat16(), None, 64, 4, decoding="auto")
    assert len(narrow.generate(prompts, 6, 0)[0][1]) == 6  # whichever kernels the machine has


# A different value for each field of a configuration whose default says too little about what else it may be.
SIZES = {
    "hidden_size": 72,
    "intermediate_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 513,
    "tie_word_embeddings": False,
}
OTHER_VALUES = SIZES | {
    "hidden_act": "gelu",
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 10_000.0,
    "model_type": "mistral",
    "dtype": "float16",
    "architectures": ["LlamaModel"],
    "eos_token_id": [2, 7],
    "layer_types": ["full_attention", "sliding_attention"],
    "per_layer_config": {"1": {"rms_norm_eps": 1.0}},
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "problem_type": "regression",
    "torch_dtype": "bfloat16",
    "partial_rotary_factor": 0.5,
}
OLDER = ("rope_scaling", "rope_theta", "torch_dtype", "partial_rotary_factor", "sliding_window", "layer_types")


def another(value):
    if isinstance(value, bool):
        return not value
    if value is None:
        return 3
    return f"{value}x" if isinstance(value, str) else value + (1 if isinstance(value, int) else 0.25)


def test_every_field_of_a_config_is_honoured_or_refused(tmp_path):
    """What loads computes what transformers computes with that config; what does not is named by its field."""
    from transformers import LlamaConfig

    base = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    config = LlamaConfig(**base, num_key_value_heads=2, tie_word_embeddings=True).to_dict()
    model = random_model(
        ModelArgs(64, 2, 4, 2, vocab_size=512, norm_eps=1e-6, tie_word_embeddings=True).with_ffn_dim(96)
    )
    checkpoint.save(model, tmp_path / "m", "hf")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert_logits_equal(tmp_path / "m")
    refused = set()
    for name in dict.fromkeys([*config, *OLDER, *OTHER_VALUES]):
        value = OTHER_VALUES[name] if name in OTHER_VALUES else another(config.get(name))
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, name: value}))
        try:
            checkpoint.load(tmp_path / "m")
        except InputError as error:
            refused.add(name)
            assert f"config.json:{name}: " in str(error) or (name in SIZES and "config" in str(error)), name
        else:
            assert_logits_equal(tmp_path / "m")
    others = "hidden_act attention_bias mlp_bias model_type rope_scaling partial_rotary_factor sliding_window"
    others += " chunk_size_feed_forward is_encoder_decoder layer_types per_layer_config"
    assert refused == {*SIZES, *others.split()}


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = {
    "5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "4": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "first": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    "linear": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear in 5": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    "both": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"rope_type": "default"}},
    "none": {"rope_theta": 1e5, "rope_scaling": None},
    "nothing": {},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_of_every_version_equals_transformers(saved, name):
    """Also where the two kinds of scaling act: at positions beyond 8,192."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = json.loads((saved / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope")} | ROPES[name]
    (saved / "config.json").write_text(json.dumps(config))
    pos = torch.tensor([[0, 5_000, 20_000, 100_000]])
    cos, _ = LlamaRotaryEmbedding(LlamaConfig(**config))(torch.zeros(1), pos)
    table = rope_table(pos, checkpoint.load(saved).rope_freqs)[:, :, 0, :, 0]
    torch.testing.assert_close(table, cos[..., : table.shape[-1]], atol=1e-6, rtol=0)


OTHER_MODELS = {
    "vision": (
        {"model_type": "mllama", "vision_config": {}},
        "this is a 'mllama' model of images and text",
    ),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, "model_type: this is a 'mistral' model; supported"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config: .*'gptq'.*GGUF file"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'.*original model"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: type 'yarn' is not supported"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}, "rope_scaling": None}, "rope_parameters: .*'longrope'"),
    "two types": ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2}}, "contradicts rope_type"),
    "absurd factor": (
        {"rope_scaling": {"type": "linear", "factor": -1}},
        r"config\.json:rope_scaling: factor: -1 is not",
    ),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
    "other factors": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}},
        "low_freq_factor 2.0",
    ),
    "more": (
        {"rope_scaling": {"rope_type": "default", "attention_factor": 2.0}},
        "attention_factor 2.0 is not supported",
    ),
    "own field": ({"logit_scale": 0.0625}, r"config\.json:logit_scale: 0\.0625 is unknown .*delete the field"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_named_by_what_they_are(saved, name):
    changes, message = OTHER_MODELS[name]
    edit_config(saved, **changes)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_what_people_find_in_a_config_does_no_harm(saved, model):
    """Fields seen in published configs, on or off."""
    edit_config(
        saved,
        **{"_name_or_path": "x", "unsloth_version": "2025.1", "pretraining_tp": 2, "auto_map": {"AutoModel": "x.Y"}},
        **{"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {}, "sliding_window": None},
        **{"eos_token_id": [1, 2], "bos_token_id": None, "quantization_config": None, "temperature": 0.6},
        **{"partial_rotary_factor": 1.0, "chunk_size_feed_forward": 0, "hidden_act": "swish", "mlp_bias": None},
    )
    assert same_weights(model, checkpoint.load(saved))


def by_file(state, names):
    """The weights dealt out to files."""
    return {name: dict(list(state.items())[i :: len(names)]) for i, name in enumerate(names)}


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
BINS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def renamed(change):
    return lambda state: {change(key): weight for key, weight in state.items()}


def with_more(state):
    """The tied head and the tables that old versions stored as well."""
    tables = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    return state | {name: torch.ones(8) for name in tables} | head


WHOLE, BIN = ["model.safetensors"], ["pytorch_model.bin"]
# How the same weights are written: names of files, whether there is an index, and what became of the names of weights.
FORMS = {
    "shards with an index": (SHARDS, True, dict),
    "shards without an index": (SHARDS, False, dict),
    "one shard": (["model-00001-of-00001.safetensors"], False, dict),
    "bin": (BIN, False, dict),
    "bins with an index": (BINS, True, dict),
    "bins without an index": (BINS, False, dict),
    "compiled": (SHARDS, True, renamed("_orig_mod.{}".format)),
    "compiled, data-parallel": (BIN, False, renamed("module._orig_mod.{}".format)),
    "layers compiled": (WHOLE, False, renamed(lambda key: key.replace(".self", "._orig_mod.self"))),
    "PEFT's wrapper": (WHOLE, False, renamed("base_model.model.{}".format)),
    "bare LlamaModel": (WHOLE, False, renamed(lambda key: key.removeprefix("model."))),
    "what old versions stored": (WHOLE, False, with_more),
    "the same in a bin": (BIN, False, with_more),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_same_weights(saved, model, name):
    names, has_index, rename = FORMS[name]
    state = rename(safetensors.torch.load_file(saved / "model.safetensors"))
    (saved / "model.safetensors").unlink()
    for file, part in by_file(state, names).items():
        torch.save(part, saved / file) if file.endswith(".bin") else safetensors.torch.save_file(part, saved / file)
    if has_index:
        listed = {key: file for file, part in by_file(state, names).items() for key in part}
        stem = names[0].partition("-")[0]
        index = f"{stem}.{names[0].rpartition('.')[2]}.index.json"
        (saved / index).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert same_weights(model, checkpoint.load(saved))
    assert checkpoint.fingerprint(saved) == checkpoint.fingerprint(saved / names[0])


def test_a_compiled_model_in_metas_layout(tmp_path, model):
    checkpoint.save(model, tmp_path)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    torch.save({f"_orig_mod.{key}": weight for key, weight in state.items()}, tmp_path / "consolidated.00.pth")
    assert same_weights(model, checkpoint.load(tmp_path))
    torch.save({**state, "_orig_mod.norm.weight": torch.ones(64)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(InputError, match="holds a weight twice"):
        checkpoint.load(tmp_path)


def test_a_stale_index_is_a_warning(saved, model):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00030.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(Notice, match=r"model\.safetensors is read; model\.safetensors\.index\.json beside it"):
        assert same_weights(model, checkpoint.load(saved))


def test_a_warning_is_one_line_on_stderr(saved):
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    options = [f"--ckpt_dir={saved}", f"--tokenizer_path={TINY / 'tokenizer.model'}", "--prompt=x"]
    run = subprocess.run([sys.executable, "inference.py", *options], cwd=ROOT, capture_output=True, text=True)
    lines = run.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["warning", "error"] and run.returncode == 2


def test_missing_numbered_files_are_named(saved):
    (saved / "model.safetensors").rename(saved / "model-00002-of-00003.safetensors")
    with pytest.raises(InputError, match=r"expected model-00001-of-00003\.safetensors, 00002, \.\.\. to 00003"):
        checkpoint.load(saved)


def test_a_model_without_a_head_is_not_completed(saved):
    edit_config(saved, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"no lm_head\.weight, and its config\.json does not tie the head"):
        checkpoint.load(saved)


def test_quantized_weights_are_seen_without_a_config_that_says_so(saved):
    state = safetensors.torch.load_file(saved / "model.safetensors")
    state["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
    safetensors.torch.save_file(state, saved / "model.safetensors")
    with pytest.raises(InputError, match="qweight: the weights are quantized; take the original"):
        checkpoint.load(saved)


NASTY = [None, True, -1, 0, 1e308, float("nan"), 1 << 70, "", "../x", "a" * 5000, [], [[]], {}, {"a": {}}, "llama\n3"]


def nasty_json(good: bytes, rng: random.Random) -> bytes:
    """An object with a value, here or further in, replaced, renamed or gone."""
    content = json.loads(good)
    target = content
    while (inner := [value for value in target.values() if isinstance(value, dict) and value]) and rng.random() < 0.5:
        target = rng.choice(inner)
    name = rng.choice(list(target))
    value = target.pop(name)
    if rng.random() < 0.8:
        target[rng.choice([name, name, name, "x" * 3000, "__class__"])] = rng.choice([*NASTY, value])
    return json.dumps(content).encode()


@pytest.mark.parametrize("n", [20, pytest.param(625, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "pytorch_model.bin", "params.json"])
def test_mutants_load_or_end_in_one_line(tmp_path, file, n):
    model = random_model(dataclasses.replace(SMALL, head_dim=None, dim=32, n_layers=2, vocab_size=64, max_seq_len=512))
    checkpoint.save(model, tmp_path / "m", "meta" if file == "params.json" else "hf")
    weights = tmp_path / "m" / "model.safetensors"
    if file == "model.safetensors.index.json":
        weights.rename(weights.with_name(SHARDS[0]))
        listed = dict.fromkeys(hf.names_of(model.args).values(), SHARDS[0])
        (tmp_path / "m" / file).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    elif file == "pytorch_model.bin":
        torch.save(safetensors.torch.load_file(weights), tmp_path / "m" / file)
        weights.unlink()
    good, rng, refused = (tmp_path / "m" / file).read_bytes(), random.Random(file), 0
    for i in range(n):
        change = nasty_json if file.endswith(".json") and i % 2 else mutant
        (tmp_path / "m" / file).write_bytes(change(good, rng))
        try:
            checkpoint.load(tmp_path / "m", torch.float32)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
    assert refused > n // 4


def test_what_a_config_leaves_out_is_what_transformers_takes():
    from transformers import LlamaConfig

    base = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    theirs, ours = LlamaConfig(**base), hf_config.args_of({"model_type": "llama", **base})
    assert ours.norm_eps == theirs.rms_norm_eps and ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.n_kv_heads == theirs.num_key_value_heads and ours.head_dim == theirs.head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
