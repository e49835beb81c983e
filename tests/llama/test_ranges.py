"""fp16 ends at 65,504: near that, results stay finite and as exact as fp16 allows, against float64.

A P100 computes in fp16, having no bfloat16. Here the same code runs on a CPU; the kernels of a GPU differ.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from support import batches, linear_of, lora_model, samples, widened

from llama.cache import Int8Cache
from llama.model import FeedForward, RMSNorm, attend
from llama.quantization import Quantization
from llama.training.lean_loss import lean_cross_entropy
from llama.training.loss import cross_entropy
from llama.training.options import Settings
from llama.training.step import Trainer

HALF = torch.float16
EPS = torch.finfo(HALF).eps  # 1 / 1,024: two neighbouring values, relative to the lower one


def draw(*shape: int, size: float, seed: int = 0) -> torch.Tensor:
    """Normal values of this standard deviation, fp16, none infinite."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    return values.clamp(-65504, 65504).to(HALF)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    """Finite, and within a share `relative` of the largest value of the float64 result."""
    assert found.isfinite().all()
    assert (found.double() - wanted).abs().max() <= relative * wanted.abs().max()


@pytest.mark.parametrize("size", [300, 3000, 30000])
def test_a_norm_and_its_gradient_of_large_activations(size):
    norm, x = RMSNorm(2048, 1e-5), draw(4, 2048, size=size).requires_grad_()
    torch.nn.init.normal_(norm.weight, mean=1.0, generator=torch.Generator().manual_seed(1))
    norm, wide = norm.to(HALF), x.detach().double().requires_grad_()
    wanted = F.rms_norm(wide, (2048,), norm.weight.detach().double(), 1e-5)
    dy = draw(4, 2048, size=1000, seed=2)
    y = norm(x)
    y.backward(dy)
    wanted.backward(dy.double())
    assert_close(y, wanted, EPS)
    assert_close(x.grad, wide.grad, 2 * EPS)


@pytest.mark.parametrize("n_queries", [1, 5, 64])
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_of_large_scores(n_queries, is_causal):
    """Dot products of up to some 200,000, of which the softmax takes differences; with a cache and without."""
    n_keys = n_queries if is_causal else 64
    q, k, v = (
        draw(2, heads, n, 64, size=size, seed=seed)
        for seed, (heads, n, size) in enumerate([(8, n_queries, 60), (2, n_keys, 60), (2, n_keys, 1e4)])
    )
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    k_all, v_all = (x.double().repeat_interleave(4, 1) for x in (k, v))
    products = q.double() @ k_all.mT
    assert products.abs().max() > 65504
    wanted = (products / 8).masked_fill(~seen, -torch.inf).softmax(-1) @ v_all
    mask = None if is_causal else seen.expand(2, 1, -1, -1)
    assert_close(attend(q, k, v, mask), wanted, 4 * EPS)


def test_a_feed_forward_whose_product_almost_fills_the_range():
    """silu(gate) * up reaches 60,000; what w2 makes of it is small again."""
    part = FeedForward(SMALL).to(HALF).requires_grad_(False)
    for weight, value in ((part.w1.weight, 200), (part.w3.weight, 300), (part.w2.weight, 1)):
        weight.copy_(draw(*weight.shape, size=1e-3) + value / weight.shape[1])
    x = torch.ones(1, 3, SMALL.dim, dtype=HALF)
    w1, w2, w3 = (layer.weight.double() for layer in (part.w1, part.w2, part.w3))
    product = F.silu(x.double() @ w1.T) * (x.double() @ w3.T)
    assert 5e4 < product.max() < 65504
    assert_close(part(x), product @ w2.T, 4 * EPS)


CODES = [Quantization(8), Quantization(8, 64), Quantization(4, 32)]


@pytest.mark.parametrize("config", CODES, ids=["int8", "int8 in groups", "int4"])
def test_a_product_with_codes_and_its_gradient(config):
    """Sums of products of codes exceed 65,504 by far, and y and dx do not; more rows than one slab has."""
    weight = torch.randn(600, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = linear_of(weight, config)
    x, dy = draw(3, 2048, size=3000, seed=1).requires_grad_(), draw(3, 600, size=3000, seed=2)
    y = layer(x)
    y.backward(dy)
    w = widened(layer)
    assert_close(y, x.detach().double() @ w.T, 4 * EPS)
    assert_close(x.grad, dy.double() @ w, 4 * EPS)


def head_gradient(loss, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [40], and the gradient of their sum times `scale` with respect to h, of logits beyond +-10,000."""
    h = draw(40, 64, size=300, seed=1).requires_grad_()
    weight = draw(1000, 64, size=2, seed=2)
    losses = loss(h, weight, torch.arange(40) * 20)
    (losses.sum() * scale).backward()
    return losses.detach(), h.grad


def wanted_loss(scale: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    h, weight = draw(40, 64, size=300, seed=1).double().requires_grad_(), draw(1000, 64, size=2, seed=2).double()
    logits = h @ weight.T
    losses = F.cross_entropy(logits, torch.arange(40) * 20, reduction="none")
    (losses.sum() * scale).backward()
    return losses.detach(), h.grad, logits.abs().max().item()


@pytest.mark.parametrize("name", ["plain", "lean"])
def test_the_loss_of_large_logits_and_its_gradient(name):
    """Logits of 10,000 and more are rounded to 8; the loss is their difference, the gradient scaled by 1,024."""
    plain = lambda h, weight, labels: cross_entropy(lambda part: part @ weight.T, h, labels, chunk=16)  # noqa: E731
    losses, grad = head_gradient({"plain": plain, "lean": lean_cross_entropy}[name], 1024.0)
    wanted, wanted_grad, largest = wanted_loss(1024.0)
    assert 10000 < largest < 65504 and losses.dtype is torch.float32
    assert_close(losses, wanted, EPS)
    assert grad.isfinite().all()
    alike = F.cosine_similarity(grad.double(), wanted_grad, dim=1) > 0.999  # not where two logits are rounded alike
    assert alike.double().mean() > 0.9


@pytest.mark.parametrize("size", [300, 65504])
def test_an_int8_cache_of_large_keys_and_values(size):
    cache = Int8Cache(SMALL, 2, 8, HALF, "cpu")
    k, v = (draw(2, SMALL.n_kv_heads, 8, SMALL.head_dim, size=size, seed=seed) for seed in (0, 1))
    for found, wanted in zip(cache.update(0, k, v, None), (k, v), strict=True):
        assert_close(found, wanted.double(), 0.5 / 127 + EPS)


def test_a_step_whose_gradients_overflow_by_themselves_is_skipped():
    """A scale of 2^30 is too much for fp16: halved, no weight moves; the first scale that fits moves them."""
    trainer = Trainer(lora_model(), Settings(optimizer="adamw", lr=1e-2, amp="fp16"), 100)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    window, scale, n_skipped = batches([[s] for s in samples(2)]), 2.0**30, 0
    before = [weight.detach().clone() for weight in trainer.weights.values()]
    while n_skipped < 24 and trainer.step(window).skipped:
        n_skipped, scale = n_skipped + 1, scale / 2
        assert trainer.scaler.get_scale() == scale
        assert all(map(torch.equal, before, trainer.weights.values())) and not trainer.optimizer.state
    assert 0 < n_skipped < 24 and trainer.scaler.get_scale() == scale
    assert not all(map(torch.equal, before, trainer.weights.values()))
    assert all(weight.isfinite().all() for weight in trainer.weights.values())
