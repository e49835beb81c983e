"""The reports say what was measured: figures stand in rows, names exist, the PDFs are what the sources give."""

from __future__ import annotations

import ast
import dataclasses
import io
import itertools
import json
import math
import random
import re
import sys

import pypdf
import pytest
from conftest import ROOT

import benchmark_finetuning
import inference
from benchmarks.rows import Row, read_folder, spread
from llama import cli, lora
from llama.config import PRESETS
from llama.errors import InputError
from llama.model import Transformer, rope_frequencies
from llama.training import memory
from reports import build
from reports import pdf as report
from reports.facts import facts
from reports.render import text as text_of_cell
from reports.tables import TABLES

REPORTS = ROOT / "reports"
SOURCES = {phase: (REPORTS / f"{phase}.typ").read_text(encoding="utf-8") for phase in report.PHASES}
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
STRAIGHT = {0x2019: "'", 0x200B: None}  # Typst sets a curved apostrophe; and a name may break after _
DEVICE = "Imagined GPU 16GB"


def call(monkeypatch, capsys, *flags):
    """As from the shell: exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["build.py", "pdf", *flags])
    with pytest.raises(SystemExit) as end:
        cli.run(build.COMMANDS)
    return end.value.code, *capsys.readouterr()


def row(experiment, cell, metrics, dtype="bfloat16", device=DEVICE, time="2026-11-22T10:00:00+00:00", **more):
    found = {name: spread(values) for name, values in metrics.items()}
    place = {"device": {"kind": "cuda", "name": device}, "dtype": dtype, "threads": 7, "torch": "2.13.0"}
    about = {"commit": "0123456789ab", "seed": 1, "command": f"python {experiment}.py", "time": time}
    return {"experiment": experiment, "cell": cell, "metrics": found, **more, **place, **about}


def rows_of(found):
    return [Row("rows.jsonl", line, data) for line, data in enumerate(found, 1)]


def gathered(rows, device=None, model="llama3.2-1b"):
    """What the reports show of rows, as if each were a line of one file."""
    by_experiment = {}
    for found in rows_of(rows):
        by_experiment.setdefault(found.data["experiment"], []).append(found)
    return report.gather(by_experiment, device, model)


def generation_rows(chance):
    """Table 1 with peers; the largest cell without the cache ran out of memory."""
    rows = []
    for engine, size, cache in itertools.product(("llama", "transformers"), (1, 8, 16), (True, False)):
        names = ("runtime_s", "ttft_s", "tpot_s", "peak_memory_mb", "runtime_over_floor_x", "ttft_over_floor_x")
        names += ("tpot_over_floor_x", "peak_memory_over_floor_x", "read_gb_s", "product_tflop_s", "step_bytes_gb")
        names += ("floor_runtime_s", "floor_ttft_s", "floor_tpot_s", "floor_peak_memory_mb")
        is_lost = (engine, size, cache) == ("llama", 16, False)
        metrics = {} if is_lost else {name: [chance.uniform(1, 3000) for _ in range(3)] for name in names}
        cell = {"model": "llama3.2-1b", "engine": engine, "batch_size": size, "use_cache": cache, "input_len": 256}
        cell |= {"output_len": 32, "decoding": "captured", "memory_limit_gb": 16.0}
        if engine == "llama" or cache:
            rows.append(row("inference", cell, metrics))
    return rows


def step_rows(chance):
    """Tables 2 and 3, all cells and peers."""
    wanted = [cell for cells in benchmark_finetuning.SETS.values() for cell in cells]
    wanted += [benchmark_finetuning.StepCell(engine="transformers", amp=True)]
    wanted += [benchmark_finetuning.StepCell(engine="peft", lora=True, half=True)]
    rows = []
    for cell in dict.fromkeys(wanted):
        names = ["step_s", "peak_memory_mb", "step_over_floor_x", "expected_peak_memory_mb", "step_tflop"]
        names += [f"{name}_{when}_mb" for name in memory.CATEGORIES for when in ("at_peak", "most")]
        place = {"model": "llama3.2-1b", **vars(cell), "seq_len": 512, "memory_limit_gb": None}
        metrics = {name: [chance.uniform(10, 9000) for _ in range(3)] for name in names}
        rows.append(row("benchmark_finetuning", place, metrics, "float32"))
    return rows


def learning_rows():
    metrics = {"held_out_loss_before_nats": [2.4459], "held_out_loss_nats": [0.5577], "held_out_right_before": [0]}
    metrics |= {"held_out_right": [8], "held_out_asked": [20], "step_s": [0.25, 0.5]}
    series = {"loss_nats": [[i, 3.0 / i] for i in range(1, 40)], "held_out_loss_nats": [[0, 2.4459], [39, 0.5577]]}
    series["answers"] = [["Name three colours.", "iraffes hum.", "Green, yellow and red."]]
    return [row("finetuning", {"model": "tiny", "preset": "learn"}, metrics, "float32", series=series)]


def compression_rows(chance):
    """A ladder of which one row ran out of memory and one has no perplexity; pruning by each of its parts."""
    names = ("parameters", "stored_mb", "loss_nats", "ttft_s", "tpot_s")
    metrics = {name: [chance.uniform(1, 9000)] for name in names}
    parts = [("dense", 0.0), *itertools.product(("iterative", "one-shot", "speed"), (0.125, 0.25))]
    same = {"model": "tiny", "steps": 12, "batch_size": 4, "lr": 0.001, "input_len": 8, "output_len": 4}
    cells = [
        {**same, "part": part, "method": "none" if part == "dense" else "dimensions", "share": share}
        for part, share in parts
    ]
    pruned = [row("pruning", cell, metrics, "float32") for cell in cells]
    names = ("runtime_s", "tokens_per_s", "weights_mb", "peak_memory_mb")
    rungs = [row("ladder", rung(number), {name: [chance.uniform(1, 900)] for name in names}) for number in (1, 2, 3)]
    rungs[1]["metrics"]["perplexity_x"] = spread([1.5781])
    return [*rungs, row("ladder", rung(4), {}), *pruned]


def rung(number):
    cell = {"model": "tiny", "row": number, "name": f"change {number}", "changes": number - 1 or None}
    return {**cell, "text": "its own", "prompts": 2, "input_len": 8, "output_len": 4, "draft": None}


@pytest.fixture(scope="module")
def imagined():
    chance = random.Random(0)
    return [*generation_rows(chance), *step_rows(chance), *learning_rows(), *compression_rows(chance)]


def real_rows():
    lines = [line for path in sorted(REPORTS.glob("results/*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def numbers(text):
    return {found.strip(",") for found in NUMBER.findall(text)}


def renderings(rows):
    """Every way in which a figure of these rows may stand in a report."""
    values, texts = set(), []
    for one in rows:
        metrics = one["metrics"]
        values |= {v[part] for v in metrics.values() for part in ("median", "min", "max", "n")}
        in_ms = [v for name, v in metrics.items() if name.startswith(("ttft", "tpot", "floor_tpot"))]
        values |= {1e3 * v[part] for v in in_ms for part in ("median", "min", "max")}
        in_ms = [v for name, v in metrics.items() if name in ("forward_s", "backward_s")]
        values |= {1e3 * v[part] for v in in_ms for part in ("median", "min", "max")}
        values |= {1e6 * v["median"] for name, v in metrics.items() if name.endswith("_error_x")}
        if {"expected_peak_memory_mb", "peak_memory_mb"} <= metrics.keys():
            values.add(metrics["expected_peak_memory_mb"]["median"] / metrics["peak_memory_mb"]["median"])
        if "tokens_equal" in metrics and "prompts" in one["cell"]:
            values.add(one["cell"]["prompts"] * one["cell"]["output_len"])
        if "held_out_loss_before_nats" in metrics:
            losses = [metrics[name]["median"] for name in ("held_out_loss_before_nats", "held_out_loss_nats")]
            values |= {losses[0] - losses[1], *map(math.exp, losses)}
        if "weights_most_mb" in metrics:
            values.add(metrics["weights_most_mb"]["median"] + metrics["copies_most_mb"]["median"])
        strings = [json.dumps(part, ensure_ascii=False) for part in (one["cell"], one.get("series", {}))]
        texts += [*strings, one["device"]["name"], one["torch"], one["dtype"], one["command"], one["time"][:10]]
        texts += [str(one["threads"]), one["commit"]]
        values |= {y for name in ("loss_nats", "held_out_loss_nats") for _, y in one.get("series", {}).get(name, ())}
    for a, b in itertools.permutations(rows, 2):
        if a["experiment"] == b["experiment"]:
            for name in ("runtime_s", "step_s", "peak_memory_mb", "forward_s", "backward_s", "ttft_s", "tpot_s"):
                if name in a["metrics"] and name in b["metrics"]:
                    values.add(a["metrics"][name]["median"] / b["metrics"][name]["median"])
            if "step_s" in a["metrics"] and {"step_s", "peak_memory_mb"} <= a["metrics"].keys() & b["metrics"].keys():
                saved, slower = (
                    x["metrics"][name]["median"] - y["metrics"][name]["median"]
                    for x, y, name in ((a, b, "peak_memory_mb"), (b, a, "step_s"))
                )
                values |= {saved / slower} if saved > 0 < slower else set()
    forms = (",.0f", ".0f", ".1f", ".2f", ".3f", ".4f", ",.2f", ",.1f")
    return {format(value, form) for value in values for form in forms} | numbers(" ".join(texts))


def cells_of(shown):
    """Every text that a table of a report shows, but for its first columns' labels."""
    tables = [(name, table) for name, found in shown["tables"].items() for table in found]
    return [(name, text) for name, table in tables for line in table["rows"] for text in line]


