"""How measured figures become text, and the rules by which Table 2 turns two of them into an arrow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CHANGED = 0.03  # of a kind of memory, and 0.05 of the time: less is no arrow in Table 2
SLOWER = 0.05
# What the course calls a kind of memory, in the categories of memory.py.
KINDS = {"parameters": ("weights", "copies"), "activations": ("activations",), "gradients": ("gradients",)}
KINDS |= {"optimizer state": ("optimizer",)}


def most_mb(metrics: dict[str, Any], kind: str) -> float:
    """The most that a kind of memory held over a step, in MB."""
    return sum(metrics[f"{name}_most_mb"]["median"] for name in KINDS[kind])


def arrow(before: float, after: float, threshold: float) -> str:
    """Up or down where the change is more than that share of what was there before, else =."""
    if abs(after - before) > threshold * before:
        return "↑" if after > before else "↓"
    return "="


def median(metrics: dict[str, Any] | None, name: str, form: str) -> str:
    """A median as text: x where memory ran out, which leaves no metrics, - where it was not measured."""
    if metrics is None or (metrics and name not in metrics):
        return "-"
    return format(metrics[name]["median"], form) if metrics else "x"


def spread(metrics: dict[str, Any] | None, name: str, form: str, factor: float = 1.0) -> str:
    """The median, the least and the most of a metric times `factor`: "1.25 (1.20 to 1.31)"; x and - as in median."""
    if not metrics or name not in metrics:
        return median(metrics, name, form)
    middle, least, most = (format(factor * metrics[name][part], form) for part in ("median", "min", "max"))
    return f"{middle} ({least} to {most})"


def counts(numbers: Iterable[int]) -> str:
    """How many runs stand behind a table: "5", "3 to 5", or "no"."""
    found = sorted(set(numbers))
    return " to ".join(str(n) for n in dict.fromkeys((found[0], found[-1]))) if found else "no"
