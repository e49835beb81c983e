"""The gradients of causal attention by the kernel: against fp64, no worse than twice PyTorch's own in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.kernels.cpu import attention_backward

pytestmark = pytest.mark.skipif(attention_backward.library() is None, reason="no AMX, or no C compiler")
BF16 = torch.bfloat16


def draw(*shape, seed):
    """Values that bfloat16 holds exactly, so that all start from the same ones."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def plain(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def results(function, given, d_out, dtype):
    """The output and the gradients of q, k and v, in fp64."""
    given = [x.to(dtype).requires_grad_() for x in given]
    out = function(*given)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, given, d_out.to(dtype)))]


@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
@pytest.mark.parametrize(("H", "K", "D"), [(4, 2, 64), (3, 3, 32), (8, 1, 128)])
def test_gradients(T, H, K, D):
    """Whole blocks and parts of them, any grouping of heads; scores so far apart that some weights vanish."""
    given = [draw(2, T, H, D, seed=0) * 3, draw(2, T, K, D, seed=1), draw(2, T, K, D, seed=2)]
    d_out = draw(2, T, H, D, seed=3)
    exact = results(plain, given, d_out, torch.float64)
    theirs = results(plain, given, d_out, BF16)
    ours = results(attention_backward.causal_attention, given, d_out, BF16)
    for found, usual, wanted in zip(ours, theirs, exact, strict=True):
        assert (found - wanted).norm() <= 2 * (usual - wanted).norm() + wanted.norm() / 512


def test_the_same_bits_every_time():
    given, d_out = [draw(2, 70, heads, 64, seed=heads) for heads in (8, 4, 4)], draw(2, 70, 8, 64, seed=9)
    first, second = (results(attention_backward.causal_attention, given, d_out, BF16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    given, d_out = [draw(1, 40, heads, 64, seed=heads) for heads in (2, 1, 1)], draw(1, 40, 2, 64, seed=9)
    d_out[0, 39, 1, 5] = bad
    _, dq, dk, dv = results(attention_backward.causal_attention, given, d_out, BF16)
    assert not dq[0, 39, 1].isfinite().all() and dq[0, 39, 0].isfinite().all() and dq[0, 38].isfinite().all()
    assert not dk.isfinite().all() and not dv.isfinite().all()


def test_fake_tensors_are_not_read():
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 40, heads, 64, dtype=BF16, requires_grad=True) for heads in (2, 1, 1))
        attention_backward.causal_attention(q, k, v).sum().backward()
        assert q.grad.shape == q.shape and k.grad.shape == k.shape
