"""English text of a small world, made up at random: what the embedded model is trained on.

    python -m data.tiny.corpus --n=10 --seed=1       # read some documents

Every document is put together from the word tables and sentence patterns of words.toml: little stories, short fact
paragraphs, lists, questions with answers, instructions with results, and chats. The number of possible documents is far
beyond what a small model can memorise, while names, pronouns, objects and facts stay consistent inside and across
documents.

Pattern language: a pattern is a sentence or a list of alternatives, `[a/b]` is an inline choice, `{slot}` is filled in,
and `a~word` becomes "a word" or "an word" as English needs it. In a plot, `-` starts a sentence, `|` gives a different
wording, `?` starts a sentence that may be left out, `+` starts a new paragraph.

What it leaves out: real persons, brands, long reasoning, and any knowledge that is not in the tables.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from llama import cli
from llama.cli import option

T = TypeVar("T")
Rng = random.Random
Slots = dict[str, str]
Pattern = str | Sequence[str]  # a sentence, or alternatives
Pair = tuple[str, str]  # a question or a task, and its answer; or the heading of a list, and the list


def table(text: str) -> list[tuple[str, ...]]:
    """The rows of a table: one per line, with fields split by `;`."""
    return [tuple(field.strip() for field in line.split(";")) for line in text.strip().split("\n")]


def read_words() -> SimpleNamespace:
    """What words.toml holds, with its tables as rows."""
    content = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
    return SimpleNamespace(**{k: table(v) if isinstance(v, str) else v for k, v in content.items()})


words = read_words()


@dataclass(frozen=True)
class Document:
    """One training document: plain `text`, or a `dialog` of (role, content) pairs with `text` empty."""

    text: str
    dialog: tuple[Pair, ...] = ()


def pick(rng: Rng, weights: Mapping[T, float]) -> T:
    """One of the keys, with probabilities in proportion to the weights."""
    return rng.choices(list(weights), list(weights.values()))[0]


def any_of(makers: Mapping[Callable[[Rng], T], float]) -> Callable[[Rng], T]:
    """A function that calls one of `makers`, drawn by its weight."""
    return lambda rng: pick(rng, makers)(rng)


_CHOICE = re.compile(r"\[([^\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])~(\W?\w+)")
_SENTENCE = re.compile(r"(^|[.!?] |\.\" |\n)\"?[a-z]")  # not after `?" `, where a speech tag follows ("asked Tom")


def expand(rng: Rng, pattern: Pattern) -> str:
    """One alternative of `pattern` with one option of every inline choice; slots stay as they are."""
    sentence = rng.choice([pattern] if isinstance(pattern, str) else pattern)
    return _CHOICE.sub(lambda match: rng.choice(match[1].split("/")), sentence)


def _fix_article(match: re.Match[str]) -> str:
    """Turns `a~word` into "a word" or "an word", keeping the capital."""
    word = match[2].lower()
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "one", "eu"))
    return match[1] + ("n " if vowel or word.startswith(("hour", "honest")) else " ") + match[2]


def polish(text: str) -> str:
    """Settles articles and sentence capitals."""
    return _SENTENCE.sub(lambda match: match[0].upper(), _ARTICLE.sub(_fix_article, text))


def fill(rng: Rng, pattern: Pattern, slots: Slots) -> str:
    """Expands a pattern, fills its slots, and the slots of what was filled in, and polishes the result."""
    return polish(expand(rng, pattern).format_map(slots).format_map(slots))


def cap(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def series(items: Sequence[str]) -> str:
    """Two or more items as English joins them: "a, b and c"."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def bulleted(items: Sequence[str]) -> str:
    return "\n".join("- " + item for item in items)


def with_article(thing: str) -> str:
    """`thing` after the mark for an article, where it is something that can be counted."""
    return thing if thing in words.mass else "a~" + thing


