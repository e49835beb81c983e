"""Charts as inline SVG: lines over a number, and stacked bars, each mark with the row that it stands for.

They are drawn 360 units wide, so that on a telephone text has the size of text. Lines differ in dash and marker and
bars in pattern, so that they can be told apart without colour; colours come from style.css, which has two sets, for
light and for dark. Left out: anything that moves, and scales of figures that begin neither at zero nor are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports.page.markup import Html, joined, number, tag
from reports.page.rows import Row

WIDTH, LEFT, RIGHT = 360, 48, 20
LONG = 20  # points; beyond, they stand too close for markers
LEGEND_LINE, PLOT_HEIGHT = 17, 190
BAR, BAR_STEP = 13, 36


@dataclass(frozen=True)
class Point:
    """A mark: where it is, and the field of the row whose value it shows."""

    x: float
    y: float
    source: str

    @classmethod
    def of(cls, x: float, row: Row, name: str) -> Point:
        return cls(x, row.median(name), row.source(f"metrics.{name}.median"))


@dataclass(frozen=True)
class Line:
    """Points in order of x. look: a, b or c, each a colour, a dash and a marker; "a floor" is the dotted one of a."""

    name: str
    points: Sequence[Point]
    look: str


class Scale:
    """Values to positions from `start` to `end`, linear or logarithmic, with round ticks at or within its ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = True) -> None:
        low, high = min(values), max(values)
        self.start, self.end, self.log = start, end, log
        if log:
            self.ticks = _log_ticks(low, high)
        else:
            self.ticks = _linear_ticks(0.0 if zero else low, high)
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 2)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from below the least to above the most; powers alone over many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    steps = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    below, above = max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)
    if below == above:
        above = ticks[ticks.index(above) + 1]
    return [tick for tick in ticks if below <= tick <= above]


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five round steps that hold everything."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def lines(
    name: str, title: str, about: str, x: str, series: Sequence[Line], log: bool = False, zero: bool = True
) -> Html:
    """A chart of lines. name: unique in the page; about: what it shows, for who cannot see it; x: title of the axis."""
    top = LEGEND_LINE * math.ceil(len(series) / 2) + 30
    points = [point for line in series for point in line.points]
    across = Scale([point.x for point in points], LEFT, WIDTH - RIGHT, zero=False)
    if len(ticks := sorted({point.x for point in points})) <= 6:  # few places: mark those, and nothing between
        across.ticks = ticks
        across.low, across.high = ticks[0] - 0.06 * (ticks[-1] - ticks[0] or 1), ticks[-1] + 0.06 * (ticks[-1] or 1)
    up = Scale([point.y for point in points], top + PLOT_HEIGHT, top, log, zero)
    parts = [_heading(title), *_legend(series)]
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{tick:,g}", x=LEFT - 6, y=y + 4, class_="tick end", data_y=y, data_at=tick))
    for tick in across.ticks:
        parts.append(tag("text", f"{tick:,g}", x=across.at(tick), y=top + PLOT_HEIGHT + 16, class_="tick middle"))
    parts.append(tag("text", x, x=(LEFT + WIDTH) / 2, y=top + PLOT_HEIGHT + 32, class_="middle axis"))
    for line in series:
        places = [(across.at(point.x), up.at(point.y)) for point in line.points]
        parts.append(tag("polyline", points=" ".join(f"{a:g},{b:g}" for a, b in places), class_=_look(line)))
        for point, (a, b) in zip(line.points, places, strict=True):
            parts.append(_marker(line.look, a, b, point, small=len(places) > LONG))
    return _svg(name, title, about, top + PLOT_HEIGHT + 40, parts)


def _look(line: Line) -> str:
    return f"line {line.look}{' long' if len(line.points) > LONG else ''}"


def _legend(series: Sequence[Line]) -> list[Html]:
    parts = []
    for i, line in enumerate(series):
        x, y = 4 + (i % 2) * WIDTH / 2, 30 + LEGEND_LINE * (i // 2)
        parts.append(tag("polyline", points=f"{x:g},{y - 4:g} {x + 26:g},{y - 4:g}", class_=_look(line)))
        parts.append(_marker(line.look, x + 13, y - 4, None, small=len(line.points) > LONG))
        parts.append(tag("text", line.name, x=x + 32, y=y))
    return parts


def _marker(look: str, x: float, y: float, point: Point | None, small: bool = False) -> Html:
    """A circle, a square or a triangle; floors and long curves have a dot that only carries the source."""
    source = {"data_from": point.source, "data_y": y} if point is not None else {}
    title = [tag("title", f"{number(point.y)}: {point.source}")] if point is not None else []
    kind = look.split()[0]
    if look.endswith("floor") or small:
        return tag("circle", *title, cx=x, cy=y, r=4, class_="unseen", **source) if point is not None else Html()
    if kind == "a":
        return tag("circle", *title, cx=x, cy=y, r=4, class_=f"mark {kind}", **source)
    corners = [(-4, -4), (4, -4), (4, 4), (-4, 4)] if kind == "b" else [(0, -5), (5, 4), (-5, 4)]
    outline = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in corners)
    return tag("polygon", *title, points=outline, class_=f"mark {kind}", **source)


