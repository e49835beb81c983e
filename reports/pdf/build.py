"""The three course reports as PDFs, from our own text and the measured rows.

    python -m reports.pdf.build                                  # reports/phase_1.pdf, phase_2.pdf, phase_3.pdf
    python -m reports.pdf.build --device=P100                    # with the rows of another measured device
    python -m reports.pdf.build --results=runs/rows --out_dir=runs/pdf

The text is in reports/phase_*.typ, in Typst. It holds no measured figure: tables, curves, figures in sentences and the
texts that models wrote come from the rows in reports/results, and what has no row there reads "not measured". The same
rows and sources give the same bytes. Left out: measuring; README.md has the command that fills each table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import rows as measured
from llama import cli
from llama.errors import EnvironmentFailure, InputError
from reports.pdf import content

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "reports"
PHASES = ("phase_1", "phase_2", "phase_3")
QUOTED = re.compile(r'#quoted\("([^"]+)", "([^"]+)"')  # (file, function) whose code a document shows


def main(
    *,
    device: str | None = None,
    model: str = "llama3.2-1b",
    results: str | None = None,
    out_dir: str | None = None,
    png: bool = False,
) -> None:
    """Build the three reports.

    Args:
        device: part of the name of a measured device; default: that of the newest rows of Table 1.
        model: whose rows fill Tables 1 to 3; the folder's name for weights of your own.
        results: folder of measured rows; default: reports/results.
        out_dir: folder for the reports; default: reports.
        png: also each page as an image, to look at.
    """
    folder = Path(results) if results is not None else SOURCES / "results"
    target = Path(out_dir) if out_dir is not None else SOURCES
    shown = gather(folder, device, model)
    target.mkdir(parents=True, exist_ok=True)
    for phase in PHASES:
        (target / f"{phase}.pdf").write_bytes(build(phase, shown))
        if png:
            for number, page in enumerate(build(phase, shown, "png"), 1):
                (target / f"{phase}-{number}.png").write_bytes(page)
        print(f"{target / phase}.pdf")
    print(f"rows of {shown['device']}; --device picks another")


def gather(folder: Path, device: str | None, model: str) -> dict[str, Any]:
    """What the documents show of the rows in a folder. Raises InputError for a row or a device that is not right."""
    rows = [row.data for found in measured.read_folder(folder).values() for row in found]
    code = [pair for phase in PHASES for pair in QUOTED.findall((SOURCES / f"{phase}.typ").read_text(encoding="utf-8"))]
    try:
        return content.make(rows, content.choose_device(rows, device), model, ROOT, code)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"a row in {folder} lacks {error}; it is not of this version, measure it again") from None


def build(phase: str, shown: dict[str, Any], form: str = "pdf") -> Any:
    """One document as bytes; as "png" a list of them, one a page. The same arguments give the same bytes."""
    try:
        import typst
    except ImportError:
        raise EnvironmentFailure("the reports need the typst package; pip install -r requirements-dev.txt") from None
    options = {"root": str(SOURCES), "ignore_system_fonts": True, "sys_inputs": {"shown": json.dumps(shown)}}
    try:
        found = typst.compile(str(SOURCES / f"{phase}.typ"), format=form, ppi=110 if form == "png" else None, **options)
    except typst.TypstError as error:
        raise InputError(f"reports/{phase}.typ: {error.message}; {'; '.join(error.hints) or 'correct it'}") from error
    return found if form == "pdf" or isinstance(found, list) else [found]


if __name__ == "__main__":
    cli.run(main)