def table_of(shown, name):
    """The only table of this name."""
    (table,) = shown["tables"][name]
    return table


# The sources


def test_named_files_functions_and_tests_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    text = "".join(SOURCES.values())
    files, names = re.findall(r'#file\("([^"]+)"\)', text), re.findall(r'#(?:code|quoted)\("([^"]+)", "([^"]+)"', text)
    assert len(files) > 5 and len(names) > 15
    assert all((ROOT / path).exists() for path in files)
    for path, name in names:
        assert report.quote(ROOT / path, name)
    proofs = re.findall(r'#proof\("([^"]+)"\)', text)
    assert len(proofs) > 5 and all(f"def {name}(" in tests for name in proofs)
    cited = set(re.findall(r"@(\w+)", text))
    known = set(re.findall(r"^(\w+):$", (REPORTS / "references.yml").read_text(), re.MULTILINE))
    assert cited == known


def test_a_name_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no KVCache\.vanished"):
        report.quote(ROOT / "llama/cache.py", "KVCache.vanished")
    with pytest.raises(InputError, match="cannot be quoted"):
        report.quote(tmp_path / "gone.py", "main")
    tree = ast.parse(report.quote(ROOT / "llama/sampling.py", "draw"))
    assert tree.body[0].name == "draw" and not ast.get_docstring(tree.body[0])


