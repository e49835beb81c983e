"""Preferences: loss and gradients of the paper's formula, the reference that never moves, and runs of pairs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import random
import signal
import sys
from pathlib import Path

import pytest
import several
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, SMALL, TINY, random_model
from support import gap, gradients, lora_model

import finetuning
from data.samples import Sample
from llama import Transformer, checkpoint, cli, lora, processes
from llama.checkpoint import hf
from llama.config import ModelArgs
from llama.errors import InputError, Stopped
from llama.lora import LoRAConfig
from llama.training import dpo, snapshot
from llama.training import several as over_processes
from llama.training import verdict as verdicts
from llama.training.batch import Batch, collate
from llama.training.options import TrainingOptions
from llama.training.run import Run, StopSignal
from llama.training.step import checkpoint_layers

Pair = tuple[Sample, Sample]
LORA = {"objective": "dpo", "optimizer": "sgd", "lr": 0.1, "accumulation": 8}
FULL = LORA | {"lora": False, "accumulation": 1}


def pairs(n: int, seed: int = 0) -> list[Pair]:
    """Random ids: a prompt of 1 to 9 tokens, two answers of 1 to 30."""
    rng, made = random.Random(seed), []
    for i in range(n):
        prompt = tuple(rng.randrange(SMALL.vocab_size) for _ in range(rng.randint(1, 9)))
        sides = []
        for side in ("chosen", "rejected"):
            ids = prompt + tuple(rng.randrange(SMALL.vocab_size) for _ in range(rng.randint(1, 30)))
            sides.append(Sample(f"record {i}, {side}", ids, (range(len(prompt), len(ids)),)))
        made.append(tuple(sides))
    return made


POOL = pairs(6)


def moved(model: Transformer) -> Transformer:
    """Away from its start, so that the margins are not 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype), alpha=0.02)
    return model


def trainer_of(model: Transformer, pool: list[Pair] = POOL, **settings) -> dpo.PreferenceTrainer:
    """A trainer whose reference is the model as it is now; the model has moved since."""
    names = [sample.name for pair in pool for sample in pair]
    trainer = dpo.PreferenceTrainer(model, TrainingOptions(**LORA | settings), 1, names)
    dpo.begin(trainer, [collate([pair]) for pair in pool])
    moved(model)
    return trainer


def windows(pool: list[Pair], *cuts: int) -> list[Batch]:
    ends = [0, *cuts, len(pool)]
    return [collate(pool[start:stop]) for start, stop in itertools.pairwise(ends)]


def step(trainer: dpo.PreferenceTrainer, window: list[Batch]):
    """The report of a step and the gradient that its optimizer was given."""
    seen = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: weight.grad.clone() for name, weight in trainer.weights.items()})
    )
    return trainer.step(window), seen