def pronouns(prefix: str, she: bool) -> Slots:
    """The slots for the pronouns of one character, lower case and with a capital."""
    he, him, his = ("she", "her", "her") if she else ("he", "him", "his")
    forms = {"he": he, "him": him, "his": his, "self": him + "self"}
    slots = {prefix + name: form for name, form in forms.items()}
    return slots | {cap(prefix + "he"): cap(he), cap(prefix + "his"): cap(his)}


# Stories


def parse_steps(text: str) -> list[tuple[str, list[str]]]:
    """Mark and wordings of each step of a plot."""
    steps: list[tuple[str, list[str]]] = []
    for line in text.replace("\n  ", " ").strip().split("\n"):
        mark, wording = line[0], line[2:]
        if mark == "|":
            steps[-1][1].append(wording)
        else:
            steps.append((mark, [wording]))
    return steps


PLOTS = {name: plot | {"steps": parse_steps(plot["steps"])} for name, plot in words.plots.items()}


def name_for(rng: Rng, animal: bool = False, she: bool | None = None, taken: str = "") -> str:
    """A name that is not `taken`; without `she`, a girl's or a boy's at random."""
    she = rng.random() < 0.5 if she is None else she
    pool = (words.pet_she if she else words.pet_he) if animal else (words.girls if she else words.boys)
    name = rng.choice(pool)
    while name == taken:
        name = rng.choice(pool)
    return name


def cast(rng: Rng, animal: bool = False) -> Slots:
    """Characters and things of a story, of animals or of children: all that must stay the same throughout it."""
    she = rng.random() < 0.5
    slots = {"n": name_for(rng, animal, she)} | pronouns("", she)
    # The friend mostly has the other pronoun, so that it is clear who is meant.
    friend_she = she if rng.random() < 0.15 else not she
    slots["o"] = slots["O"] = name_for(rng, animal, friend_she, slots["n"])
    slots |= pronouns("o", friend_she)
    if animal:
        slots["k"], slots["ok"] = rng.sample(words.story_animals, 2)
    else:
        slots["k"], slots["ok"] = "girl" if she else "boy", "girl" if friend_she else "boy"
    elder, pronoun = rng.choice(words.elders_animal if animal else words.elders_child)
    slots |= {"e": elder, "E": cap(elder)} | pronouns("e", pronoun == "she")
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


def set_time(rng: Rng, slots: Slots) -> None:
    """Season (where `slots` have none yet), part of the day and the phrases that name them."""
    slots["season"] = slots.get("season") or rng.choice(tuple(words.season_adj))
    slots["part"] = rng.choice(("morning", "morning", "day", "afternoon"))
    slots["sadj"] = rng.choice(words.season_adj[slots["season"]])
    slots["time"] = expand(rng, words.times).format_map(slots)
    slots["O1"] = rng.choice(words.night_noises)


@dataclass(frozen=True)
class Story:
    """A finished story: its title, who and what it is about, and patterns of requests for it."""

    title: str
    text: str
    slots: Slots
    requests: list[str]


def set_job(rng: Rng, slots: Slots) -> None:
    """Makes the hero a grown-up with a job, who is called by it ("the farmer"), and the friend a child."""
    slots["k"] = rng.choice(words.story_jobs)
    slots["n"] = "the " + slots["k"]
    friend_she = slots["ohe"] == "she"
    slots["ok"] = "girl" if friend_she else "boy"
    slots["o"] = name_for(rng, False, friend_she)


def story_start(rng: Rng, plot_name: str, slots: Slots) -> list[str]:
    """The sentences before the plot; settles how the plot names its time (slot `T`)."""
    slots["T"] = f"{slots['time']},"
    if plot_name == "worker":
        return []
    quick = rng.random() < 0.35 and plot_name != "dark"
    parts = [expand(rng, words.quick_openings if quick else words.openings)]
    if quick:
        slots["T"] = f"That {slots['part']},"
        if rng.random() < 0.3:
            parts.append(expand(rng, words.season_weather[slots["season"]]))
    if rng.random() < 0.6:
        about = expand(rng, words.about_hero)
        while "{o}" in about and "strangers" in PLOTS[plot_name]:
            about = expand(rng, words.about_hero)
        parts.append(about)
    return parts


