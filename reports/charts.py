"""From measured rows to charts: one function for each chart, whatever shows it.

A function here takes rows of one experiment and returns matplotlib figures by name, the stem of their file in
reports/figures. README shows those files; the page and the PDFs show the same SVG. A figure has one plot and the width
of a phone's screen, so that several can stand beside each other or one below the other. Dashes, markers and hatches
tell series apart, not colours alone. The label of a figure says what it shows, for readers who cannot see it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.rows import Row, group
from reports.cells import chosen
from reports.tables import weights_of
from reports.training_tables import step_label, step_order

WIDTH, HEIGHT, BAR, ENTRY = 3.7, 2.5, 0.37, 0.17  # inches: a figure, lines, a bar with its label, a legend's line
BLUE, RED, GREY = "#1b5e99", "#b3420d", "#4d4d4d"  # the page replaces these, black and white by its own
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 7, "axes.titlelocation": "left"}
STYLE |= {"axes.titlecolor": GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
STYLE |= {"axes.grid": True, "grid.color": "#d9d9d9", "grid.linewidth": 0.6, "lines.linewidth": 1.4}
STYLE |= {"lines.markersize": 4, "legend.frameon": False, "legend.handlelength": 3.2, "hatch.linewidth": 0.8}
MANY = 20  # points; beyond, they stand too close for markers
CATEGORIES = {"weights": "", "optimizer": "..", "gradients": "////", "copies": "----"}  # of training/memory.py
CATEGORIES |= {"activations": "xxxx", "temporary": "||||"}
Named = dict[str, Figure]


def generation(rows: Sequence[Row]) -> Named:
    """Runtime and peak memory by batch size with and without the cache, each with its hardware limit."""
    found: Named = {}
    series = {"with KV cache": (True, "o", "-", BLUE), "without": (False, "s", "--", RED)}
    plots = {"runtime": ("runtime_s", "Runtime (s), logarithmic"), "memory": ("peak_memory_mb", "Peak memory (MB)")}
    for same in group(rows, "model", "input_len", "output_len", "memory_limit_gb"):
        by_size = sorted(same, key=lambda row: row.cell["batch_size"])
        own = chosen(by_size, engine="llama")
        formats = dict.fromkeys(map(weights_of, own))
        for weights, (what, (metric, title)) in itertools.product(formats, plots.items()):
            title += f", {weights} weights" if len(formats) > 1 else ""
            figure, axes = _plot(title, same, f"{what.capitalize()} by batch size, with and without the KV cache.")
            for label, (use_cache, marker, dash, colour) in series.items():
                ours = [row for row in chosen(own, use_cache=use_cache) if weights_of(row) == weights]
                _line(axes, ours, "batch_size", metric, label, marker + dash, colour)
                _line(axes, ours, "batch_size", f"floor_{metric}", f"{label}: hardware limit", f"{marker}:", colour)
            others = chosen(by_size, engine="transformers")
            _line(axes, others, "batch_size", metric, "transformers, its cache", "^-.", GREY)
            axes.set(xlabel="batch size", xticks=sorted({row.cell["batch_size"] for row in same}))
            if metric == "runtime_s":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            _add(found, f"generation-{what}", figure, same[0])
    return found


def steps(rows: Sequence[Row]) -> Named:
    """Memory at the peak by category with the measured peak, and time per step with its limit; one batch per step."""
    found: Named = {}
    for same in group(rows, "model", "seq_len", "memory_limit_gb", dtype=False):
        single = sorted(chosen(same, batch_size=1, accumulation=1), key=step_order)
        labelled = [(step_label(row).removeprefix("llama, "), row) for row in single]
        about = "Memory at the peak of a step by what it holds, and the measured peak, for each choice of techniques."
        parts = {f"{category}_at_peak_mb": (category, hatch) for category, hatch in CATEGORIES.items()}
        _bars(
            found, "steps-memory", "Memory at the peak (MB)", about, labelled, parts, "peak_memory_mb", "measured peak"
        )
        about = "Time per step, and the least that its matrix products take, for each choice of techniques."
        parts = {"step_s": ("measured", "")}
        _bars(found, "steps-time", "Time per step (s)", about, labelled, parts, "floor_step_s", "hardware limit")
    return found


def loss(rows: Sequence[Row]) -> Named:
    """Training and held-out loss over the steps of each run that kept them."""
    found: Named = {}
    for row in rows:
        series = row.data.get("series", {})
        if not series.get("loss_nats"):
            continue
        preset = row.cell.get("preset", "run")
        title = f"Loss (nats per label token), {preset}"
        figure, axes = _plot(title, [row], "Training loss at every step, and held-out loss where it was measured.")
        _draw(axes, series["loss_nats"], "training", "x-.", GREY)
        _draw(axes, series.get("held_out_loss_nats", []), "held out", "o-", BLUE)
        axes.set_xlabel("optimizer step")
        _add(found, f"loss-{preset}", figure, row)
    return found


def ladder(rows: Sequence[Row]) -> Named:
    """Tokens per second and memory of each row of the ladder."""
    found: Named = {}
    for same in group(rows, "model"):
        several = len({row.cell["text"] for row in same}) > 1
        labelled = [
            (f"{row.cell['row']}. {row.cell['name']}" + f", text: {row.cell['text']}" * several, row)
            for row in sorted(same, key=lambda row: row.cell["row"])
        ]
        about = "Tokens per second of each row of the ladder, with whiskers from the slowest to the fastest run."
        _bars(found, "ladder-speed", "Tokens per second", about, labelled, {"tokens_per_s": ("median", "")})
        about = "Memory of the weights and peak memory of each row of the ladder."
        parts = {"weights_mb": ("weights", "")}
        _bars(found, "ladder-memory", "Memory (MB)", about, labelled, parts, "peak_memory_mb", "peak memory")
    return found


def pruning(rows: Sequence[Row]) -> Named:
    """Held-out loss by share removed for each method, and time per decoding step by the size of what is left."""
    found: Named = {}
    for same in group([row for row in rows if row.has("loss_nats")], "model"):
        for method in dict.fromkeys(row.cell["method"] for row in same if row.cell["method"] != "none"):
            about = f"Held-out loss by the share that {method} pruning removes, for each way of fine-tuning."
            figure, axes = _plot(f"Held-out loss (nats per token), {method}", same, about)
            for label, part, metric, style, colour in (
                ("one-shot, not fine-tuned", "one-shot", "loss_cut_nats", "x:", GREY),
                ("one-shot, steps of one round", "one-round", "loss_nats", "^-.", RED),
                ("one-shot, steps of all rounds", "one-shot", "loss_nats", "s--", RED),
                ("iterative", "iterative", "loss_nats", "o-", BLUE),
            ):
                ours = sorted(chosen(same, part=part, method=method), key=lambda row: row.cell["share"])
                _line(axes, ours, "share", metric, label, style, colour)
            for row, style in zip(chosen(same, method="none"), ("-", "-."), strict=False):
                label = f"dense, {row.cell['steps'] or 'no'} steps"
                axes.axhline(row.median("loss_nats"), color="black", linewidth=0.8, linestyle=style, label=label)
            axes.set_xlabel("share removed")
            _add(found, f"pruning-{method}", figure, same[0])
    for same in group(chosen(rows, part="speed"), "model"):
        about = "Time per decoding step by the size of the weights that pruning leaves, and its hardware limit."
        figure, axes = _plot("Time per decoding step (ms)", same, about)
        ours = sorted(same, key=lambda row: row.cell["share"])
        _line(axes, ours, "stored_mb", "tpot_s", "measured", "o-", BLUE, 1e3)
        _line(axes, ours, "stored_mb", "floor_tpot_s", "hardware limit", "o:", BLUE, 1e3)
        axes.set(xlabel="weights (MB)", ylim=(0, None))
        _add(found, "pruning-speed", figure, same[0])
    return found


CHARTS = {"inference": generation, "benchmark_finetuning": steps, "finetuning": loss}
CHARTS |= {"ladder": ladder, "pruning": pruning}  # by the experiment whose rows they take


def _plot(title: str, rows: Sequence[Row], about: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty plot with its title and what its rows, all of one model and device, were measured on."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
        axes = figure.subplots()
        axes.set_facecolor("none")
        dtypes = " and ".join(dict.fromkeys(row.data["dtype"] for row in rows))
        axes.set_title(f"{rows[0].cell['model']}, {dtypes}, {rows[0].data['device']['name']}")
    figure.set_label(about)
    return figure, axes


def _line(
    axes: Axes, rows: Sequence[Row], x: str, y: str, label: str, style: str, colour: str, scale: float = 1
) -> None:
    """The medians of a metric by `scale`, over a value of the cell or over another metric."""
    points = [(row.median(x) if row.has(x) else row.cell[x], scale * row.median(y)) for row in rows if row.has(y)]
    _draw(axes, points, label, style, colour)


def _draw(axes: Axes, points: Sequence[Sequence[float]], label: str, style: str, colour: str) -> None:
    """A line, hollow markers where it is dotted. style: a marker and a dash, as matplotlib writes them."""
    if not points:
        return
    marker, dash = (style[0], style[1:]) if len(points) <= MANY else ("", "-")
    fill = "white" if dash == ":" else colour
    width = 1.1 if dash == ":" or not marker else None
    with matplotlib.rc_context(STYLE):
        axes.plot(*zip(*points, strict=True), f"{marker}{dash}", color=colour, label=label, lw=width, mfc=fill)


def _bars(
    found: Named,
    stem: str,
    title: str,
    about: str,
    labelled: Sequence[tuple[str, Row]],
    parts: dict[str, tuple[str, str]],
    mark: str = "",
    mark_name: str = "",
) -> None:
    """Metrics of each row as one bar below its label, and another metric, `mark`, as a line across the bar.

    parts: name and hatch of each metric; where there is one alone, its spread is drawn, too.
    """
    labelled = [(label, row) for label, row in labelled if any(map(row.has, (*parts, mark)))]
    if not labelled:
        return
    figure, axes = _plot(title, [row for _, row in labelled], about, 0.9 + BAR * len(labelled))
    with matplotlib.rc_context(STYLE):
        for i, (label, row) in enumerate(labelled):
            axes.annotate(label, (0, i - 0.22), (0, 1.5), textcoords="offset points", fontsize=7)
            end = 0.0
            for metric, (name, hatch) in parts.items():
                value = row.median(metric) if row.has(metric) else 0.0
                style = {"color": BLUE} if not hatch else {"facecolor": "white", "edgecolor": BLUE, "hatch": hatch}
                if value:
                    axes.barh(i, value, 0.38, left=end, label=name, **style)
                end += value
            if len(parts) == 1:
                spread = row.metrics[metric]
                axes.plot([spread["min"], spread["max"]], [i, i], color=GREY, lw=1)
            if row.has(mark):
                place = [row.median(mark)] * 2, [i - 0.19, i + 0.25]
                axes.plot(*place, color="white", lw=4, solid_capstyle="butt")
                axes.plot(*place, color="black", lw=1.6, solid_capstyle="butt", label=mark_name)
        axes.set(yticks=[], ylim=(len(labelled) - 0.6, -0.75))
        axes.grid(visible=False, axis="y")
    _add(found, stem, figure, labelled[0][1])


def _add(found: Named, stem: str, figure: Figure, row: Row) -> None:
    """Add the legend, and the figure under a name that no other has."""
    (axes,) = figure.axes
    if not axes.lines and not axes.patches:  # memory ran out in every cell
        return
    pairs = zip(*axes.get_legend_handles_labels(), strict=True)
    entries = {label: handle for handle, label in sorted(pairs, key=lambda pair: isinstance(pair[0], Line2D))}
    if len(entries) > 1:
        with matplotlib.rc_context(STYLE):
            columns = 2 if max(map(len, entries)) < 30 else 1
            figure.legend(entries.values(), entries, loc="outside lower left", ncols=columns, fontsize=7)
            figure.set_figheight(figure.get_figheight() + ENTRY * math.ceil(len(entries) / columns))
    name = re.sub(r"[^\w.]+", "-", f"{stem}-{row.cell['model']}-{row.data['device']['kind']}")
    several = sum(other.startswith(name) for other in found)
    found[name if not several else f"{name}-{several + 1}"] = figure
