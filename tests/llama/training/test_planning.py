"""A step over several processes: the memory of one is that of one part, traffic what the libraries send."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import several as processes_of_tests
import torch
import torch.distributed as dist
from conftest import SMALL, random_model
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from llama import ModelArgs, Transformer, lora, parallel, processes
from llama import device as devices
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.processes import World
from llama.training import memory, several
from llama.training.memory import Shape
from llama.training.options import Settings
from llama.training.planning import Division, Plan, Step, divisions, fewest, plan, plans
from llama.training.step import Trainer

ARGS = dataclasses.replace(SMALL, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8)
ADAPTERS = LoRAConfig(targets=("wq", "wv", "wo", "w2"))
SHAPE = Shape(2, 24, 40)
FULL = Step(ARGS, torch.float32, None, Settings(optimizer="adamw"), SHAPE)
ADAPTED = Step(ARGS, torch.bfloat16, ADAPTERS, Settings(optimizer="adamw"), SHAPE, (0, 1))
AMP = dataclasses.replace(FULL, settings=Settings(optimizer="adamw", amp="bf16"), layers=(0, 1))
STEPS = pytest.mark.parametrize("step", [FULL, ADAPTED, AMP], ids=["full", "adapted", "amp"])


def whole(step: Step) -> Transformer:
    with torch.device("meta"):
        model = Transformer(step.args).to(step.dtype)
    return model


def n_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@STEPS
def test_one_process_is_the_estimate_of_one(step):
    alone = memory.estimate(*(getattr(step, field.name) for field in dataclasses.fields(step)))
    found = plan(step, Division())
    assert (found.footprint, found.sent, found.tokens) == (alone, 0, 48)
    assert divisions(1) == [Division()] and str(Division()) == "one process"
    copied = plan(step, Division(replicas=4))
    trained = alone.largest["gradients"]
    sending = alone.largest["weights"] + alone.largest["optimizer"] + 2 * trained  # a copy of the gradients travels
    assert (copied.footprint.peak, copied.tokens) == (max(alone.peak, sending), 4 * 48)


@STEPS
@pytest.mark.parametrize("n", [2, 4])
def test_a_part_has_the_weights_that_split_leaves(step, n):
    """To the byte; and of its optimizer state and gradients as many as those weights that are trained."""
    model = whole(step)
    parallel.split(model, World(n - 1, n))
    model.requires_grad_(True)
    if step.adapters is not None:
        lora.apply(model, step.adapters)
    found = plan(step, Division(tensor=n)).footprint.largest
    assert found["weights"] == n_bytes(model.parameters()) + n_bytes(model.buffers())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert found["gradients"] == n_bytes(trained)
    assert found["optimizer"] == 2 * n_bytes(trained) + 4 * len(trained)  # and a count of steps each


def test_shards_are_divided_and_a_block_and_the_root_are_whole_at_a_time():
    model, alone = whole(FULL), plan(FULL, Division()).footprint.largest
    block, everything = n_bytes(model.layers[0].parameters()), n_bytes(model.parameters())
    root = everything - 2 * block
    for n in (2, 4):
        found = plan(FULL, Division(shards=n)).footprint
        # Weights and gradients, and of a block each once more in a flat buffer; at last only the root's, so too.
        assert found.largest["gathered"] == max(2 * root + 4 * block, 3 * root)
        for name in ("weights", "gradients", "optimizer"):
            assert found.largest[name] == pytest.approx(alone[name] / n, rel=1e-3)
        assert found.largest["activations"] == alone["activations"] and found.at_peak["optimizer"] > 0
    half = plan(AMP, Division(shards=2)).footprint.largest
    assert half["gathered"] == max(root + 2 * block, 3 * root // 2) and half["copies"] == 0  # the same in 16 bits
    frozen = plan(dataclasses.replace(ADAPTED, layers=()), Division(shards=2)).footprint.largest
    adapters = lora.apply(model.to(torch.bfloat16), ADAPTERS) and n_bytes(lora.state_dict(model).values())
    assert frozen["gathered"] == root // 2 + block + 2 * adapters  # of one block of two, weights and gradients twice


@STEPS
def test_more_processes_never_need_more_each(step):
    families = [[Division(shards=n) for n in (2, 4, 8)], [Division(tensor=n) for n in (1, 2, 4)]]
    families += [[Division(tensor=2, shards=n) for n in (2, 4)], [Division(replicas=n) for n in (2, 4, 8)]]
    for family in families:
        peaks = [plan(step, division).footprint.peak for division in family]
        assert peaks == sorted(peaks, reverse=True)


def test_what_is_sent_by_hand():
    """Two batches of 2 sequences of 24 tokens with 40 labels; 64 wide, 2 blocks, of which one is recomputed."""
    step = dataclasses.replace(FULL, shape=dataclasses.replace(SHAPE, accumulation=2), layers=(1,))
    weights, table = ARGS.weight_bytes(4), 512 * 64 * 4
    assert plan(step, Division(replicas=4)).sent == 2 * 3 / 4 * weights
    # Blocks twice, the root, a table and a norm, once; and the gradients.
    blocks = weights - table - 64 * 4
    assert plan(step, Division(shards=4)).sent == 2 * 3 / 4 * (blocks + weights + weights)
    sums = (4 + 4 + 1 + 1) * 48 * 64 * 4 + 40 * 64 * 4 + 40 * 3 * 4
    assert plan(step, Division(tensor=2)).sent == 2 * sums
    adapters = (64 + 64 + 64 + 64) * 16 * 4 * 2  # of A at wq and wv, of B at wo and w2, in two layers
    halves = (4 + 4 + 2 + 1) * 48 * 64 * 2 + 40 * 64 * 2 + 40 * 3 * 4
    assert plan(ADAPTED, Division(tensor=2)).sent == halves + adapters


class Sent(TorchDispatchMode):
    """Adds up what ring algorithms would send for the collectives that run."""

    n_bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "allgather_base" in name or "reduce_scatter_base" in name:
            self.n_bytes += (dist.get_world_size() - 1) / dist.get_world_size() * max(args[0].nbytes, args[1].nbytes)
        elif "allreduce" in name:
            self.n_bytes += 2 * (dist.get_world_size() - 1) / dist.get_world_size() * n_bytes(args[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def four():
    """Process 0 of four, of which the others do not exist: collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("adapters", [None, ADAPTERS])