def story_end(rng: Rng, indoors: bool, so_far: str) -> str:
    """A closing that fits: of a friend who came, told to an elder who was not there, with a way home from outside."""
    while True:
        closing = expand(rng, words.closings)
        lacks_friend = "{o}" in closing and "{o}" not in so_far
        has_elder = "{e}" in closing and ("{e}" in so_far or "{E}" in so_far)
        is_home = (" home" in closing or "lived happily" in closing) and indoors
        if not (lacks_friend or has_elder or is_home):
            return closing


def make_story(rng: Rng) -> Story:
    """Puts one story together: opening, plot, closing, and sometimes a lesson."""
    slots = cast(rng, animal=rng.random() < 0.5)
    plot_name, plot = rng.choice(tuple(PLOTS.items()))
    if plot_name == "worker":
        set_job(rng, slots)
    for key, values in plot["slots"].items():
        slots[key] = rng.choice(values)
    set_time(rng, slots)
    set_material(rng, slots)
    parts = story_start(rng, plot_name, slots)
    split = rng.random() < 0.6
    for mark, wordings in plot["steps"]:
        if mark == "?" and rng.random() < 0.5:
            continue
        parts.append(("\n\n" if split and mark == "+" else "") + expand(rng, wordings))
    if rng.random() < 0.6:
        ending = story_end(rng, "indoors" in plot, " ".join(parts))
        parts.append(("\n\n" if split and rng.random() < 0.3 else "") + ending)
    if rng.random() < 0.3:
        parts.append(expand(rng, plot["lessons"]))
    text = polish(" ".join(parts).format_map(slots).replace(" \n", "\n"))
    in_title = slots | {"K": slots["k"].title(), "Thing": slots["thing"].title()}
    title = fill(rng, plot.get("titles", words.titles), in_title)
    return Story(title, text, slots, plot.get("requests", words.requests))


def story_document(rng: Rng) -> Document:
    """A little story, sometimes under a title."""
    story = make_story(rng)
    return Document(f"{story.title}\n\n{story.text}" if rng.random() < 0.15 else story.text)


# Facts: every relation can be stated, asked and answered


@dataclass(frozen=True)
class Relation:
    """A table of facts with patterns to state them, to ask for them and to check them; words.toml explains the rest."""

    table: Sequence[Slots]
    say: Sequence[str]
    ask: Sequence[str]
    short: str
    check: Sequence[str] = ()
    differ: str = "b"
    in_paragraphs: bool = True
    always_short: bool = False


def as_slots(rows: Sequence[tuple[str, ...]]) -> list[Slots]:
    """Rows as slots `a`, `b` and `c` (`A` is `a` with a capital)."""
    return [dict(zip("abc", row, strict=False)) | {"A": cap(row[0])} for row in rows]


HEAD, *ANIMALS = words.animals
ANIMAL_ROWS: list[Slots] = [dict(zip(HEAD, row, strict=True)) for row in ANIMALS]
# Animals with a sound, which is also written as after "it": moos, hisses.
LOUD_ROWS = [
    row | {"sounds": row["sound"] + ("es" if row["sound"].endswith(("s", "sh", "ch", "x")) else "s")}
    for row in ANIMAL_ROWS
    if row["sound"] != "-"
]
TABLES: dict[str, list[Slots]] = {
    "animals": ANIMAL_ROWS,
    "sounds": LOUD_ROWS,
    "days": [{"a": day, "b": words.days[(i + 1) % 7]} for i, day in enumerate(words.days)],
    "months": [
        {"a": month, "b": words.months[(i + 1) % 12], "o": words.ordinals[i]} for i, month in enumerate(words.months)
    ],
    "kinds": as_slots(
        [(with_article(thing), kind) for name, kind in words.kind_of.items() for thing in words.categories[name]]
    ),
}
RELATIONS = {
    name: Relation(**{**content, "table": TABLES.get(content["table"]) or as_slots(getattr(words, content["table"]))})
    for name, content in words.relations.items()
}
# Larger tables are asked about more often.
RELATION_WEIGHTS = {name: max(1.0, min(len(relation.table), 45) / 10) for name, relation in RELATIONS.items()}
IN_PARAGRAPHS = [relation for relation in RELATIONS.values() if relation.in_paragraphs]
PROPER = frozenset(
    ["I", *words.days, *words.months, *(part for row in words.capitals for name in row for part in name.split())]
)


