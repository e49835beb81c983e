"""The documents show what the rows give, and no number that no row holds."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

import finetuning
from benchmarks import kernels as benchmark_kernels
from benchmarks import ladder as benchmark_ladder
from benchmarks.rows import read_folder
from llama import cli
from llama.errors import InputError
from reports import build
from reports.cells import Figure
from reports.render import parts

ROWS = read_folder(build.RESULTS)


@pytest.mark.parametrize("name", build.DOCUMENTS)
def test_documents_are_what_the_rows_give(name):
    """Whoever measures again runs `python -m reports.build readme`; twice changes nothing more."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert build.filled(text, ROWS) == text, f"{name}: run python -m reports.build readme"


def test_a_document_with_another_number_is_noticed():
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    changed = text.replace("| 5.00 |", "| 5.01 |")
    assert changed != text and build.filled(changed, ROWS) == text


def test_every_part_stands_in_a_document():
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in build.DOCUMENTS)
    named = re.findall(r"<!-- begin: (\S+) -->", texts)
    assert set(named) == build.PARTS.keys()
    assert texts.count("<!-- begin: ") == len(build.PART.findall(texts))  # each has its end


def test_what_stands_outside_of_parts_is_left_alone():
    document = "# A title\n\n<!-- begin: loading -->\nold\n<!-- end -->\n\nmore | text\n"
    filled = build.filled(document, ROWS)
    assert filled.startswith("# A title\n\n<!-- begin: loading -->\n\n**Loading llama3.2-1b**\n\n| layout |")
    assert filled.endswith("\n\n<!-- end -->\n\nmore | text\n") and "old" not in filled
    assert "Not measured yet." in build.filled(document, {})
    with pytest.raises(InputError, match="<!-- begin: nothing -->: no such part; known are table-1"):
        build.filled(document.replace("loading", "nothing"), ROWS)


def test_the_command_writes_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "FIGURES", tmp_path / "figures")
    for name in build.DOCUMENTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("<!-- begin: loading -->\n<!-- end -->\n")
    cli.call_command({"readme": build.readme}, ["readme", f"--results={build.RESULTS}"])
    assert capsys.readouterr().out.count(".md\n") == len(build.DOCUMENTS)
    assert "| meta | bfloat16 |" in (tmp_path / "README.md").read_text()
    assert len(list((tmp_path / "figures").glob("*.svg"))) > 5


def figures_of(name: str) -> dict[str, Figure]:
    """Every figure of a part by what it shows, with its value."""
    experiment, make = build.PARTS[name]
    found = [table for table in make(ROWS.get(experiment, []))]
    cells = [cell for table in found for line in table.body for cell in line]
    return {part.source: part for cell in cells for part in parts(cell) if isinstance(part, Figure)}


def test_what_is_published_was_measured_often_enough_and_at_once():
    """Five runs and more for what is compared, on one device and with one commit; nothing of a table is missing."""
    for experiment, metric, model in (
        ("inference", "runtime_s", "llama3.2-1b"),
        ("formats", "runtime_s", "llama3.2-1b"),
        ("ladder", "runtime_s", "tiny"),
        ("kernels", "run_s", "llama3.2-1b"),
        ("loading", "load_s", "llama3.2-1b"),
    ):
        rows = [row for row in ROWS.get(experiment, []) if row.cell["model"] == model]
        assert rows and min(row.metrics[metric]["n"] for row in rows) >= 5
        assert len({(row.data["device"]["name"], row.data["commit"]) for row in rows}) == 1
    assert max(row.metrics["peak_over_weights_x"]["max"] for row in ROWS["loading"]) <= 1.15
    assert {row.cell["weights"] for row in ROWS["formats"]} == {"bf16", "int8", "int4"}
    rungs = [row.cell["row"] for row in ROWS["ladder"] if row.cell["model"] == "tiny"]
    assert sorted(rungs) == [cell.row for cell in benchmark_ladder.ladder(True)]
    steps = [row for row in ROWS["benchmark_finetuning"] if row.cell["model"] == "llama3.2-1b"]
    assert len({(row.data["device"]["name"], row.data["commit"]) for row in steps}) == 1
    presets = {row.cell["preset"] for row in ROWS["finetuning"] if row.cell["model"] == "tiny"}
    assert presets == set(finetuning.PRESETS)
    assert {row.cell["part"] for row in ROWS["kernels"]} == set(benchmark_kernels.PARTS["cpu"])
    assert len(figures_of("table-1")) == 12
