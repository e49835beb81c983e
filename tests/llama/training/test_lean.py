"""Every lean part against its plain twin, and that it keeps what it says and no more."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model
from support import batches, gap, gradients, lora_model, samples
from torch.utils.flop_counter import FlopCounterMode

from llama import Transformer, lora
from llama.errors import InputError, NonFinite
from llama.kernels.cpu import train_ops
from llama.lora import LoRALinear
from llama.model import FeedForward, RMSNorm, apply_rope, rope_frequencies, rope_table
from llama.training import lean, lean_loss
from llama.training.lean import make_lean
from llama.training.step import Settings, Trainer, checkpoint_layers, evaluate

FULL = {"optimizer": "sgd", "lr": 0.05}


def full_model(dtype: torch.dtype = torch.float32) -> Transformer:
    return random_model().to(dtype).requires_grad_(True)


def steady_lora_model(dropout: float, dtype: torch.dtype) -> Transformer:
    """Adapters a tenth as large; the others amplify any rounding until chance decides."""
    model = lora_model(dropout, dtype)
    for module in lora.layers(model).values():
        module.lora_B.data.mul_(0.1)
    return model


def train(model: Transformer, window, n_steps: int, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = Trainer(model, Settings(**settings), n_steps)
    torch.manual_seed(7)
    losses = [trainer.step(window).loss for _ in range(n_steps)]
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


def movement(after: dict[str, torch.Tensor], before: Transformer) -> dict[str, torch.Tensor]:
    return {name: after[name].double() - weight.detach().double() for name, weight in before.named_parameters()}


def saved_bytes(model: torch.nn.Module, work) -> int:
    """Bytes of the distinct storages that are kept for the backward pass, those of the weights left out."""
    storages, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = work()
    del kept
    return sum(storages.values())


# Parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm(dtype):
    """Output to the bit, gradient to rounding; kept: the input and one number a position."""
    torch.manual_seed(0)
    plain = RMSNorm(64, 1e-5).to(dtype)
    plain.weight.data.normal_()
    plain.weight.requires_grad_(False)
    slim = lean.LeanRMSNorm(plain, None)
    results = []
    for norm in (plain, slim):
        x = torch.randn(3, 17, 64, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = norm(x)
        y.backward(torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(2)))
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert gap({"x": results[1][1]}, {"x": results[0][1]}) < tolerance
    wide = torch.promote_types(dtype, torch.float32).itemsize
    assert saved_bytes(slim, lambda: slim(x * 1)) == 3 * 17 * (64 * dtype.itemsize + wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation(dtype):
    """The rotation of the model and its gradient, far out in the context too."""
    freqs_cis = rope_table(torch.tensor([[0, 1, 77, 5_000, 100_000]]), rope_frequencies(SMALL))
    results = []
    for rotate in (apply_rope, lean._Rotation.apply):
        x = torch.randn(1, 5, 4, 16, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = rotate(x, freqs_cis)
        y.backward(torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(2)))
        results.append((y.detach(), x.grad))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for found, expected in zip(results[1], results[0], strict=True):
        assert gap({"x": found}, {"x": expected}) < tolerance


def test_feed_forward():
    """A frozen SwiGLU: equal in fp64, in bfloat16 no further from that than the plain one; kept: gate and up."""
    exact = FeedForward(SMALL).double().requires_grad_(False)
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        plain = copy.deepcopy(exact).to(dtype)
        for name, part in (("plain", plain), ("lean", lean.LeanFeedForward(slim(plain), None, lean.Workspace()))):
            x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            y = part(x)
            y.backward(torch.ones_like(y))
            results[name, dtype] = {"y": y.detach(), "dx": x.grad}
            if name == "lean":
                assert saved_bytes(part, lambda part=part, x=x: part(x * 1)) == 2 * (
                    2 * 9 * SMALL.ffn_dim * dtype.itemsize
                )
    wanted = results["plain", torch.float64]
    assert gap(results["lean", torch.float64], wanted) < 1e-14
    assert gap(results["lean", torch.bfloat16], wanted) < 1.1 * gap(results["plain", torch.bfloat16], wanted)


def slim(feed_forward):
    """Its projections as lean ones, which is how make_lean hands it over."""
    feed_forward = copy.deepcopy(feed_forward)
    for name, linear in list(feed_forward.named_children()):
        setattr(feed_forward, name, lean.LeanLinear(linear, None, lean.Workspace()))
    return feed_forward


def test_a_second_backward_pass_is_refused():
    """The first one overwrites what was kept."""
    part = lean.LeanFeedForward(
        slim(FeedForward(SMALL).to(torch.bfloat16).requires_grad_(False)), None, lean.Workspace()
    )
    y = part(torch.ones(1, 4, 64, dtype=torch.bfloat16, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16])
def test_adapted_projection(dropout, base):
    """The same elements are dropped, from the same state of the generator; loss and gradients agree."""
    results = []
    for is_lean in (False, True):
        model = steady_lora_model(dropout, base)
        if is_lean:
            make_lean(model)
        model.train()
        torch.manual_seed(3)
        h = model.hidden(torch.arange(40)[None] * 7 % SMALL.vocab_size)
        h.float().square().sum().backward()
        results.append((h.detach(), gradients(model), torch.get_rng_state()))
    (h, grads, state), (lean_h, lean_grads, lean_state) = results
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[base]
    assert gap({"h": lean_h}, {"h": h}) < tolerance and gap(lean_grads, grads) < tolerance
    assert torch.equal(state, lean_state)


@pytest.mark.parametrize(("held", "kept"), [(1 << 27, 1 << 27), (5 * 512 * 8, 1 << 27), (5 * 512 * 8, 0), (1, 1)])
@pytest.mark.parametrize("is_trained", [False, True])
def test_loss(monkeypatch, held, kept, is_trained):
    """Loss and gradients against F.cross_entropy on all logits, with slices and parts that do not divide evenly."""
    monkeypatch.setattr(lean_loss, "SLICE", 100)
    monkeypatch.setattr(lean_loss, "LOGIT_BYTES", held)
    monkeypatch.setattr(lean_loss, "KEPT_BYTES", kept)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(23, 64, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(512, 64, dtype=torch.float64, generator=generator).requires_grad_(is_trained)
    labels = torch.randint(512, (23,), generator=generator)
    expected = F.cross_entropy(h @ weight.t(), labels, reduction="sum")
    (expected / 7).backward()
    wanted = {"h": h.grad, "weight": weight.grad}
    h.grad, moved = None, torch.zeros_like(weight)

    def move(part, a, b):
        start = (part.data_ptr() - weight.data_ptr()) // (64 * 8)
        moved[start : start + len(part)] += a.t() @ b

    found = lean_loss.lean_cross_entropy(h, weight, labels, move).sum()
    (found / 7).backward()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(h.grad, wanted["h"], rtol=1e-9, atol=1e-12)
    if is_trained:
        torch.testing.assert_close(moved.detach(), wanted["weight"], rtol=1e-9, atol=1e-12)


def test_loss_survives_confident_and_hopeless_logits():
    h = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    found = lean_loss.lean_cross_entropy(h, weight, torch.tensor([0, 0])).sum()
    found.backward()
    assert found.item() == 400.0 and h.grad.isfinite().all()


# Whole steps


@pytest.mark.parametrize(
    ("checkpointed", "tie"),
    [
        *(((), True), ((0, 2), False), ((0, 1, 2, 3), True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (((), False), ((0, 2), True), ((0, 1, 2, 3), False))),
    ],
)
def test_sgd_inside_the_backward_pass_is_sgd(checkpointed, tie):
    """20 steps in fp64: losses and weights are those of the plain step, with tied and untied output tables."""
    before = random_model(dataclasses.replace(SMALL, tie_word_embeddings=tie)).double().requires_grad_(True)
    window = batches([samples(3)])
    results = []
    for is_lean in (False, True):
        model = copy.deepcopy(before)
        if is_lean:
            checkpoint_layers(model, checkpointed)
        results.append(train(model, window, 20, lean=is_lean, **FULL))
    (losses, weights), (lean_losses, lean_weights) = results
    assert lean_losses == pytest.approx(losses, rel=1e-10)
    assert losses[-1] < 0.9 * losses[0]
    assert gap(movement(lean_weights, before), movement(weights, before)) < 1e-9
    assert all(weight.grad is None for weight in model.parameters())


def test_sgd_inside_the_backward_pass_in_fp32():
    before, window = full_model(), batches([samples(3)])
    results = [train(copy.deepcopy(before), window, 20, lean=is_lean, **FULL) for is_lean in (False, True)]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert gap(movement(results[1][1], before), movement(results[0][1], before)) < 1e-3


def test_bf16_autocast_of_lean_sgd_rounds_no_more_than_plain():
    """Distance of what three steps move from three steps in fp64: lean within 1.3 of plain."""
    before, window, moved = full_model(), batches([samples(3)]), []
    for kind, amp, is_lean in ((torch.float64, "none", False), (None, "bf16", False), (None, "bf16", True)):
        model = copy.deepcopy(before).to(kind)
        moved.append(movement(train(model, window, 3, lean=is_lean, amp=amp, **FULL)[1], before))
    assert 0 < gap(moved[2], moved[0]) < 1.3 * gap(moved[1], moved[0]) < 0.1


def test_lean_adapters_learn_the_same():
    """20 AdamW steps of two accumulated batches each, dropout on, in fp64."""
    window = batches([samples(2), samples(2, seed=1)])
    options = {"optimizer": "adamw", "lr": 1e-3, "clip_norm": 1.0}
    results = [train(lora_model(0.1, torch.float64), window, 20, lean=lean, **options) for lean in (False, True)]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9)
    assert results[0][0][-1] < results[0][0][0] - 0.1


@pytest.mark.parametrize(
    ("dtype", "amp"),
    [(torch.float32, "bf16"), (torch.float32, "fp16"), (torch.bfloat16, "none"), (torch.float16, "none")],
)
def test_sixteen_bit_rounding_of_lean_parts_is_no_worse(dtype, amp):
    """Distance of the gradients from those in fp64: lean within 1.1 of plain, on average over what is dropped."""
    window, distances = batches([samples(4)])[0], [0.0, 0.0]
    for seed in range(2):
        exact = None
        for kind, setting, is_lean in ((torch.float64, "none", False), (dtype, amp, False), (dtype, amp, True)):
            model = steady_lora_model(0.1, dtype)  # the exact one has the same rounded weights
            model = model.double() if kind is torch.float64 else model
            trainer = Trainer(model, Settings(lean=is_lean, amp=setting), 1)
            torch.manual_seed(seed)
            model.train()
            with trainer.autocast():
                loss = trainer.loss_sum(window)
            loss.backward()
            found = {name: grad.double() for name, grad in gradients(model).items()}
            if exact is None:
                exact = found
            else:
                distances[is_lean] += gap(found, exact)
    assert 0 < distances[True] < 1.1 * distances[False] < 0.1


def test_checkpointing_changes_no_bit_of_lean_adapters():
    results = []
    for layers in ((), (0, 1, 2, 3)):
        model = lora_model(0.3)
        checkpoint_layers(model, layers)
        results.append(train(model, batches([samples(2)]), 5, lean=True, optimizer="adamw", lr=1e-2))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True))


@pytest.mark.parametrize("is_full", [False, True])
def test_recomputing_a_lean_block_leaves_its_last_product_out(is_full):
    """FLOPs that checkpointing adds to a step: all matrix products of the blocks but w2, and attention."""
    flops = []
    for layers in ((), (0, 1, 2, 3)):
        model = full_model() if is_full else lora_model(targets=("wq", "wv"))
        checkpoint_layers(model, layers)
        trainer = Trainer(model, Settings(lean=True), 1)
        with FlopCounterMode(display=False) as counter:
            trainer.back_propagate(batches([samples(1)])[0], 1)
        flops.append(counter.get_total_flops())
    T = len(samples(1)[0].tokens)
    products = SMALL.block_linear_params() - SMALL.dim * SMALL.ffn_dim + (0 if is_full else 4 * (2 * 64 + 64 + 32))
    attention = 4 * T * T * SMALL.dim  # scores and sums, as the counter sees them: not causal
    assert flops[1] - flops[0] in (2 * 4 * T * products, 4 * (2 * T * products + attention))


def test_a_lean_model_is_the_same_model():
    """State-dict keys, evaluation and logits are those of the plain one; adapters stay adapters."""
    plain, slim = lora_model(0.1), lora_model(0.1)
    make_lean(slim)
    assert plain.state_dict().keys() == slim.state_dict().keys()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(slim.eval()(tokens), plain.eval()(tokens), rtol=1e-6, atol=1e-6)
    assert {type(m) for m in slim.modules() if isinstance(m, LoRALinear)} == {lean.LeanLoRALinear}
    window = batches([samples(3)])
    losses = [evaluate(Trainer(lora_model(), Settings(lean=is_lean), 1), window).loss for is_lean in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_lean_keeps_for_the_backward_pass():
    """16-bit base, adapters with dropout on wq and wv: 13 bf16 values a position and channel, the plain parts 24."""
    T, dim, n_heads, r = 128, SMALL.dim, SMALL.n_heads, 4
    kept = []
    for is_lean in (False, True):
        model = lora_model(0.05, torch.bfloat16, ("wq", "wv")).train()
        if is_lean:
            make_lean(model)
        kept.append(saved_bytes(model, lambda model=model: model.hidden(torch.arange(T)[None])))
    # block input and its sum with attention, normed input, 2 dropout masks of half the size, q, k, v, output, gate, up
    channels = dim * (1 + 1 + 1 + 2 * 0.5 + 1 + 2 * SMALL.n_kv_heads / n_heads + 1) + 2 * SMALL.ffn_dim
    others = 4 * (2 + n_heads + 2 * r)  # fp32: two norms, the sums of attention, what the adapters' A made
    expected = SMALL.n_layers * T * (2 * channels + others)
    assert expected <= kept[1] < 1.03 * expected  # the last norm's input, the rotations
    assert kept[0] > 1.7 * kept[1]


# What it refuses


@pytest.mark.parametrize("frozen", ["tok_embeddings.weight", "layers.2.attention.wo.weight", "norm.weight"])
def test_what_is_partly_frozen_is_refused_by_name(frozen):
    model = full_model()
    model.get_parameter(frozen).requires_grad_(False)
    with pytest.raises(InputError, match=f"but {frozen} is frozen and others are not"):
        Trainer(model, Settings(lean=True), 1)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optimizer": "adamw"}, "optimizer=adamw"),
        ({"momentum": 0.9}, "momentum=0.9"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"clip_norm": 1.0}, "clip_norm=1.0"),
        ({"amp": "fp16"}, "amp=fp16"),
    ],
)
def test_no_step_is_taken_for_another(settings, name):
    with pytest.raises(InputError, match=f"which {name} does not allow"):
        Trainer(full_model(), Settings(lean=True, **settings), 1)
    Trainer(lora_model(), Settings(lean=True, **settings), 1)  # adapters have gradients: all of it is possible


def test_no_second_batch_is_accumulated():
    with pytest.raises(ValueError, match="cannot accumulate"):
        Trainer(full_model(), Settings(lean=True), 1).step(batches([samples(1), samples(1)]))


def test_a_loss_that_is_not_finite_moves_nothing():
    model, window = full_model(), batches([samples(2)])
    trainer = Trainer(model, Settings(lean=True, lr=1.0), 1)
    model.layers[1].ffn_norm.weight.data[0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFinite, match="no weight was changed"):
        trainer.step(window)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name


def test_a_gradient_that_is_not_finite_ends_the_run():
    trainer = Trainer(full_model(), Settings(lean=True), 1)

    def spoil(_, __, y):
        if y.requires_grad:
            y.register_hook(lambda dy: dy * math.nan)

    trainer.model.layers[2].register_forward_hook(spoil)
    with pytest.raises(NonFinite, match=r"has moved weights; the snapshots are from before"):
        trainer.step(batches([samples(2)]))
    assert trainer.progress.steps == 0


@pytest.mark.parametrize("lean_mode", [True, False])
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("make", [full_model, lora_model])
def test_a_row_says_which_kernels_ran(monkeypatch, lean_mode, amp, make):
    """`in_use` says "c" where a step calls one of the kernels, and only there; without a compiler there is none."""
    called = []
    run = train_ops._run
    monkeypatch.setattr(train_ops, "_run", lambda name, *arguments: (called.append(name), run(name, *arguments)))
    trainer = Trainer(make(), Settings(**FULL, amp=amp, lean=lean_mode), 1)
    trainer.step(batches([samples(2)]))
    assert train_ops.in_use(lean_mode, trainer.device) == ("c" if called else "none")
    monkeypatch.setattr(train_ops, "library", lambda: None)
    assert train_ops.in_use(lean_mode, trainer.device) == "none"