@dataclass(frozen=True)
class Bar:
    """A stack of parts (category, value, source), and beside it a tick for one value on the same scale."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    mark: tuple[float, str] | None = None


def bars(name: str, title: str, about: str, series: Sequence[Bar], mark: str) -> Html:
    """Horizontal stacked bars from zero. mark: what the ticks beside the bars are."""
    categories = list(dict.fromkeys(part[0] for bar in series for part in bar.parts))
    entries = [*categories, *([mark] if any(bar.mark for bar in series) else [])]
    top = 26 + LEGEND_LINE * math.ceil(len(entries) / 2)
    ends = [sum(part[1] for part in bar.parts) for bar in series] + [bar.mark[0] for bar in series if bar.mark]
    along = Scale([0.0, *ends], 4, WIDTH - RIGHT)
    height = top + BAR_STEP * len(series)
    parts = [_patterns(name), _heading(title)]
    for i, entry in enumerate(entries):
        x, y = 4 + (i % 2) * WIDTH / 2, 30 + LEGEND_LINE * (i // 2)
        if i < len(categories):
            parts.append(tag("rect", x=x, y=y - 10, width=26, height=10, class_="bar", fill=_fill(name, i)))
        else:
            parts.append(tag("line", x1=x + 13, x2=x + 13, y1=y - 12, y2=y + 2, class_="stroke"))
        parts.append(tag("text", entry, x=x + 32, y=y))
    for tick in along.ticks:
        x = along.at(tick)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=height, class_="grid"))
        place = {"x": x, "y": height + 14, "class_": "tick middle" if tick else "tick"}
        parts.append(tag("text", f"{tick:,g}", **place, data_x=x, data_at=tick))
    for i, bar in enumerate(series):
        y, sum_so_far = top + BAR_STEP * i + 18, 0.0
        parts.append(tag("text", bar.label, x=4, y=y - 5))
        for category, value, source in bar.parts:
            x, end = along.at(sum_so_far), along.at(sum_so_far + value)
            sum_so_far += value
            label = tag("title", f"{category}, {number(value)}: {source}")
            shape = {
                "x": x,
                "y": y,
                "width": round(end - x, 2),
                "height": BAR,
                "fill": _fill(name, categories.index(category)),
            }
            parts.append(tag("rect", label, **shape, class_="bar", data_from=source, data_length=round(end - x, 2)))
        if bar.mark is not None:
            x, label = along.at(bar.mark[0]), tag("title", f"{mark}, {number(bar.mark[0])}: {bar.mark[1]}")
            ends_y = {"y1": y - 2, "y2": y + BAR + 2}
            parts.append(tag("line", x1=x, x2=x, **ends_y, class_="halo"))
            parts.append(tag("line", label, x1=x, x2=x, **ends_y, class_="stroke", data_from=bar.mark[1], data_x=x))
    return _svg(name, title, about, height + 22, parts)


PATTERNS = ("", "M0,6 L6,0", "M0,0 L6,6", "M3,0 V6 M0,3 H6", "M0,3 H6", "M3,2 V4")  # the first one is solid


def _fill(name: str, i: int) -> str:
    return "currentColor" if i == 0 else f"url(#{name}-{i % len(PATTERNS)})"


def _patterns(name: str) -> Html:
    """Hatchings, for bars that differ without colour."""
    found = [
        tag(
            "pattern",
            tag("path", d=path, class_="hatch"),
            id=f"{name}-{i}",
            width=6,
            height=6,
            patternUnits="userSpaceOnUse",
        )
        for i, path in enumerate(PATTERNS)
        if path
    ]
    return tag("defs", *found)


def _heading(title: str) -> Html:
    return tag("text", title, x=4, y=12, class_="title")


def _svg(name: str, title: str, about: str, height: float, parts: Sequence[Html]) -> Html:
    head = [tag("title", title, id=f"{name}-title"), tag("desc", about, id=f"{name}-about")]
    named = {"role": "img", "aria_labelledby": f"{name}-title {name}-about", "viewBox": f"0 0 {WIDTH} {height:g}"}
    return tag("figure", tag("svg", joined([*head, *parts]), **named))
