"""Preference pairs of the embedded model's world: the right answer in one sentence, against another answer.

    python -m data.tiny.pairs --n=200 > data/tiny/pairs_200.json

The rejected answer is curt (half of them), wrong, or rambles on about something else (a quarter each). Questions and
facts are those of corpus.py, as chats of one turn; that an answer is right follows from the tables.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from data.tiny.corpus import RELATIONS, Pair, Rng, fill
from llama import cli
from llama.cli import option

# Each relation with the field that its questions ask for; those of which another row's answer is surely wrong.
ASKED = {"legs": "legs", "young": "young", "group": "group", "who": "a", "daybefore": "a", "nthmonth": "a"}
ASKED |= dict.fromkeys(("capital", "colour", "opposite", "sides", "day", "month", "plural", "past"), "b")


def fact(rng: Rng) -> tuple[str, str, str, str]:
    """A question about a fact; the right sentence, a wrong one, and the right answer without a sentence."""
    name = rng.choice(tuple(ASKED))
    relation, field = RELATIONS[name], ASKED[name]
    row = rng.choice(relation.table)
    other = rng.choice([other for other in relation.table if other[field] != row[field]])
    wrong = row | {field: other[field]}
    say = [fill(rng, relation.say, slots) for slots in (row, wrong)]
    return fill(rng, relation.ask, row), *say, fill(rng, relation.short, row)


def addition(rng: Rng) -> tuple[str, str, str, str]:
    """The same about a sum in digits."""
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    wrong = rng.choice([n for n in range(2, 21) if n != a + b])
    return f"What is {a} plus {b}?", *(f"{a} plus {b} is {n}." for n in (a + b, wrong)), f"{a + b}."


def rambling(rng: Rng, answer: str) -> str:
    """The answer, and two more facts that nobody asked for."""
    return " ".join([answer, *(fact(rng)[1] for _ in range(2))])


def pairs(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` questions with a chosen and a rejected answer, no question twice."""
    rng = random.Random(f"pairs-{seed}")
    found: dict[str, Pair] = {}
    while len(found) < n:
        asked, right, wrong, curt = fact(rng) if rng.random() < 0.85 else addition(rng)
        found[asked] = right, rng.choice([curt, curt, wrong, rambling(rng, right)])
    return [
        {"messages": [{"role": "user", "content": asked}], "chosen": chosen, "rejected": rejected}
        for asked, (chosen, rejected) in found.items()
    ]


@dataclass(frozen=True)
class Options(cli.Options):
    """Print preference pairs of the embedded model's world, as JSON."""

    n: int = option(200, "number of pairs", least=1)
    seed: int = option(1, "seed of the random numbers", **cli.SEEDS)


def main(options: Options) -> None:
    print(json.dumps(pairs(options.n, options.seed), indent=1))


if __name__ == "__main__":
    cli.run(main)
