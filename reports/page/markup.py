"""HTML from measured rows: every figure is a <data> element that names the file, the line and the field it stands in.

So a reader finds what a figure is made of by pointing at it, and tests/test_page.py looks every figure up again.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from reports.page.rows import Row

UNITS = {"tflop_s": "TFLOP/s", "gb_s": "GB/s", "tflop": "TFLOP", "gb": "GB", "mb": "MB", "nats": "nats", "s": "s"}
UNITS |= {"x": "x"}


class Html(str):
    """Text that is markup already; every other string is escaped."""

    __slots__ = ()


def escape(text: Any) -> Html:
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. A trailing _ of an attribute's name is dropped, _ inside becomes -; None leaves an attribute out."""
    names = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opened = "".join(f' {key}="{html.escape(str(value))}"' for key, value in names.items())
    return Html(f"<{name}{opened}>{''.join(map(escape, children))}</{name}>")


def joined(parts: Sequence[Any], between: str = "") -> Html:
    return Html(escape(between).join(map(escape, parts)))


def number(value: float) -> str:
    """A count as it is; else three significant digits, or all digits of a larger integer part."""
    if isinstance(value, int) or value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def figure(row: Row, name: str, scale: float = 1, stat: str = "median") -> Html:
    """A figure of a row, by `scale`; its spread shows where one points at it. A dash where it was not measured."""
    if not row.metrics:
        return tag("abbr", "x", title="out of memory")
    if name not in row.metrics:
        return Html("-")
    values, source = row.metrics[name], row.source(f"metrics.{name}.{stat}")
    shown = number(values[stat] * scale)
    spread = f"median of {values['n']}, {values['min']:.6g} to {values['max']:.6g}" if values["n"] > 1 else "one run"
    title = f"{source} ({spread})"
    return tag(
        "data", shown, value=values[stat], data_from=source, data_scale=None if scale == 1 else scale, title=title
    )


def spread(row: Row, name: str, scale: float = 1) -> Html:
    """A median with the least and the most of its runs, where there was more than one."""
    if not row.has(name) or row.metrics[name]["n"] == 1:
        return figure(row, name, scale)
    parts = [figure(row, name, scale, stat) for stat in ("median", "min", "max")]
    return joined([parts[0], " ", tag("small", "(", parts[1], " to ", parts[2], ")")])


def ratio(above: Row, upper: str, below: Row, lower: str) -> Html:
    """One figure over another: paths into rows, such as metrics.runtime_s.median or cell.output_len."""
    values = [look_up(row, path) for row, path in ((above, upper), (below, lower))]
    if None in values or not values[1]:
        return Html("-")
    source = f"{above.source(upper)} / {below.source(lower)}"
    return tag("data", number(values[0] / values[1]), value=values[0] / values[1], data_from=source, title=source)


def look_up(row: Row, path: str) -> float | None:
    found: Any = row.data
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def heading(name: str, rows: Sequence[Row]) -> tuple[str, int]:
    """A metric's name in words with its unit, and the factor to that unit: seconds become ms where all are short."""
    words, unit = name, ""
    for ending, written in UNITS.items():
        if name.endswith(f"_{ending}"):
            words, unit = name.removesuffix(f"_{ending}"), written
            break
    values = [row.median(name) for row in rows if row.has(name)]
    scale = 1
    if unit == "s" and values and max(values) < 0.1:
        unit, scale = "ms", 1000
    return words.replace("_", " ") + (f" ({unit})" if unit else ""), scale


def table(
    caption: Any, head: Sequence[Any], body: Sequence[Sequence[Any]], note: Any = "", narrow: str = "cards"
) -> Html:
    """A table whose first column names the rows; on a narrow screen each row becomes a card, unless it is to `stay`."""
    numeric = [all(_is_figure(line[i]) for line in body) for i in range(len(head))]
    kinds = ["n" if is_numeric else None for is_numeric in numeric]
    heads = [
        tag("th", text, scope="col", role="columnheader", class_=kind) for text, kind in zip(head, kinds, strict=True)
    ]
    lines = []
    for first, *rest in body:
        cells = [tag("th", first, scope="row", role="rowheader", data_label=_text(head[0]))]
        for text, title, kind in zip(rest, head[1:], kinds[1:], strict=True):
            kind = f"{kind or ''} none".strip() if text == "-" else kind
            cells.append(tag("td", tag("span", text), role="cell", class_=kind, data_label=_text(title)))
        lines.append(tag("tr", *cells, role="row"))
    inside = [tag("thead", tag("tr", *heads, role="row"), role="rowgroup"), tag("tbody", *lines, role="rowgroup")]
    grid = tag("table", tag("caption", caption), *inside, role="table", class_=narrow)
    label = f"{_text(caption)}, scrolls sideways where it is wide"
    return joined([tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label=label), note])


def _is_figure(text: Any) -> bool:
    return isinstance(text, Html) and (text.startswith(("<data", "<abbr")) or text == "-")


def _text(content: Any) -> str:
    """A heading without its markup, for a label."""
    if not isinstance(content, Html):
        return str(content)
    parts = content.replace(">", "<").split("<")
    return html.unescape("".join(parts[::2]))


def provenance(rows: Sequence[Row]) -> Html:
    """On what, with what, when and from which code rows were measured."""
    settings = dict.fromkeys(
        f"{row.data['device']['name']} ({row.data['device']['kind']}), {row.data['dtype']}, "
        f"{row.data['threads']} threads, torch {row.data['torch']}"
        for row in rows
    )
    commits = dict.fromkeys(row.data["commit"] for row in rows)
    dates = dict.fromkeys(row.data["time"][:10] for row in rows)
    commands = dict.fromkeys(row.data["command"] for row in rows)
    runs = {values["n"] for row in rows for values in row.metrics.values()}
    parts = ["; ".join(settings), f"{runs.pop()} runs of each" if len(runs) == 1 and runs != {1} else ""]
    parts += [", ".join(dates), f"commit {', '.join(commits)}"]
    code = joined([tag("code", command) for command in commands], "; ")
    return tag("p", ". ".join(part for part in parts if part) + ". ", code, class_="source")