@pytest.mark.parametrize("phase", report.PHASES[1:])
def test_sources_hold_no_measured_figure(phase):
    """Numbers with a unit come from rows or from facts(), never from the keyboard."""
    prose = SOURCES[phase].replace("width: 100%", "")
    found = re.findall(r"\d[\d,.]*\s*(?:s|ms|min|MB|GB|GB/s|TFLOP|tokens/s|times|x|%)(?![\w-])", prose)
    assert not found


def test_cross_entropies_are_right():
    for probability, nats, bits in ((0.2, "1.609", "2.322"), (0.7, "0.357", "0.515")):
        assert f"-log {probability} = {nats}$ nats ({bits} bits)" in SOURCES["phase_1"]
        assert f"{-math.log(probability):.3f}" == nats and f"{-math.log2(probability):.3f}" == bits
    assert f"{math.log(128_256):.2f}" in SOURCES["phase_1"]


def test_facts_are_those_of_the_model():
    args = PRESETS["llama3.2-1b"]
    ours = facts(args)
    plain = rope_frequencies(dataclasses.replace(args, use_scaled_rope=False, rope_scale_factor=None))
    factors = plain / rope_frequencies(args)
    assert ours["rope_kept"] == str(int((factors == 1).sum()))
    assert ours["rope_slowed"] == str(int((factors > 31.9).sum()))
    tiny = PRESETS["tiny-draft"]
    model = Transformer.random(tiny, dtype=rope_frequencies(tiny).dtype)
    lora.apply(model, lora.LoRAConfig())
    trained, total = lora.trainable_share(model)
    assert facts(tiny)["lora_params"] == f"{trained:,}"
    assert facts(tiny)["lora_share"] == f"{trained / total:.4%}"
    assert ours["lora_params"] == "1,703,936" and ours["kv_token"] == "32,768"


# From rows to tables


def test_every_number_of_the_tables_stands_in_a_row(imagined):
    for rows in (imagined, real_rows()):
        shown = gathered(rows)
        known = renderings(rows) | {"1", "8", "16", "16-bit", "95"}
        for name, text in cells_of(shown):
            assert numbers(text) <= known, (name, text)
        for figure in shown["figures"].values():
            assert numbers(figure) <= known


