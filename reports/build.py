"""Documents from measured rows.

    python -m reports.build readme    # the tables of README.md, docs/results.md and data/tiny/README.md, and the charts
    python -m reports.build page      # all that was measured: reports/index.html, which needs no network

A document shows the tables of NAME between the lines `<!-- begin: NAME -->` and `<!-- end -->`; what stands there is
replaced, all else is left alone. The same rows give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Row, read_folder
from llama import cli
from llama.cli import option
from llama.errors import InputError
from reports import page as results_page
from reports import tables
from reports.cells import Table
from reports.charts import CHARTS
from reports.render import markdown, save_svg, write

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES, PAGE = (ROOT / "reports" / name for name in ("results", "figures", "index.html"))
DOCUMENTS = ("README.md", "docs/results.md", "data/tiny/README.md")
PART = re.compile(r"(<!-- begin: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def in_short(name: str, make: Callable[[Sequence[Row]], list[Table]]) -> Callable[[Sequence[Row]], list[Table]]:
    """The table of this name for the setting measured last: README stays short, however many devices were measured."""

    def last(rows: Sequence[Row]) -> list[Table]:
        found = [table for table in make(rows) if table.name == name]
        return sorted(found, key=lambda table: max(row.data["time"] for row in table.rows))[-1:]

    return last


# What each part of a document shows: the experiment, and the tables made from its rows.
PARTS: dict[str, tuple[str, Callable[[Sequence[Row]], list[Table]]]] = {
    "table-1": ("inference", tables.table_1),
    "table-1-short": ("inference", in_short("table-1", tables.table_1)),
    "generation": ("inference", tables.generation_details),
    "formats": ("formats", tables.generation_details),
    "table-2": ("benchmark_finetuning", tables.table_2),
    "table-3": ("benchmark_finetuning", tables.table_3),
    "table-3-short": ("benchmark_finetuning", in_short("table-3", tables.table_3)),
    "steps": ("benchmark_finetuning", tables.step_details),
    "estimates": ("estimates", tables.estimates),
    "learning": ("finetuning", tables.learning),
    "answers": ("finetuning", tables.answers),
    "loading": ("loading", tables.loading),
    "ladder": ("ladder", tables.ladder),
    "drafts": ("ladder", tables.drafts),
    "kernels": ("kernels", tables.kernels),
    "pruning-quality": ("pruning", tables.pruning_quality),
    "pruning-speed": ("pruning", tables.pruning_speed),
    "embedded": ("tiny", tables.embedded),
}


@dataclass(frozen=True)
class ReadmeOptions(cli.Options):
    """Draw the charts and fill the tables of README.md, docs/results.md and data/tiny/README.md from measured rows."""

    results: str | None = option(None, "folder of measured rows; default: reports/results")


def readme(options: ReadmeOptions) -> None:
    """Draw the charts, and fill the parts of every document."""
    rows = read_folder(Path(options.results) if options.results is not None else RESULTS)
    for experiment, draw in CHARTS.items():
        for name, figure in draw(rows.get(experiment, [])).items():
            save_svg(figure, FIGURES / f"{name}.svg")
    for name in DOCUMENTS:
        path = ROOT / name
        write(path, filled(path.read_text(encoding="utf-8"), rows).encode())
        print(path)


def filled(document: str, rows: dict[str, list[Row]]) -> str:
    """A document with each of its parts made anew. Raises InputError for a part of no known name."""

    def part(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in PARTS:
            raise InputError(f"<!-- begin: {name} -->: no such part; known are {', '.join(PARTS)}")
        experiment, make = PARTS[name]
        shown = markdown(make(rows.get(experiment, []))) or "Not measured yet.\n"
        return f"{begin}\n{shown}\n{end}"

    return PART.sub(part, document)


@dataclass(frozen=True)
class PageOptions(cli.Options):
    """Make the results page from measured rows."""

    results: str | None = option(None, "folder of measured rows; default: reports/results")
    page: str | None = option(None, "file to write; default: reports/index.html")


def page(options: PageOptions) -> None:
    rows = read_folder(Path(options.results) if options.results is not None else RESULTS)
    path = Path(options.page) if options.page is not None else PAGE
    write(path, results_page.render(rows).encode())
    print(f"{sum(map(len, rows.values()))} rows of {len(rows)} experiments in {path}")


COMMANDS = {"readme": readme, "page": page}

if __name__ == "__main__":
    cli.run(COMMANDS)
