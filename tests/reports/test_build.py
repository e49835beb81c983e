"""The documents show what the rows give, and no number that no row holds."""

from __future__ import annotations

import pytest
from conftest import ROOT

import benchmark_finetuning
from benchmarks import kernels as benchmark_kernels
from benchmarks import ladder as benchmark_ladder
from benchmarks.rows import Row, read_folder
from llama import cli
from llama.config import PRESETS
from llama.errors import InputError
from llama.training import options
from reports import build
from reports.cells import Figure
from reports.render import markdown
from reports.tables import TABLES, estimates, table_1

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


def test_every_table_stands_in_a_document():
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in build.DOCUMENTS)
    named = {(experiment, name) for _, experiment, name, *_ in build.PART.findall(texts)}
    every = {(name, make.__name__) for name in TABLES for make in TABLES[name]}
    assert named == every - {("perplexity", "perplexity")}  # which says the same as the table of formats, row by row
    assert texts.count("<!-- begin: ") == len(build.PART.findall(texts))  # each has its end


def test_what_stands_outside_of_parts_is_left_alone():
    document = "# A title\n\n<!-- begin: loading loading -->\nold\n<!-- end -->\n\nmore | text\n"
    filled = build.filled(document, ROWS)
    assert filled.startswith("# A title\n\n<!-- begin: loading loading -->\n\n**Loading llama3.2-1b**\n\n| layout |")
    assert filled.endswith("\n\n<!-- end -->\n\nmore | text\n") and "old" not in filled
    assert "Not measured yet." in build.filled(document, {})
    for name in ("nothing loading", "loading nothing"):
        with pytest.raises(InputError, match=f"<!-- begin: {name} -->: there is no table"):
            build.filled(document.replace("loading loading", name), ROWS)


def test_the_command_writes_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "FIGURES", tmp_path / "figures")
    for name in build.DOCUMENTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("<!-- begin: loading loading -->\n<!-- end -->\n")
    cli.call_command({"readme": build.readme}, ["readme", f"--results={build.RESULTS}"])
    assert capsys.readouterr().out.count(".md\n") == len(build.DOCUMENTS)
    assert "| meta | bfloat16 |" in (tmp_path / "README.md").read_text()
    assert len(list((tmp_path / "figures").glob("*.svg"))) > 5


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
    assert presets == set(options.PRESETS)
    assert {row.cell["part"] for row in ROWS["kernels"]} == set(benchmark_kernels.PARTS["cpu"])
    assert all(
        isinstance(cell, Figure) for table in table_1(ROWS["inference"]) for _, *line in table.body for cell in line
    )


def test_in_short_is_the_first_table_of_the_newest_setting():
    later = [
        Row("later.jsonl", row.line, {**row.data, "threads": 99, "time": "2099-01-01"}) for row in ROWS["inference"]
    ]
    for rows in ([*ROWS["inference"], *later], [*later, *ROWS["inference"]]):
        (table,) = build.in_short(table_1(rows))
        assert table.name == "table-1" and {row.data["threads"] for row in table.rows} == {99}
    assert build.in_short([]) == []


@pytest.mark.slow
def test_the_committed_estimates_are_what_is_computed_now():
    cells = [cell for name in ("course", "lean", "half") for cell in benchmark_finetuning.SETS[name]]
    args = (PRESETS["llama3.2-1b"], cells, 512, benchmark_finetuning.P100_GB)
    found = benchmark_finetuning.estimates(None, "llama3.2-1b", *args)
    assert markdown(estimates(found)).split("|\n\n")[0] == markdown(estimates(ROWS["estimates"])).split("|\n\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["divisions", "cards"])
def test_the_committed_plans_are_what_is_computed_now(experiment):
    """By the command that each row says it came from."""
    (command,) = {row.data["command"] for row in ROWS[experiment]}
    options = benchmark_finetuning.Options.resolve(
        {"estimate": True, "optimizer": "adamw"}
        | ({"model": "all"} if experiment == "cards" else {"model": "llama3.1-8b", "world_size": 8})
        | ({"memory_limit_gb": 80.0} if "--memory_limit_gb=80" in command else {})
    )
    make = {"divisions": benchmark_finetuning.division_plans, "cards": benchmark_finetuning.card_plans}[experiment]
    found = make(None, options, options.chosen_cells())
    assert [(row.cell, row.metrics) for row in found] == [(row.cell, row.metrics) for row in ROWS[experiment]]
