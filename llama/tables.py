"""The rules by which Table 2 turns two measurements into an arrow, for every place that shows one."""

from __future__ import annotations

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
