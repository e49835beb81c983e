"""Each fused operation against its plain twin, both against fp64: no worse than twice the twin's rounding."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.kernels.cpu import train_ops

needs_kernels = pytest.mark.skipif(train_ops.library() is None, reason="no AVX-512 with bfloat16, or no C compiler")
BF16 = torch.bfloat16


def draw(*shape, dtype=torch.float64, seed=0, scale=1.0):
    """Values that bfloat16 holds exactly, so that all formats start from the same ones."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(BF16).to(dtype)


def require_accurate(monkeypatch, operation, **tensors):
    """operation(**tensors) in bfloat16: fused and plain, against fp64. Tensors named *_wide are fp32 in both.

    The fused result may err by twice what the plain one does, or by one rounding to bfloat16 where that is exact.
    """

    def run(dtype, wide):
        made = {
            name: tensor.to(wide if name.endswith("_wide") else dtype) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in tensors.items()
        }
        results = operation(**{name: tensor.clone() for name, tensor in made.items()})
        return results if isinstance(results, tuple) else (results,)

    calls = []
    library = train_ops.library()
    kernels = {name: getattr(library, name) for name in train_ops.SIGNATURES}
    spy = type(
        "Spy", (), {name: staticmethod(lambda *a, f=f, n=name: (calls.append(n), f(*a))) for name, f in kernels.items()}
    )
    exact = run(torch.float64, torch.float64)
    monkeypatch.setattr(train_ops, "library", lambda: spy)
    fused = run(BF16, torch.float32)
    assert calls, "no kernel was called"
    monkeypatch.setattr(train_ops, "library", lambda: None)
    before = len(calls)
    plain = run(BF16, torch.float32)
    assert len(calls) == before
    for ours, theirs, wanted in zip(fused, plain, exact, strict=True):
        error, allowed = ((found.double() - wanted).norm() for found in (ours, theirs))
        assert ours.shape == theirs.shape and error <= 2 * allowed + wanted.norm() / 512
    monkeypatch.undo()


SHAPES = [(1, 16), (3, 48), (2, 5, 64), (17, 2048)]


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("widths", ["", "x", "x_w", "x_w_dy", "w"])
def test_rms_norm(monkeypatch, shape, widths):
    """For bfloat16 throughout, and for the fp32 residuals and weights of autocast; the weight's gradient too."""
    names = {key: key + "_wide" if key in widths.split("_") else key for key in ("x", "w", "dy")}
    tensors = {names["x"]: draw(*shape), names["w"]: draw(shape[-1], seed=1), names["dy"]: draw(*shape, seed=2)}

    def operation(**given):
        x, w, dy = (given[names[key]] for key in ("x", "w", "dy"))
        narrow = torch.float64 if x.dtype is torch.float64 else BF16
        y, inverse = train_ops.rms_norm(x, w, 1e-5, narrow)
        return (y, inverse, *train_ops.rms_norm_backward(x, w, inverse, dy, True))

    require_accurate(monkeypatch, operation, **tensors)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(monkeypatch, shape):
    """Also where e^-x overflows, and where the results lie over the arguments."""
    gate = draw(*shape, scale=20.0)
    gate.view(-1)[:4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    tensors = {"gate": gate, "up": draw(*shape, seed=1), "d": draw(*shape, seed=2)}

    def operation(gate, up, d):
        return (train_ops.swiglu(gate, up), *train_ops.swiglu_backward(d, gate, up))

    require_accurate(monkeypatch, operation, **tensors)


@needs_kernels
@pytest.mark.parametrize("sign", [1, -1])
def test_rotate(monkeypatch, sign):
    angles = draw(2, 7, 1, 8, scale=3.0)
    freqs_cis = torch.stack((angles.cos(), angles.sin()), dim=-1)
    rotate = lambda x, freqs_wide: train_ops.rotate(x, freqs_wide, sign)  # noqa: E731
    require_accurate(monkeypatch, rotate, x=draw(2, 7, 3, 16), freqs_wide=freqs_cis.float().double())


@needs_kernels
@pytest.mark.parametrize("rank", [1, 8, 11])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_lora(monkeypatch, rank, has_dropout):
    """Ranks that are and are not multiples of what the registers hold; dropped elements stay as they are."""
    x, a, y = draw(2, 9, 48), draw(rank, 48, seed=1), draw(2, 9, 48, seed=2)
    marks = {"drop": torch.rand(2, 9, 48, generator=torch.Generator().manual_seed(3)) < 0.3} if has_dropout else {}

    def operation(x, a_wide, y, drop=None):
        low = train_ops.lora_down(x, drop, a_wide, 1.25)
        raised = train_ops.lora_up_(y, low, a_wide, drop, 0.5)
        return low, raised, train_ops.lora_outer(low, x, drop, 2.0)

    require_accurate(monkeypatch, operation, x=x, a_wide=a, y=y, **marks)
    if has_dropout:
        after = operation(x.to(BF16), a.float(), y.to(BF16), marks["drop"])[1]
        assert torch.equal(after[marks["drop"]], y.to(BF16)[marks["drop"]])


@needs_kernels
@pytest.mark.parametrize("size", [1, 5, 16, 37, 1000])
def test_softmax(monkeypatch, size):
    """Any number of columns; labels in other parts of the row; logits a hundred apart."""
    labels = torch.tensor([0, size - 1, -1, size, -5000, size // 2])

    def operation(z, labels):
        lse = train_ops.logsumexp(z)
        return lse, train_ops.softmax_gradient_(z, lse, labels, 1024.0)

    z = draw(6, size, scale=5.0)
    z[1] *= 20
    require_accurate(monkeypatch, operation, z=z, labels=labels)


@needs_kernels
def test_sgd(monkeypatch):
    def operation(w_wide, g):
        train_ops.sgd_(w_wide, g, 0.1)
        return w_wide

    require_accurate(monkeypatch, operation, w_wide=draw(33, 48), g=draw(33, 48, seed=1))


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    """A step that is not finite must be noticed: nothing may turn NaN or infinity into a number."""
    x, ones = torch.zeros(2, 16, dtype=BF16), torch.ones(16, dtype=BF16)
    x[1, 3] = bad
    y, _ = train_ops.rms_norm(x, ones, 1e-5, BF16)
    found = (
        y,
        train_ops.rms_norm_backward(torch.ones_like(x), ones, torch.ones(2, 1), x, True)[0],
        train_ops.swiglu(torch.ones_like(x), x),
        train_ops.swiglu_backward(x, torch.ones_like(x), torch.ones_like(x))[1],
        train_ops.lora_down(x, None, torch.ones(1, 16), 1.0),
        train_ops.logsumexp(x)[:, None],
    )
    for result in found:
        assert result[0].isfinite().all() and not result[1].isfinite().all()


@needs_kernels
def test_fake_tensors_are_not_read():
    """The estimate of memory runs the same code on tensors without data: outputs of the right kind, and no crash."""
    with FakeTensorMode():
        x = torch.empty(4, 32, dtype=BF16)
        y, inverse = train_ops.rms_norm(x, torch.empty(32), 1e-5, BF16)
        low = train_ops.lora_down(y, None, torch.empty(8, 32), 1.0)
        lse = train_ops.logsumexp(train_ops.swiglu(x, y))
    assert (y.dtype, inverse.shape, low.shape, low.dtype, lse.shape) == (BF16, (4, 1), (4, 8), torch.float32, (4,))
