"""Tables 2 and 3: every number is a row's, only steps are timed, and what is compared does the same work."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL
from support import CUDA, FakeGPU

import benchmark_finetuning
from benchmark_finetuning import COURSE, SETS, Options, StepCell, StepRunner, keep
from benchmarks import hardware
from benchmarks.rows import Row, read_file, read_folder
from llama import Transformer, checkpoint, cli
from llama import device as devices
from llama.config import PRESETS
from llama.errors import InputError, InternalError
from llama.kernels.cpu import train_ops
from llama.training import planning
from reports import charts, render, tables

OPTIONS = Options(model="tiny", device="cpu")


def made_row(cell: StepCell, peak: float, step: float, **kinds: float) -> Row:
    most = {f"{name}_most_mb": kinds.get(name, 0.0) for name in benchmark_finetuning.memory.CATEGORIES}
    run = {
        "peak_memory_mb": peak,
        "step_s": step,
        "step_tflop": step / 2,
        "expected_peak_memory_mb": peak * 0.9,
        **most,
    }
    return keep(None, OPTIONS, cell, [run] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("cells", ["half", "course,lean,table2"])
def test_it_measures_every_cell(tmp_path, cells):
    """A whole small benchmark, by its command line."""
    flags = f"--model=tiny-draft --cells={cells} --seq_len=24 --repeats=2 --device=cpu".split()
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figures={tmp_path}"]
    command = [sys.executable, "benchmark_finetuning.py", *flags, *paths]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = read_file(tmp_path / "rows.jsonl")
    names = [field.name for field in dataclasses.fields(StepCell)]
    found = {StepCell(**{name: row.cell[name] for name in names}): row.metrics for row in rows}
    assert found.keys() == {cell for name in cells.split(",") for cell in SETS[name]}
    weights = PRESETS["tiny-draft"].weight_bytes(4) / 1e6
    for cell, metrics in found.items():
        value = {name: spread["median"] for name, spread in metrics.items()}
        assert all(spread["n"] == 2 for spread in metrics.values())
        kinds = benchmark_finetuning.memory.CATEGORIES
        total = sum(value[f"{name}_at_peak_mb"] for name in kinds)
        assert total == pytest.approx(value["expected_peak_memory_mb"], rel=1e-4)  # some ids are views of longer ones
        assert value["weights_most_mb"] == pytest.approx(weights * (0.5 if cell.half else 1), rel=0.2)
        assert value["step_s"] > 0 and value["floor_step_s"] > 0 and value["load_s"] > 0
        assert (value["copies_most_mb"] > 0) == cell.amp
        assert (value["gradients_most_mb"] > 0.9 * weights) == (not cell.lora and not cell.lean)
        if cell.checkpointing:
            plain = found[dataclasses.replace(cell, checkpointing=False)]
            # A third more at most; much of so small a model is its output table, which nothing recomputes.
            assert 1.05 < value["step_tflop"] / plain["step_tflop"]["median"] < 1.45
    assert (tmp_path / "steps-time-tiny-draft-cpu.svg").read_text().startswith("<svg")
    shown = tables.table_3(rows) + tables.table_2(rows) + tables.step_details(rows)
    assert render.markdown(shown) in run.stdout


@pytest.mark.slow
def test_the_peers_take_the_same_step(tmp_path):
    """Their first loss is ours, or the benchmark would end."""
    pytest.importorskip("peft")
    flags = "--model=tiny --cells=half,course --seq_len=24 --repeats=1 --device=cpu --against=peers".split()
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figures={tmp_path}"]
    subprocess.run([sys.executable, "benchmark_finetuning.py", *flags, *paths], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {"transformers", "peft"} < {row["cell"]["engine"] for row in rows}


def test_one_cell_by_itself(tmp_path):
    """What a cell's process does, in this one: every figure that tables and charts take, and which kernels ran."""
    checkpoint.save(Transformer.random(PRESETS["tiny-draft"], torch.bfloat16), tmp_path / "weights")
    rows = []
    options = Options(model="tiny-draft", seq_len=24, device="cpu")
    for cell in (StepCell(lora=True, half=True, lean=True), StepCell(amp=True)):
        runner = StepRunner(options, cell, tmp_path / "weights")
        runner.prepare()
        runs = [runner.measure(), runner.measure()]
        assert runs[0]["first_loss_nats"] == runs[1]["first_loss_nats"] == pytest.approx(8.4, abs=0.3)
        assert runs[0]["step_s"] > 0 and runs[0]["step_over_floor_x"] > 0
        rows.append(keep(tmp_path / "rows.jsonl", options, cell, runs))
    assert [row.data["dtype"] for row in rows] == ["bfloat16", "float32"]
    assert [row.median("copies_most_mb") > 0 for row in rows] == [False, True]
    assert [row.cell["kernels"] for row in rows] == ["c" if train_ops.library() else "none", "none"]
    assert charts.steps(rows).keys() == {"steps-memory-tiny-draft-cpu", "steps-time-tiny-draft-cpu"}
    assert "| llama, lean + 16-bit base + LoRA |" in render.markdown(tables.step_details(rows))


