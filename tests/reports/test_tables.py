"""Tables say what the rows say: each figure is looked up again at the place that it names."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re

import pytest
from support import measured_row, tables_of_committed_rows

from benchmarks.rows import Row, read_folder
from reports import build, cells, tables
from reports.cells import Figure, Table
from reports.render import parts, text
from reports.training_tables import CHANGED, LINKS, SLOWER, arrow

ROWS = read_folder(build.RESULTS)
PLACE = re.compile(r"([\w.-]+\.jsonl):(\d+) ([\w.]+)")


TABLES = tables_of_committed_rows()
MADE = [(name, make) for name, several in tables.TABLES.items() for make in several]


def figures_of(table: Table) -> list[Figure]:
    cells = [cell for line in (*table.body, table.note) for cell in line]
    return [part for cell in cells for part in parts(cell) if isinstance(part, Figure)]


def value_at(source: str) -> float:
    """What a source stands for, read from the files again: places, and arithmetic with them."""

    def look_up(match: re.Match[str]) -> str:
        file, line, path = match.groups()
        found = json.loads((build.RESULTS / file).read_text(encoding="utf-8").splitlines()[int(line) - 1])
        for part in path.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        return repr(found)

    return eval(PLACE.sub(look_up, source), {"exp": math.exp, "__builtins__": {}})


def is_rounding(shown: str, value: float) -> bool:
    """Whether a number as it is written is the value, up to half of its last place."""
    digits = shown.replace(",", "").replace("%", "")
    place = 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) - value) <= place / 2 * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_every_figure_stands_at_its_place(table):
    found = figures_of(table)
    assert found or "answers" in table.name
    for figure in found:
        assert value_at(figure.source) == pytest.approx(figure.value, rel=1e-12)
        assert is_rounding(figure.text, figure.value * figure.scale), figure
        spread = re.search(r"median of (\d+), (\S+) to (\S+)\)", figure.title)
        if spread is not None:
            for shown, name in zip(spread.groups(), ("n", "min", "max"), strict=True):
                value = value_at(f"{figure.source.rpartition('.')[0]}.{name}")
                assert float(shown) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_no_other_number_stands_in_a_table(table):
    """What is no figure stands literally in a row, or is a batch size, a row's number or a threshold."""
    known = json.dumps([row.data for row in table.rows]) + f" {CHANGED:.0%} {SLOWER:.0%}"
    known += " 1.00 16-bit 16 bits 8 bits 1 x 2 2 x 1 float32 Share 0 95 %"
    known += "".join(f" {link} {rate:g}" for link, rate in LINKS.items()) + " none of up to 64"
    known += "".join(f" {row.cell['limit_gb']:g}" for row in table.rows if "limit_gb" in row.cell)
    words = [part for cell in (*table.head, *table.note) for part in parts(cell) if isinstance(part, str)]
    words += [part for line in table.body for cell in line for part in parts(cell) if isinstance(part, str)]
    literal = set(re.findall(r"\d+(?:\.\d+)?", known))
    strange = {number for word in words for number in re.findall(r"\d+(?:\.\d+)?", word.replace(",", ""))} - literal
    assert not strange


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_a_table_is_whole(table):
    assert table.body and table.title and all(len(line) == len(table.head) for line in table.body)
    assert len(set(table.head)) == len(table.head), "two columns of one name cannot be told apart"


def test_every_row_feeds_a_table():
    used = {(row.file, row.line) for table in TABLES for row in table.rows}
    assert used == {(row.file, row.line) for rows in ROWS.values() for row in rows}


def test_no_rows_no_tables():
    assert not any(make([]) for _, make in MADE) and not tables.generic([])


@pytest.mark.parametrize(("experiment", "make"), MADE)
def test_settings_do_not_mix(experiment, make):
    """Rows of another device make tables of their own, with the same figures."""
    rows = ROWS.get(experiment, [])
    others = []
    for row in rows:
        device = {"kind": "cuda", "name": f"Other {row.data['device']['name']}"}
        others.append(Row("other.jsonl", row.line, {**row.data, "device": device}))
    alone, both = make(rows), make([*rows, *others])
    assert len(both) == 2 * len(alone)
    for table in both:
        assert len({row.file for row in table.rows}) == 1
        assert len({match[1] for figure in figures_of(table) for match in PLACE.finditer(figure.source)}) <= 1
    shown = [[[text(cell) for cell in line] for line in table.body] for table in both]
    assert all([[text(cell) for cell in line] for line in table.body] in shown for table in alone)


