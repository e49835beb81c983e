"""Whether this device computes what the slow path computes: every fast path beside its twin, in each dtype.

    python -m benchmarks.equality

A small model with random weights, and prompts of random ids. The error is the largest difference, relative to the
largest value of the slow twin; the bound is a few roundings of the dtype. A path that differs by more ends the run with
exit code 1, after its row is kept: measure nothing on such a device before the cause is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs, rows
from benchmarks import options as shared
from llama import ModelArgs, Transformer, cli, lora, quantization
from llama import device as devices
from llama.cli import option
from llama.code_layers import Quantized
from llama.decoding import Decoder
from llama.errors import InternalError
from llama.lora import LoRAConfig
from llama.quantization import Quantization
from llama.training.batch import Batch
from llama.training.options import Settings
from llama.training.step import Trainer
from reports import tables

ARGS = ModelArgs(dim=512, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=1000, norm_eps=1e-5, rope_theta=10000.0)
PROMPT, STEPS, SEQUENCES = 40, 8, 3
# A few roundings: of products, of the residual stream, of logits.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Options(shared.RowOptions):
    """Compare every fast path of this device with its slow twin."""

    device: str = option("auto", cli.DEVICE)
    seed: int = option(1, "of random weights and prompts", **cli.SEEDS)


def main(options: Options) -> None:
    path, (device, _) = options.results_file("equality"), devices.resolve(options.device)
    dtypes = [torch.float32, torch.float16] if device.type == "cuda" else [torch.float32]
    dtypes += [torch.bfloat16] if devices.computes_bf16(device) else []
    found, differing = [], []
    for dtype in dtypes:
        for check, errors in CHECKS.items():
            model = Transformer.random(ARGS, dtype, device, options.seed).eval()
            error = float(errors(model))
            cell = {"model": "random weights", "check": check, "decoding": Decoder(model, "auto").name}
            values, name = {"error_x": [error], "bound_x": [BOUNDS[dtype]]}, devices.dtype_name(dtype)
            found.append(rows.record(path, "equality", cell, values, device, name, options.seed))
            if not error <= BOUNDS[dtype]:
                differing.append(f"{check} in {name}")
    shared.finish(path, "equality", found, tables.generic(found))
    if differing:
        raise InternalError(f"{', '.join(differing)}: differs from the slow path by more than rounding")


def difference(fast: Tensor, slow: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN where one of them is."""
    return ((fast.double() - slow.double()).abs().max() / slow.double().abs().max()).item()


def prompts(model: Transformer, n: int) -> Tensor:
    """Random ids [n, PROMPT + STEPS]."""
    ids = inputs.random_prompts(model.args.vocab_size, n, PROMPT + STEPS, 0)
    return torch.tensor(ids, device=model.norm.weight.device)


@torch.no_grad()
def stepwise(model: Transformer, decoding: str, tokens: Tensor) -> Tensor:
    """Logits [n, STEPS, V]: of the prompt, and of steps that are given the tokens after it."""
    n = len(tokens)
    with Decoder(model, decoding).start(n, PROMPT + STEPS) as run:
        last = torch.full((n,), PROMPT - 1, device=tokens.device)
        found = [run.last_logits(tokens[:, :PROMPT], last).clone()]
        for i in range(PROMPT, PROMPT + STEPS - 1):
            pos = torch.full((n, 1), i, device=tokens.device)
            found.append(run.step(tokens[:, i : i + 1], pos)[:, -1].clone())
    return torch.stack(found, 1)


def decode_step(model: Transformer) -> float:
    tokens = prompts(model, SEQUENCES)
    return difference(stepwise(model, "auto", tokens), stepwise(model, "eager", tokens))


def without_cache(model: Transformer) -> float:
    tokens = prompts(model, SEQUENCES)
    with torch.no_grad():
        slow = model(tokens)[:, PROMPT - 1 : -1]
    return difference(stepwise(model, "eager", tokens), slow)


def batch(model: Transformer) -> float:
    tokens = prompts(model, SEQUENCES)
    alone = torch.cat([stepwise(model, "auto", sequence[None]) for sequence in tokens])
    return difference(stepwise(model, "auto", tokens), alone)


def codes(config: Quantization) -> Callable[[Transformer], float]:
    def against_dequantized(model: Transformer) -> float:
        """The fast step on codes, beside plain products with the weights that the codes stand for."""
        form, errors = quantization.quantized_copy(model, config), []
        x = torch.randn(SEQUENCES, ARGS.ffn_dim, device=model.norm.weight.device, dtype=model.dtype)
        for module in form.modules():
            if isinstance(module, Quantized) and module.in_features == ARGS.ffn_dim:
                whole = module.widen(slice(0, module.out_features), x.new_empty(module.out_features, ARGS.ffn_dim))
                errors.append(difference(module(x), F.linear(x, whole)))
        return max(errors)

    return against_dequantized


def training(settings: Settings) -> Callable[[Transformer], float]:
    def against_plain(model: Transformer) -> float:
        """Gradients of adapters."""
        found = []
        for chosen in (settings, Settings()):
            adapted = copy.deepcopy(model)
            lora.apply(adapted, LoRAConfig(dropout=0.0))
            for name, weight in adapted.named_parameters():
                if name.endswith("lora_B"):  # at zero A would have no gradient
                    torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator(weight.device).manual_seed(0))
            trainer = Trainer(adapted.train(), chosen, 1)
            tokens = prompts(model, SEQUENCES)
            where = torch.arange(0, tokens.numel(), 3, device=tokens.device)
            trainer.loss_sum(Batch(tokens, None, where, tokens.flatten()[where])).backward()
            found.append(torch.cat([weight.grad.flatten() for weight in trainer.weights.values()]))
        return difference(*found)

    return against_plain


CHECKS: dict[str, Callable[[Transformer], float]] = {
    "fast decode step, eager": decode_step,
    "KV cache, whole text": without_cache,
    "batch, one by one": batch,
    "int8 product, dequantized": codes(Quantization(8)),
    "int4 product, dequantized": codes(Quantization(4, 32, zero_points=True)),
    "lean gradients, plain": training(Settings(lean=True)),
}

if __name__ == "__main__":
    cli.run(main)