def log_prob(model: Transformer, sample: Sample) -> torch.Tensor:
    """By itself, from all logits."""
    tokens = torch.tensor(sample.tokens)
    picked = model(tokens[None])[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return picked[sample.n_prompt - 1 :].sum()


def formula(model: Transformer, reference: Transformer, pool: list[Pair], beta: float) -> torch.Tensor:
    """Equation 7 of the paper, word for word."""
    terms = []
    for chosen, rejected in pool:
        with torch.no_grad():
            ref_chosen, ref_rejected = log_prob(reference, chosen), log_prob(reference, rejected)
        ratio_chosen, ratio_rejected = log_prob(model, chosen) - ref_chosen, log_prob(model, rejected) - ref_rejected
        terms.append(-torch.log(torch.sigmoid(beta * ratio_chosen - beta * ratio_rejected)))
    return torch.stack(terms).mean()


# The loss


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_and_gradients_are_those_of_the_paper(beta):
    model = random_model().double()
    reference = copy.deepcopy(model)
    trainer = trainer_of(model, beta=beta, lora=False)
    expected = formula(model, reference, POOL, beta)
    expected.backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    report, found = step(trainer, windows(POOL, 2, 3))
    assert report.loss == pytest.approx(expected.item(), rel=1e-12)
    assert gap(found, wanted) < 1e-10
    assert set(report.figures) == {"margin", "reward_accuracy"} and report.figures["margin"] != 0


@pytest.mark.filterwarnings("ignore")  # of its own
def test_loss_and_gradients_are_those_of_trl(tmp_path):
    """Its DPOTrainer on the same weights and ids, in fp32 (where it is installed; it is no requirement)."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = random_model()
    checkpoint.save(model, tmp_path, "hf")
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trainer = trainer_of(model.requires_grad_(True), lora=False)
    checkpoint.save(model, tmp_path / "moved", "hf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    report, found = step(trainer, windows(POOL, 2))

    class Tokenized(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    records = [
        {"prompt_ids": list(a.tokens[: a.n_prompt])}
        | {f"{side}_ids": list(s.tokens[s.n_prompt :]) for side, s in (("chosen", a), ("rejected", b))}
        for a, b in POOL
    ]
    settings = {"output_dir": str(tmp_path / "trl"), "beta": 0.1, "report_to": [], "use_cpu": True, "bf16": False}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="a", pad_token="a")
    other = Tokenized(
        theirs,
        reference,
        trl.DPOConfig(**settings, gradient_checkpointing=False),
        train_dataset=datasets.Dataset(datasets.table.InMemoryTable.from_pylist(records), fingerprint="pairs"),
        processing_class=tokenizer,
    )
    loss = other.compute_loss(theirs.train(), other.data_collator(records))
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    grads, names = {name: weight.grad for name, weight in theirs.named_parameters()}, hf.names_of(SMALL)
    wanted = {name: hf.swap_rotary_order(grads[names[name]], name, SMALL, to_hf=False) for name in found}
    assert gap(found, wanted) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_any_partition_of_pairs_has_the_gradient_of_one_batch(dtype, tolerance):
    """Each pair counts the same, however a window is cut into batches and whatever their lengths."""
    model = lora_model(dtype=dtype)
    trainer = trainer_of(model, lr=0.0)
    whole, wanted = step(trainer, windows(POOL))
    for cuts in ((1,), (5,), (2, 4), (1, 2, 3, 4, 5)):
        report, found = step(trainer, windows(POOL, *cuts))
        assert report.loss == pytest.approx(whole.loss, rel=max(tolerance, 1e-6))
        assert gap(found, wanted) <= tolerance
        assert report.figures["margin"] == pytest.approx(whole.figures["margin"], rel=1e-4)
        assert report.figures["reward_accuracy"] == whole.figures["reward_accuracy"]


def test_a_mean_of_means_is_another_gradient():
    trainer = trainer_of(lora_model().double(), lr=0.0)
    course = trainer_of(lora_model().double(), lr=0.0, loss_normalization="microbatch")
    _, pairs_alike = step(trainer, windows(POOL, 1))
    _, batches_alike = step(course, windows(POOL, 1))
    assert gap(batches_alike, pairs_alike) > 0.05


@pytest.mark.parametrize("is_lora", [True, False])
@pytest.mark.parametrize("way", ["checkpointed", "lean", "both"])
def test_lean_and_recomputed_steps_on_pairs_are_the_plain_step(way, is_lora):
    """In fp64, after three steps: of all weights, lean SGD happens inside the backward pass."""
    found = []
    for is_plain in (True, False):
        model = lora_model(dropout=0.1).double() if is_lora else random_model().double().requires_grad_(True)
        if not is_plain and way != "lean":
            checkpoint_layers(model, (0, 1, 3))
        is_lean = not is_plain and way != "checkpointed"
        trainer = trainer_of(model, lora=is_lora, accumulation=1, lean=is_lean, lr=1e-2)
        losses = [trainer.step(windows(POOL)).loss for _ in range(3)]
        found.append((losses, {name: weight.detach() for name, weight in trainer.weights.items()}))
    (losses, weights), (others, other_weights) = found
    assert others == pytest.approx(losses, rel=1e-9) and losses[2] != losses[0]
    assert gap(other_weights, weights) < 1e-10


@pytest.mark.parametrize("kept", [1, 1 << 27])
def test_a_lean_table_that_is_trained_moves_by_the_gradient_of_each_position(kept, monkeypatch):
    """Also where the logits are computed again, after a part of the table has moved."""
    monkeypatch.setattr("llama.training.lean_loss.KEPT_BYTES", kept)
    monkeypatch.setattr("llama.training.lean_loss.SLICE", 100)
    tables = []
    for is_lean in (False, True):
        model = random_model(dataclasses.replace(SMALL, tie_word_embeddings=False)).double().requires_grad_(True)
        trainer_of(model, **FULL, lean=is_lean).step(windows(POOL))
        tables.append(model.output.weight.detach())
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_is_near_and_starts_from_nothing(amp):
    """The reference is computed under the same autocast, so that the loss starts at ln 2; fp16 is scaled."""
    trainer = trainer_of(lora_model(), amp=amp)
    plain = trainer_of(lora_model())
    assert trainer.step(windows(POOL, 3)).loss == pytest.approx(plain.step(windows(POOL, 3)).loss, rel=0.02)
    fresh = random_model()
    lora.apply(fresh, LoRAConfig())
    start = dpo.PreferenceTrainer(fresh, TrainingOptions(**LORA, amp=amp), 1, trainer.names)
    dpo.begin(start, [collate([pair]) for pair in POOL])
    report = start.step([collate([pair]) for pair in POOL])
    assert report.loss == pytest.approx(0.693147, abs=0.01) and not report.skipped
    assert start.scaler.is_enabled() == (amp == "fp16")


# The reference


def test_the_reference_is_the_base_to_the_bit():
    """That of new adapters is the model without them; and with dropout on the reference has none."""
    base, model = random_model(), random_model()
    lora.apply(model, LoRAConfig(r=4, dropout=0.5))
    trainer = trainer_of(model)
    alone = dpo.PreferenceTrainer(base.requires_grad_(True), TrainingOptions(**LORA), 1, trainer.names)
    one_by_one, log_ref = [collate([pair]) for pair in POOL], torch.tensor([*trainer.reference.values()])
    assert torch.equal(dpo.log_probs(alone, one_by_one).flatten(), log_ref)
    assert not torch.equal(dpo.log_probs(trainer, one_by_one).flatten(), log_ref)  # the model has moved since
    for module in lora.layers(model).values():
        module.is_merged = True  # adds no update: the adapter is off
    assert torch.equal(dpo.log_probs(trainer, one_by_one).flatten(), log_ref)


def test_the_reference_stays_while_the_model_moves_and_is_part_of_a_snapshot():
    trainer = trainer_of(lora_model())
    before = dict(trainer.reference)
    trainer.step(windows(POOL))
    content = trainer.snapshot()
    other = trainer_of(lora_model())
    other.set_reference(torch.zeros(2 * len(POOL)))
    other.restore(content)
    assert other.reference == trainer.reference == before
    assert other.step(windows(POOL, 1)).loss == trainer.step(windows(POOL, 1)).loss
    fewer = dpo.PreferenceTrainer(lora_model(), TrainingOptions(**LORA), 1, trainer.names[:4])
    with pytest.raises(InputError, match="reference: has 12 log-probabilities, expected 4"):
        fewer.restore(content)


# Held-out pairs


def test_figures_of_held_out_pairs():
    before = dpo.Preferences(chosen=[-5.0, -5, -5, -5] * 5, rejected=[-4.0, -4, -6, -4] * 5)
    after = dpo.Preferences(chosen=[-4.0, -5, -5, -6] * 5, rejected=[-6.0, -5.5, -6, -4] * 5)
    found = dpo.figures(before, after, 0.5)
    mean = {name.removeprefix("held_out_"): value[0] for name, value in found.items()}
    assert mean["preferred_before"] == 0.25 and mean["preferred"] == 0.75 and mean["preferred_rise"] == 0.5
    assert mean["reward_accuracy"] == 0.5  # a margin of 0 is none
    assert mean["margin"] == pytest.approx(0.5 * (3 + 1.5 + 0 - 1) / 4)
    assert mean["chosen_gain"] == 0.0 and mean["rejected_gain"] == pytest.approx((-2 - 1.5 + 0 + 0) / 4)
    assert all(low <= value <= high and low < high for value, low, high in found.values())
    assert set(dpo.UNITS) == set(mean)
    first, *_ = dpo.describe(found, 20)
    assert first.startswith("Of 20 held-out pairs the chosen answer was the likelier one in 25.0 [")


def test_evaluation_starts_at_ln_2():
    trainer = trainer_of(lora_model())
    held_out = [collate([pair]) for pair in pairs(4, seed=9)]
    start = dpo.evaluate(trainer, held_out, None)
    assert start.sums == pytest.approx([0.693147] * 4) and start.loss == pytest.approx(0.693147)
    moved(trainer.model)
    after = dpo.evaluate(trainer, held_out, start)
    margins = torch.tensor(after.margins(start, 0.1))
    assert after.sums == pytest.approx((-F.logsigmoid(margins)).tolist()) and after.loss != start.loss


# Runs


@contextlib.contextmanager
def quick():
    """What is tested is the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "ANSWER_LEN", 3)
        patch.setattr(finetuning, "INSTRUCTIONS", ("Say fox.",))
        yield patch


