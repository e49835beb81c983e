"""Documents from measured rows.

    python -m reports.build readme    # the tables of README.md, docs/ and data/tiny/README.md, and the charts
    python -m reports.build page      # all that was measured: reports/index.html, which needs no network
    python -m reports.build pdf       # the three course reports: reports/phase_1.pdf, phase_2.pdf, phase_3.pdf
    python -m reports.build pdf --device=P100    # with the rows of another measured device

A document shows what a function of tables.py makes of an experiment's rows between the lines
`<!-- begin: EXPERIMENT FUNCTION -->` and `<!-- end -->`; what stands there is replaced, all else is left alone.
The same rows give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Row, read_folder
from llama import cli
from llama.cli import option
from llama.errors import InputError
from reports import page as results_page
from reports import pdf as course_reports
from reports.cells import Table
from reports.charts import CHARTS
from reports.render import markdown, save_svg, write
from reports.tables import TABLES

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES, PAGE = (ROOT / "reports" / name for name in ("results", "figures", "index.html"))
DOCUMENTS = ("README.md", "docs/results.md", "data/tiny/README.md", "docs/trust.md")
PART = re.compile(r"(<!-- begin: (\w+) (\w+)( in short)? -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class ReadmeOptions(cli.Options):
    """Draw the charts and fill the tables of README.md, docs/ and data/tiny/README.md from measured rows."""

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
    """A document with each of its parts made anew. Raises InputError for a table that no experiment has."""

    def part(match: re.Match[str]) -> str:
        begin, experiment, name, is_short, end = match.groups()
        make = next((make for make in TABLES.get(experiment, ()) if make.__name__ == name), None)
        if make is None:
            raise InputError(f"{begin.strip()}: there is no table {name} of {experiment}; correct it")
        found = make(rows.get(experiment, []))
        return f"{begin}\n{markdown(in_short(found) if is_short else found) or 'Not measured yet.'}\n{end}"

    return PART.sub(part, document)


def in_short(tables: Sequence[Table]) -> list[Table]:
    """The first table of the setting that was measured last: README stays short when more devices are measured."""
    first = [table for table in tables if table.name == tables[0].name]
    return sorted(first, key=lambda table: max(row.data["time"] for row in table.rows))[-1:]


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


@dataclass(frozen=True)
class PdfOptions(cli.Options):
    """Make the three course reports from measured rows."""

    device: str | None = option(None, "part of the name of a measured device; default: that of the newest Table 1")
    model: str = option("llama3.2-1b", "whose rows fill Tables 1 to 3; the folder's name for weights of your own")
    results: str | None = option(None, "folder of measured rows; default: reports/results")
    out_dir: str | None = option(None, "folder for the reports; default: reports")
    png: bool = option(False, "also each page as an image")


def pdf(options: PdfOptions) -> None:
    rows = read_folder(Path(options.results) if options.results is not None else RESULTS)
    target = Path(options.out_dir) if options.out_dir is not None else ROOT / "reports"
    shown = course_reports.gather(rows, options.device, options.model)
    for phase in course_reports.PHASES:
        write(target / f"{phase}.pdf", course_reports.build(phase, shown))
        for number, image in enumerate(course_reports.build(phase, shown, "png") if options.png else [], 1):
            write(target / f"{phase}-{number}.png", image)
        print(target / f"{phase}.pdf")
    print(f"rows of {shown['device']}; --device picks another")


COMMANDS = {"readme": readme, "page": page, "pdf": pdf}

if __name__ == "__main__":
    cli.run(COMMANDS)