def lower_first(text: str) -> str:
    """`text` with a small first letter, unless it starts with a name."""
    return text if text.split(" ")[0].rstrip(".,") in PROPER else text[:1].lower() + text[1:]


def ask_fact(rng: Rng) -> Pair:
    """A question about one fact, with a long or a short answer, or as a yes/no question."""
    relation = RELATIONS[pick(rng, RELATION_WEIGHTS)]
    row = rng.choice(relation.table)
    if relation.check and rng.random() < 0.25:
        yes = rng.random() < 0.5
        other = row if yes else rng.choice(relation.table)
        if yes or other[relation.differ] != row[relation.differ]:
            asked = fill(rng, relation.check, row | {relation.differ: other[relation.differ]})
            return asked, f"{'Yes' if yes else 'No'}, {lower_first(fill(rng, relation.say, row))}"
    answer = fill(rng, relation.say if rng.random() < 0.65 else relation.short, row)
    if answer.startswith('"') or relation.always_short:
        answer = fill(rng, relation.short, row)
    return fill(rng, relation.ask, row), answer


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
    question = expand(rng, words.sum_questions).format(a=a, b=b, sign=sign_word)
    return question, cap(f"{a} {sign_word} {b} is {c}.")


def ask_story_sum(rng: Rng) -> Pair:
    """A sum in a small everyday scene."""
    she, number = rng.random() < 0.5, words.numbers
    name, (one, many) = name_for(rng, False, she), rng.choice(words.foods)
    start = rng.randint(2, 10)
    if rng.random() < 0.5:
        change = rng.randint(1, 10)
        total, verb, what = start + change, rng.choice(words.gains), "more"
    else:
        change = rng.randint(1, start - 1)
        total, verb, what = start - change, rng.choice(words.losses), "of them"
    middle = f"{'She' if she else 'He'} {verb} {number[change]} {what}."
    count = f"{number[total]} {one if total == 1 else many}"
    question = f"{name} has {number[start]} {many}. {middle} How many {many} does {name} have now?"
    return question, rng.choice((f"{name} has {count} now.", f"{name} now has {count}."))


def ask_compare(rng: Rng) -> Pair:
    """A comparison of two things or two numbers."""
    scale = words.comparisons[pick(rng, {i: scale["weight"] for i, scale in enumerate(words.comparisons)})]
    order = scale["order"]
    low, high = (order[i] for i in sorted(rng.sample(range(len(order)), 2)))
    first, second = rng.sample((low, high), 2)
    word, right, wrong = (scale["more"], high, low) if rng.random() < 0.5 else (scale["less"], low, high)
    return polish(f"Which is {word}, {first} or {second}?"), polish(cap(f"{right} is {word} than {wrong}."))


def animal_paragraph(rng: Rng) -> str:
    """A paragraph about one animal, in a mixed order of facts."""
    row = rng.choice(LOUD_ROWS)
    plural, singular = words.animal_paragraphs
    patterns = plural if rng.random() < 0.5 else singular
    first = fill(rng, patterns["first"], row)
    return " ".join([first] + [fill(rng, fact, row) for fact in rng.sample(patterns["facts"], rng.randint(3, 6))])