def test_a_step_with_kernels_and_one_without_are_two_cells(tmp_path, monkeypatch):
    """A machine without a compiler takes the same step in another time: its row does not replace the other."""
    cell, path = StepCell(lora=True, lean=True), tmp_path / "rows.jsonl"
    for library in (object(), None):
        monkeypatch.setattr(train_ops, "library", lambda library=library: library)
        keep(path, OPTIONS, cell, [{"step_s": 1.0}])
    keep(path, OPTIONS, StepCell(engine="peft", lora=True, half=True), [{"step_s": 1.0}])
    found = read_folder(tmp_path)["benchmark_finetuning"]
    assert [row.cell["kernels"] for row in found] == ["c", "none", "peer"]


def test_a_step_counts_neither_loading_nor_warm_up_nor_looking_into_memory(monkeypatch):
    """On a device that works behind the host's back, with each of them a thousand times longer and larger."""
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(benchmark_finetuning.devices, "resolve", lambda *a: (CUDA, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(benchmark_finetuning, "warm_training", lambda *a: gpu.queue(1000.0, 5000))
    monkeypatch.setattr(hardware, "product_rate", lambda *a: gpu.queue(300.0, 5000) or {"256 tokens": 1e12})
    steps = []

    def load(self):
        gpu.queue(500.0, 5000)
        self.trainer, self.flops = SimpleNamespace(model=None), 1e12

        def step():
            steps.append(1)
            gpu.queue(50.0 if len(steps) <= 2 else 3.0, n_bytes=70)  # the first calls compile
            return 11.0

        return step

    monkeypatch.setattr(StepRunner, "_load", load)
    runner = StepRunner(Options(warm_up=2, device="cuda"), StepCell(), Path())
    runner.prepare()
    for _ in range(2):
        values = runner.measure()
        assert (values["step_s"], values["peak_memory_mb"]) == (3.0, 70 / 1e6)
        assert (values["load_s"], values["first_loss_nats"], values["step_over_floor_x"]) == (500.0, 11.0, 3.0)
    assert len(steps) == 4


def test_every_number_of_table_3_stands_in_a_row():
    """Change any figure of a row and the table changes; out of memory is an x; other kinds of cells are not in it."""
    rows = [made_row(cell, 1000.0 + i, 1.25 + i) for i, cell in enumerate(COURSE)]

    def table_3(rows: list[Row]) -> str:
        return render.markdown(tables.table_3(rows)[:1])

    before = table_3(rows)
    assert len(re.findall(r"(?m)^\| (?:yes|no) \|", before)) == len(COURSE)
    for i, name in enumerate(("peak_memory_mb", "step_s")):
        changed = copy.deepcopy(rows)
        changed[i].metrics[name]["median"] += 1000
        assert table_3(changed) != before
    lost = copy.deepcopy(rows)
    for row in lost:
        row.metrics.clear()
    assert table_3(lost).count("| x | x |") == len(COURSE)
    assert table_3([*rows, made_row(StepCell(lora=True, half=True), 77.0, 7.7)]) == before
    numbers = {number for line in before.splitlines() if "| no |" in line for number in re.findall(r"\d[\d,.]*", line)}
    numbers |= {number for number in re.findall(r"\d[\d,.]*", before.split("| yes | yes | yes |")[1].split("\n")[0])}
    assert numbers == {f"{1000 + i:,}" for i in range(8)} | {f"{1.25 + i:.2f}" for i in range(8)}


def test_arrows_of_table_2_are_changes_beyond_the_threshold():
    """Full fine-tuning as it is: recomputation leaves the peak where it was, mixed precision adds copies."""
    kinds = {"weights": 100.0, "activations": 40.0, "gradients": 100.0}
    changes = {"checkpointing": {"activations": 4.0}, "amp": {"copies": 50.0, "activations": 25.0}}
    changes["lora"] = {"gradients": 1.0, "activations": 39.5}
    rows = [made_row(StepCell(batch_size=2), 330.0, 2.0, **{**kinds, "activations": 80.0})]
    for accumulation in (1, 2):
        peaks = {"": 220.0, "checkpointing": 218.0, "amp": 219.0, "lora": 141.0}
        for name, peak in peaks.items():
            cell = StepCell(**({name: True} if name else {}), accumulation=accumulation)
            found = {**kinds, **changes.get(name, {})}
            rows.append(made_row(cell, peak, 1.3 if name else 1.0, **found))
    first, second = tables.table_2(rows)
    cells = {line[0].split()[0]: [render.text(cell) for cell in line[1:]] for line in first.body}
    assert cells["parameters"] == ["= 100 to 100", "↑ 100 to 150", "= 100 to 100"]
    assert cells["activations"] == ["↓ 40 to 4", "↓ 40 to 25", "= 40 to 40"]
    assert cells["gradients"][2] == "↓ 100 to 1" and cells["peak"][0] == "= 220 to 218"
    text = render.markdown([first, second])
    assert "| accumulation (1 x 2 to 2 x 1) |" in text and "↓ 80 to 40" in text
    assert "not the peak: without accumulation" in text and "(220 and 218 MB)" in text
    assert "Mixed precision raises the memory of parameters" in text
    assert tables.table_2(rows[:3]) == []  # pairs are missing


def test_what_is_not_the_same_work_is_not_compared():
    runs = [
        (StepCell(), [{"first_loss_nats": 11.0}]),
        (StepCell(amp=True), []),
        (StepCell(lora=True), [{"first_loss_nats": 11.2}]),
    ]
    message = r"first loss of llama, lora is 11.200, that of llama, plain 11.000"
    with pytest.raises(InternalError, match=message) as caught:
        list(benchmark_finetuning.same_losses(iter(runs)))
    assert cli.explain(caught.value)[1] == 1
    other = (StepCell(batch_size=2), [{"first_loss_nats": 9.0}])  # of other tokens
    assert len(list(benchmark_finetuning.same_losses(iter([*runs[:2], other])))) == 3


def test_cells_wait_side_by_side_only_where_they_fit():
    sizes = {cell: 3.0 if cell.lora else 12.0 for cell in COURSE}
    groups = benchmark_finetuning.side_by_side(COURSE, sizes.get, 20.0)
    assert sorted(str(cell) for group in groups for cell in group) == sorted(map(str, COURSE))
    assert all(sum(map(sizes.get, group)) <= 20.0 for group in groups) and len(groups) < len(COURSE)
    peer, ours = StepCell(engine="peft", lora=True, half=True), StepCell(lora=True, half=True, lean=True)
    groups = benchmark_finetuning.side_by_side([*COURSE, ours, peer], lambda cell: 3.0, 7.0)
    assert [peer, ours] in groups


def test_estimates_say_which_cells_fit():
    rows = benchmark_finetuning.estimates(
        None, "x", SMALL, [StepCell(), StepCell(lora=True), *benchmark_finetuning.PEERS], 64, 0.0025
    )
    (table,) = tables.estimates(rows)
    assert {row.data["device"]["kind"] for row in rows} == {"meta"}  # they are no measurements
    yes_no = [line[-1] for line in table.body]
    full, adapted = (benchmark_finetuning.predicted(SMALL, cell, 64).peak for cell in (StepCell(), StepCell(lora=True)))
    assert yes_no == [("yes" if peak <= 2.5e6 else "no") for peak in (full, adapted)]
    assert str(table.body[0][1]) == f"{full / devices.MB:,.0f}" and table.head[-1] == "within 0.0025 GB"
    sizes = [row.median(name) for row in rows for name in row.metrics if name.endswith("_at_peak_mb")]
    assert sum(sizes) == pytest.approx(sum(row.median("peak_memory_mb") for row in rows))


def test_processes_share_a_step_by_the_command_line(capsys):
    """Rows say what planning does, with the cells of large models; what cannot be divided is said and has no row."""
    flags = "--estimate --world_size=2 --model=tiny-draft --seq_len=24 --memory_limit_gb=0.004 --optimizer=adamw"
    cli.call(benchmark_finetuning.main, flags.split())
    out = capsys.readouterr().out
    assert out.startswith("left out: tensor parallel 2: 2 processes cannot share n_kv_heads=1 evenly; start fewer\n")
    lines = [line.split(" | ") for line in out.splitlines() if "DDP 2" in line or "FSDP2 2" in line]
    assert [line[0] for line in lines] == [
        *["| checkpointing + mixed precision, AdamW"] * 2,
        *["| 16-bit base + checkpointing + LoRA, AdamW"] * 2,
    ]
    options = Options(model="tiny-draft", seq_len=24, estimate=True, optimizer="adamw")
    for cell, (_, division, *shown) in zip([cell for cell in SETS["large"] for _ in range(2)], lines, strict=True):
        sharing = {"DDP 2": {"replicas": 2}, "FSDP2 2": {"shards": 2}}[division]
        step = benchmark_finetuning.shared_step(PRESETS["tiny-draft"], cell, options)
        found = planning.plan(step, planning.Division(**sharing))
        assert shown[0] == f"{found.footprint.peak / 1e6:,.0f}"
        assert shown[-3:] == [
            "yes" if found.footprint.peak <= 4e6 else "no",
            f"{found.sent / 1e6:,.0f}",
            f"{found.tokens} |",
        ]
    assert {line[-3] for line in lines} == {"yes", "no"}


def test_cards_that_are_too_small_or_too_few_are_crosses(monkeypatch):
    monkeypatch.setattr(benchmark_finetuning, "PLANNED", ("tiny-draft",))
    monkeypatch.setattr(benchmark_finetuning, "CARDS_GB", (0.0001, 1.0))
    options = Options(model="all", seq_len=24, estimate=True)
    rows = benchmark_finetuning.card_plans(None, options, SETS["large"][:1])
    (table,) = tables.cards(rows)
    small, large = ([render.text(cell) for cell in line] for line in table.body)
    assert small[2:4] == ["0.0001", "none of up to 64"] and set(small[4:]) == {"x"}
    assert large[2:6] == ["1", "1", "1", "1"] and large[-3:] == ["0.000"] * 3  # one card sends nothing
    rows[1].metrics["sent_mb"]["median"] = 24_000.0
    assert [render.text(cell) for cell in tables.cards(rows)[0].body[1][-3:]] == ["2.000", "1.920", "0.053"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model=gpt2", "--model=gpt2: expected one of llama3.2-1b"),
        ("--cells=all", "--cells=all: expected a choice of course,lean,half,large,table2, each once"),
        ("--cells=course,course", "each once"),
        ("--seq_len=1", "--seq_len=1: expected at least 2"),
        ("--seq_len=1000000", "--seq_len=1000000: more positions than"),
        ("--repeats=0", "--repeats=0: expected at least 1"),
        ("--against=litgpt", "--against=litgpt: expected one of peers"),
        ("--cells=lean --accumulation=2", "--accumulation=2: lean full fine-tuning has no gradients to accumulate"),
        ("--cells=table2 --batch_size=2", "--cells=table2 sets --batch_size and accumulation itself"),
        ("--device=tpu", "--device=tpu is"),
        ("--world_size=8", "--world_size=8 is for estimates; add --estimate=True"),
        ("--optimizer=adamw", "--optimizer=adamw is for estimates"),
        ("--estimate --world_size=0", "--world_size=0: expected at least 1"),
        ("--model=all", "--model=all finds the least --world_size by --estimate=True"),
        ("--model=all --estimate --world_size=8", "without --world_size and --ckpt_dir"),
        ("--device=cpu --memory_limit_gb=16", "--memory_limit_gb=16.0: expected a CUDA device"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark_finetuning.main, ["--model=tiny", *flags.split()][(1 if "--model" in flags else 0) :])