FLAGS = {"objective": "dpo", "held_out": 10, "accumulation": 3, "epochs": 2, "save_every": 1, "optimizer": "adamw"}
FLAGS |= {"lr": 1e-2, "export": "none", "device": "cpu", "checkpointing": "1,3", "dropout": 0.1, "beta": 0.3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small random model with the embedded tokenizer, and some pairs."""
    work = tmp_path_factory.mktemp("pairs")
    args = ModelArgs(**{**vars(SMALL), "vocab_size": 4096, "dim": 32, "head_dim": 8})
    checkpoint.save(random_model(args), work / "base", "meta", TINY / "tokenizer.model")
    records = json.loads((TINY / "pairs_200.json").read_text())[:18]
    (work / "pairs.json").write_text(json.dumps(records))
    return work


def call(monkeypatch, capsys, **options) -> tuple[int, str, str]:
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["finetuning.py", *arguments])
    with quick(), pytest.raises(SystemExit) as exit_:
        cli.run(finetuning.main)
    return exit_.value.code, *capsys.readouterr()


class StopAfter(StopSignal):
    """As if a signal came after some steps."""

    def __init__(self, run: Run, step: int) -> None:
        super().__init__()
        self.run, self.step, self.received = run, step, signal.SIGTERM

    def __call__(self) -> bool:
        return self.run.trainer.progress.windows >= self.step


def stopped(base: Path, root: Path, step: int, **changes) -> None:
    """A run that is stopped after some steps."""
    places = {"ckpt_dir": str(base / "base"), "data": str(base / "pairs.json"), "out_dir": str(root)}
    options = TrainingOptions.resolve(FLAGS | places | changes)
    with quick():
        files = finetuning.directory_of(options.ckpt_dir), finetuning.tokenizer_file(options)
        run = Run(options, *files, *finetuning.read_data(options))
        with snapshot.lock(root), contextlib.suppress(Stopped):
            run.begin()
            stop = StopAfter(run, step)
            finetuning.train(run, stop)
            run.save_and_stop(stop)


WAYS = {
    "adapters": {"amp": "fp16"},
    "adapters, lean": {"amp": "bf16", "lean": True},
    "all weights": {"lora": False, "lr": 1e-3},
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "adapters")) for way in WAYS])
def test_a_run_of_pairs_resumes_to_the_same_bytes(way, base, tmp_path, monkeypatch, capsys):
    """The losses need the log-probabilities of the start, which a resumed run does not compute again."""
    given = FLAGS | {"ckpt_dir": base / "base", "data": base / "pairs.json"} | WAYS[way]
    code, out, err = call(monkeypatch, capsys, **given, out_dir=tmp_path / "whole", results=tmp_path / "rows.jsonl")
    assert code == 0, err
    assert "8 pairs, 10 held out" in out and "averaged over pairs, of dpo with beta 0.3" in out
    stopped(base, tmp_path / "run", 3, **WAYS[way])
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "begin", None)
        code, again, err = call(monkeypatch, capsys, resume=True, out_dir=tmp_path / "run")
    assert code == 0, err
    written = []
    for root in (tmp_path / "whole", tmp_path / "run"):
        last = root / "snapshots" / "step-00000006"
        written.append(
            [(root / "loss.jsonl").read_bytes(), *(p.read_bytes() for p in sorted(last.glob("*.safetensors")))]
        )
    assert written[0] == written[1]
    for text in ("Held-out loss 0.6931 before", "Of 10 held-out pairs", "mean margin of"):
        assert text in out and text in again
    lines = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    assert all({"margin", "reward_accuracy"} <= line.keys() for line in lines if "loss" in line)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["cell"]["objective"] == "dpo" and row["cell"]["beta"] == 0.3
    for name, unit in dpo.UNITS.items():
        found = [row["metrics"][f"held_out_{name}{part}_{unit}"]["median"] for part in ("", "_low", "_high")]
        assert found == summary[f"held_out_{name}"]


REFUSED = {
    "--packing=True with --objective=dpo: a pair is a sequence already": {"packing": True},
    "--beta=0.0: expected more than 0": {"beta": 0},
    "--beta=0.5 is of --objective=dpo; leave it out": {"objective": "answers", "beta": 0.5},
    "--objective=rlhf: expected one of answers, dpo": {"objective": "rlhf"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_pairs_is_refused_in_one_line(message, base, tmp_path, monkeypatch, capsys):
    given = {"objective": "dpo", "ckpt_dir": base / "base", "data": base / "pairs.json", "out_dir": tmp_path / "run"}
    code, _, err = call(monkeypatch, capsys, **given | REFUSED[message])
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_bad_pairs_are_refused_in_one_line(base, tmp_path, monkeypatch, capsys):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b"}]))
    given = {"objective": "dpo", "data": path, "out_dir": tmp_path / "run", "ckpt_dir": base / "base"}
    code, _, err = call(monkeypatch, capsys, **given)
    assert code == 2 and f"{path}:record 1 has the fields prompt, chosen; expected " in err
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "b"}]))
    code, _, err = call(monkeypatch, capsys, **given)
    assert code == 2 and "1 left out (record 1: chosen and rejected are the same)" in err
    assert len(err.splitlines()) == 1


def test_each_model_has_its_own_pairs():
    for ckpt_dir, folder in ((None, TINY), ("models/any", ROOT / "data")):
        options = TrainingOptions(objective="dpo", ckpt_dir=ckpt_dir)
        assert finetuning.data_file(options).samefile(folder / "pairs_200.json")


# Several processes


class Steps(Run):
    """Two steps of a run without its directory, on windows of three batches and one."""

    def __init__(self, options: TrainingOptions) -> None:
        self.me, self.options, self.total, self.eval_every = processes.start(), options, 2, 2
        self.windows = [windows(POOL, 2, 4), windows(POOL[:1])]
        self.model, self.device, self.reports = random_model().double(), torch.device("cpu"), []
        lora.apply(self.model, LoRAConfig(4, 8.0, 0.1), 0)
        if options.shard and self.me.size > 1:
            over_processes.shard(self.model, self.device)
        names = [sample.name for pair in POOL for sample in pair]
        self.trainer = dpo.PreferenceTrainer(self.model, options, 2, names)
        dpo.begin(self.trainer, [collate([pair]) for pair in POOL])

    def window(self) -> list[Batch]:
        return self.windows[self.trainer.progress.windows]

    def log_step(self, report, names, bar) -> None:
        self.reports.append((report.loss, *report.figures.values()))

    def start_clock(self) -> None: ...

    def save(self) -> None: ...


def two_steps() -> list:
    found = []
    for is_shared in (False, True):
        run = Steps(TrainingOptions(**LORA | {"lr": 1.0, "shard": is_shared}))
        finetuning.train(run, StopSignal())
        weights = {name: over_processes.whole(weight.detach()) for name, weight in run.trainer.weights.items()}
        found.append((run.reports, weights, run.trainer.reference))
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_processes_train_the_pairs_of_one():
    """Copies, of which each computes the reference of some pairs, and shares, which go through all of them together."""
    alone = two_steps()
    for result in several.run(2, two_steps):
        for (reports, weights, reference), (found, others, other_reference) in zip(alone, result, strict=True):
            assert [list(report) for report in found] == [pytest.approx(list(report), rel=1e-9) for report in reports]
            assert other_reference == pytest.approx(reference, rel=1e-12)
            assert gap(others, weights) < 1e-10


# What a model learns


def prefers_more(tmp_path, monkeypatch, capsys, **options) -> dict:
    given = {"objective": "dpo", "preset": "learn", "export": "none", "out_dir": tmp_path / "run", "device": "cpu"}
    code, out, err = call(monkeypatch, capsys, **given | options)
    assert code == 0, err
    assert "It learned." in out
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def test_the_embedded_model_learns_what_is_preferred(tmp_path, monkeypatch, capsys):
    """A few steps on a few pairs; the whole run is the slow test below."""
    (tmp_path / "pairs.json").write_text(json.dumps(json.loads((TINY / "pairs_200.json").read_text())[:45]))
    given = {"data": tmp_path / "pairs.json", "max_steps": 4, "held_out": 15, "lr": 3e-3}
    summary = prefers_more(tmp_path, monkeypatch, capsys, **given)
    assert summary["held_out_margin"][1] > 0 and summary["held_out_reward_accuracy"][1] > 0.5
    assert summary["held_out_preferred"][0] >= summary["held_out_preferred_before"][0]


@pytest.mark.slow
def test_the_embedded_model_learns_to_prefer_whole_right_sentences(tmp_path, monkeypatch, capsys):
    summary = prefers_more(tmp_path, monkeypatch, capsys, held_out=60)
    assert summary["held_out_preferred_rise"][1] > 0 and summary["held_out_preferred"][0] > 0.9
