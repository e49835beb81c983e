"""Hugging Face's layout as it is written: the folder that `transformers` itself would write for the same model.

    config.json              the shape, the context length, the ids of begin, end and padding
    model.safetensors        the weights, with Hugging Face's names and row order
    tokenizer.json ...       see tokenizer_files.py

Left out on purpose: several weight files with an index, uploading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from llama import files
from llama.checkpoint import hf, hf_config, tokenizer_files
from llama.checkpoint.source import write_fields
from llama.config import ModelArgs
from llama.device import dtype_name
from llama.model import Transformer


def write(model: Transformer, directory: Path, tokenizer_path: Path | None) -> None:
    """One file of weights; a tied head is left out, as Hugging Face does."""
    names = hf.names_of(model.args)
    state = {
        names[name]: hf.swap_rotary_order(weight.detach().cpu(), name, model.args, to_hf=True).contiguous()
        for name, weight in model.state_dict().items()
    }
    config = config_of(model.args, next(model.parameters()).dtype)
    if tokenizer_path is not None:
        config |= tokenizer_files.write(tokenizer_path, directory, model.args)
    files.write_json(directory / hf.CONFIG, config)
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def config_of(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json in the words of transformers 4, which 5 reads as well."""
    scaling = None
    if args.use_scaled_rope:
        scaling = {"rope_type": "llama3", "factor": args.rope_scale_factor, **hf_config.ROPE_SCALING}
    elif args.rope_linear_factor is not None:
        scaling = {"rope_type": "linear", "factor": args.rope_linear_factor}
    return {
        "architectures": ["LlamaForCausalLM"],
        **hf_config.FIXED,
        **write_fields(hf_config.FIELDS, args),
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": dtype_name(dtype),
    }