def test_shards_send_what_fsdp2_sends(four, adapters):
    model = random_model(ARGS).requires_grad_(True)
    if adapters is not None:
        lora.apply(model, adapters)
    mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Sent() as sent:
        model(torch.zeros(2, 24, dtype=torch.int64)).sum().backward()
    step = Step(ARGS, torch.float32, adapters, Settings(), SHAPE)
    assert sent.n_bytes == plan(step, Division(shards=4)).sent


def test_a_part_sums_its_layers_twice_forward(four):
    model = random_model(ARGS)
    parallel.split(model, World(0, 4))
    with torch.no_grad(), Sent() as sent:
        model.hidden(torch.zeros(2, 24, dtype=torch.int64), None, None)
    assert sent.n_bytes == 2 * 3 / 4 * (2 * ARGS.n_layers + 1) * 48 * 64 * 4


def test_the_fewest_are_found_and_what_does_not_fit_is_none():
    every = [found for n in (1, 2, 4) for found in plans(FULL, n) if isinstance(found, Plan)]
    for limit in sorted(found.footprint.peak for found in every):
        fitting = [found for found in every if found.footprint.peak <= limit]
        size = min(d.tensor * d.shards * d.replicas for d in (found.division for found in fitting))
        found = fewest(FULL, limit, 4)
        assert found.footprint.peak <= limit
        assert found.division.tensor * found.division.shards * found.division.replicas == size
        same = [other for other in fitting if other.division in divisions(size)]
        assert found.sent / found.tokens == min(other.sent / other.tokens for other in same)
    assert fewest(FULL, min(found.footprint.peak for found in every) - 1, 4) is None


def test_what_cannot_be_divided_says_why():
    reasons = [found[1] for found in plans(FULL, 8) if isinstance(found, tuple)]
    assert reasons == ["8 processes cannot share n_kv_heads=4 evenly; start fewer"]
    assert [str(d) for d in divisions(8)[2:]] == [
        "tensor parallel 8",
        "tensor parallel 2 x FSDP2 4",
        "tensor parallel 4 x FSDP2 2",
    ]
    lean = dataclasses.replace(FULL, settings=Settings(lean=True))
    with pytest.raises(InputError, match="lean full fine-tuning"):
        plan(lean, Division(replicas=2))
    assert plan(lean, Division()).footprint.largest["gradients"] == 0  # alone it may


def test_state_of_the_optimizer_counts_from_the_beginning():
    """The first step makes it at its end, and all others have it while activations are there."""
    model = random_model(ARGS).requires_grad_(True)
    trainer, window = Trainer(model, Settings(optimizer="adamw"), 1), Shape(4, 200, 800).window()
    first, second = (memory.track_step(trainer, window).footprint() for _ in range(2))
    assert first.peak == second.peak and first.at_peak["optimizer"] == second.at_peak["optimizer"] > 0


LARGE = dataclasses.replace(ARGS, dim=512, n_layers=8, n_heads=8, head_dim=64, vocab_size=8192)


def measured_peak(args: ModelArgs, is_sharded: bool) -> int:
    """Of two steps of this process among others, over what it held before."""
    me, device = processes.start(), torch.device("cpu")
    batch = Shape(1, 64, 64).window()[0]

    def work() -> None:
        model = Transformer.random(args, torch.float32, device, 0).requires_grad_(True)
        if is_sharded:
            several.shard(model, device)
        trainer = Trainer(model, Settings(optimizer="adamw"), 2)
        devices.return_freed_memory()
        devices.reset_peak_memory(device)
        for _ in range(2):
            for _, part in several.share_out([batch] * me.size, me, is_sharded):
                (trainer.loss_sum(part) / (me.size * 64)).backward()
            several.sum_over_processes(list(trainer.weights.values()), 0.0, False)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

    with torch.enable_grad():
        work()
        gc.collect()
        devices.return_freed_memory()
        before = devices.memory_bytes(device)
        work()
    return devices.peak_memory_bytes(device) - before


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["copies", "shares"])
def test_plans_are_what_real_processes_take(n, is_sharded):
    step = Step(LARGE, torch.float32, None, Settings(optimizer="adamw"), Shape(1, 64, 64))
    planned = plan(step, Division(shards=n) if is_sharded else Division(replicas=n)).footprint
    measured = processes_of_tests.run(n, measured_peak, LARGE, is_sharded)
    assert max(measured) == pytest.approx(planned.peak, rel=0.1)
