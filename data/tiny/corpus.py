"""English text of a small world, made up at random: what the embedded model is trained on.

    python -m data.tiny.corpus --n=10 --seed=1       # read some documents

Every document is put together from the word tables and sentence patterns of words.toml: little stories, short fact
paragraphs, lists, questions with answers, instructions with results, and chats. The number of possible documents is far
beyond what a small model can memorise, while names, pronouns, objects and facts stay consistent inside and across
documents.

Pattern language: `|` separates whole alternatives (in words.toml they are the entries of a list), `[a/b]` is an inline
choice, `{slot}` is filled in, and `a~word` becomes "a word" or "an word" as English needs it. In a plot, `- ` starts a
sentence, `| ` gives a different wording, `? ` starts a sentence that may be left out, `+ ` starts a new paragraph.

What it leaves out: real persons, brands, long reasoning, and any knowledge that is not in the tables.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from llama import cli
from llama.cli import option

Rng = random.Random
Slots = dict[str, str]
Pattern = str | Sequence[str]  # alternatives, split by "|" or as entries
Pair = tuple[str, str]  # a question or a task, and its answer; or the heading of a list, and the list


def table(text: str) -> list[tuple[str, ...]]:
    """The rows of a table: one per line, with fields split by `;`."""
    return [tuple(field.strip() for field in line.split(";")) for line in text.strip().split("\n")]


def read_words() -> SimpleNamespace:
    """What words.toml holds, with its tables as rows."""
    content = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
    texts = ("plots", "passages")
    return SimpleNamespace(**{k: table(v) if isinstance(v, str) and k not in texts else v for k, v in content.items()})


words = read_words()


@dataclass(frozen=True)
class Document:
    """One training document: plain `text`, or a `dialog` of (role, content) pairs with `text` empty."""

    text: str
    dialog: tuple[Pair, ...] = ()


@cache
def alternatives(pattern: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in pattern.split("|"))


@cache
def _compiled(sentence: str) -> tuple[str | tuple[str, ...], ...]:
    """A sentence pattern cut into fixed strings and tuples of inline choices."""
    pieces = re.split(r"\[([^\]]*)\]", sentence)
    return tuple(tuple(p.strip() for p in piece.split("/")) if i % 2 else piece for i, piece in enumerate(pieces))


def expand(rng: Rng, pattern: Pattern) -> str:
    """One alternative of `pattern` with one option of every inline choice; slots stay as they are."""
    sentence = rng.choice(alternatives(pattern) if isinstance(pattern, str) else pattern)
    return "".join(p if isinstance(p, str) else rng.choice(p) for p in _compiled(sentence))


_ARTICLE = re.compile(r"\b([Aa])~(\W?\w+)")
_SENTENCE = re.compile(r"(^|[.!?] |[.!?]\" |\n)(\"?)([a-z])")


def article(word: str) -> str:
    """The right indefinite article for `word`."""
    low = word.lower()
    if low.startswith(("uni", "use", "one", "eu")):
        return "a"
    return "an" if low[:1] in "aeiou" or low.startswith(("hour", "honest")) else "a"


def _fix_article(match: re.Match[str]) -> str:
    """Turns `a~word` into "a word" or "an word", keeping the capital."""
    chosen = article(match[2])
    return (chosen.capitalize() if match[1] == "A" else chosen) + " " + match[2]


def _fix_capital(match: re.Match[str]) -> str:
    """Capitalises the first letter of a sentence, but not a speech tag such as `?" asked`."""
    if match[1][:2] in ('!"', '?"'):
        return match[0]
    return match[1] + match[2] + match[3].upper()


def polish(text: str) -> str:
    """Settles articles and sentence capitals."""
    if "~" in text:
        text = _ARTICLE.sub(_fix_article, text)
    return _SENTENCE.sub(_fix_capital, text)


def fill(rng: Rng, pattern: Pattern, slots: Slots) -> str:
    """Expands a pattern, fills its slots and polishes the result."""
    text = expand(rng, pattern).format_map(slots)
    return polish(text.format_map(slots) if "{" in text else text)


def cap(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def series(items: Sequence[str]) -> str:
    """Items as English joins them: "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def bulleted(items: Sequence[str]) -> str:
    return "\n".join("- " + item for item in items)