def topic_paragraph(rng: Rng) -> str:
    """Several facts from one table."""
    relation = rng.choice(IN_PARAGRAPHS)
    rows = rng.sample(relation.table, min(len(relation.table), rng.randint(3, 6)))
    return " ".join(fill(rng, relation.say, row) for row in rows)


def mixed_paragraph(rng: Rng) -> str:
    """Facts from several tables."""
    relations = rng.sample(IN_PARAGRAPHS, rng.randint(3, 5))
    return " ".join(fill(rng, relation.say, rng.choice(relation.table)) for relation in relations)


def plain_paragraph(rng: Rng) -> str:
    """A few sums in words, or the parts of a category and the forms of an adjective."""
    if rng.random() < 0.5:
        sums = [answer for _, answer in several(rng, ask_sum, (0, 0, 1, 1, 1, 1))]
        signs = str.maketrans({"-": "minus", "+": "plus", "=": "is"})
        return " ".join(s if s.endswith(".") else s.translate(signs) + "." for s in sums)
    name, members = rng.choice(tuple(words.categories.items()))
    things = polish(series([with_article(m) for m in rng.sample(members, rng.randint(3, 5))]))
    word, bigger, biggest = rng.choice(words.comparatives)
    return f'{cap(things)} are {name}. We say "{word}", "{bigger}" and "{biggest}".'


paragraph = any_of({animal_paragraph: 4, topic_paragraph: 3, mixed_paragraph: 2, plain_paragraph: 1})


def fact_document(rng: Rng) -> Document:
    """A short expository paragraph."""
    return Document(paragraph(rng))


# Lists


def shopping_list(rng: Rng) -> Pair:
    """A shopping list and its heading."""
    heading = fill(rng, words.shopping_headings, {"day": rng.choice(words.days), "n": name_for(rng)})
    return heading, bulleted(rng.sample(words.goods, rng.randint(3, 7)))


def packing_list(rng: Rng) -> Pair:
    """A packing list and its heading."""
    trip = rng.choice(words.trips)
    heading = fill(rng, words.packing_headings, {"trip": trip, "on": "for" if "night" in trip else "on"})
    return heading, bulleted(rng.sample(words.pack, rng.randint(4, 7)))


def steps_list(rng: Rng) -> Pair:
    """Numbered steps for doing something."""
    title, steps = rng.choice(tuple(words.steps.items()))
    return f"How to {title}", numbered(steps)


def category_list(rng: Rng) -> Pair:
    """Things of one category."""
    name, members = rng.choice(tuple(words.categories.items()))
    count = rng.randint(3, 6)
    heading = rng.choice((cap(name), f"{cap(words.numbers[count])} {name}", f"A list of {name}"))
    layout = numbered if rng.random() < 0.5 else bulleted
    return heading, layout(rng.sample(members, count))


def plan_list(rng: Rng) -> Pair:
    """What someone will do on the days of a week."""
    name, start, count = name_for(rng), rng.randrange(7), rng.randint(3, 5)
    slots = cast(rng)
    slots["place"] = rng.choice(words.plan_places)
    plans = rng.sample(words.plans, count)
    lines = [f"{words.days[(start + i) % 7]}: {plan.format_map(slots)}" for i, plan in enumerate(plans)]
    return f"{name}'s plan for the week", "\n".join(lines)


first_list = any_of({shopping_list: 5, packing_list: 4, steps_list: 1, category_list: 3, plan_list: 3})
second_list = any_of({shopping_list: 4, packing_list: 4, steps_list: 2, category_list: 3, plan_list: 3})


def list_document(rng: Rng) -> Document:
    """One list or two, each under its heading."""
    lists = [first_list(rng)]
    if rng.random() < 0.3:
        lists.append(second_list(rng))
    return Document("\n\n".join(f"{heading}:\n{body}" for heading, body in lists))


# Questions with answers


