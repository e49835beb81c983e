"""The results page: every measured row in tables and charts, and a replay of generation, in one file without network.

The page says nothing that no row says: each figure names its row, and what was not measured is said to be so. An
experiment without a section here comes as a plain table of its rows. Layout, style and the replay's script: templates/.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, group
from reports import charts, tables
from reports.cells import computed, figure
from reports.columns import Tables
from reports.render import TEMPLATES, Provenance, html, svg, template

if TYPE_CHECKING:
    from markupsafe import Markup

# Anchor, title and experiment of each section, and its tables where those are not all of the experiment's.
SECTIONS: list[tuple[Any, ...]] = [
    ("table-1", "Table 1: memory and runtime of generation", "inference"),
    ("table-2", "Table 2: what each technique does to memory and time", "benchmark_finetuning", (tables.table_2,)),
    ("table-3", "Table 3: combinations of techniques", "benchmark_finetuning", (tables.table_3, tables.step_details)),
    ("estimates", "Predicted memory of a fine-tuning step", "estimates"),
    ("divisions", "Predicted memory and traffic of each of several processes", "divisions"),
    ("cards", "Predicted number of cards for a fine-tuning step", "cards"),
    ("fine-tuning", "Fine-tuning: does it learn", "finetuning"),
    ("sweep", "Where the learning rate of the preset learn comes from", "sweep"),
    ("pre-training", "Continued pre-training", "pretraining"),
    ("choices", "Preferences: which of two answers", "preferences"),
    ("conversation", "Conversations: the KV cache kept from turn to turn", "conversation"),
    ("leaderboard", "Leaderboard: loss, training and generation", "leaderboard"),
    ("loading", "Loading", "loading"),
    ("formats", "Generation with quantized weights", "formats"),
    ("ladder", "The ladder: one change per row", "ladder"),
    ("speculation", "Speculative decoding with a model's own forms", "speculation"),
    ("kernels", "Kernels: each beside the plain PyTorch that it equals", "kernels"),
    ("context", "Long texts: time and memory by the length of the prompt", "context"),
    ("attention", "Attention: all scores in memory, and fused", "attention"),
    ("pruning", "Pruning: size, quality and speed", "pruning"),
    ("perplexity", "Perplexity by format of the weights", "perplexity", (tables.perplexity_formats,)),
    ("inspection", "What adapters and few bits change inside", "inspection"),
    ("embedded", "The embedded models", "tiny"),
]
COLOURS = {charts.BLUE: "var(--a)", charts.RED: "var(--b)", charts.GREY: "var(--c)", "#d9d9d9": "var(--rule)"}
COLOURS |= {"#000000": "currentColor", "#ffffff": "var(--paper)"}  # of charts, by those of style.css: light and dark


def render(rows: dict[str, list[Row]]) -> str:
    """The page as text, the same for the same rows."""
    sections = [("replay", "With and without the KV cache, as it ran", replays(rows.get("replay", [])))]
    sections += [(anchor, title, section(rows, *shown)) for anchor, title, *shown in SECTIONS]
    others = [name for name in rows if name not in {"replay", *(experiment for _, _, experiment, *_ in SECTIONS)}]
    sections += [(name, name.replace("_", " ").capitalize(), html(tables.generic(rows[name]))) for name in others]
    measured = [row for found in rows.values() for row in found if row.data["device"]["kind"] != "meta"]
    devices = dict.fromkeys(row.device_name for row in measured)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "replay.js"))
    return template("page.html", sections=sections, devices=list(devices), style=style, script=script)


def section(rows: dict[str, list[Row]], experiment: str, make: Sequence[Tables] = ()) -> Markup | str:
    """The tables of an experiment, and after the first of them its charts; nothing without rows."""
    found = rows.get(experiment, [])
    first, *others = (html(function(found)) for function in make or tables.TABLES[experiment])
    drawn = {} if tables.table_2 in make or experiment not in charts.CHARTS else charts.CHARTS[experiment](found)
    short = (
        experiment[0] + experiment[3]
    )  # no other two are alike; the names of charts are long, and stand before each of their ids
    figures = [inline(f"{short}{number}", chart) for number, chart in enumerate(drawn.values(), 1)]
    return template("section.html", first=first, figures=figures, others=others) if found else ""


def inline(name: str, found: charts.Figure) -> dict[str, str]:
    """A chart as part of the page: in its colours, with unique ids, and in words for readers who cannot see it."""
    text = svg(found).replace(" font-family: 'DejaVu Sans';", "")  # style.css says it once
    for colour, ours in COLOURS.items():
        text = text.replace(colour, ours)
    text = re.sub(r'\b(id="|href="#)|(url\(#)', lambda match: f"{match[0]}{name}-", text)
    box, content = re.fullmatch(r'(?s)<svg .*?viewBox="([^"]*)".*?>(.*)</svg>\s*', text).groups()
    return {"name": name, "title": found.get_suptitle(), "about": found.get_label(), "box": box, "content": content}


def replays(rows: Sequence[Row]) -> Markup | str:
    """Side by side, the newest recording of each prompt with the cache and without."""
    found = []
    for same in group(rows, "model", "prompt"):
        sides = {row.cell.get("use_cache"): row for row in same if row.data.get("series", {}).get("token_s")}
        if set(sides) == {True, False}:
            pair = [sides[True], sides[False]]
            found.append({"sides": [side(row) for row in pair], "row": pair[0], "about": Provenance.of(pair)})
    return template("replay.html", replays=found) if found else ""


def side(row: Row) -> dict[str, Any]:
    """One recorded run: its time, its tokens and its rate, and the tokens with their seconds."""
    series = row.data["series"]
    count = computed("{}", int, "d", (row, "cell.output_len"))
    rate = computed("{} / {}", operator.truediv, ".1f", (row, "cell.output_len"), (row, "replayed_s"))
    figures = [("time", "time", (figure(row, "replayed_s", ".2f"), " s"))]
    figures += [("tokens", "count", count), ("rate", "rate", (rate, " tokens/s"))]
    texts = series.get("text", [None] * len(series["token_s"]))
    return {"row": row, "figures": figures, "tokens": list(zip(series["token_s"], texts, strict=True))}