def test_tables_are_those_of_the_page(imagined):
    """The same objects as on the page and in the documents, in the same digits."""
    rows = read_folder(REPORTS / "results")
    shown = report.gather(rows, None, "llama3.2-1b")["tables"]
    for experiment, make in [(name, make) for name in report.COMMANDS for make in TABLES.get(name, ())]:
        for table in make(rows.get(experiment, [])):
            model = table.rows[0].cell["model"]
            if model == "llama3.2-1b" or experiment not in ("inference", "benchmark_finetuning", *report.TRAINED):
                lines = sorted([text_of_cell(cell) for cell in line] for line in table.body)
                assert lines in [sorted(other["rows"]) for other in shown[table.name]], table.title


def test_without_rows_everything_is_not_measured():
    shown = gathered([])
    assert shown["device"] == "no device" and set(shown["figures"].values()) == {"not measured"}
    assert not shown["tables"] and not any(shown["charts"].values()) and not shown["comparisons"]
    named = re.findall(r'#?(?:measured|charts|not-measured)\((?:"[^"]+", )?"(\w+)"', "".join(SOURCES.values()))
    assert len(named) > 15 and all(shown["commands"][name].startswith("python ") for name in named)


def test_out_of_memory_is_an_x_and_other_devices_do_not_mix(imagined):
    other = [row("inference", imagined[0]["cell"], {"runtime_s": [7.77]}, device="Other CPU")]
    shown = gathered([*imagined, *other], DEVICE)
    assert [line[-1] for line in table_of(shown, "table-1")["rows"]][2:] == ["x", "x"]
    assert "7.77" not in json.dumps(shown["tables"])
    of_other = gathered([*imagined, *other], "Other CPU")
    body = table_of(of_other, "table-1")["rows"]
    assert body[1][1] == "7.77" and body[0][1] == "-"
    assert "table-3" not in of_other["tables"] and of_other["charts"]["benchmark_finetuning"] == []


def test_tables_of_two_settings_do_not_mix(imagined):
    """A later Table 1 in another dtype is the table; none of its cells is filled from the earlier one."""
    later = row("inference", imagined[0]["cell"], {"runtime_s": [7.77]}, "float32", time="2027-01-01T00:00:00+00:00")
    found = table_of(gathered([later, *imagined], DEVICE), "table-1")["rows"]
    assert found[1][1:] == ["7.77"]


def test_a_device_is_chosen_by_part_of_its_name(imagined):
    other = row("tiny", {}, {}, device="Imagined CPU", time="2027-01-01T00:00:00+00:00")
    rows = [*imagined, other]
    assert report.choose_device(rows_of(rows), None) == DEVICE  # it has Table 1, though another row is newer
    assert report.choose_device(rows_of(rows), "gpu 16") == DEVICE and report.choose_device([], None) is None
    for wanted, message in (("imagined", "fits 2 devices; measured are Imagined CPU"), ("P100", "fits no measured")):
        with pytest.raises(InputError, match=message):
            report.choose_device(rows_of(rows), wanted)


def test_each_table_names_its_setting(imagined):
    for name, found in gathered(imagined, DEVICE)["tables"].items():
        for table in found:
            about = table["about"]
            assert (
                about["where"].startswith(f"{DEVICE}, 7 threads, torch 2.13.0, ") and "2026-11-22" in about["when"]
            ), name
            assert about["commands"][0].startswith("python ")
    where = table_of(gathered(imagined, DEVICE), "table-1")["about"]["where"]
    assert "held to 16 GB; medians (least to most) of 3 runs" in where


