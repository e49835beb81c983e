"""What a chart draws is what the rows say: every point, bar and mark, looked up again in the figures."""

from __future__ import annotations

import itertools

import pytest
from conftest import ROOT

from benchmarks.rows import Row, read_folder
from reports import charts, render

ROWS = read_folder(ROOT / "reports" / "results")
ALL = [(chart, experiment) for experiment, chart in charts.CHARTS.items()]


def drawn(figure) -> dict[str, set[tuple[float, float]]]:
    """The points of each line with a name, and (width, place) of each bar, by the name in the legend."""
    (axes,) = figure.axes
    found = {}
    for line in axes.lines:
        found.setdefault(line.get_label(), set()).update((float(x), float(y)) for x, y in line.get_xydata())
    for bars in axes.containers:
        found.setdefault(bars.get_label(), set()).update(
            (round(float(bar.get_width()), 6), float(bar.get_x())) for bar in bars
        )
    return found


def points(rows: list[Row], x, y: str, scale: float = 1) -> set[tuple[float, float]]:
    return {(float(x(row)), scale * row.median(y)) for row in rows if row.has(y)}


def pick(rows: list[Row], **cell) -> list[Row]:
    return [row for row in rows if all(row.cell[name] == value for name, value in cell.items())]


def test_generation_draws_every_cell_and_its_limit():
    rows, found = ROWS["inference"], charts.generation(ROWS["inference"])
    assert len(found) == 2
    for figure, metric in zip(found.values(), ("runtime_s", "peak_memory_mb"), strict=True):
        lines = drawn(figure)
        for name, use_cache in (("with KV cache", True), ("without", False)):
            ours = pick(rows, engine="llama", use_cache=use_cache)
            assert lines[name] == points(ours, lambda row: row.cell["batch_size"], metric)
            limits = points(ours, lambda row: row.cell["batch_size"], f"floor_{metric}")
            assert limits and lines[f"{name}: hardware limit"] == limits
        others = points(pick(rows, engine="transformers"), lambda row: row.cell["batch_size"], metric)
        assert lines["transformers, its cache"] == others


def test_each_format_of_weights_has_charts_of_its_own():
    rows = pick(ROWS["formats"], model="llama3.2-1b")
    found = charts.generation(rows)
    names = list(dict.fromkeys(row.cell["weights"] for row in rows))
    assert len(names) == 3 and len(found) == 2 * len(names)
    for figure, name in zip(list(found.values())[::2], names, strict=True):
        ours = pick(rows, engine="llama", use_cache=True, weights=name)
        assert drawn(figure)["with KV cache"] == points(ours, lambda row: row.cell["batch_size"], "runtime_s")
        assert name in figure.get_suptitle()


def test_steps_draw_every_category_peak_and_limit():
    rows = pick(ROWS["benchmark_finetuning"], batch_size=1, accumulation=1)
    memory, time = (drawn(figure) for figure in charts.steps(ROWS["benchmark_finetuning"]).values())
    for category in charts.CATEGORIES:
        sizes = {round(row.median(name), 6) for row in rows if row.has(name := f"{category}_at_peak_mb")} - {0.0}
        assert {width for width, _ in memory.get(category, ())} == sizes
    assert {x for x, _ in memory["measured peak"]} == {
        row.median("peak_memory_mb") for row in rows if row.has("peak_memory_mb")
    }
    assert {width for width, _ in time["measured"]} == {round(row.median("step_s"), 6) for row in rows}
    assert {x for x, _ in time["hardware limit"]} == {
        row.median("floor_step_s") for row in rows if row.has("floor_step_s")
    }


def test_a_bar_is_its_parts_end_to_end():
    """Each category starts where the one before it ends; the first at zero."""
    for figure in charts.steps(ROWS["benchmark_finetuning"]).values():
        (axes,) = figure.axes
        by_row = {}
        for bar in axes.patches:
            by_row.setdefault(round(bar.get_y(), 3), []).append((bar.get_x(), bar.get_x() + bar.get_width()))
        for parts in by_row.values():
            assert parts[0][0] == 0
            assert all(start == pytest.approx(end) for (_, end), (start, _) in itertools.pairwise(parts))


def test_loss_draws_the_series_of_each_run():
    found = charts.loss(ROWS["finetuning"])
    assert len(found) == len(ROWS["finetuning"])
    for figure, row in zip(found.values(), ROWS["finetuning"], strict=True):
        for name, key in (("training", "loss_nats"), ("held out", "held_out_loss_nats")):
            assert drawn(figure)[name] == {(x, y) for x, y in row.data["series"][key]}
    without = [Row(row.file, row.line, {**row.data, "series": {}}) for row in ROWS["finetuning"]]
    assert charts.loss(without) == {}


def test_the_ladder_draws_speed_and_memory():
    rows = ROWS["ladder"]
    speed, memory = (drawn(figure) for figure in charts.ladder(rows).values())
    assert {width for width, _ in speed["median"]} == {round(row.median("tokens_per_s"), 6) for row in rows}
    ends = {x for label, line in speed.items() if label != "median" for x, _ in line}
    assert ends == {row.metrics["tokens_per_s"][end] for row in rows for end in ("min", "max")}
    assert {width for width, _ in memory["weights"]} == {round(row.median("weights_mb"), 6) for row in rows}
    assert {x for x, _ in memory["peak memory"]} == {row.median("peak_memory_mb") for row in rows}


