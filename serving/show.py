"""What the page shows, as HTML: columns of a comparison, a chart, tokens with what was likely. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llama import Tokenizer
from llama import device as devices
from serving.room import Marked, Side

STYLE = Path(__file__).with_name("page.css")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 180, 44, 22  # of the chart, in its own units


def visible(tokenizer: Tokenizer, token: int) -> str:
    """A token's text with its line feeds visible, or its bytes in hexadecimal where they are no text on their own."""
    data = tokenizer.token_bytes(token)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return escape(data.hex(" "))
    return escape(text).replace("\n", "\u21b5").replace("\t", "\u21e5")


def note(text: str) -> str:
    """A line that says what happened, or what was wrong."""
    return f'<p class="note" role="status">{escape(text)}</p>' if text else ""


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What the tokenizer makes of a text: each token with its number."""
    chips = "".join(f'<span class="chip"><b>{visible(tokenizer, i)}</b><i>{i}</i></span>' for i in ids)
    return f'<p class="count">{len(ids)} tokens</p><div class="chips">{chips}</div>'


def likely(tokenizer: Tokenizer, found: Sequence[Marked]) -> str:
    """Generated tokens, each with the likeliest at its place; tokens of a draft in colour."""
    cards = []
    for one in found:
        cards += [
            f'<div class="card rejected"><s>{visible(tokenizer, token)}</s><small>rejected</small></div>'
            for token in one.rejected[:1]
        ]
        rows = "".join(
            f'<tr class="{"taken" if token == one.piece.token else ""}"><td>{visible(tokenizer, token)}</td>'
            f'<td class="bar" style="--p:{math.exp(value):.3f}">{math.exp(value):.1%}</td></tr>'
            for token, value in one.piece.likeliest
        )
        kind = "accepted" if one.is_accepted else "own"
        cards.append(
            f'<div class="card {kind}"><b>{visible(tokenizer, one.piece.token)}</b><table>{rows}</table></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def column(side: Side, found: Sequence[Marked], n_prompt: int, first: int | None) -> str:
    """One side of a comparison so far. first: the number of the first token that differs from the other side's."""
    seconds = [one.piece.seconds for one in found]
    values = {"tokens": f"{len(found)}"}
    if found:  # before, the form of the model may not be there
        weights, rest = side.memory(n_prompt + len(found))
        values |= {"tokens/s": f"{len(found) / sum(seconds):.1f}", "first token": f"{1000 * seconds[0]:.0f} ms"}
        values |= {"weights": megabytes(weights), "cache" if side.use_cache else "activations": megabytes(rest)}
    if side.draft is not None:
        values["from the draft"] = f"{sum(one.is_accepted for one in found)}"
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())
    texts = [escape(one.piece.text) for one in found]
    text = "".join(f"<mark>{text}</mark>" if i == first else text for i, text in enumerate(texts)).lstrip(" ")
    return f'<section class="side"><h4>{escape(side.label)}</h4><dl>{facts}</dl><p class="text">{text}</p></section>'


def difference(
    tokenizer: Tokenizer, left: Sequence[Marked], right: Sequence[Marked], have_ended: bool
) -> tuple[int | None, str]:
    """The number of the first token that differs, None where there is none; and in words, with the margin."""
    pairs = list(zip(left, right, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a.piece.token != b.piece.token), None)
    if first is None and have_ended and len(left) != len(right):
        return None, f"equal for {len(pairs)} tokens, where one of them ends"
    if first is None:
        return None, f"equal{'' if have_ended else ' so far'}: {len(pairs)} tokens"
    a, b = (one.piece for one in pairs[first])
    names = [repr(tokenizer.decode([piece.token])) for piece in (a, b)]
    other = dict(a.likeliest).get(b.token)
    if other is None:
        margin = f"more than {a.logprob - a.likeliest[-1][1]:.2f} nats"
    else:
        margin = f"{a.logprob - other:.4f} nats"
    return first, f"first differ at token {first + 1}: {names[0]} against {names[1]}, margin on the left {margin}"


def chart(sides: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Time per token over position for each side, as lines; the first token, which reads the prompt, is left out."""
    lines = [[1000 * value for value in seconds[1:]] for _, seconds in sides]
    n = max(map(len, lines), default=0)
    if n < 2:
        return ""
    top = nice(sorted(value for line in lines for value in line)[-1 - sum(map(len, lines)) // 50])  # but for outliers
    x = lambda i: LEFT + (WIDTH - LEFT - 8) * i / (n - 1)  # noqa: E731
    y = lambda value: 8 + (HEIGHT - BOTTOM - 8) * (1 - min(value / top, 1))  # noqa: E731
    parts = []
    for value in (0, top / 2, top):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">2</text>')
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">token {n + 1}</text>')
    for number, line in enumerate(lines):
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(line))
        parts.append(f'<polyline class="line{number}" points="{points}"/>')
    legend = "".join(f'<span class="key line{i}">{escape(label)}</span>' for i, (label, _) in enumerate(sides))
    about = f"Milliseconds per token over position: {' and '.join(label for label, _ in sides)}"
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>ms per token, over position {legend}</figcaption>{drawn}</figure>'


def nice(value: float) -> float:
    """A round number that is not below a value: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * 0.999)


def megabytes(n_bytes: int) -> str:
    """As sizes are written here."""
    size = n_bytes / devices.MB
    return f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 2}f} MB"