# The command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:1"),
        ('{"experiment": "inference"}', "rows.jsonl:1"),
        (json.dumps(row("inference", {"model": "llama3.2-1b"}, {"runtime_s": [1.0]})), "lacks 'input_len'"),
    ],
)
def test_a_broken_row_is_one_line_and_exit_2(line, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    code, out, err = call(monkeypatch, capsys, f"--results={tmp_path}", f"--out_dir={tmp_path / 'out'}")
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    for flag, message in ((f"--results={tmp_path}/none", "does not exist"), ("--device=Abacus", "fits no measured")):
        code, _, err = call(monkeypatch, capsys, flag, f"--out_dir={tmp_path}")
        assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_compare_finds_is_kept(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    flags = ["--compare", "--max_gen_len=8", "--device=cpu", "--prompt=The fox", f"--results={path}"]
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
    with pytest.raises(SystemExit) as end:
        cli.run(inference.main)
    out, _ = capsys.readouterr()
    assert end.value.code == 0
    kept = json.loads(path.read_text())
    assert kept["series"]["verdict"] == ["equal (8 of 8)"] and kept["metrics"]["tokens_equal"]["median"] == 8
    assert kept["series"]["text_on"] == kept["series"]["text_off"] and kept["series"]["text_on"][0].split()[0] in out
    (found,) = report.comparisons([Row("rows.jsonl", 1, kept)])
    assert found["n_equal"] == 1 and found["prompts"][0]["prompt"] == "The fox"
    monkeypatch.setattr(sys, "argv", ["inference.py", f"--results={path}"])
    with pytest.raises(SystemExit) as end:
        cli.run(inference.main)
    assert end.value.code == 2 and "add --compare" in capsys.readouterr().err


# The PDFs


def text_of(pdf):
    """The text of a PDF as a search in it sees it, without the numbers of sections."""
    text = "\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages)
    return re.sub(r"(?m)^\d\.\d (?=[A-Za-z])", "", text)


def strange_numbers(phase, text, shown, rows):
    """Numbers from 100 on, or with a decimal point, that no row, no arithmetic and no line of the source has."""
    code, typed = " ".join(shown["code"].values()), SOURCES[phase] + (REPORTS / "references.yml").read_text()
    drawn = "".join(chart for found in shown["charts"].values() for chart in found)
    ticks = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawn))
    known = renderings(rows) | numbers(" ".join([code, typed, ticks, *shown["facts"].values()]))
    plain = {number.replace(",", "") for number in known}
    return {
        n for n in numbers(text) if n.replace(",", "") not in plain and ("." in n or float(n.replace(",", "")) >= 100)
    }


def test_committed_reports_are_what_sources_and_rows_give():
    shown = report.gather(read_folder(REPORTS / "results"), None, "llama3.2-1b")
    for phase in report.PHASES:
        assert (REPORTS / f"{phase}.pdf").read_bytes() == report.build(phase, shown), f"{phase}.pdf: run make reports"


@pytest.mark.slow
@pytest.mark.parametrize("phase", report.PHASES)
def test_no_other_number_is_in_a_pdf(phase, imagined):
    real = report.gather(read_folder(REPORTS / "results"), None, "llama3.2-1b")
    cases = [((REPORTS / f"{phase}.pdf").read_bytes(), real, real_rows())]
    made = gathered(imagined, DEVICE)
    cases.append((report.build(phase, made), made, imagined))
    for pdf, shown, rows in cases:
        text = text_of(pdf)
        assert not strange_numbers(phase, text, shown, rows)
        assert strange_numbers(phase, text.replace("the", "98.7654", 1), shown, rows) == {"98.7654"}
        words = "".join(text.split()).translate(STRAIGHT)  # without the places where lines and names may break
        for name in re.findall(r'#measured\("(\w+)"', SOURCES[phase]):
            for table in shown["tables"].get(name, []):
                for cell in itertools.chain(*table["rows"]):
                    assert "".join(cell.split()) in words, (name, cell)


@pytest.mark.slow
def test_empty_results_build_with_not_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows").mkdir()
    code, out, err = call(monkeypatch, capsys, f"--results={tmp_path / 'rows'}", f"--out_dir={tmp_path / 'out'}")
    assert (code, err) == (0, "") and out.count(".pdf") == 3
    for phase in report.PHASES[1:]:
        pdf = (tmp_path / "out" / f"{phase}.pdf").read_bytes()
        places = re.findall(r'#?(?:measured|charts|not-measured)\((?:"[^"]+", )?"(\w+)"', SOURCES[phase])
        text = "".join(text_of(pdf).split())  # lines break anywhere
        assert text.count("Notmeasuredonthisdevice:python") == len(places) > 4
        assert all(report.COMMANDS[name].replace(" ", "") in text for name in places)
        assert pdf.count(b"/FontFile") >= 3 and b"CreationDate" not in pdf
    again = tmp_path / "again"
    assert call(monkeypatch, capsys, f"--results={tmp_path / 'rows'}", f"--out_dir={again}")[0] == 0
    for phase in report.PHASES:
        assert (again / f"{phase}.pdf").read_bytes() == (tmp_path / "out" / f"{phase}.pdf").read_bytes()


def test_rows_were_measured_with_code_that_is_kept():
    """Each committed row names a commit; one with changes beside it could not be measured again."""
    for path in (ROOT / "reports" / "results").glob("*.jsonl"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert re.fullmatch(r"[0-9a-f]{12}", json.loads(line)["commit"]), f"{path.name}:{number}"