def passage(rng: Rng) -> tuple[str, list[Pair]]:
    """A small passage and two to four questions about it."""
    pattern, questions = rng.choice(words.passages).values()
    slots = cast(rng)
    set_time(rng, slots)
    slots["thing"], slots["spot"] = rng.choice(words.passage_things), rng.choice(words.spots)
    slots["num"], slots["day"] = rng.choice(words.numbers[3:13]), rng.choice(words.days)
    slots["job"], slots["does"] = rng.choice(words.jobs)
    slots["mat2"], slots["mat"] = rng.choice(words.material_nouns), rng.choice(words.materials)
    slots["why"], slots["whynot"] = rng.choice(words.why), rng.choice(words.whynot)
    if pattern.startswith("The {ok}"):  # the friend is a pet
        slots["ok"], slots["o"] = rng.choice(words.story_animals), name_for(rng, animal=True)
    chosen = rng.sample(questions, rng.randint(2, len(questions)))
    return fill(rng, pattern, slots), [(fill(rng, q, slots), fill(rng, a, slots)) for q, a in chosen]


question = any_of({ask_fact: 10, ask_sum: 3, ask_story_sum: 2.5, ask_compare: 1.5})


def several(rng: Rng, maker: Callable[[Rng], Pair], weights: tuple[int, ...]) -> list[Pair]:
    """One to `len(weights)` pairs, no question twice."""
    n = rng.choices(range(1, len(weights) + 1), weights)[0]
    answers: dict[str, str] = {}
    while len(answers) < n:
        answers.update([maker(rng)])
    return list(answers.items())


def qa_document(rng: Rng) -> Document:
    """Questions with answers, alone or about a passage."""
    if rng.random() < 0.35:
        text, items = passage(rng)
        text += "\n\n"
    else:
        text, items = "", several(rng, question, (2, 3, 3, 2))
    return Document(text + "\n\n".join(f"Question: {q}\nAnswer: {a}" for q, a in items))


# Instructions with results


def do_sentence(rng: Rng) -> Pair:
    """Write a sentence about an animal or a thing."""
    slots = cast(rng)
    set_time(rng, slots)
    slots |= {"spot": rng.choice(words.spots), "day": rng.choice(words.days)}
    if rng.random() < 0.5:
        row = rng.choice([r for r in ANIMAL_ROWS if r["name"] in words.story_animals])
        slots |= {"x": row["name"], "young": row["young"]}
        result = fill(rng, words.animal_does, slots)
    else:
        slots["x"] = rng.choice(words.passage_things)
        result = fill(rng, words.thing_does, slots)
    return fill(rng, words.sentence_tasks, slots), result


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
    kind = rng.choice(words.word_tasks)
    word, *forms = rng.choice(getattr(words, kind["table"]))
    ask = expand(rng, kind["ask"]) if len(kind["ask"]) > 1 else kind["ask"][0]
    return ask.format(a=word), cap(", ".join(forms))


SIMPLE_WORDS = sorted({w for members in words.categories.values() for w in members if " " not in w and "-" not in w})


def do_letters(rng: Rng) -> Pair:
    """Small tasks with the form of words."""
    kind, word = rng.randrange(5), rng.choice(SIMPLE_WORDS)
    if kind == 0:
        picked = rng.sample(SIMPLE_WORDS, rng.randint(3, 4))
        return f"Put these words in alphabetical order: {', '.join(picked)}.", ", ".join(sorted(picked))
    if kind == 1:
        return f'Write the word "{word}" in capital letters.', word.upper()
    if kind == 2:
        n, times = rng.choice(((2, "twice"), (3, "three times"), (4, "four times")))
        return f'Repeat the word "{word}" {times}.', " ".join([word] * n)
    if kind == 3:
        return f'What is the first letter of the word "{word}"?', word[0].upper()
    picked = rng.sample(SIMPLE_WORDS, rng.randint(3, 6))
    return f"Count these words: {', '.join(picked)}.", f"There are {words.numbers[len(picked)]} words."


