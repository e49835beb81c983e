"""What a Hugging Face config.json says about a model, as transformers 4 and 5 write it.

Every field that could change what the model computes is honoured or refused by name. A field that is not listed here is
refused as well, unless it is off (null, false, empty): that nobody has heard of it does not make it harmless.
"""

from __future__ import annotations

import reprlib
from typing import Any

from llama.checkpoint.source import read_fields
from llama.config import ROPE_HIGH_FREQ_FACTOR, ROPE_LOW_FREQ_FACTOR, ROPE_ORIGINAL_CONTEXT, ModelArgs

# Our name -> theirs, of what is taken over as it is.
FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_seq_len": "max_position_embeddings",
}
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # transformers' own, where they are not Meta's
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
SCALES = dict.fromkeys(("rope_scale_factor", "rope_linear_factor"), "rope_scaling: factor")
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
ROPE_SCALING = {
    "low_freq_factor": ROPE_LOW_FREQ_FACTOR,
    "high_freq_factor": ROPE_HIGH_FREQ_FACTOR,
    "original_max_position_embeddings": ROPE_ORIGINAL_CONTEXT,
}
# What LlamaForCausalLM does not compute with: names, token ids (the tokenizer's matter), how it was trained, how text
# is drawn by default, what a call returns. pretraining_tp cuts products into parts; auto_map names code, not run here.
HARMLESS = frozenset(
    """
    architectures auto_map dtype model_max_length max_sequence_length name_or_path pretraining_tp tokenizer_class
    torch_dtype transformers_version transformers.js_config unsloth_fixed unsloth_version is_llama_config use_cache
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    initializer_range attention_dropout hidden_dropout classifier_dropout neftune_noise_alpha gradient_checkpointing
    is_decoder use_bfloat16 torchscript tf_legacy_loss
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups num_return_sequences
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty diversity_penalty bad_words_ids
    no_repeat_ngram_size encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
KNOWN = {*FIELDS.values(), *ROPE_FIELDS, *FIXED, *HARMLESS}
# The value at which a field that is unknown to LlamaForCausalLM does nothing.
NEUTRAL = {"partial_rotary_factor": 1.0, "chunk_size_feed_forward": 0}


def args_of(config: dict[str, Any]) -> ModelArgs:
    """The shape of a model. Raises ValueError, `field: reason` with their name or ours, for what is not honoured."""
    _refuse_other_models(config)
    for name, only in FIXED.items():
        if config.get(name) not in (None, only) and (name, config[name]) != ("hidden_act", "swish"):  # the same as silu
            raise ValueError(f"{name}: {reprlib.repr(config[name])} is not supported, only {only!r}")
    for name, value in config.items():
        if name not in KNOWN and not _is_off(value) and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise ValueError(
                f"{name}: {reprlib.repr(value)} is unknown here and might change what the model computes; delete the "
                "field if it does not"
            )
    given = DEFAULTS | {name: value for name, value in config.items() if value is not None}
    return read_fields(FIELDS, given, **_rope_of(config))


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _refuse_other_models(config: dict[str, Any]) -> None:
    """What it is comes first: all other fields of a different model mean something else."""
    kind = config.get("model_type", FIXED["model_type"])
    if kind != FIXED["model_type"]:
        what = " model of images and text" if "vision_config" in config else " model"
        raise ValueError(f"model_type: this is a {reprlib.repr(kind)}{what}; supported are Llama text models ('llama')")
    for name in ("quantization_config", "compression_config"):
        if not _is_off(config.get(name)):
            settings = config[name] if isinstance(config[name], dict) else {}
            method = settings.get("quant_method") or "an unnamed method"
            raise ValueError(
                f"{name}: the weights are quantized with {reprlib.repr(method)}, which is not supported; take the "
                "original model, or a GGUF file of it"
            )


def _rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps everything under `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart.

    Where both are there, 5 takes `rope_scaling`, and a `rope_theta` inside before one outside.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{field}: {reprlib.repr(rope)} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {"factor", *ROPE_SCALING} if kind == "llama3" else {"factor"} if kind == "linear" else set()
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"{field}: type {reprlib.repr(kind)} is not supported, only llama3, linear and default")
    if rope.get("type", kind) != kind:
        raise ValueError(f"{field}: type {reprlib.repr(rope['type'])} contradicts rope_type {kind!r}")
    for name, value in rope.items():
        is_unused = name == "original_max_position_embeddings" or value in (None, NEUTRAL.get(name))
        if name not in {"rope_type", "type", "rope_theta", *scaling} and not is_unused:
            raise ValueError(f"{field}: {name} {reprlib.repr(value)} is not supported with type {kind!r}")
    base = rope.get("rope_theta", config.get("rope_theta"))
    theta = {"rope_theta": 10_000.0 if base is None else base}
    if kind == "default":
        return theta
    if rope.get("factor") is None:
        raise ValueError(f"{field}: factor is missing")
    if kind == "linear":
        return {**theta, "rope_linear_factor": rope["factor"]}
    given = {"original_max_position_embeddings": config.get("max_position_embeddings"), **rope}
    given |= {name: config[name] for name in ROPE_SCALING if name in config}
    for name, only in ROPE_SCALING.items():
        if given.get(name) != only:
            raise ValueError(f"{field}: {name} {reprlib.repr(given.get(name))} is not supported, only {only}")
    return {**theta, "use_scaled_rope": True, "rope_scale_factor": rope["factor"]}