def pronouns(slots: Slots, prefix: str, she: bool) -> None:
    """Puts the pronouns of one character into `slots`, lower case and with a capital."""
    he, him, his = ("she", "her", "her") if she else ("he", "him", "his")
    slots[prefix + "he"], slots[prefix + "him"], slots[prefix + "his"] = he, him, his
    slots[cap(prefix + "he")], slots[cap(prefix + "his")] = cap(he), cap(his)
    slots[prefix + "self"] = him + "self" if she else "himself"


# Stories


@dataclass(frozen=True)
class Plot:
    """One plot: choices for its slots, then steps of (optional, starts a paragraph, alternatives)."""

    choices: dict[str, tuple[str, ...]]
    lesson: str
    steps: tuple[tuple[bool, bool, str], ...]


def parse_plots(text: str) -> dict[str, Plot]:
    """Reads `PLOTS_TEXT`."""
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


PLOTS = parse_plots(words.plots)
PLOT_NAMES = tuple(PLOTS)
# Things that are learnt, not owned: they make no good title or request.
VERB_PLOTS = frozenset({"learn"})
MATERIAL_NOUNS = ("wood", "metal", "paper", "glass", "wool", "cotton", "leather", "stone", "clay", "straw")


def name_for(rng: Rng, animal: bool, she: bool, taken: str = "") -> str:
    """A name that is not `taken`."""
    pool = (words.pet_she if she else words.pet_he) if animal else (words.girls if she else words.boys)
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
        slots["k"], slots["ok"] = rng.sample(words.story_animals, 2)
    else:
        slots["k"], slots["ok"] = "girl" if she else "boy", "girl" if friend_she else "boy"
    elder, pronoun = rng.choice(words.elders_animal if animal else words.elders_child)
    slots["e"], slots["E"], slots["O"] = elder, cap(elder), slots["o"]
    pronouns(slots, "e", pronoun == "she")
    slots["home"] = rng.choice(words.animal_homes if animal else words.child_homes)
    slots["area"] = rng.choice(words.animal_areas if animal else words.child_areas)
    slots["adj"] = rng.choice(words.hero_adj)
    slots["trait"], slots["trait2"] = rng.sample(words.traits, 2)
    slots["food"], slots["food2"] = rng.sample(words.treats, 2)
    slots["goods"], slots["goods2"] = rng.sample(words.goods, 2)
    slots["col"] = rng.choice(words.colours)
    set_material(rng, slots)
    return slots


def set_material(rng: Rng, slots: Slots) -> None:
    """A material that the thing of the story can be made of."""
    slots["mat"] = rng.choice(words.material_of.get(slots.get("thing", ""), ["wood", "metal"]))
    slots["matadj"] = {"wood": "wooden", "wool": "woollen"}.get(slots["mat"], slots["mat"])


def set_time(rng: Rng, slots: Slots, season: str) -> None:
    """Season, part of the day and the phrases that name them."""
    slots["season"], slots["part"] = season, rng.choice(("morning", "morning", "day", "afternoon"))
    slots["sadj"] = rng.choice(words.season_adj[season])
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
    """The sentences before the plot; settles how the plot names its time (slot `T`)."""
    night = plot_name == "dark"
    slots["T"] = f"{slots['time']},"
    if plot_name == "worker":
        return []
    parts: list[str] = []
    quick = rng.random() < 0.35 and not night
    parts.append(expand(rng, words.quick_openings if quick else words.openings))
    if quick:
        slots["T"] = f"That {slots['part']},"
        if rng.random() < 0.3:
            parts.append(expand(rng, words.season_weather[slots["season"]]))
    if rng.random() < 0.6:
        about = expand(rng, words.about_hero)
        # In "friend" the two have not met yet, and in "race" and "share" they are not friends at first.
        while "{o}" in about and plot_name in ("friend", "race", "share", "market"):
            about = expand(rng, words.about_hero)
        parts.append(about)
    return parts