def test_pruning_draws_every_way_and_speed_by_size():
    rows, found = ROWS["pruning"], charts.pruning(ROWS["pruning"])
    kept = lambda row: 1 - row.cell["share"]  # noqa: E731
    cuts = [row for row in rows if row.has("loss_nats") and row.cell["method"] != "none"]
    for model, method in {(row.cell["model"], row.cell["method"]) for row in cuts}:
        own = pick(rows, model=model)
        lines = drawn(found[f"pruning-{method}-{model}-cpu"])
        for name, part, metric in (
            ("iterative", "iterative", "loss_nats"),
            ("one-shot, steps of one round", "one-round", "loss_nats"),
            ("one-shot, steps of all rounds", "one-shot", "loss_nats"),
            ("one-shot, not fine-tuned", "one-shot", "loss_cut_nats"),
        ):
            assert lines.get(name, set()) == points(pick(own, part=part, method=method), kept, metric)
        size = drawn(found[f"pruning-size-{model}-cpu"])
        assert size[method] == points(pick(own, part="iterative", method=method), kept, "stored_mb")
        levels = {y for name, line in lines.items() if name.startswith("dense") for _, y in line}
        assert levels == {row.median("loss_nats") for row in pick(own, part="dense")}
    for model in ("tiny", "llama3.2-1b"):
        lines = drawn(found[f"pruning-speed-{model}-cpu"])
        for name, metric in (("dimensions", "tpot_s"), ("dimensions, hardware limit", "floor_tpot_s")):
            ours = pick([row for row in rows if row.cell["part"] == "speed"], model=model)
            assert lines[name] == points(ours, lambda row: row.median("stored_mb"), metric, 1e3)


def test_context_draws_the_step_of_every_cache_and_its_limit():
    rows = pick(ROWS["context"], n_layers=16)
    (figure,) = charts.context(ROWS["context"]).values()
    lines = drawn(figure)
    for cache in ("bfloat16", "int8"):
        ours = pick(rows, engine="llama", cache=cache)
        assert lines[f"{cache} cache"] == points(ours, lambda row: row.cell["context"], "tpot_s", 1e3)
        limits = points(ours, lambda row: row.cell["context"], "floor_tpot_s", 1e3)
        assert limits and lines[f"{cache} cache: hardware limit"] == limits
    others = points(pick(rows, engine="transformers"), lambda row: row.cell["context"], "tpot_s", 1e3)
    assert lines["transformers"] == others


def test_attention_draws_time_and_memory_of_every_form():
    rows = ROWS["attention"]
    time, memory = (drawn(figure) for figure in charts.attention(rows).values())
    for name in {(row.cell["engine"], row.data["dtype"]) for row in rows}:
        own = [row for row in rows if (row.cell["engine"], row.data["dtype"]) == name and row.metrics]
        passes = {(row.cell["positions"], 1e3 * (row.median("forward_s") + row.median("backward_s"))) for row in own}
        assert time[", ".join(name)] == passes
        assert memory[", ".join(name)] == points(own, lambda row: row.cell["positions"], "backward_peak_mb")


@pytest.mark.parametrize(("chart", "experiment"), ALL)
def test_series_differ_without_colour(chart, experiment):
    """In dash, marker or its filling, or hatch; and each chart says what it shows."""
    for figure in chart(ROWS[experiment]).values():
        axes = figure.axes[0]  # beside a heat map stands its scale
        lines = [line for line in axes.lines if line.get_label()[0] != "_"]
        looks = {
            (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white"): line.get_label()
            for line in lines
        }
        assert len(looks) == len({line.get_label() for line in lines})
        hatches = {bars.get_label(): bars[0].get_hatch() or "" for bars in axes.containers}
        assert len(set(hatches.values())) == len(hatches)
        assert figure.get_label() and axes.get_title("left") and figure.get_suptitle()


@pytest.mark.parametrize(("chart", "experiment"), ALL)
def test_no_rows_no_chart_and_out_of_memory_no_point(chart, experiment):
    assert chart([]) == {}
    lost = [Row(row.file, row.line, {**row.data, "metrics": {}, "series": {}}) for row in ROWS[experiment]]
    assert chart(lost) == {}


def test_a_batch_size_whose_memory_ran_out_keeps_its_tick_and_steps_of_larger_batches_have_no_chart():
    rows = ROWS["inference"]
    lost = [Row(row.file, row.line, {**row.data, "metrics": row.metrics if row.cell["batch_size"] < 16 else {}})
            for row in rows]  # fmt: skip
    for figure in charts.generation(lost).values():
        assert list(figure.axes[0].get_xticks()) == [1, 8, 16]
    assert charts.steps([row for row in ROWS["benchmark_finetuning"] if row.cell["batch_size"] > 1]) == {}


def test_two_settings_are_two_charts():
    rows = ROWS["finetuning"]
    other = [Row("x.jsonl", row.line, {**row.data, "torch": "2.7.1"}) for row in rows]
    found = charts.loss([*rows, *other])
    assert len(found) == 2 * len(rows) and all(name.endswith(("cpu", "cpu-2")) for name in found)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for (name, figure), again in zip(
        charts.steps(ROWS["benchmark_finetuning"]).items(),
        charts.steps(ROWS["benchmark_finetuning"]).values(),
        strict=True,
    ):
        render.save_svg(figure, tmp_path / f"{name}.svg")
        text = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert text == render.svg(again) and "measured" in text


@pytest.mark.parametrize(("chart", "experiment"), ALL)
def test_committed_figures_are_those_of_the_committed_rows(chart, experiment):
    for name, figure in chart(ROWS[experiment]).items():
        kept = (ROOT / "reports" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert kept == render.svg(figure), f"{name}.svg: run make reports"