@pytest.mark.parametrize(("experiment", "make"), MADE)
def test_rows_that_ran_out_of_memory_have_an_x(experiment, make):
    """Whichever row is lost, the other figures stay, and nothing breaks."""
    rows = ROWS.get(experiment, [])
    for lost in range(len(rows)):
        found = [Row(row.file, row.line, {**row.data, "metrics": {}} if i == lost else row.data)
                 for i, row in enumerate(rows)]  # fmt: skip
        for table in make(found):
            assert all(rows[lost].source("") not in figure.source for figure in figures_of(table))
    everything = make([Row(row.file, row.line, {**row.data, "metrics": {}}) for row in rows])
    assert not any(figures_of(table) for table in everything)


@pytest.mark.parametrize(("experiment", "make"), MADE)
def test_a_changed_median_changes_a_table(experiment, make):
    """No figure that a table names is a copy from somewhere else."""
    rows = ROWS.get(experiment, [])
    before = [figure for table in make(rows) for figure in figures_of(table)]
    places = {match.groups() for figure in before for match in PLACE.finditer(figure.source)}
    for file, line, path in sorted(places)[:: max(1, len(places) // 40)]:
        if not path.startswith("metrics."):
            continue
        changed = copy.deepcopy(next(row for row in rows if (row.file, str(row.line)) == (file, line)))
        _, metric, stat = path.split(".")
        changed.metrics[metric][stat] = 2 * changed.metrics[metric][stat] + 7
        others = [changed if row.source("") == changed.source("") else row for row in rows]
        after = [figure for table in make(others) for figure in figures_of(table)]
        assert [figure.text for figure in before] != [figure.text for figure in after], path


# Figures


def test_figures_as_text():
    one = measured_row({"step_s": [1.25, 1.2, 1.306]})
    assert str(cells.figure(one, "step_s", ".1f")) == "1.2"
    assert text(cells.spread(one, "step_s", ".0f", 1e3)) == "1250 (1200 to 1306)"
    assert text(cells.spread(measured_row({"step_s": 1.25}), "step_s", ".2f")) == "1.25"  # one run has no spread
    for show in (cells.figure, cells.spread):
        assert [show(found, "peak_mb", ".1f") for found in (None, measured_row({}), one)] == ["-", "x", "-"]


def test_ratios_name_both_rows():
    above, below, lost = measured_row({"a_s": 3.0}), measured_row({"a_s": 1.5}, 2), measured_row({}, 3)
    found = cells.ratio(above, below, "a_s")
    assert (found.text, found.value) == ("2.00", 2.0)
    assert found.source == "rows.jsonl:1 metrics.a_s.median / rows.jsonl:2 metrics.a_s.median"
    assert [cells.ratio(above, other, "a_s") for other in (lost, None, measured_row({"b_s": 1.0}))] == ["x", "-", "-"]
    assert cells.ratio(None, lost, "a_s") == "-" and cells.ratio(above, measured_row({"a_s": 0.0}), "a_s") == "-"


def test_arrows_are_changes_beyond_the_threshold():
    assert [arrow(100, after, 0.03) for after in (103, 103.1, 97, 96.9, 0)] == ["=", "↑", "=", "↓", "↓"]
    assert [arrow(0, after, 0.03) for after in (0, 1)] == ["=", "↑"]


def test_what_the_larger_part_of_a_generation_is_bound_by():
    metrics = {"floor_ttft_s": 1.0, "floor_tpot_s": 0.2}
    for output_len, use_cache, words in (
        (5, True, "prompt: products"),
        (9, True, "steps: reading"),
        (9, False, "steps: products"),
    ):
        shape = {"model": "m", "input_len": 8, "output_len": output_len, "batch_size": 1, "engine": "llama"}
        table = tables.generation_details([measured_row(metrics, use_cache=use_cache, **shape)])[1]
        assert table.name == "limits" and table.body[0][-1] == words


def test_a_models_weights_and_adapter_stand_beside_its_name():
    text_of = {"data": "t", "data_sha256": None, "tokens": 9, "context": 4, "stride": 4, "batch_size": 1}
    metrics = {"loss_nats": 1.0, "perplexity_x": 2.7, "scored_tokens": 6, "windows": 2, "tokens_per_s": 9.0}
    cells_of = [{"adapter": None}, {"adapter": "a"}, {"adapter": None, "weights": "int8"}]
    rows = [measured_row(metrics, line, model="m", **text_of, **cell) for line, cell in enumerate(cells_of, 1)]
    (table,) = tables.perplexity(rows)
    assert [line[0] for line in table.body] == ["m, float32", "m with adapter, float32", "m, int8, float32"]


def test_formats_of_a_model_stand_beside_each_other_by_batch_size():
    """A line for each format, with the ratio to 16 bits; every figure is of a row; adapters have no part in it."""
    text_of = {"model": "m", "data": "t", "data_sha256": None, "tokens": 9, "context": 4, "stride": 4}
    int4 = {"weights": "int4", "group_size": 64, "zero_points": True, "calibrated": True, "int8_matrices": 3}
    trained = {"weights": "int4", "group_size": 64, "zero_points": True, "qat": True}
    formats = ({"adapter": None}, {"adapter": None, "weights": "int8"}, int4, trained, {"adapter": "a"})
    rows = []
    for number, (cell, size) in enumerate(itertools.product(formats, (12, 4)), 1):
        metrics = {"perplexity_x": 20 + number, "weights_mb": 100 * number, "weight_bits": number / 10}
        metrics |= {"windows": 2, "tokens_per_s": 1000 + number, "peak_memory_mb": 2000 + number}
        rows.append(measured_row(metrics, number, batch_size=size, **text_of, **cell))
        rows[-1].data["dtype"] = "bfloat16"
    (table,) = tables.perplexity_formats(rows)
    assert table.head[-2:] == ["peak memory, batch 4 (MB)", "peak memory, batch 12 (MB)"]
    assert [[text(cell) for cell in line] for line in table.body] == [
        ["bf16", "0.20", "-", "-", "-", "22.000", "1.0000", "200.0", "2,002", "2,001"],
        ["int8", "0.40", "row", "no", "no", "24.000", "1.0909", "400.0", "2,004", "2,003"],
        ["int4 and int8", "0.60", "64", "yes", "yes", "26.000", "1.1818", "600.0", "2,006", "2,005"],
        ["int4, QAT", "0.80", "64", "yes", "no", "28.000", "1.2727", "800.0", "2,008", "2,007"],
    ]
    assert not tables.perplexity_formats(rows[-2:]) and not tables.perplexity_formats([])


def test_generic_tables_show_every_metric_of_any_experiment():
    nasty = {"model": "<b>", "layers": [0, 3], "note": None}
    rows = [measured_row({"step_s": 0.00123, "size": 10.0}, 1, **nasty, bits=4), measured_row({}, 2, **nasty, bits=8)]
    (table,) = tables.generic(rows)
    assert table.head == ["bits", "step (ms)", "size"] and [[text(c) for c in line] for line in table.body] == [
        ["4", "1.23", "10"],
        ["8", "x", "x"],
    ]
    assert table.title == "E; model <b>; layers [0, 3]; note -"


def measured_again(rows: list[Row], metric: str, **more) -> list[Row]:
    """The same cells, measured again by scripts whose rows say more."""
    found = [Row("later.jsonl", row.line, copy.deepcopy(row.data)) for row in rows]
    for row in found:
        row.cell.update(more)
        row.metrics[metric]["median"] = 7.77
    return found


def test_a_row_that_says_more_takes_the_place_of_the_one_before():
    """Older rows neither name the weights of their dtype nor the kernels of their step: no cell is shown twice."""
    for experiment, metric, more in (
        ("inference", "runtime_s", {"weights": "bf16"}),
        ("benchmark_finetuning", "step_s", {"kernels": "none"}),
    ):
        older = [row for row in ROWS[experiment] if not more.keys() & row.cell.keys()]
        later = measured_again(older, metric, **more)
        for make in tables.TABLES[experiment]:
            alone, both = make(later), make([*older, *later])
            assert alone and [table.body for table in both] == [table.body for table in alone]


def test_steps_with_different_kernels_are_told_apart():
    lean = [row for row in ROWS["benchmark_finetuning"] if row.cell["lean"] and not row.cell["half"]]
    both = measured_again(lean, "step_s", kernels="c") + measured_again(lean, "step_s", kernels="none")
    details = tables.step_details(both)[0]
    assert {line[0].rpartition(", ")[2] for line in details.body} == {"kernels: c", "kernels: none"}
    assert len(details.body) == 2 * len(lean) and len(tables.table_3(both)[0].body) == len(lean)
