"""Generates the English text that the tiny model of this repository is trained on.

Every document is put together at random from the word tables and sentence patterns of ``words.py``: little stories,
short fact paragraphs, lists, questions with answers, instructions with results, and chats.  All of it was written for
this repository; nothing is taken from a data set or a book.  The number of possible documents is far beyond what a
small model can memorise, while names, pronouns, objects and facts stay consistent inside and across documents.

Pattern language: ``|`` separates whole alternatives, ``[a/b]`` is an inline choice, ``{slot}`` is filled in, and
``a~word`` becomes "a word" or "an word" as English needs it.  In a plot, ``- `` starts a sentence, ``| `` gives
another wording, ``? `` starts a sentence that may be left out, ``+ `` starts a new paragraph.

What it leaves out: real persons, brands, long reasoning, and any knowledge that is not in the tables.

The tables and patterns are in ``words.py``.  Run ``python -m data.tiny.corpus --n 10 --seed 1`` to read some samples.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from data.tiny import words

# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------

Rng = random.Random
Slots = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One training document: plain ``text``, or a ``dialog`` of (role, content) pairs with ``text`` empty."""

    text: str
    dialog: tuple[tuple[str, str], ...] = ()


@cache
def alternatives(pattern: str) -> tuple[str, ...]:
    """The alternatives of a ``|`` table or pattern, with line breaks of the source taken out."""
    return tuple(part.strip() for part in re.sub(r"\s*\n\s*", " ", pattern).replace("[ ", "[").split("|"))


@cache
def rows(table: str) -> tuple[tuple[str, ...], ...]:
    """The rows of a table whose rows are split by ``|`` and whose fields are split by ``;``."""
    return tuple(tuple(field.strip() for field in row.split(";")) for row in alternatives(table))


@cache
def lines(table: str) -> tuple[tuple[str, ...], ...]:
    """The rows of a table with one row per line (a line that starts with a space continues the one before)."""
    joined = table.replace("\n ", " ")
    return tuple(tuple(field.strip() for field in row.split(";")) for row in joined.split("\n") if row)


@cache
def _compiled(sentence: str) -> tuple[str | tuple[str, ...], ...]:
    """A sentence pattern cut into fixed strings and tuples of inline choices."""
    pieces = re.split(r"\[([^\]]*)\]", sentence)
    return tuple(tuple(p.strip() for p in piece.split("/")) if i % 2 else piece for i, piece in enumerate(pieces))


def expand(rng: Rng, pattern: str) -> str:
    """Picks one alternative of ``pattern`` and one option of every inline choice; slots stay as they are."""
    sentence = rng.choice(alternatives(pattern))
    return "".join(p if isinstance(p, str) else rng.choice(p) for p in _compiled(sentence))


_ARTICLE = re.compile(r"\b([Aa])~(\W?\w+)")
_SENTENCE = re.compile(r"(^|[.!?] |[.!?]\" |\n)(\"?)([a-z])")
_TAG = re.compile(r"([!?]\" )([a-z])")


def article(word: str) -> str:
    """The right indefinite article for ``word``."""
    low = word.lower()
    if low.startswith(("uni", "use", "one", "eu")):
        return "a"
    return "an" if low[:1] in "aeiou" or low.startswith(("hour", "honest")) else "a"


def _fix_article(match: re.Match[str]) -> str:
    """Turns ``a~word`` into "a word" or "an word", keeping the capital."""
    chosen = article(match[2])
    return (chosen.capitalize() if match[1] == "A" else chosen) + " " + match[2]


def _fix_capital(match: re.Match[str]) -> str:
    """Capitalises the first letter of a sentence, but not a speech tag such as ``?" asked``."""
    if match[1][:2] in ('!"', '?"'):
        return match[0]
    return match[1] + match[2] + match[3].upper()


def polish(text: str) -> str:
    """Settles articles and sentence capitals."""
    if "~" in text:
        text = _ARTICLE.sub(_fix_article, text)
    return _SENTENCE.sub(_fix_capital, text)


def fill(rng: Rng, pattern: str, slots: Slots) -> str:
    """Expands a pattern, fills its slots and polishes the result."""
    text = expand(rng, pattern).format_map(slots)
    return polish(text.format_map(slots) if "{" in text else text)