INDOOR_PLOTS = frozenset(
    {"dark", "birthday", "repair", "snow", "garden", "pet", "learn", "build", "neighbour", "worker"}
)


def story_end(rng: Rng, plot_name: str, so_far: str) -> str:
    """A closing that fits: it names the friend only if the friend has come, and walks home only from outside."""
    while True:
        closing = expand(rng, words.closings)
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
    set_time(rng, slots, slots.get("season") or rng.choice(tuple(words.season_adj)))
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


# Facts: every relation can be stated, asked and answered


@dataclass(frozen=True)
class Relation:
    """A table of facts with patterns to state them, to ask for them and to check them with yes or no."""

    table: tuple[Slots, ...]
    say: Sequence[str]
    ask: Sequence[str]
    short: str
    check: Sequence[str] = ()
    differ: str = "b"


def pairs(rows: Sequence[tuple[str, ...]]) -> tuple[Slots, ...]:
    """Rows as slots `a`, `b` and `c` (`A` is `a` with a capital)."""
    return tuple(dict(zip("abc", row, strict=False)) | {"A": cap(row[0])} for row in rows)


def third_person(verb: str) -> str:
    """The form of a regular verb after he, she or it."""
    return verb + "es" if verb.endswith(("s", "sh", "ch", "x")) else verb + "s"


def of_kind(thing: str, kind: str) -> Slots:
    named = thing if thing in words.mass else "a~" + thing
    return {"a": thing, "A": cap(named), "b": kind, "x": named}