def do_count(rng: Rng) -> Pair:
    """Count the words of a sentence, or count up or down."""
    if rng.random() < 0.5:
        sentence = do_sentence(rng)[1]
        count = f"There are {len(sentence.split())} words in the sentence."
        return f'Count the words in this sentence: "{sentence}"', count
    start, length = rng.randint(1, 12), rng.randint(3, 7)
    values = [str(v) for v in range(start, start + length)]
    if rng.random() < 0.5:
        return f"Count from {values[0]} to {values[-1]}.", ", ".join(values)
    return f"Count down from {values[-1]} to {values[0]}.", ", ".join(reversed(values))


def do_finish(rng: Rng) -> Pair:
    """Finish a sentence."""
    start, endings = rng.choice(tuple(words.endings.items()))
    slots = cast(rng) | {"num": rng.choice(words.numbers[3:13]), "one_food": rng.choice(words.foods)[0]}
    return f"Finish the sentence: {start}", f"{start} {lower_first(fill(rng, endings, slots))}"


def do_describe(rng: Rng) -> Pair:
    """Describe an animal."""
    row = rng.choice(ANIMAL_ROWS)
    facts = [fill(rng, fact, row) for fact in rng.sample(words.describe_facts, rng.randint(1, 3))]
    first = fill(rng, words.describe_first, row)
    return fill(rng, words.describe_tasks, row), " ".join([first] + facts)


def do_story(rng: Rng) -> Pair:
    """Write a short story about a hero and a thing."""
    story = make_story(rng)
    return fill(rng, story.requests, story.slots), story.text


def do_how(rng: Rng) -> Pair:
    """Explain how to do something."""
    title, steps = rng.choice(tuple(words.steps.items()))
    ask = fill(rng, words.how_tasks, {"title": title})
    if rng.random() < 0.5:
        return ask, numbered(steps)
    first, *middle, last = (lower_first(s) for s in steps)
    sentences = [cap(m) if i % 2 else f"Then {m}" for i, m in enumerate(middle)]
    return ask, " ".join([f"First, {first}", *sentences, f"At the end, {last}"])


def do_odd(rng: Rng) -> Pair:
    """Find the word that does not belong."""
    name, other = rng.sample(words.odd_categories, 2)
    members = words.categories[name]
    same = rng.sample(members, 3)
    odd = rng.choice([word for word in words.categories[other] if word not in members])
    ask = f"Which word does not belong: {', '.join(rng.sample([*same, odd], 4))}?"
    return ask, f"{cap(odd)} does not belong. The other words are {name}."


def do_make_list(rng: Rng) -> Pair:
    """Write a shopping or packing list."""
    if rng.random() < 0.5:
        heading, body = shopping_list(rng)
        return "Write a shopping list.", f"{heading}:\n{body}"
    trip = rng.choice(words.trips)
    return f"Write a packing list for {trip}.", bulleted(rng.sample(words.pack, rng.randint(4, 6)))


task = any_of(
    {
        do_sentence: 4,
        do_list: 3,
        do_word: 3,
        do_letters: 4,
        do_count: 2,
        do_finish: 2,
        do_describe: 3,
        do_story: 3,
        do_how: 1,
        do_odd: 1.5,
        do_make_list: 2,
    }
)


def instruction_document(rng: Rng) -> Document:
    """One instruction with a long result, or a few with short ones."""
    first = task(rng)
    items = [first]
    if len(first[1]) < 120 and rng.random() < 0.75:
        items += [i for i in several(rng, task, (3, 2)) if i[0] != first[0] and len(i[1]) < 160]
    return Document("\n\n".join(f"Instruction: {a}\nResult: {b}" for a, b in items))


# Chats


def ask_passage(rng: Rng) -> Pair:
    """A passage with one question."""
    text, items = passage(rng)
    return f"{text}\n\n{items[0][0]}", items[0][1]


