"""A table as Markdown, as HTML and for Typst, all with the same texts; and a chart as SVG."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row
from llama.errors import EnvironmentFailure
from reports.cells import OUT_OF_MEMORY, Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
REPEATED = ("runtime_s", "step_s", "run_s", "load_s", "tpot_s", "forward_s")  # what a cell is repeated for


@dataclass(frozen=True)
class Provenance:
    """On what, when and by which commands rows were measured."""

    where: str
    when: str
    commands: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Provenance:
        dtypes: dict[str, dict[str, None]] = {}
        for row in rows:
            dtypes.setdefault(row.setting, {})[row.data["dtype"]] = None
        settings = "; ".join(f"{place}, {' and '.join(names)}" for place, names in dtypes.items())
        runs = sorted({row.metrics[name]["n"] for row in rows for name in REPEATED if name in row.metrics})
        limits = sorted({row.cell["memory_limit_gb"] for row in rows if row.cell.get("memory_limit_gb")})
        held = "".join(f", held to {limit:g} GB" for limit in limits)
        what = "steps" if any(row.has("step_s") for row in rows) else "runs"
        counts = f"; medians (least to most) of {_span(runs)} {what}" if runs and runs[-1] > 1 else ""
        days, commits = ({row.data[name][:12]: None for row in rows} for name in ("time", "commit"))
        when = f"{_span(sorted({day[:10] for day in days}))}, commit {', '.join(commits)}"
        return cls(f"{settings}{held}{counts}", when, tuple(dict.fromkeys(row.data["command"] for row in rows)))


def _span(values: Sequence[Any]) -> str:
    return " to ".join(str(value) for value in dict.fromkeys((values[0], values[-1])))


def parts(cell: Cell) -> tuple[Any, ...]:
    """The texts and figures of a cell."""
    return cell if isinstance(cell, tuple) else (cell,)


def text(cell: Cell) -> str:
    return "".join(map(str, parts(cell)))


def with_provenance(tables: Sequence[Table]) -> list[tuple[Table, Provenance | None]]:
    """Each table with the provenance of its rows; None where the next one has the same, which then says so for both."""
    found = [Provenance.of(table.rows) if table.rows else None for table in tables]
    after = iter([*found[1:], None])
    return [(table, None if own == next(after) else own) for table, own in zip(tables, found, strict=True)]


def markdown(tables: Sequence[Table]) -> str:
    """Tables under each other, each with its title, its notes and the setting that it was measured in."""
    paragraphs = []
    for table, about in with_provenance(tables):
        lines = [table.head, ["---:" if is_numeric else "---" for is_numeric in table.numeric], *table.body]
        grid = "\n".join(f"| {' | '.join(_escaped(text(cell)) for cell in line)} |" for line in lines)
        paragraphs += [f"**{_escaped(table.title)}**", grid, *(_escaped(text(note)) for note in table.note)]
        if about is not None:
            has_lost = any(cell == OUT_OF_MEMORY for line in table.body for cell in line)
            paragraphs.append(_escaped(about.where) + ("; x: out of memory." if has_lost else "."))
    return "\n\n".join(paragraphs) + "\n" if paragraphs else ""


def _escaped(words: str) -> str:
    """Text that stays text in a cell of Markdown: no new cell, line, element or link."""
    return re.sub(r"([|\\])|(?<=\])\(", r"\\\g<0>", " ".join(words.split())).replace("&", "&amp;").replace("<", "&lt;")


def html(tables: Sequence[Table]) -> Markup:
    """Tables whose figures are <data> elements that name the file, the line and the field they stand in."""
    return template("tables.html", shown=with_provenance(tables))


def template(file: str, /, **shown: Any) -> Markup:
    """A template of reports/templates with what it shows; text is escaped there."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters["parts"] = parts
    return Markup(environment.get_template(file).render(**shown))


def typst(table: Table) -> dict[str, Any]:
    """A table as plain texts, for Typst's own json()."""
    about = Provenance.of(table.rows) if table.rows else Provenance("", "", ())
    return {
        "title": table.title,
        "head": list(table.head),
        "rows": [[text(cell) for cell in line] for line in table.body],
        "numeric": table.numeric,
        "note": [text(note) for note in table.note],
        "about": {**vars(about), "commands": list(about.commands)},
    }


def svg(figure: Figure) -> str:
    """A chart, its words as text rather than outlines; the same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "llama", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plain = re.sub(r"(?s)^.*?(?=<svg)| *<metadata>.*?</metadata>\n", "", text.getvalue())
    plain = re.sub(r'<g id="(?![^"]*tick_)[^"]*">', "<g>", plain)  # a tick tells that its number was not measured
    plain = re.sub(r"(?m)^ +| transform=\"rotate\(-0 [^\"]*\"", "", plain)
    places = re.compile(r"(?<=\.\d\d)\d+")  # a hundredth of a point is enough; words are outside of tags
    return re.sub(r"<[^>]*>", lambda tag: places.sub("", tag[0]), plain)


def save_svg(figure: Figure, path: Path) -> None:
    write(path, svg(figure).encode())


def write(path: Path, content: bytes) -> None:
    """The whole file or the old one, never half of it. Raises EnvironmentFailure where it cannot be written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise EnvironmentFailure(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