HEAD, *ANIMALS = words.animals
ANIMAL_ROWS: tuple[Slots, ...] = tuple(dict(zip(HEAD, row, strict=True)) for row in ANIMALS)
TABLES: dict[str, tuple[Slots, ...]] = {
    "animals": ANIMAL_ROWS,
    "sounds": tuple(row | {"sounds": third_person(row["sound"])} for row in ANIMAL_ROWS if row["sound"] != "-"),
    "days": tuple({"a": day, "b": words.days[(i + 1) % 7]} for i, day in enumerate(words.days)),
    "months": tuple(
        {"a": month, "b": words.months[(i + 1) % 12], "o": words.ordinals[i]} for i, month in enumerate(words.months)
    ),
    "season_facts": tuple({"a": what, "b": season} for season, what in words.season_facts),
    "kinds": tuple(of_kind(thing, kind) for name, kind in words.kind_of.items() for thing in words.categories[name]),
}
RELATIONS = {
    name: Relation(**{**content, "table": TABLES.get(content["table"]) or pairs(getattr(words, content["table"]))})
    for name, content in words.relations.items()
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


def ask_fact(rng: Rng, relation: Relation | None = None) -> Pair:
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


_CAPITAL_WORDS = [part for row in words.capitals for name in row for part in name.split()]
PROPER = frozenset([*words.days, *words.months, *_CAPITAL_WORDS, "I"])


def lower_first(text: str) -> str:
    """`text` with a small first letter, unless it starts with a name."""
    return text if text.split(" ")[0].rstrip(".,") in PROPER else text[:1].lower() + text[1:]


def ask_sum(rng: Rng) -> Pair:
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
    a, b, c = (words.numbers[value] if spelled else str(value) for value in values)
    if not spelled and rng.random() < 0.3:
        return f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {c}"
    question = expand(rng, "What is {a} {s} {b}?|How much is {a} {s} {b}?").format(a=a, b=b, s=sign_word)
    return question, cap(f"{a} {sign_word} {b} is {c}.")


def ask_story_sum(rng: Rng) -> Pair:
    """A sum in a small everyday scene."""
    she = rng.random() < 0.5
    name, (one, many) = name_for(rng, False, she), rng.choice(words.foods)
    start = rng.randint(2, 10)
    she_has = "she" if she else "he"
    if rng.random() < 0.5:
        change = rng.randint(1, 10)
        total, verb = start + change, rng.choice(("gets", "buys", "finds"))
        middle = f"{cap(she_has)} {verb} {words.numbers[change]} more."
    else:
        change = rng.randint(1, start - 1)
        total, verb = start - change, rng.choice(("eats", "gives away", "loses"))
        middle = f"{cap(she_has)} {verb} {words.numbers[change]} of them."
    count = f"{words.numbers[total]} {one if total == 1 else many}"
    question = f"{name} has {words.numbers[start]} {many}. {middle} How many {many} does {name} have now?"
    return question, rng.choice((f"{name} has {count} now.", f"{name} now has {count}."))


def ask_compare(rng: Rng) -> Pair:
    """A comparison of two things or two numbers."""
    kind = rng.random()
    if kind < 0.35:
        order, more, less = ["a~" + name for name in words.size_order], "bigger", "smaller"
    elif kind < 0.55:
        order, more, less = words.speed_order, "faster", "slower"
    elif kind < 0.75:
        order, more, less = words.weight_order, "heavier", "lighter"
    else:
        order, more, less = [str(i) for i in range(1, 21)], "larger", "smaller"
    low, high = (order[i] for i in sorted(rng.sample(range(len(order)), 2)))
    first, second = rng.sample((low, high), 2)
    word, right, wrong = (more, high, low) if rng.random() < 0.5 else (less, low, high)
    return polish(f"Which is {word}, {first} or {second}?"), polish(cap(f"{right} is {word} than {wrong}."))


def animal_paragraph(rng: Rng) -> str:
    """A paragraph about one animal, in a mixed order of facts."""
    row = rng.choice(TABLES["sounds"])
    if rng.random() < 0.5:
        facts = ["They eat {eats}.", "They live {lives}.", "They have {legs} legs.", "They have {look}."]
        facts.append("They can {sound}.")
        first = fill(rng, "{plural} are {group}s.|Many people like {plural}.|Have you ever seen {plural}?", row)
    else:
        facts = ["It eats {eats}.", "It lives {lives}.", "It has {legs} legs.", "It has {look}.", "It can {sound}."]
        first = fill(rng, "A~{name} is a~{group}.|The {name} is a~{group}.|Let us learn about the {name}.", row)
    facts.append("A young {name} is called a~{young}.")
    return " ".join([first] + [fill(rng, pattern, row) for pattern in rng.sample(facts, rng.randint(3, 6))])


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
    name, members = rng.choice(tuple(words.categories.items()))
    many = polish(series([m if m in words.mass else "a~" + m for m in rng.sample(members, rng.randint(3, 5))]))
    word, bigger, biggest = rng.choice(words.comparatives)
    return f'{cap(many)} are {name}. We say "{word}", "{bigger}" and "{biggest}".'


def fact(rng: Rng) -> Document:
    """A short expository paragraph."""
    maker = rng.choices((animal_paragraph, topic_paragraph, mixed_paragraph, sum_paragraph), (4, 3, 2, 1))[0]
    return Document(maker(rng))


# Lists


def shopping_list(rng: Rng) -> Pair:
    """A shopping list and its heading."""
    heading = fill(
        rng,
        "Shopping list|Things to buy on {day}|Shopping list for {n}|{n}'s shopping list|Shopping list for {day}",
        {"day": rng.choice(words.days), "n": name_for(rng, False, rng.random() < 0.5)},
    )
    return heading, bulleted(rng.sample(words.goods, rng.randint(3, 7)))


def packing_list(rng: Rng) -> Pair:
    """A packing list and its heading."""
    trip = rng.choice(words.trips)
    heading = rng.choice(
        (
            f"Packing list for {trip}",
            f"Things to take on {trip}" if "night" not in trip else f"Things to take for {trip}",
            f"What we need for {trip}",
        )
    )
    return heading, bulleted(rng.sample(words.pack, rng.randint(4, 7)))


def steps_list(rng: Rng) -> Pair:
    """Numbered steps for doing something."""
    title, steps = rng.choice(tuple(words.steps.items()))
    return f"How to {title}", numbered(steps)


def category_list(rng: Rng) -> Pair:
    """Things of one category."""
    name, members = rng.choice(tuple(words.categories.items()))
    count = rng.randint(3, min(6, len(members)))
    heading = rng.choice((cap(name), f"{cap(words.numbers[count])} {name}", f"A list of {name}"))
    mark = rng.random() < 0.5
    items = rng.sample(members, count)
    return heading, numbered(items) if mark else bulleted(items)


def plan_list(rng: Rng) -> Pair:
    """What someone will do on the days of a week."""
    she = rng.random() < 0.5
    name, start, count = name_for(rng, False, she), rng.randrange(7), rng.randint(3, 5)
    things = alternatives(
        "bake a cake|visit {e}|clean the {place}|read a book|go to the market|swim in the lake|paint the {place}|"
        "write a letter to {o}|play with {o}|work in the garden|buy {goods}|mend the old gate|cook soup|walk in {area}"
    )
    slots = cast(rng, False)
    slots["place"] = rng.choice(("kitchen", "shed", "fence", "bedroom", "hall", "gate"))
    doing = [t.format_map(slots) for t in rng.sample(things, count)]
    days = [words.days[(start + i) % 7] for i in range(count)]
    return f"{name}'s plan for the week", "\n".join(f"{d}: {t}" for d, t in zip(days, doing, strict=True))


LIST_MAKERS = (shopping_list, packing_list, steps_list, category_list, plan_list)


def list_document(rng: Rng) -> Document:
    """A list under its heading."""
    heading, body = rng.choices(LIST_MAKERS, (5, 4, 1, 3, 3))[0](rng)
    if rng.random() < 0.3:
        second, more = rng.choices(LIST_MAKERS, (4, 4, 2, 3, 3))[0](rng)
        return Document(f"{heading}:\n{body}\n\n{second}:\n{more}")
    return Document(f"{heading}:\n{body}")


# Questions with answers

PASSAGES = tuple(
    (b.strip().split("\n")[0], tuple(tuple(x.split(";")) for x in b.strip().split("\n")[1:]))
    for b in words.passages.replace("\n  ", " ").split("#")
)


def passage(rng: Rng) -> tuple[str, list[Pair]]:
    """A small passage and two to four questions about it."""
    pattern, questions = rng.choice(PASSAGES)
    slots = cast(rng, False)
    set_time(rng, slots, rng.choice(tuple(words.season_adj)))
    slots["thing"], slots["spot"] = rng.choice(words.passage_things), rng.choice(words.spots)
    slots["num"], slots["day"] = rng.choice(words.numbers[3:13]), rng.choice(words.days)
    slots["job"], slots["does"] = rng.choice(words.jobs)
    slots["mat2"], slots["mat"] = rng.choice(MATERIAL_NOUNS), rng.choice(words.materials)
    slots["why"] = rng.choice(words.why).format_map(slots)
    slots["whynot"] = rng.choice(words.whynot).format_map(slots)
    if pattern.startswith("The {ok}"):
        slots["ok"] = rng.choice(words.story_animals)
        slots["o"] = name_for(rng, True, rng.random() < 0.5)
    chosen = rng.sample(questions, rng.randint(2, len(questions)))
    return fill(rng, pattern, slots), [(fill(rng, q, slots), fill(rng, a, slots)) for q, a in chosen]


ASKERS: tuple[tuple[Callable[[Rng], Pair], float], ...] = (
    (ask_fact, 10),
    (ask_sum, 3),
    (ask_story_sum, 2.5),
    (ask_compare, 1.5),
)


def question(rng: Rng) -> Pair:
    """Any question that stands alone, with its answer."""
    return rng.choices([a for a, _ in ASKERS], [w for _, w in ASKERS])[0](rng)


def as_qa(items: list[Pair]) -> str:
    """Pairs in the plain question format."""
    return "\n\n".join(f"Question: {q}\nAnswer: {a}" for q, a in items)


def several(rng: Rng, maker: Callable[[Rng], Pair], weights: tuple[int, ...]) -> list[Pair]:
    """One to `len(weights)` pairs, no question twice."""
    n = rng.choices(range(1, len(weights) + 1), weights)[0]
    answers: dict[str, str] = {}
    while len(answers) < n:
        asked, answer = maker(rng)
        answers[asked] = answer
    return list(answers.items())


def qa(rng: Rng) -> Document:
    """Questions with answers, alone or about a passage."""
    if rng.random() < 0.35:
        text, items = passage(rng)
        return Document(f"{text}\n\n{as_qa(items)}")
    return Document(as_qa(several(rng, question, (2, 3, 3, 2))))


# Instructions with results


def do_sentence(rng: Rng) -> Pair:
    """Write a sentence about an animal or a thing."""
    slots = cast(rng, False)
    set_time(rng, slots, rng.choice(tuple(words.season_adj)))
    slots |= {"spot": rng.choice(words.spots), "day": rng.choice(words.days)}
    if rng.random() < 0.5:
        row = rng.choice([r for r in ANIMAL_ROWS if r["name"] in words.story_animals])
        slots |= {"x": row["name"], "young": row["young"]}
        result = fill(rng, words.animal_does, slots)
    else:
        slots["x"] = rng.choice(words.passage_things)
        result = fill(rng, words.thing_does, slots)
    return fill(
        rng,
        'Write a sentence about a~{x}.|Make a sentence with the word "{x}".|Use the word "{x}" in a sentence.',
        slots,
    ), result


def do_list(rng: Rng) -> Pair:
    """List or name some things of a category."""
    name, members = rng.choice(tuple(words.categories.items()))
    count = rng.randint(2, 5)
    items = rng.sample(members, count)
    if rng.random() < 0.5:
        return f"Name {words.numbers[count]} {name}.", cap(series(items)) + "."
    return f"List {words.numbers[count]} {name}.", numbered(items)


def do_word(rng: Rng) -> Pair:
    """Opposite, plural, past tense, comparative or rhyme of a word."""
    rows, pattern = (
        (words.opposites, 'Name the opposite of "{a}".|Give the opposite of "{a}".'),
        (words.plurals, 'Give the plural of "{a}".|Write the plural of "{a}".'),
        (words.past, 'Give the past tense of "{a}".|Write the past tense of "{a}".'),
        (words.comparatives, None),
        (words.rhymes, None),
    )[rng.randrange(5)]
    a, *rest = rng.choice(rows)
    if rows is words.comparatives:
        return f'Give the other two forms of "{a}".', cap(", ".join(rest))
    if rows is words.rhymes:
        return f'Name a word that rhymes with "{a}".', cap(rest[0])
    return expand(rng, pattern).format(a=a), cap(rest[0])


SIMPLE_WORDS = sorted({w for members in words.categories.values() for w in members if " " not in w and "-" not in w})


def do_letters(rng: Rng) -> Pair:
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
    return f"Count these words: {', '.join(picked)}.", f"There are {words.numbers[len(picked)]} words."


def do_count(rng: Rng) -> Pair:
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


def do_finish(rng: Rng) -> Pair:
    """Finish a sentence."""
    start, endings = rng.choice(tuple(words.endings.items()))
    slots = cast(rng, False) | {"num": rng.choice(words.numbers[3:13])}
    one = rng.choice(words.foods)[0]
    end = fill(rng, [ending.replace("{food} cakes", one + " cakes") for ending in endings], slots)
    return f"Finish the sentence: {start}", f"{start} {lower_first(end)}"


def do_describe(rng: Rng) -> Pair:
    """Describe an animal."""
    row = rng.choice(ANIMAL_ROWS)
    facts = ["It has {legs} legs.", "It eats {eats}.", "It lives {lives}.", "Its young is called a~{young}."]
    chosen = [fill(rng, f, row) for f in rng.sample(facts, rng.randint(1, 3))]
    first = fill(rng, "A~{name} is a~{group} with {look}.|A~{name} has {look}.", row)
    return fill(
        rng, "Describe a~{name}.|Tell me about the {name}.|What is a~{name}?|Write about the {name}.", row
    ), " ".join([first] + chosen)


def do_story(rng: Rng) -> Pair:
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


def do_how(rng: Rng) -> Pair:
    """Explain how to do something."""
    title, steps = rng.choice(tuple(words.steps.items()))
    ask = rng.choice((f"Explain how to {title}.", f"Tell me how to {title}.", f"Write the steps to {title}."))
    if rng.random() < 0.5:
        return ask, numbered(steps)
    first, *middle, last = (lower_first(s) for s in steps)
    return ask, " ".join(
        [f"First, {first}"] + [cap(m) if i % 2 else f"Then {m}" for i, m in enumerate(middle)] + [f"At the end, {last}"]
    )


def do_odd(rng: Rng) -> Pair:
    """Find the word that does not belong."""
    name, other = rng.sample(("fruits", "vegetables", "tools", "clothes", "birds", "drinks", "shapes", "jobs"), 2)
    picked = rng.sample(words.categories[name], 3)
    odd = rng.choice([w for w in words.categories[other] if w not in words.categories[name]])
    mixed = rng.sample(picked + [odd], 4)
    return (
        f"Which word does not belong: {', '.join(mixed)}?",
        f"{cap(odd)} does not belong. The other words are {name}.",
    )


def do_make_list(rng: Rng) -> Pair:
    """Write a shopping or packing list."""
    if rng.random() < 0.5:
        heading, body = shopping_list(rng)
        return "Write a shopping list.", f"{heading}:\n{body}"
    trip = rng.choice(words.trips)
    return f"Write a packing list for {trip}.", bulleted(rng.sample(words.pack, rng.randint(4, 6)))


TASKS: tuple[tuple[Callable[[Rng], Pair], float], ...] = (
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


def task(rng: Rng) -> Pair:
    """Any instruction with its result."""
    return rng.choices([t for t, _ in TASKS], [w for _, w in TASKS])[0](rng)


def instruction(rng: Rng) -> Document:
    """One instruction with a long result, or a few with short ones."""
    first = task(rng)
    items = [first]
    if len(first[1]) < 120 and rng.random() < 0.75:
        items += [i for i in several(rng, task, (3, 2)) if i[0] != first[0] and len(i[1]) < 160]
    return Document("\n\n".join(f"Instruction: {a}\nResult: {b}" for a, b in items))


# Chats


def turn(rng: Rng) -> Pair:
    """One exchange of a chat: a question, a task, or a passage with one question."""
    kind = rng.random()
    if kind < 0.5:
        return question(rng)
    if kind < 0.85:
        return task(rng)
    text, items = passage(rng)
    return f"{text}\n\n{items[0][0]}", items[0][1]


def animal_talk(rng: Rng) -> list[Pair]:
    """Two or three questions about one animal; the later ones say "it"."""
    row = rng.choice(TABLES["sounds"])
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


# The corpus

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
    """One random document; a pure function of the state of `rng`."""
    return KINDS[rng.choices(list(mix), list(mix.values()))[0]](rng)


def records(n: int, seed: int) -> list[dict[str, str]]:
    """`n` different tasks of this world, in the shape of Alpaca's: instruction, input (for a third), output."""
    rng = random.Random(f"records-{seed}")
    answers: dict[Pair, str] = {}
    while len(answers) < n:
        kind = rng.randrange(3)
        if kind == 0:
            text, items = passage(rng)
            answers[items[0][0], text] = items[0][1]
        else:
            asked, answer = question(rng) if kind == 1 else task(rng)
            answers[asked, ""] = answer
    return [{"instruction": asked, "input": text, "output": answer} for (asked, text), answer in answers.items()]


@dataclass(frozen=True)
class Options(cli.Options):
    """Print documents of the embedded model's world."""

    n: int = option(10, "number of documents", least=1)
    seed: int = option(1, "seed of the random numbers")
    records: bool = option(False, "instructions with answers instead, as JSON")


def main(options: Options) -> None:
    if options.records:
        print(json.dumps(records(options.n, options.seed), indent=1))
        return
    rng = random.Random(options.seed)
    for _ in range(options.n):
        made = document(rng)
        print(made.text or "\n".join(f"<{role}> {content}" for role, content in made.dialog))
        print("-" * 60)


if __name__ == "__main__":
    cli.run(main)