turn = any_of({question: 50, task: 35, ask_passage: 15})


def animal_talk(rng: Rng) -> list[Pair]:
    """Two or three questions about one animal; the later ones say "it"."""
    row = rng.choice(LOUD_ROWS)
    first = (fill(rng, words.animal_questions, row), fill(rng, words.animal_answers, row))
    later = rng.sample(words.animal_turns, rng.randint(1, 2))
    return [first] + [(fill(rng, pair["ask"], row), fill(rng, pair["answer"], row)) for pair in later]


def chat_document(rng: Rng) -> Document:
    """A dialog of one to three turns, sometimes with a greeting or thanks."""
    kind = rng.random()
    if kind < 0.2:
        turns = animal_talk(rng)
    elif kind < 0.4:
        turns = [do_story(rng)]
    else:
        turns = [turn(rng) for _ in range(pick(rng, {1: 3, 2: 4, 3: 3}))]
    while len(turns) > 1 and sum(len(q.split()) + len(a.split()) for q, a in turns) > 170:
        turns.pop()
    if len(turns) < 3 and rng.random() < 0.12:
        name = name_for(rng)
        hello = expand(rng, words.hellos).format(n=name)
        greeting = f"Hello, {name}!" if name in hello else "Hello!"
        turns.insert(0, (hello, f"{greeting} {rng.choice(words.offers)}"))
    if len(turns) < 3 and rng.random() < 0.12:
        turns.append((rng.choice(words.thanks), rng.choice(words.welcomes)))
    return Document("", tuple(pair for user, reply in turns for pair in (("user", user), ("assistant", reply))))


# The corpus

KINDS: dict[str, Callable[[Rng], Document]] = {
    "story": story_document,
    "fact": fact_document,
    "list": list_document,
    "qa": qa_document,
    "instruction": instruction_document,
    "chat": chat_document,
}
# Shares of the kinds, by documents; a story is three times as long as the rest.
Mix = dict[str, float]
BALANCED: Mix = {"story": 0.40, "fact": 0.12, "list": 0.08, "qa": 0.15, "instruction": 0.10, "chat": 0.15}
QUESTIONS: Mix = {"story": 0.12, "fact": 0.10, "list": 0.05, "qa": 0.33, "instruction": 0.15, "chat": 0.25}

SAMPLE_PROMPTS: tuple[str, ...] = tuple(words.sample_prompts)


def document(rng: Rng, mix: Mix = BALANCED) -> Document:
    """One random document; a pure function of the state of `rng`."""
    return KINDS[pick(rng, mix)](rng)


def records(n: int, seed: int) -> list[dict[str, str]]:
    """`n` different tasks of this world as Alpaca's records: instruction, input (for a third), output."""
    rng = random.Random(f"records-{seed}")
    answers: dict[Pair, str] = {}
    while len(answers) < n:
        kind = rng.randrange(3)
        text, items = passage(rng) if kind == 0 else ("", [question(rng) if kind == 1 else task(rng)])
        asked, answer = items[0]
        answers[asked, text] = answer
    return [{"instruction": asked, "input": text, "output": answer} for (asked, text), answer in answers.items()]


@dataclass(frozen=True)
class Options(cli.Options):
    """Print documents of the embedded model's world."""

    n: int = option(10, "number of documents", least=1)
    seed: int = option(1, "seed of the random numbers", **cli.SEEDS)
    records: bool = option(False, "instructions with answers instead, as JSON")


def main(options: Options) -> None:
    if options.records:
        print(json.dumps(records(options.n, options.seed), indent=1))
        return
    rng = random.Random(options.seed)
    for _ in range(options.n):
        doc = document(rng)
        print(doc.text or "\n".join(f"<{role}> {content}" for role, content in doc.dialog))
        print("-" * 60)


if __name__ == "__main__":
    cli.run(main)
