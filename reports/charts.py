"""From measured rows to charts: one function for each chart, whatever shows it.

A function of CHARTS takes rows of one experiment and returns matplotlib figures by name, the stem of their file in
reports/figures. README shows those files; the page and the PDFs show the same SVG. A figure has one plot and the width
of a phone's screen, so that several can stand beside each other or one below the other. Dashes, markers and hatches
tell series apart, not colours alone. The label of a figure says what it shows, for readers who cannot see it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as PatchPath

from benchmarks.rows import Row, group
from llama.lora import META_NAMES
from reports.cells import chosen
from reports.tables import changed_by, weights_of
from reports.training_tables import run_label, step_label, step_order

WIDTH, HEIGHT, BAR, ENTRY = 3.7, 2.5, 0.37, 0.17  # inches: a figure, lines, a bar with its label, a legend's line
BLUE, RED, GREY = "#1b5e99", "#b3420d", "#4d4d4d"  # the page replaces these, black and white by its own
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 7, "axes.titlelocation": "left"}
STYLE |= {"axes.titlecolor": GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
STYLE |= {"axes.grid": True, "grid.color": "#d9d9d9", "grid.linewidth": 0.6, "lines.linewidth": 1.4}
STYLE |= {"lines.markersize": 4, "legend.frameon": False, "legend.handlelength": 3.2, "hatch.linewidth": 0.8}
SHADES, BOX = 8, [PatchPath.MOVETO, *[PatchPath.LINETO] * 3, PatchPath.CLOSEPOLY]  # of a heat map, its cells
MANY = 20  # points; beyond, they stand too close for markers
CATEGORIES = {"weights": "", "optimizer": "..", "gradients": "////", "copies": "----"}  # of training/memory.py
CATEGORIES |= {"activations": "xxxx", "temporary": "||||"}
Charts = Callable[[Sequence[Row]], dict[str, Figure]]
Drawn = Iterator[tuple[str, Figure]]  # a figure without legend, by what its name starts with


def per_setting(*names: str, dtype: bool = True) -> Callable[[Callable[[list[Row]], Drawn]], Charts]:
    """Let a function that draws rows of one setting take rows of any, and give its figures legends and unique names.

    A setting: see `benchmarks.rows.group`. A figure for which no row has a metric is left out.
    """

    def decorate(draw: Callable[[list[Row]], Drawn]) -> Charts:
        @functools.wraps(draw)
        @matplotlib.rc_context(STYLE)
        def charts(rows: Sequence[Row]) -> dict[str, Figure]:
            found: dict[str, Figure] = {}
            for same in group(rows, *names, dtype=dtype):
                for stem, figure in draw(same):
                    if not figure.axes[0].has_data():
                        continue
                    _add_legend(figure)
                    name = re.sub(r"[^\w.]+", "-", f"{stem}-{same[0].cell['model']}-{same[0].data['device']['kind']}")
                    several = sum(other.startswith(name) for other in found)
                    found[f"{name}-{several + 1}" if several else name] = figure
            return found

        return charts

    return decorate


@per_setting("model", "input_len", "output_len", "memory_limit_gb")
def generation(rows: list[Row]) -> Drawn:
    """Runtime and peak memory by batch size with and without the cache, each with its hardware limit."""
    series = {"with KV cache": (True, "o", "-", BLUE), "without": (False, "s", "--", RED)}
    plots = {"runtime": ("runtime_s", "Runtime (s), logarithmic"), "memory": ("peak_memory_mb", "Peak memory (MB)")}
    by_size = sorted(rows, key=lambda row: row.cell["batch_size"])
    formats = dict.fromkeys(map(weights_of, chosen(by_size, engine="llama")))
    for weights, (what, (metric, title)) in itertools.product(formats, plots.items()):
        title += f", {weights} weights" if len(formats) > 1 else ""
        figure, axes = _plot(title, rows, f"{what.capitalize()} by batch size, with and without the KV cache.")
        for label, (use_cache, marker, dash, colour) in series.items():
            ours = chosen(by_size, engine="llama", use_cache=use_cache)
            ours = [row for row in ours if weights_of(row) == weights]
            _line(axes, ours, "batch_size", metric, label, marker + dash, colour)
            _line(axes, ours, "batch_size", f"floor_{metric}", f"{label}: hardware limit", f"{marker}:", colour)
        others = chosen(by_size, engine="transformers")
        _line(axes, others, "batch_size", metric, "transformers, its cache", "^-.", GREY)
        axes.set(xlabel="batch size", xticks=sorted({row.cell["batch_size"] for row in rows}))
        if metric == "runtime_s":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        yield f"generation-{what}", figure


@per_setting("model", "seq_len", "memory_limit_gb", dtype=False)
def steps(rows: list[Row]) -> Drawn:
    """Memory at the peak by category with the measured peak, and time per step with its limit; one batch per step."""
    single = sorted(chosen(rows, batch_size=1, accumulation=1), key=step_order)
    if not single:
        return
    labelled = [(step_label(row).removeprefix("llama, "), row) for row in single]
    about = "Memory at the peak of a step by what it holds, and the measured peak, for each choice of techniques."
    parts = {f"{category}_at_peak_mb": (category, hatch) for category, hatch in CATEGORIES.items()}
    mark = ("peak_memory_mb", "measured peak")
    yield "steps-memory", _bars("Memory at the peak (MB)", about, labelled, parts, mark)
    about = "Time per step, and the least that its matrix products take, for each choice of techniques."
    mark = ("floor_step_s", "hardware limit")
    yield "steps-time", _bars("Time per step (s)", about, labelled, {"step_s": ("measured", "")}, mark)


@per_setting("model", "preset")
def loss(rows: list[Row]) -> Drawn:
    """Training and held-out loss over the steps of each run that kept them."""
    for row in rows:
        series = row.data.get("series", {})
        if series.get("loss_nats"):
            preset = run_label(row)
            about = "Training loss at every step, and held-out loss where it was measured."
            per = "pair" if row.cell.get("objective") == "dpo" else "label token"
            figure, axes = _plot(f"Loss (nats per {per}), {preset}", [row], about)
            _draw(axes, series["loss_nats"], "training", "x-.", GREY)
            _draw(axes, series.get("held_out_loss_nats", []), "held out", "o-", BLUE)
            axes.set_xlabel("optimizer step")
            yield f"loss-{preset}", figure


@per_setting("model")
def ladder(rows: list[Row]) -> Drawn:
    """Tokens per second and memory of each row of the ladder."""
    several = len({row.cell["text"] for row in rows}) > 1
    labelled = [
        (f"{row.cell['row']}. {row.cell['name']}" + f", text: {row.cell['text']}" * several, row)
        for row in sorted(rows, key=lambda row: row.cell["row"])
    ]
    about = "Tokens per second of each row of the ladder, with whiskers from the slowest to the fastest run."
    yield "ladder-speed", _bars("Tokens per second", about, labelled, {"tokens_per_s": ("median", "")})
    about = "Memory of the weights and peak memory of each row of the ladder."
    mark = ("peak_memory_mb", "peak memory")
    yield "ladder-memory", _bars("Memory (MB)", about, labelled, {"weights_mb": ("weights", "")}, mark)


@per_setting("model")
def pruning(rows: list[Row]) -> Drawn:
    """Held-out loss and size by the share that each method keeps, and time per decoding step by size."""
    by_share = sorted(rows, key=lambda row: -row.cell["share"])
    trained = [row for row in rows if row.has("loss_nats")]
    methods = [method for method in dict.fromkeys(row.cell["method"] for row in trained) if method != "none"]

    def by_kept(axes: Axes, metric: str, label: str, style: str, colour: str, **wanted: str) -> None:
        points = [(1 - row.cell["share"], row.median(metric)) for row in chosen(by_share, **wanted) if row.has(metric)]
        _draw(axes, points, label, style, colour)
        axes.set_xlabel("share kept")

    for method in methods:
        about = f"Held-out loss by the share that {method} pruning keeps, for each way of fine-tuning."
        figure, axes = _plot(f"Held-out loss (nats per token), {method}", rows, about)
        for label, part, metric, style, colour in (
            ("one-shot, not fine-tuned", "one-shot", "loss_cut_nats", "x:", GREY),
            ("one-shot, steps of one round", "one-round", "loss_nats", "^-.", RED),
            ("one-shot, steps of all rounds", "one-shot", "loss_nats", "s--", RED),
            ("iterative", "iterative", "loss_nats", "o-", BLUE),
        ):
            by_kept(axes, metric, label, style, colour, part=part, method=method)
        for row, style in zip(chosen(trained, method="none"), ("-", "-."), strict=False):
            label = f"dense, {row.cell['steps'] or 'no'} steps"
            axes.axhline(row.median("loss_nats"), color="black", linewidth=0.8, linestyle=style, label=label)
        yield f"pruning-{method}", figure
    if trained:
        about = "Size of the weights in 16 bits by the share that pruning keeps of what it takes out, for each method."
        figure, axes = _plot("Weights (MB), 16 bits", trained, about)
        for method, style, colour in zip(methods, ("o-", "s--", "^-."), (BLUE, RED, GREY), strict=False):
            by_kept(axes, "stored_mb", method, style, colour, part="iterative", method=method)
        axes.set_ylim(0, None)
        yield "pruning-size", figure
    if speed := chosen(by_share, part="speed"):
        about = "Time per decoding step by the size of the weights that pruning leaves, and its hardware limit."
        figure, axes = _plot("Time per decoding step (ms)", speed, about)
        for method, colour in zip(dict.fromkeys(row.cell["method"] for row in speed), (BLUE, RED), strict=False):
            own = chosen(speed, method=method)
            _line(axes, own, "stored_mb", "tpot_s", method, "o-", colour, 1e3)
            _line(axes, own, "stored_mb", "floor_tpot_s", f"{method}, hardware limit", "o:", colour, 1e3)
        axes.set(xlabel="weights (MB)", ylim=(0, None))
        yield "pruning-speed", figure


@per_setting("model", "steps")
def context(rows: list[Row]) -> Drawn:
    """Time per token by the tokens before it, of the whole model, with the limit of each cache."""
    layers = max(row.cell["n_layers"] for row in rows)
    whole = sorted(chosen(rows, n_layers=layers), key=lambda row: row.cell["context"])
    about = "Time per output token by the tokens before it, for each cache, with the hardware limit, and transformers."
    figure, axes = _plot("Time per output token (ms)", whole, about)
    caches = dict.fromkeys(row.cell["cache"] for row in whole)
    for cache, marker, dash, colour in zip(caches, "os", ("-", "--"), (BLUE, RED), strict=False):
        own = chosen(whole, engine="llama", cache=cache)
        _line(axes, own, "context", "tpot_s", f"{cache} cache", marker + dash, colour, 1e3)
        _line(axes, own, "context", "floor_tpot_s", f"{cache} cache: hardware limit", f"{marker}:", colour, 1e3)
    _line(axes, chosen(whole, engine="transformers"), "context", "tpot_s", "transformers", "^-.", GREY, 1e3)
    axes.set(xlabel="tokens before it", xscale="log", yscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    yield "context", figure


@per_setting("model", "heads", "kv_heads", "textbook_limit_gb", dtype=False)
def attention(rows: list[Row]) -> Drawn:
    """Time and memory of a forward and a backward pass by length, both axes logarithmic."""
    markers = dict(zip(dict.fromkeys(row.cell["engine"] for row in rows), "os^vD", strict=False))
    dashes = dict(zip(dict.fromkeys(row.data["dtype"] for row in rows), ("-", "--", "-."), strict=False))
    colours = {"textbook": RED, "fused": BLUE}
    for what, title, names, scale in (
        ("time", "Attention, forward and backward (ms)", ("forward_s", "backward_s"), 1e3),
        ("memory", "Attention, peak memory (MB)", ("backward_peak_mb",), 1),
    ):
        about = f"{what.capitalize()} of attention by positions: all scores in memory, and fused."
        figure, axes = _plot(title, rows, about)
        for (engine, marker), (dtype, dash) in itertools.product(markers.items(), dashes.items()):
            own = sorted(chosen(rows, engine=engine), key=lambda row: row.cell["positions"])
            own = [row for row in own if row.data["dtype"] == dtype and row.has(*names)]
            points = [(row.cell["positions"], scale * sum(map(row.median, names))) for row in own]
            _draw(axes, points, f"{engine}, {dtype}", marker + dash, colours.get(engine, GREY))
        axes.set(xlabel="positions", xscale="log", yscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        yield f"attention-{what}", figure


@per_setting("model", "adapter", "adapter_sha256", "weights")
def inspection(rows: list[Row]) -> Drawn:
    """How far each matrix has moved, as a heat map of layers, and what became of the activations."""
    for row in (row for row in rows if row.metrics):
        what = changed_by(row)
        moved = {name: [100 * value for _, value in row.data["series"][f"{name}_update_x"]] for name in META_NAMES}
        about = "Relative change of each matrix of each layer, in percent: a heat map."
        figure, axes = _plot(f"Change of each matrix (%), {what}", [row], about)
        _heat_map(axes, list(moved.values()))
        axes.set(xlabel="layer", yticks=range(len(moved)), yticklabels=list(moved))
        yield f"inspection-matrices-{what}", figure
        about = "Relative change of the activations after each block, in percent."
        figure, axes = _plot(f"Change of the activations (%), {what}", [row], about)
        points = [(layer, 100 * value) for layer, value in row.data["series"]["activation_x"]]
        _draw(axes, points, "activations", "o-", BLUE)
        axes.set(xlabel="layer", ylim=(0, None))
        yield f"inspection-activations-{what}", figure


CHARTS = {"inference": generation, "benchmark_finetuning": steps, "finetuning": loss}
CHARTS |= {
    "pretraining": loss,
    "preferences": loss,
    "ladder": ladder,
    "pruning": pruning,
    "inspection": inspection,
    "attention": attention,
    "context": context,
}  # by the experiment whose rows they take


def _plot(title: str, rows: Sequence[Row], about: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty plot with its title and what its rows, all of one model and device, were measured on."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none", label=about)
    figure.suptitle(textwrap.fill(title, 50), x=0.01, ha="left", fontsize=9, fontweight="bold")
    dtypes = " and ".join(dict.fromkeys(row.data["dtype"] for row in rows))
    axes = figure.subplots()
    axes.set(facecolor="none", title=f"{rows[0].cell['model']}, {dtypes}, {rows[0].device_name}")
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
    axes.plot(*zip(*points, strict=True), f"{marker}{dash}", color=colour, label=label, lw=width, mfc=fill)


def _bars(
    title: str,
    about: str,
    labelled: Sequence[tuple[str, Row]],
    parts: dict[str, tuple[str, str]],
    mark: tuple[str, str] = ("", ""),
) -> Figure:
    """Metrics of each row as one bar below its label, and another metric, `mark`, as a line across the bar.

    parts: name and hatch of each metric; where there is one alone, its spread is drawn, too. mark: a metric, its name.
    """
    measured = [(label, row) for label, row in labelled if any(map(row.has, (*parts, mark[0])))]
    figure, axes = _plot(title, [row for _, row in labelled], about, 0.9 + BAR * len(measured))
    for i, (label, row) in enumerate(measured):
        axes.annotate(label, (0, i - 0.22), (0, 1.5), textcoords="offset points", fontsize=7)
        end = 0.0
        for metric, (name, hatch) in parts.items():
            value = row.median(metric) if row.has(metric) else 0.0
            style = {"facecolor": "white", "edgecolor": BLUE, "hatch": hatch} if hatch else {"color": BLUE}
            if value:
                axes.barh(i, value, 0.38, left=end, label=name, **style)
            end += value
        if len(parts) == 1:
            spread = row.metrics[metric]
            axes.plot([spread["min"], spread["max"]], [i, i], color=GREY, lw=1)
        if row.has(mark[0]):
            place = [row.median(mark[0])] * 2, [i - 0.19, i + 0.25]
            axes.plot(*place, color="white", lw=4, solid_capstyle="butt")
            axes.plot(*place, color="black", lw=1.6, solid_capstyle="butt", label=mark[1])
    axes.set(yticks=[], ylim=(len(measured) - 0.6, -0.75))
    axes.grid(visible=False, axis="y")
    return figure


def _heat_map(axes: Axes, lines: Sequence[Sequence[float]]) -> None:
    """Values from 0 in shades, line below line, with a scale. Cells of a shade are one path: the page stays small."""
    shades, top = matplotlib.colormaps["cividis"].resampled(SHADES), max(map(max, lines)) or 1.0
    boxes: dict[int, list[PatchPath]] = {}
    for y, line in enumerate(lines):
        right = -0.5
        for shade, run in itertools.groupby(min(SHADES - 1, int(SHADES * value / top)) for value in line):
            left, right = right, right + len(list(run))
            corners = [(left, y - 0.5), (right, y - 0.5), (right, y + 0.5), (left, y + 0.5), (left, y - 0.5)]
            boxes.setdefault(shade, []).append(PatchPath(corners, BOX))
    for shade, paths in sorted(boxes.items()):
        axes.add_patch(PathPatch(PatchPath.make_compound_path(*paths), facecolor=shades(shade), linewidth=0))
    axes.set(xlim=(-0.5, len(lines[0]) - 0.5), ylim=(len(lines) - 0.5, -0.5))
    axes.grid(False)
    axes.figure.colorbar(ScalarMappable(Normalize(0, top), shades), ax=axes)


def _add_legend(figure: Figure) -> None:
    """What tells several series apart, below the plot; lines come last."""
    axes = figure.axes[0]  # the next would be a scale of colours
    pairs = zip(*axes.get_legend_handles_labels(), strict=True)
    entries = {label: handle for handle, label in sorted(pairs, key=lambda pair: isinstance(pair[0], Line2D))}
    if len(entries) > 1:
        columns = 2 if max(map(len, entries)) < 30 else 1
        figure.legend(entries.values(), entries, loc="outside lower left", ncols=columns, fontsize=7)
        figure.set_figheight(figure.get_figheight() + ENTRY * math.ceil(len(entries) / columns))