def cap(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def series(items: list[str] | tuple[str, ...], word: str = "and") -> str:
    """Joins items as English does: "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + f" {word} " + items[-1]


def some(rng: Rng, table: str, count: int) -> list[str]:
    """``count`` different entries of a ``|`` table."""
    return rng.sample(alternatives(table), count)


def pronouns(slots: Slots, prefix: str, she: bool) -> None:
    """Puts the pronouns of one character into ``slots``, lower case and with a capital."""
    he, him, his = ("she", "her", "her") if she else ("he", "him", "his")
    slots[prefix + "he"], slots[prefix + "him"], slots[prefix + "his"] = he, him, his
    slots[cap(prefix + "he")], slots[cap(prefix + "his")] = cap(he), cap(his)
    slots[prefix + "self"] = him + "self" if she else "himself"


# ---------------------------------------------------------------------------------------------------------------------
# Stories
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """One plot: slot choices of its own, then steps of (optional, starts a paragraph, alternatives)."""

    choices: dict[str, tuple[str, ...]]
    lesson: str
    steps: tuple[tuple[bool, bool, str], ...]


def parse_plots(text: str) -> dict[str, Plot]:
    """Reads ``PLOTS_TEXT``."""
    plots: dict[str, Plot] = {}
    for block in text.strip().split("# ")[1:]:
        name, *body = block.strip().split("\n")
        choices: dict[str, tuple[str, ...]] = {}
        lesson = ""
        steps: list[tuple[bool, bool, str]] = []
        for line in "\n".join(body).replace("\n  ", " ").split("\n"):
            mark, rest = line[:2], line[2:].strip()
            if mark == "| ":
                optional, paragraph, before = steps[-1]
                steps[-1] = (optional, paragraph, before + "|" + rest)
            elif mark in ("- ", "? ", "+ "):
                steps.append((mark == "? ", mark == "+ ", rest))
            elif line.startswith("lesson = "):
                lesson = line[9:]
            else:
                key, values = line.split(" = ")
                choices[key] = tuple(value.strip() for value in values.split(","))
        plots[name] = Plot(choices, lesson, tuple(steps))
    return plots


PLOTS = parse_plots(words.PLOTS_TEXT)
PLOT_NAMES = tuple(PLOTS)
# Things that are learnt, not owned: they make no good title or request.
VERB_PLOTS = frozenset({"learn"})
MATERIAL_NOUNS = "wood|metal|paper|glass|wool|cotton|leather|stone|clay|straw"


def name_for(rng: Rng, animal: bool, she: bool, taken: str = "") -> str:
    """A name that is not ``taken``."""
    pool = (words.PET_SHE if she else words.PET_HE) if animal else (words.GIRLS if she else words.BOYS)
    name = rng.choice(pool)
    while name == taken:
        name = rng.choice(pool)
    return name


def cast(rng: Rng, animal: bool | None = None) -> Slots:
    """Characters, place and season of a story: everything that must stay the same all through it."""
    animal = rng.random() < 0.5 if animal is None else animal
    she = rng.random() < 0.5
    slots: Slots = {"n": name_for(rng, animal, she)}
    pronouns(slots, "", she)
    # The friend mostly has the other pronoun, so that it is clear who is meant.
    friend_she = she if rng.random() < 0.15 else not she
    slots["o"] = name_for(rng, animal, friend_she, slots["n"])
    pronouns(slots, "o", friend_she)
    if animal:
        slots["k"], slots["ok"] = rng.sample(words.STORY_ANIMALS, 2)
    else:
        slots["k"], slots["ok"] = "girl" if she else "boy", "girl" if friend_she else "boy"
    elder, pronoun = rng.choice(rows(words.ELDERS_ANIMAL if animal else words.ELDERS_CHILD))
    slots["e"], slots["E"], slots["O"] = elder, cap(elder), slots["o"]
    pronouns(slots, "e", pronoun == "she")
    slots["home"] = rng.choice(alternatives(words.ANIMAL_HOMES if animal else words.CHILD_HOMES))
    slots["area"] = rng.choice(alternatives(words.ANIMAL_AREAS if animal else words.CHILD_AREAS))
    slots["adj"] = rng.choice(words.HERO_ADJ)
    slots["trait"], slots["trait2"] = rng.sample(words.TRAITS, 2)
    slots["food"], slots["food2"] = rng.sample(words.TREATS, 2)
    slots["goods"], slots["goods2"] = some(rng, words.GOODS, 2)
    slots["col"] = rng.choice(words.COLOURS)
    set_material(rng, slots)
    return slots


def set_material(rng: Rng, slots: Slots) -> None:
    """A material that the thing of the story can be made of."""
    slots["mat"] = rng.choice(alternatives(words.MATERIAL_OF.get(slots.get("thing", ""), "wood|metal")))
    slots["matadj"] = {"wood": "wooden", "wool": "woollen"}.get(slots["mat"], slots["mat"])


def set_time(rng: Rng, slots: Slots, season: str) -> None:
    """Season, part of the day and the phrases that name them."""
    slots["season"], slots["part"] = season, rng.choice(("morning", "morning", "day", "afternoon"))
    slots["sadj"] = rng.choice(words.SEASON_ADJ[season])
    slots["time"] = expand(
        rng, "one {sadj} {season} {part}|one {sadj} {part}|one {season} {part}|one {sadj} {part} in {season}"
    ).format_map(slots)
    slots["O1"] = rng.choice(("Tap, tap, tap!", "It went creak, creak.", "Something moved near the window."))


@dataclass(frozen=True)
class Story:
    """A finished story with its title and what it is about."""

    title: str
    text: str
    slots: Slots


def job_story(rng: Rng, slots: Slots) -> None:
    """Makes the hero a grown-up with a job, who is called by it ("the farmer")."""
    slots["k"] = rng.choice(
        ("farmer", "baker", "gardener", "tailor", "painter", "cook", "carpenter", "shepherd", "potter")
    )
    slots["n"] = "the " + slots["k"]
    slots["ok"] = "girl" if slots["ohe"] == "she" else "boy"
    slots["o"] = name_for(rng, False, slots["ohe"] == "she")


def story_start(rng: Rng, plot_name: str, slots: Slots) -> list[str]:
    """The sentences before the plot; settles how the plot names its time (slot ``T``)."""
    night = plot_name == "dark"
    slots["T"] = f"{slots['time']},"
    if plot_name == "worker":
        return []
    parts: list[str] = []
    quick = rng.random() < 0.35 and not night
    parts.append(expand(rng, words.QUICK_OPENINGS if quick else words.OPENINGS))
    if quick:
        slots["T"] = f"That {slots['part']},"
        if rng.random() < 0.3:
            parts.append(expand(rng, words.SEASON_WEATHER[slots["season"]]))
    if rng.random() < 0.6:
        about = expand(rng, words.ABOUT_HERO)
        # In "friend" the two have not met yet, and in "race" and "share" they are not friends at first.
        while "{o}" in about and plot_name in ("friend", "race", "share", "market"):
            about = expand(rng, words.ABOUT_HERO)
        parts.append(about)
    return parts


INDOOR_PLOTS = frozenset(
    {"dark", "birthday", "repair", "snow", "garden", "pet", "learn", "build", "neighbour", "worker"}
)


def story_end(rng: Rng, plot_name: str, so_far: str) -> str:
    """A closing that fits: it names the friend only if the friend has come, and walks home only from outside."""
    while True:
        closing = expand(rng, words.CLOSINGS)
        if "{o}" in closing and "{o}" not in so_far:
            continue
        if "{e}" in closing and ("{e}" in so_far or "{E}" in so_far):
            continue
        if (" home" in closing or "lived happily" in closing) and plot_name in INDOOR_PLOTS:
            continue
        return closing


def make_story(rng: Rng) -> Story:
    """Puts one story together: opening, plot, closing, and sometimes a lesson."""
    slots = cast(rng)
    plot_name = rng.choice(PLOT_NAMES)
    if plot_name == "worker":
        job_story(rng, slots)
    plot = PLOTS[plot_name]
    for key, values in plot.choices.items():
        slots[key] = rng.choice(values)
    set_time(rng, slots, slots.get("season") or rng.choice(tuple(words.SEASON_ADJ)))
    slots["verb"] = "learn to " if plot_name in VERB_PLOTS else ""
    set_material(rng, slots)
    parts = story_start(rng, plot_name, slots)
    split = rng.random() < 0.6
    for optional, paragraph, pattern in plot.steps:
        if optional and rng.random() < 0.5:
            continue
        parts.append(("\n\n" if split and paragraph else "") + expand(rng, pattern))
    if rng.random() < 0.6:
        ending = story_end(rng, plot_name, " ".join(parts))
        parts.append(("\n\n" if split and rng.random() < 0.3 else "") + ending)
    if rng.random() < 0.3:
        parts.append(expand(rng, plot.lesson))
    text = polish(" ".join(parts).format_map(slots).replace(" \n", "\n").replace("\n\n ", "\n\n"))
    return Story(story_title(rng, slots), text, slots)


def story_title(rng: Rng, slots: Slots) -> str:
    """A title that fits the hero and the thing of the story."""
    if slots["n"].startswith("the "):
        return fill(rng, f"The {slots['k'].title()} and the {slots['thing'].title()}", slots)
    if slots["verb"]:
        return fill(rng, "{n} Learns Something New|How {n} Did It|{n} Does Not Give Up", slots)
    thing = slots["thing"].title()
    who = slots["k"].title()
    return fill(
        rng, f"The {who} and the {thing}|{{n}} and the {thing}|{{n}} and {{o}}|The {thing}|{{n}}'s {thing}", slots
    )


def story(rng: Rng) -> Document:
    """A little story, sometimes under a title."""
    made = make_story(rng)
    return Document(f"{made.title}\n\n{made.text}" if rng.random() < 0.15 else made.text)


# ---------------------------------------------------------------------------------------------------------------------
# Facts: every relation can be stated, asked and answered
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """A table of facts with patterns to state them, to ask for them and to check them with yes or no."""

    table: tuple[Slots, ...]
    say: str
    ask: str
    short: str
    check: str = ""
    differ: str = "b"


def pairs(table: str) -> tuple[Slots, ...]:
    """A two-column table as slots ``a`` and ``b`` (``A`` is ``a`` with a capital)."""
    return tuple({"a": r[0], "b": r[1], "A": cap(r[0])} for r in rows(table))


def third_person(verb: str) -> str:
    """The form of a regular verb after he, she or it."""
    return verb + "es" if verb.endswith(("s", "sh", "ch", "x")) else verb + "s"


ANIMAL_ROWS: tuple[Slots, ...] = tuple(
    dict(zip(words.ANIMAL_HEAD.split(), r, strict=True)) for r in lines(words.ANIMALS)
)
SOUND_ROWS = tuple(r | {"sounds": third_person(r["sound"])} for r in ANIMAL_ROWS if r["sound"] != "-")
BODY_ROWS = pairs(words.BODY)
DAY_ROWS = tuple({"a": d, "b": words.DAYS[(i + 1) % 7]} for i, d in enumerate(words.DAYS))
MONTH_ROWS = tuple(
    {"a": m, "b": words.MONTHS[(i + 1) % 12], "o": words.ORDINALS[i]} for i, m in enumerate(words.MONTHS)
)
CATEGORY_ROWS = tuple(
    {"a": x, "b": c}
    for c in (
        "fruits",
        "vegetables",
        "tools",
        "clothes",
        "insects",
        "birds",
        "flowers",
        "shapes",
        "drinks",
        "musical instruments",
    )
    for x in words.CATEGORIES[c].split("|")
)
IS_KIND = {
    "fruits": "fruit",
    "vegetables": "vegetable",
    "tools": "tool",
    "clothes": "piece of clothing",
    "insects": "insect",
    "birds": "bird",
    "flowers": "flower",
    "shapes": "shape",
    "drinks": "drink",
    "musical instruments": "musical instrument",
}
KIND_ROWS = tuple(
    {
        "a": r["a"],
        "A": cap(r["a"] if r["a"] in words.MASS else "a~" + r["a"]),
        "b": IS_KIND[r["b"]],
        "x": r["a"] if r["a"] in words.MASS else "a~" + r["a"],
    }
    for r in CATEGORY_ROWS
)

RELATIONS: dict[str, Relation] = {
    "eats": Relation(
        ANIMAL_ROWS,
        "{plural} eat {eats}.|A~{name} eats {eats}.",
        "What do {plural} eat?|What does a~{name} eat?",
        "{eats}.",
    ),
    "lives": Relation(
        ANIMAL_ROWS,
        "{plural} live {lives}.|A~{name} lives {lives}.|You can find {plural} {lives}.",
        "Where do {plural} live?|Where does a~{name} live?|Where can you find {plural}?",
        "{lives}.",
    ),
    "sound": Relation(
        SOUND_ROWS,
        "{plural} {sound}.|A~{name} {sounds}.|The sound that {plural} make is called a {sound}.",
        "What sound does a~{name} make?|What sound do {plural} make?",
        "{plural} {sound}.",
    ),
    "legs": Relation(
        ANIMAL_ROWS,
        "{plural} have {legs} legs.|A~{name} has {legs} legs.",
        "How many legs does a~{name} have?|How many legs do {plural} have?",
        "{legs}.",
        "Does a~{name} have {legs} legs?|Do {plural} have {legs} legs?",
        "legs",
    ),
    "young": Relation(
        ANIMAL_ROWS,
        "A young {name} is called a~{young}.|The young of a~{name} is called a~{young}.|"
        "A baby {name} is called a~{young}.",
        "What is a young {name} called?|What do we call a baby {name}?|What is the young of a~{name} called?",
        "a~{young}.",
        "Is a young {name} called a~{young}?",
        "young",
    ),
    "look": Relation(
        ANIMAL_ROWS,
        "A~{name} has {look}.|{plural} have {look}.",
        "What does a~{name} look like?",
        "A~{name} has {look}.",
    ),
    "group": Relation(
        ANIMAL_ROWS,
        "A~{name} is a~{group}.|{plural} are {group}s.",
        "What kind of animal is a~{name}?",
        "a~{group}.",
        "Is a~{name} a~{group}?|Are {plural} {group}s?",
        "group",
    ),
    "capital": Relation(
        pairs(words.CAPITALS),
        "The capital of {a} is {b}.|{b} is the capital of {a}.",
        "What is the capital of {a}?|Which city is the capital of {a}?|Name the capital of {a}.",
        "{b}.",
        "Is {b} the capital of {a}?",
    ),
    "colour": Relation(
        pairs(words.COLOUR_OF),
        "The colour of {a} is {b}.|{A} is {b}.",
        "What colour is {a}?|What is the colour of {a}?",
        "{b}.",
        "Is {a} {b}?",
    ),
    "opposite": Relation(
        pairs(words.OPPOSITES),
        'The opposite of "{a}" is "{b}".|"{b}" is the opposite of "{a}".',
        'What is the opposite of "{a}"?|Which word is the opposite of "{a}"?',
        "{b}.",
    ),
    "tool": Relation(
        pairs(words.TOOLS),
        "We use {a} to {b}.|You can use {a} to {b}.|People use {a} to {b}.",
        "What do we use {a} for?|What can you do with {a}?",
        "We use {a} to {b}.",
        "Do we use {a} to {b}?",
    ),
    "job": Relation(pairs(words.JOBS), "A~{a} {b}.", "What does a~{a} do?", "A~{a} {b}."),
    "who": Relation(
        pairs(words.JOBS),
        "A~{a} {b}.|A person who {b} is called a~{a}.",
        "Who {b}?|What do we call a person who {b}?",
        "a~{a}.",
    ),
    "body": Relation(
        BODY_ROWS,
        "We {b} with our {a}.|We use our {a} to {b}.",
        "What do we use our {a} for?",
        "We use our {a} to {b}.",
    ),
    "kept": Relation(
        pairs(words.KEPT),
        "We keep {a} {b}.|People keep {a} {b}.",
        "Where do we keep {a}?|Where do people keep {a}?",
        "{b}.",
    ),
    "made": Relation(pairs(words.MADE), "{A} is made of {b}.|We make {a} from {b}.", "What is {a} made of?", "{b}."),
    "from": Relation(
        pairs(words.FROM),
        "We get {a} from {b}.|People get {a} from {b}.",
        "Where do we get {a} from?|What do we get {a} from?",
        "From {b}.",
    ),
    "sides": Relation(
        pairs(words.SHAPES),
        "A~{a} has {b} sides.|A shape with {b} sides can be a~{a}.",
        "How many sides does a~{a} have?",
        "{b}.",
        "Does a~{a} have {b} sides?",
    ),
    "count": Relation(
        tuple({"a": r[0], "b": r[1], "c": r[2]} for r in lines(words.COUNTS)), "{c}.", "How many {a}?", "{b}."
    ),
    "science": Relation(tuple({"a": r[0], "b": r[1]} for r in lines(words.SCIENCE)), "{b}", "{a}", "{b}"),
    "travel": Relation(
        pairs(words.TRAVEL), "{A} travels {b}.|{A} moves {b}.", "Where does {a} travel?|Where does {a} move?", "{b}."
    ),
    "season": Relation(
        tuple({"a": r[1], "b": r[0]} for r in rows(words.SEASON_FACTS)),
        "In {b}, {a}.|In the {b}, {a}.",
        "What happens in {b}?",
        "In {b}, {a}.",
    ),
    "day": Relation(
        DAY_ROWS,
        "The day after {a} is {b}.|{b} comes after {a}.|{a} comes before {b}.",
        "Which day comes after {a}?|What is the day after {a}?",
        "{b}.",
        "Does {b} come after {a}?",
    ),
    "daybefore": Relation(
        DAY_ROWS,
        "The day before {b} is {a}.|{a} comes before {b}.",
        "Which day comes before {b}?|What is the day before {b}?",
        "{a}.",
    ),
    "month": Relation(
        MONTH_ROWS,
        "{b} comes after {a}.|The month after {a} is {b}.",
        "Which month comes after {a}?|What is the month after {a}?",
        "{b}.",
        "Does {b} come after {a}?",
    ),
    "nthmonth": Relation(
        MONTH_ROWS,
        "{a} is the {o} month of the year.|The {o} month of the year is {a}.",
        "What is the {o} month of the year?|Which month is the {o} of the year?",
        "{a}.",
    ),
    "plural": Relation(pairs(words.PLURALS), 'The plural of "{a}" is "{b}".', 'What is the plural of "{a}"?', "{b}."),
    "past": Relation(
        pairs(words.PAST), 'The past tense of "{a}" is "{b}".', 'What is the past tense of "{a}"?', "{b}."
    ),
    "rhyme": Relation(
        pairs(words.RHYMES),
        'The word "{a}" rhymes with "{b}".',
        'Does "{a}" rhyme with "{b}"?',
        'Yes, "{a}" rhymes with "{b}".',
    ),
    "kind": Relation(KIND_ROWS, "{A} is a~{b}.", "Is {x} a~{b}?", "Yes, {x} is a~{b}.", "Is {x} a~{b}?"),
}
RELATION_NAMES = tuple(RELATIONS)
RELATION_WEIGHTS = tuple(max(1.0, min(len(r.table), 45) / 10) for r in RELATIONS.values())
WORLD = tuple(n for n in RELATIONS if n not in ("plural", "past", "rhyme", "opposite", "kind", "daybefore", "who"))


def pick_relation(rng: Rng) -> Relation:
    """A relation, larger tables more often."""
    return RELATIONS[rng.choices(RELATION_NAMES, RELATION_WEIGHTS)[0]]


def state(rng: Rng, relation: Relation, row: Slots) -> str:
    """The fact of one row as a sentence."""
    return fill(rng, relation.say, row)


def ask_fact(rng: Rng, relation: Relation | None = None) -> tuple[str, str]:
    """A question about one fact, with a long or a short answer, or as a yes/no question."""
    relation = relation or pick_relation(rng)
    row = rng.choice(relation.table)
    if relation.check and rng.random() < 0.25:
        if rng.random() < 0.5:
            return fill(rng, relation.check, row), f"Yes, {lower_first(state(rng, relation, row))}"
        other = rng.choice(relation.table)
        if other[relation.differ] != row[relation.differ]:
            wrong = row | {relation.differ: other[relation.differ]}
            return fill(rng, relation.check, wrong), f"No, {lower_first(state(rng, relation, row))}"
    answer = state(rng, relation, row) if rng.random() < 0.65 else fill(rng, relation.short, row)
    if answer[:1] == '"' or relation in (RELATIONS["rhyme"], RELATIONS["kind"]):
        answer = fill(rng, relation.short, row)
    return fill(rng, relation.ask, row), answer


_CAPITAL_WORDS = [part for row in rows(words.CAPITALS) for name in row for part in name.split()]
PROPER = frozenset([*words.DAYS, *words.MONTHS, *_CAPITAL_WORDS, "I"])


def lower_first(text: str) -> str:
    """``text`` with a small first letter, unless it starts with a name."""
    return text if text.split(" ")[0].rstrip(".,") in PROPER else text[:1].lower() + text[1:]


def number_name(rng: Rng, value: int, spelled: bool) -> str:
    """A number as digits or as a word."""
    return words.NUMBERS[value] if spelled else str(value)


def ask_sum(rng: Rng) -> tuple[str, str]:
    """A sum or a difference of numbers up to twenty."""
    spelled = rng.random() < 0.3
    if rng.random() < 0.5:
        total = rng.randint(2, 20)
        left = rng.randint(0, total)
        values, sign, sign_word = (left, total - left, total), "+", "plus"
    else:
        left = rng.randint(1, 20)
        right = rng.randint(0, left)
        values, sign, sign_word = (left, right, left - right), "-", "minus"
    a, b, c = (number_name(rng, v, spelled) for v in values)
    if not spelled and rng.random() < 0.3:
        return f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {c}"
    question = expand(rng, "What is {a} {s} {b}?|How much is {a} {s} {b}?").format(a=a, b=b, s=sign_word)
    return question, cap(f"{a} {sign_word} {b} is {c}.")


def ask_story_sum(rng: Rng) -> tuple[str, str]:
    """A sum in a small everyday scene."""
    she = rng.random() < 0.5
    name, (one, many) = name_for(rng, False, she), rng.choice(rows(words.FOODS))
    start = rng.randint(2, 10)
    she_has = "she" if she else "he"
    if rng.random() < 0.5:
        change = rng.randint(1, 10)
        total, verb = start + change, rng.choice(("gets", "buys", "finds"))
        middle = f"{cap(she_has)} {verb} {words.NUMBERS[change]} more."
    else:
        change = rng.randint(1, start - 1)
        total, verb = start - change, rng.choice(("eats", "gives away", "loses"))
        middle = f"{cap(she_has)} {verb} {words.NUMBERS[change]} of them."
    count = f"{words.NUMBERS[total]} {one if total == 1 else many}"
    question = f"{name} has {words.NUMBERS[start]} {many}. {middle} How many {many} does {name} have now?"
    return question, rng.choice((f"{name} has {count} now.", f"{name} now has {count}."))


def ask_compare(rng: Rng) -> tuple[str, str]:
    """A comparison of two things or two numbers."""
    kind = rng.random()
    if kind < 0.35:
        small, big = sorted(rng.sample(range(len(words.SIZE_ORDER)), 2))
        low, high, more, less = "a~" + words.SIZE_ORDER[small], "a~" + words.SIZE_ORDER[big], "bigger", "smaller"
    elif kind < 0.55:
        low, high = (words.SPEED_ORDER[i] for i in sorted(rng.sample(range(len(words.SPEED_ORDER)), 2)))
        more, less = "faster", "slower"
    elif kind < 0.75:
        low, high = (words.WEIGHT_ORDER[i] for i in sorted(rng.sample(range(len(words.WEIGHT_ORDER)), 2)))
        more, less = "heavier", "lighter"
    else:
        low, high = (str(i) for i in sorted(rng.sample(range(1, 21), 2)))
        more, less = "larger", "smaller"
    first, second = rng.sample((low, high), 2)
    word, right, wrong = (more, high, low) if rng.random() < 0.5 else (less, low, high)
    return polish(f"Which is {word}, {first} or {second}?"), polish(cap(f"{right} is {word} than {wrong}."))


def animal_paragraph(rng: Rng) -> str:
    """A paragraph about one animal, in a mixed order of facts."""
    row = rng.choice(SOUND_ROWS)
    plural = rng.random() < 0.5
    if plural:
        facts = [
            "They eat {eats}.",
            "They live {lives}.",
            "They have {legs} legs.",
            "They have {look}.",
            "They can {sound}.",
            "A young {name} is called a~{young}.",
        ]
        first = fill(rng, "{plural} are {group}s.|Many people like {plural}.|Have you ever seen {plural}?", row)
    else:
        facts = [
            "It eats {eats}.",
            "It lives {lives}.",
            "It has {legs} legs.",
            "It has {look}.",
            "It can {sound}.",
            "A young {name} is called a~{young}.",
        ]
        first = fill(rng, "A~{name} is a~{group}.|The {name} is a~{group}.|Let us learn about the {name}.", row)
    chosen = rng.sample(facts, rng.randint(3, 6))
    return " ".join([first] + [fill(rng, f, row) for f in chosen])


def topic_paragraph(rng: Rng) -> str:
    """Several facts from one table."""
    relation = RELATIONS[rng.choice(WORLD)]
    chosen = rng.sample(relation.table, min(len(relation.table), rng.randint(3, 6)))
    return " ".join(state(rng, relation, row) for row in chosen)


def mixed_paragraph(rng: Rng) -> str:
    """A fact with its question, or facts from several tables."""
    sentences: list[str] = []
    for name in rng.sample(WORLD, rng.randint(3, 5)):
        relation = RELATIONS[name]
        sentences.append(state(rng, relation, rng.choice(relation.table)))
    return " ".join(sentences)


def sum_paragraph(rng: Rng) -> str:
    """A few sums, or the parts of a category."""
    if rng.random() < 0.5:
        sums = [answer for _, answer in several(rng, ask_sum, (0, 0, 1, 1, 1, 1))]
        plain = [a if a.endswith(".") else a.replace("-", "minus").replace("+", "plus") for a in sums]
        return " ".join(a if a.endswith(".") else a.replace("=", "is") + "." for a in plain)
    name, members = rng.choice(tuple(words.CATEGORIES.items()))
    many = polish(series([m if m in words.MASS else "a~" + m for m in some(rng, members, rng.randint(3, 5))]))
    word, bigger, biggest = rng.choice(rows(words.COMPARATIVES))
    return f'{cap(many)} are {name}. We say "{word}", "{bigger}" and "{biggest}".'


def fact(rng: Rng) -> Document:
    """A short expository paragraph."""
    maker = rng.choices((animal_paragraph, topic_paragraph, mixed_paragraph, sum_paragraph), (4, 3, 2, 1))[0]
    return Document(maker(rng))


# ---------------------------------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------------------------------


def shopping_list(rng: Rng) -> tuple[str, str]:
    """A shopping list and its heading."""
    heading = fill(
        rng,
        "Shopping list|Things to buy on {day}|Shopping list for {n}|{n}'s shopping list|Shopping list for {day}",
        {"day": rng.choice(words.DAYS), "n": name_for(rng, False, rng.random() < 0.5)},
    )
    return heading, "\n".join("- " + item for item in some(rng, words.GOODS, rng.randint(3, 7)))


def packing_list(rng: Rng) -> tuple[str, str]:
    """A packing list and its heading."""
    trip = rng.choice(alternatives(words.TRIPS))
    heading = rng.choice(
        (
            f"Packing list for {trip}",
            f"Things to take on {trip}" if "night" not in trip else f"Things to take for {trip}",
            f"What we need for {trip}",
        )
    )
    return heading, "\n".join("- " + item for item in some(rng, words.PACK, rng.randint(4, 7)))


def steps_list(rng: Rng) -> tuple[str, str]:
    """Numbered steps for doing something."""
    title, *steps = rng.choice(lines(words.STEPS))
    count = len(steps)
    return f"How to {title}", "\n".join(f"{i + 1}. {steps[i]}" for i in range(count))


def category_list(rng: Rng) -> tuple[str, str]:
    """Things of one category."""
    name, members = rng.choice(tuple(words.CATEGORIES.items()))
    count = rng.randint(3, min(6, len(alternatives(members))))
    heading = rng.choice((cap(name), f"{cap(words.NUMBERS[count])} {name}", f"A list of {name}"))
    mark = rng.random() < 0.5
    items = some(rng, members, count)
    return heading, "\n".join(f"{i}. {item}" if mark else f"- {item}" for i, item in enumerate(items, 1))


def plan_list(rng: Rng) -> tuple[str, str]:
    """What someone will do on the days of a week."""
    she = rng.random() < 0.5
    name, start, count = name_for(rng, False, she), rng.randrange(7), rng.randint(3, 5)
    things = (
        "bake a cake|visit {e}|clean the {place}|read a book|go to the market|swim in the lake|paint the {place}|"
        "write a letter to {o}|play with {o}|work in the garden|buy {goods}|mend the old gate|cook soup|walk in {area}"
    )
    slots = cast(rng, False)
    slots["place"] = rng.choice(("kitchen", "shed", "fence", "bedroom", "hall", "gate"))
    doing = [t.format_map(slots) for t in some(rng, things, count)]
    days = [words.DAYS[(start + i) % 7] for i in range(count)]
    return f"{name}'s plan for the week", "\n".join(f"{d}: {t}" for d, t in zip(days, doing, strict=True))


LIST_MAKERS = (shopping_list, packing_list, steps_list, category_list, plan_list)


def list_document(rng: Rng) -> Document:
    """A list under its heading."""
    heading, body = rng.choices(LIST_MAKERS, (5, 4, 1, 3, 3))[0](rng)
    if rng.random() < 0.3:
        second, more = rng.choices(LIST_MAKERS, (4, 4, 2, 3, 3))[0](rng)
        return Document(f"{heading}:\n{body}\n\n{second}:\n{more}")
    return Document(f"{heading}:\n{body}")


# ---------------------------------------------------------------------------------------------------------------------
# Questions with answers
# ---------------------------------------------------------------------------------------------------------------------

PASSAGES = tuple(
    (b.strip().split("\n")[0], tuple(tuple(x.split(";")) for x in b.strip().split("\n")[1:]))
    for b in words.PASSAGES_TEXT.replace("\n  ", " ").split("#")
)


def passage(rng: Rng) -> tuple[str, list[tuple[str, str]]]:
    """A small passage and two to four questions about it."""
    pattern, questions = rng.choice(PASSAGES)
    slots = cast(rng, False)
    set_time(rng, slots, rng.choice(tuple(words.SEASON_ADJ)))
    slots["thing"], slots["spot"] = rng.choice(words.PASSAGE_THINGS), rng.choice(alternatives(words.SPOTS))
    slots["num"], slots["day"] = rng.choice(words.NUMBERS[3:13]), rng.choice(words.DAYS)
    slots["job"], slots["does"] = rng.choice(rows(words.JOBS))
    slots["mat2"], slots["mat"] = rng.choice(alternatives(MATERIAL_NOUNS)), rng.choice(words.MATERIALS)
    slots["why"] = rng.choice(alternatives(words.WHY)).format_map(slots)
    slots["whynot"] = rng.choice(alternatives(words.WHYNOT)).format_map(slots)
    if pattern.startswith("The {ok}"):
        slots["ok"] = rng.choice(words.STORY_ANIMALS)
        slots["o"] = name_for(rng, True, rng.random() < 0.5)
    chosen = rng.sample(questions, rng.randint(2, len(questions)))
    return fill(rng, pattern, slots), [(fill(rng, q, slots), fill(rng, a, slots)) for q, a in chosen]


ASKERS: tuple[tuple[Callable[[Rng], tuple[str, str]], float], ...] = (
    (ask_fact, 10),
    (ask_sum, 3),
    (ask_story_sum, 2.5),
    (ask_compare, 1.5),
)


def question(rng: Rng) -> tuple[str, str]:
    """Any question that stands alone, with its answer."""
    return rng.choices([a for a, _ in ASKERS], [w for _, w in ASKERS])[0](rng)


def as_qa(items: list[tuple[str, str]]) -> str:
    """Pairs in the plain question format."""
    return "\n\n".join(f"Question: {q}\nAnswer: {a}" for q, a in items)


def several(rng: Rng, maker: Callable[[Rng], tuple[str, str]], weights: tuple[int, ...]) -> list[tuple[str, str]]:
    """One to ``len(weights)`` pairs, no question twice."""
    wanted = rng.choices(range(1, len(weights) + 1), weights)[0]
    found: dict[str, str] = {}
    while len(found) < wanted:
        asked, answer = maker(rng)
        found[asked] = answer
    return list(found.items())


def qa(rng: Rng) -> Document:
    """Questions with answers, alone or about a passage."""
    if rng.random() < 0.35:
        text, items = passage(rng)
        return Document(f"{text}\n\n{as_qa(items)}")
    return Document(as_qa(several(rng, question, (2, 3, 3, 2))))


# ---------------------------------------------------------------------------------------------------------------------
# Instructions with results
# ---------------------------------------------------------------------------------------------------------------------


def do_sentence(rng: Rng) -> tuple[str, str]:
    """Write a sentence about an animal or a thing."""
    slots = cast(rng, False)
    set_time(rng, slots, rng.choice(tuple(words.SEASON_ADJ)))
    slots |= {"spot": rng.choice(alternatives(words.SPOTS)), "day": rng.choice(words.DAYS)}
    if rng.random() < 0.5:
        row = rng.choice([r for r in ANIMAL_ROWS if r["name"] in words.STORY_ANIMALS])
        slots |= {"x": row["name"], "young": row["young"]}
        result = fill(rng, words.ANIMAL_DOES, slots)
    else:
        slots["x"] = rng.choice(words.PASSAGE_THINGS)
        result = fill(rng, words.THING_DOES, slots)
    return fill(
        rng,
        'Write a sentence about a~{x}.|Make a sentence with the word "{x}".|Use the word "{x}" in a sentence.',
        slots,
    ), result


def do_list(rng: Rng) -> tuple[str, str]:
    """List or name some things of a category."""
    name, members = rng.choice(tuple(words.CATEGORIES.items()))
    count = rng.randint(2, 5)
    items = some(rng, members, count)
    if rng.random() < 0.5:
        return f"Name {words.NUMBERS[count]} {name}.", cap(series(items)) + "."
    return f"List {words.NUMBERS[count]} {name}.", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def do_word(rng: Rng) -> tuple[str, str]:
    """Opposite, plural, past tense, comparative or rhyme of a word."""
    kind = rng.randrange(5)
    if kind == 0:
        a, b = rng.choice(rows(words.OPPOSITES))
        return expand(rng, 'Name the opposite of "{a}".|Give the opposite of "{a}".').format(a=a), cap(b)
    if kind == 1:
        a, b = rng.choice(rows(words.PLURALS))
        return expand(rng, 'Give the plural of "{a}".|Write the plural of "{a}".').format(a=a), cap(b)
    if kind == 2:
        a, b = rng.choice(rows(words.PAST))
        return expand(rng, 'Give the past tense of "{a}".|Write the past tense of "{a}".').format(a=a), cap(b)
    if kind == 3:
        a, b, c = rng.choice(rows(words.COMPARATIVES))
        return f'Give the other two forms of "{a}".', f"{cap(b)}, {c}"
    a, b = rng.choice(rows(words.RHYMES))
    return f'Name a word that rhymes with "{a}".', cap(b)


SIMPLE_WORDS = sorted({w for c in words.CATEGORIES.values() for w in c.split("|") if " " not in w and "-" not in w})


def do_letters(rng: Rng) -> tuple[str, str]:
    """Small tasks with the form of words."""
    kind = rng.randrange(5)
    word = rng.choice(SIMPLE_WORDS)
    if kind == 0:
        picked = rng.sample(SIMPLE_WORDS, rng.randint(3, 4))
        return f"Put these words in alphabetical order: {', '.join(picked)}.", ", ".join(sorted(picked))
    if kind == 1:
        return f'Write the word "{word}" in capital letters.', word.upper()
    if kind == 2:
        times = rng.randint(2, 4)
        return f'Repeat the word "{word}" {("twice", "three times", "four times")[times - 2]}.', " ".join(
            [word] * times
        )
    if kind == 3:
        return f'What is the first letter of the word "{word}"?', word[0].upper()
    picked = rng.sample(SIMPLE_WORDS, rng.randint(3, 6))
    return f"Count these words: {', '.join(picked)}.", f"There are {words.NUMBERS[len(picked)]} words."


def do_count(rng: Rng) -> tuple[str, str]:
    """Count the words of a sentence, or count up or down."""
    if rng.random() < 0.5:
        sentence = do_sentence(rng)[1]
        return (
            f'Count the words in this sentence: "{sentence}"',
            f"There are {len(sentence.split())} words in the sentence.",
        )
    start, length = rng.randint(1, 12), rng.randint(3, 7)
    values = [str(v) for v in range(start, start + length)]
    if rng.random() < 0.5:
        return f"Count from {values[0]} to {values[-1]}.", ", ".join(values)
    return f"Count down from {values[-1]} to {values[0]}.", ", ".join(reversed(values))


def do_finish(rng: Rng) -> tuple[str, str]:
    """Finish a sentence."""
    start, endings = rng.choice(tuple(words.ENDINGS.items()))
    slots = cast(rng, False) | {"num": rng.choice(words.NUMBERS[3:13])}
    one = rng.choice(rows(words.FOODS))[0]
    end = fill(rng, endings.replace("{food} cakes", one + " cakes"), slots)
    return f"Finish the sentence: {start}", f"{start} {lower_first(end)}"


def do_describe(rng: Rng) -> tuple[str, str]:
    """Describe an animal."""
    row = rng.choice(ANIMAL_ROWS)
    facts = ["It has {legs} legs.", "It eats {eats}.", "It lives {lives}.", "Its young is called a~{young}."]
    chosen = [fill(rng, f, row) for f in rng.sample(facts, rng.randint(1, 3))]
    first = fill(rng, "A~{name} is a~{group} with {look}.|A~{name} has {look}.", row)
    return fill(
        rng, "Describe a~{name}.|Tell me about the {name}.|What is a~{name}?|Write about the {name}.", row
    ), " ".join([first] + chosen)


def do_story(rng: Rng) -> tuple[str, str]:
    """Write a short story about a hero and a thing."""
    made = make_story(rng)
    return request_for(rng, made), made.text


def request_for(rng: Rng, made: Story) -> str:
    """A request that the story answers."""
    slots = made.slots
    if slots["n"].startswith("the "):
        return fill(rng, "[Write/Tell me] a [short/little] story about a~{k} and a~{thing}.", slots)
    if slots["verb"]:
        return fill(
            rng,
            "[Write/Tell me] a [short/little] story about a~{k} who learns to {thing}.|Tell me about {n}, a~{k} who "
            "wants to {thing}.",
            slots,
        )
    return fill(
        rng,
        "[Write/Tell me] a [short/little] story about a~{k} and a~{thing}.|[Write/Tell me] a story about a~{k} named "
        "{n} and a~{thing}.|[Write/Tell me] a story about {n} the {k} and {o} the {ok}.",
        slots,
    )


def do_how(rng: Rng) -> tuple[str, str]:
    """Explain how to do something."""
    title, *steps = rng.choice(lines(words.STEPS))
    ask = rng.choice((f"Explain how to {title}.", f"Tell me how to {title}.", f"Write the steps to {title}."))
    if rng.random() < 0.5:
        return ask, "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
    first, *middle, last = (lower_first(s) for s in steps)
    return ask, " ".join(
        [f"First, {first}"] + [cap(m) if i % 2 else f"Then {m}" for i, m in enumerate(middle)] + [f"At the end, {last}"]
    )


def do_odd(rng: Rng) -> tuple[str, str]:
    """Find the word that does not belong."""
    name, other = rng.sample(("fruits", "vegetables", "tools", "clothes", "birds", "drinks", "shapes", "jobs"), 2)
    picked = some(rng, words.CATEGORIES[name], 3)
    odd = rng.choice(
        [w for w in alternatives(words.CATEGORIES[other]) if w not in alternatives(words.CATEGORIES[name])]
    )
    mixed = rng.sample(picked + [odd], 4)
    return (
        f"Which word does not belong: {', '.join(mixed)}?",
        f"{cap(odd)} does not belong. The other words are {name}.",
    )


def do_make_list(rng: Rng) -> tuple[str, str]:
    """Write a shopping or packing list."""
    if rng.random() < 0.5:
        heading, body = shopping_list(rng)
        return "Write a shopping list.", f"{heading}:\n{body}"
    trip = rng.choice(alternatives(words.TRIPS))
    return f"Write a packing list for {trip}.", "\n".join("- " + i for i in some(rng, words.PACK, rng.randint(4, 6)))


TASKS: tuple[tuple[Callable[[Rng], tuple[str, str]], float], ...] = (
    (do_sentence, 4),
    (do_list, 3),
    (do_word, 3),
    (do_letters, 4),
    (do_count, 2),
    (do_finish, 2),
    (do_describe, 3),
    (do_story, 3),
    (do_how, 1),
    (do_odd, 1.5),
    (do_make_list, 2),
)


def task(rng: Rng) -> tuple[str, str]:
    """Any instruction with its result."""
    return rng.choices([t for t, _ in TASKS], [w for _, w in TASKS])[0](rng)


def instruction(rng: Rng) -> Document:
    """One instruction with a long result, or a few with short ones."""
    first = task(rng)
    items = [first]
    if len(first[1]) < 120 and rng.random() < 0.75:
        items += [i for i in several(rng, task, (3, 2)) if i[0] != first[0] and len(i[1]) < 160]
    return Document("\n\n".join(f"Instruction: {a}\nResult: {b}" for a, b in items))


# ---------------------------------------------------------------------------------------------------------------------
# Chats
# ---------------------------------------------------------------------------------------------------------------------


def turn(rng: Rng) -> tuple[str, str]:
    """One exchange of a chat: a question, a task, or a passage with one question."""
    kind = rng.random()
    if kind < 0.5:
        return question(rng)
    if kind < 0.85:
        return task(rng)
    text, items = passage(rng)
    return f"{text}\n\n{items[0][0]}", items[0][1]


def animal_talk(rng: Rng) -> list[tuple[str, str]]:
    """Two or three questions about one animal; the later ones say "it"."""
    row = rng.choice(SOUND_ROWS)
    later = [
        ("What does it eat?|And what does it eat?", "A~{name} eats {eats}."),
        ("Where does it live?|And where does it live?", "A~{name} lives {lives}."),
        ("How many legs does it have?", "A~{name} has {legs} legs."),
        ("What is its young called?", "A young {name} is called a~{young}."),
        ("What sound does it make?", "A~{name} {sounds}."),
        ("What does it look like?", "A~{name} has {look}."),
    ]
    start = fill(rng, "What is a~{name}?|What kind of animal is a~{name}?|Tell me about the {name}.", row)
    turns = [(start, fill(rng, "A~{name} is a~{group}.|A~{name} is a~{group} with {look}.", row))]
    for ask, answer in rng.sample(later, rng.randint(1, 2)):
        turns.append((fill(rng, ask, row), fill(rng, answer, row)))
    return turns


def chat(rng: Rng) -> Document:
    """A dialog of one to three turns, sometimes with a greeting or thanks."""
    kind = rng.random()
    if kind < 0.2:
        turns = animal_talk(rng)
    elif kind < 0.4:
        turns = [do_story(rng)]
    else:
        turns = [turn(rng) for _ in range(rng.choices((1, 2, 3), (3, 4, 3))[0])]
    while len(turns) > 1 and sum(len(q.split()) + len(a.split()) for q, a in turns) > 170:
        turns.pop()
    if len(turns) < 3 and rng.random() < 0.12:
        name = name_for(rng, False, rng.random() < 0.5)
        hello = expand(rng, "Hello!|Hi!|Good morning!|Hello, my name is {n}.|Hi, I am {n}.").format(n=name)
        greet = f"Hello, {name}!" if name in hello else "Hello!"
        turns.insert(0, (hello, f"{greet} {rng.choice(('How can I help you?', 'What can I do for you today?'))}"))
    if len(turns) < 3 and rng.random() < 0.12:
        turns.append(
            (
                rng.choice(("Thank you!", "Thanks!", "Thank you for your help.", "That is very helpful. Thank you!")),
                rng.choice(("You are welcome!", "You are welcome. Have a nice day!", "I am glad to help.")),
            )
        )
    dialog = [pair for user, reply in turns for pair in (("user", user), ("assistant", reply))]
    return Document("", tuple(dialog))


# ---------------------------------------------------------------------------------------------------------------------
# The corpus
# ---------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[random.Random], Document]] = {
    "story": story,
    "fact": fact,
    "list": list_document,
    "qa": qa,
    "instruction": instruction,
    "chat": chat,
}
# Shares of the kinds, by documents; a story is three times as long as the rest.
Mix = dict[str, float]
BALANCED: Mix = {"story": 0.40, "fact": 0.12, "list": 0.08, "qa": 0.15, "instruction": 0.10, "chat": 0.15}
QUESTIONS: Mix = {"story": 0.12, "fact": 0.10, "list": 0.05, "qa": 0.33, "instruction": 0.15, "chat": 0.25}

SAMPLE_PROMPTS: tuple[str, ...] = (
    "Once upon a time, there was a little fox named",
    "Question: What colour is the sky on a clear day?\nAnswer:",
    "One cold winter morning, Anna the girl",
    "Instruction: Explain how to build a bird house.\nResult:",
    "The farmer went to the market to buy",
    "Question: What is the capital of France?\nAnswer:",
)


def document(rng: random.Random, mix: Mix = BALANCED) -> Document:
    """One random document; a pure function of the state of ``rng``."""
    return KINDS[rng.choices(list(mix), list(mix.values()))[0]](rng)


def records(n: int, seed: int) -> list[dict[str, str]]:
    """``n`` different tasks of this world, in the shape of Alpaca's: instruction, input (for a third), output."""
    rng = random.Random(f"records-{seed}")
    found: dict[tuple[str, str], str] = {}
    while len(found) < n:
        kind = rng.randrange(3)
        if kind == 0:
            text, items = passage(rng)
            found[items[0][0], text] = items[0][1]
        else:
            asked, answer = question(rng) if kind == 1 else task(rng)
            found[asked, ""] = answer
    return [{"instruction": asked, "input": text, "output": answer} for (asked, text), answer in found.items()]


def main() -> None:
    """Prints sample documents, or records."""
    parser = argparse.ArgumentParser(description="Print sample documents of the tiny corpus.")
    parser.add_argument("--n", type=int, default=10, help="number of documents")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random numbers")
    parser.add_argument("--records", action="store_true", help="instructions with answers instead, as JSON")
    args = parser.parse_args()
    if args.records:
        print(json.dumps(records(args.n, args.seed), indent=1))
        return
    rng = random.Random(args.seed)
    for _ in range(args.n):
        made = document(rng)
        print(made.text or "\n".join(f"<{role}> {content}" for role, content in made.dialog))
        print("-" * 60)


if __name__ == "__main__":
    main()
