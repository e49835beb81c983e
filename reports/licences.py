"""The licences of everything that the requirements bring: `python -m reports.licences` writes them into
docs/security.md, as the installed packages state them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llama.errors import EnvironmentFailure
from reports.cells import Table
from reports.render import markdown, write

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"
FILES = {"requirements.txt": "scripts", "requirements-demo.txt": "demo", "requirements-dev.txt": "tests"}
PART = re.compile(r"(<!-- begin: licences -->\n).*?(<!-- end -->)", re.DOTALL)
# Names that packages give their licence, and the one that all are listed under (SPDX).
SPDX = {
    "MIT License": "MIT",
    "BSD License": "BSD",  # with which clauses is not said
    **dict.fromkeys(("Apache Software License", "Apache 2.0", "Apache 2.0 License"), "Apache-2.0"),
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
NVIDIA = ("nvidia-", "cuda-")  # what CUDA builds of torch bring; one sentence of the page for all


def requirements(name: str) -> list[Requirement]:
    """The lines of a requirements file, without those of the file that it begins with."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def reached(requirement: Requirement) -> Iterator[str]:
    """The installed packages that a requirement brings, itself first. Raises EnvironmentFailure for a missing one."""
    seen, waiting = set(), [requirement]
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), wanted.extras or {""}
        if (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        try:
            needed = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            raise EnvironmentFailure(f"{name} is not installed; make .venv/dev.stamp .venv/demo.stamp") from None
        yield name
        waiting += [
            need for need in needed if not need.marker or any(need.marker.evaluate({"extra": e}) for e in extras)
        ]


def packages(name: str) -> dict[str, list[str]]:
    """What a requirements file brings: each package, and the lines of the file through which it comes."""
    found: dict[str, list[str]] = {}
    for requirement in requirements(name):
        if not requirement.marker or requirement.marker.evaluate():
            for package in dict.fromkeys(reached(requirement)):
                found.setdefault(package, []).append(canonicalize_name(requirement.name))
    return found


def licence(name: str) -> str:
    """The SPDX name of what a package states: in an expression, else in classifiers, else in a line of text."""
    about = metadata.metadata(name)
    classifiers = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or () if line.startswith("License")]
    stated = about.get("License-Expression") or " OR ".join(classifiers) or about.get("License") or "not stated"
    return " OR ".join(SPDX.get(part, part) for part in stated.splitlines()[0].split(" OR "))


def table() -> Table:
    """One line for each package: the first requirements file that brings it, and through which of its lines."""
    lines: dict[str, list[str]] = {}
    for file, use in FILES.items():
        for name, through in packages(file).items():
            if name.startswith(NVIDIA):
                continue
            via = "" if name in through else ", ".join(through)
            lines.setdefault(name, [name, metadata.version(name).split("+")[0], licence(name), use, via])
    return Table("licences", "", ["package", "version", "licence", "for", "through"], [lines[n] for n in sorted(lines)])


def filled(page: str) -> str:
    lines = [line for line in markdown([table()]).splitlines() if line.startswith("|")]
    return PART.sub(lambda match: match[1] + "\n" + "\n".join(lines) + "\n\n" + match[2], page)


if __name__ == "__main__":
    write(PAGE, filled(PAGE.read_text(encoding="utf-8")).encode())
    print(PAGE)
