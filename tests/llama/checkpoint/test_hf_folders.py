"""Hugging Face folders as people have them, against `transformers`: configurations, files of weights, real widths."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import SMALL, random_model
from support import same_weights

from llama import Llama, ModelArgs, checkpoint

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
    prompts = tokens[:, :8].tolist()
    cached, _ = Llama(loaded, None, 64, 4, decoding="auto").generate(prompts, 6, 0)
    uncached, _ = Llama(loaded, None, 64, 4, decoding="eager").generate(prompts, 6, 0, use_cache=False)
    assert cached == uncached
    narrow = Llama(loaded.bfloat16(), None, 64, 4, decoding="auto")
    assert len(narrow.generate(prompts, 6, 0)[0][1]) == 6  # whichever kernels the machine has
