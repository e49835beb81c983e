"""The bug zoo: failures that people had elsewhere, each planted on purpose, and a test of this suite that notices it.

tests/zoo/*.toml holds them: `says`, the failure in a sentence; `file`, `old` and `new`, the change that plants it;
`test`, the one that has to fail then. An id that begins with F is of a catalogue of 71 failures, one that begins with
`case` of a collection of inputs that people had trouble with; a letter at the end tells plants of one failure apart.

    python tests/test_zoo.py table      write the table of docs/trust.md anew
    python tests/test_zoo.py record     plant all of them, and keep how many were noticed as a row
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "tests" / "zoo"
DOCUMENT = ROOT / "docs" / "trust.md"
MARKS = ("<!-- zoo: begin -->\n", "<!-- zoo: end -->\n")
AT_ONCE = 4  # by `record`
RANGES = ((1, 9), (10, 17), (20, 31), (35, 37), (40, 44), (50, 67), (70, 73), (75, 76), (80, 85), (90, 93))
FAILURES = [f"F{number:02}" for first, last in RANGES for number in range(first, last + 1)]
CASES = """
    adapter_of_another_format bin_alone closed_streams compiled_prefix completion_beyond_its_end
    context_of_the_config csv empty_instruction ends_of_names few_keys_of_an_adapter fields_of_an_adapter
    file_of_a_checkpoint head_dim home_directory ids_beyond_the_tokenizer interrupt_at_the_start
    json_lines_named_json large_seed lfs_pointer limits_in_params merged_folder_in_transformers metas_scripts
    moved_run no_home no_proc numbered_file_without_an_index old_python original_only padded_table
    prompts_in_json_lines quantized_elsewhere second_space several_dtypes small_step stale_index tags_in_a_dialog
    text_and_messages what_is_expected windows
""".split()
BROKEN = re.compile(r"\b(NameError|SyntaxError|IndentationError|ImportError|ModuleNotFoundError)\b")


FORKING = """
import json, os, signal, sys
import pytest, torch, transformers  # noqa
for line in sys.stdin:
    tree, output, test = json.loads(line)
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, flush=True)
        continue
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(tree)
    signal.alarm(600)  # of a test that hangs
    code = 99
    try:
        known = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
        code = pytest.main(["-o", "addopts=", "-W", known, "-x", "-q", "-rs", "-p", "no:cacheprovider", test])
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


@dataclass(frozen=True)
class Plant:
    """A failure, the change of `file` that plants it, and the node id of the test that notices it."""

    id: str
    says: str
    file: str
    old: str
    new: str
    test: str

    @property
    def kind(self) -> str:
        """The id without the letter of one of several plants."""
        return re.sub(r"^(F\d\d)[a-z]$", r"\1", self.id)


def read() -> list[Plant]:
    """All plants, in the order of the failures."""
    found = []
    for path in sorted(ZOO.glob("*.toml")):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        cases = tables.pop("case", {})
        tables |= {f"case.{name}": table for name, table in cases.items()}
        found += [Plant(id=name, **table) for name, table in tables.items()]
    return sorted(found, key=lambda plant: plant.id)


PLANTS = read()


def copy_tree(target: Path) -> Path:
    """The repository's files as they are now, without its history; the models beside them are linked."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    if (ROOT / "models").exists():
        (target / "models").symlink_to((ROOT / "models").resolve())
    return target


class Forks:
    """A process that has imported what takes seconds and nothing of this repository; each test runs in a fork of it."""

    def __init__(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        # Python tells old bytecode by seconds and size, which a plant may leave as they are.
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", FORKING]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, test: str, tree: Path) -> tuple[int, str]:
        """pytest's exit code, and what it printed."""
        output = tree / ".output"
        self._process.stdin.write(json.dumps([str(tree), str(output), test]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), output.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def is_noticed(plant: Plant, tree: Path, forks: Forks) -> tuple[bool, str]:
    """Plant it and run its test: whether that itself failed, and what it printed. The tree is then what it was."""
    path = tree / plant.file
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace(plant.old, plant.new), encoding="utf-8")
    try:
        code, output = forks.run(plant.test, tree)
    finally:
        path.write_text(good, encoding="utf-8")
    failed = re.search(r"^1 failed\b", output, re.MULTILINE) is not None
    return code == 1 and failed and not BROKEN.search(output), output


def table() -> str:
    """The plants as Markdown."""
    lines = ["| id | what goes wrong | the test that notices it |", "|---|---|---|"]
    for plant in PLANTS:
        name = plant.test.partition("::")[2].partition("[")[0]
        lines.append(f"| {plant.id} | {plant.says} | `{name}` |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A document with its table as it should be."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


def test_every_failure_and_every_case_is_planted():
    assert len(FAILURES) == 71
    assert {plant.kind for plant in PLANTS} == {*FAILURES, *(f"case.{name}" for name in CASES)}


def test_each_plant_changes_one_place():
    for plant in PLANTS:
        assert (ROOT / plant.file).read_text(encoding="utf-8").count(plant.old) == 1, plant.id
        assert plant.old != plant.new, plant.id
        assert len(plant.old.splitlines()) + len(plant.new.splitlines()) <= 20, plant.id


def test_each_named_test_exists():
    for plant in PLANTS:
        file, _, name = plant.test.partition("::")
        defined = f"def {name.partition('[')[0]}("
        assert defined in (ROOT / file).read_text(encoding="utf-8"), plant.id


def test_the_table_of_the_document_is_that_of_the_plants():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_table(text)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to it")
    return copy_tree(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def forks():
    with closing(Forks()) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.id)
def test_each_planted_failure_is_noticed(tree, forks, plant):
    noticed, output = is_noticed(plant, tree, forks)
    if " skipped" in output and " passed" not in output and " failed" not in output:
        pytest.skip(f"the test that notices it is skipped here: {plant.test}")
    assert noticed, output[-3000:]


def record() -> None:
    """Plant all of them, and append how many were noticed to the rows."""
    import torch

    from benchmarks import rows

    def noticed_of(plants: list[Plant]) -> list[Plant]:
        with tempfile.TemporaryDirectory() as folder, closing(Forks()) as forks:
            tree = copy_tree(Path(folder))
            return [plant for plant in plants if is_noticed(plant, tree, forks)[0]]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = pool.map(noticed_of, [PLANTS[i::AT_ONCE] for i in range(AT_ONCE)])
        noticed = [plant for part in parts for plant in part]
    lost = [plant for plant in PLANTS if plant not in noticed]
    runs = {
        "failures_planted_n": [len(FAILURES)],
        "failures_noticed_n": [len(set(FAILURES) - {plant.kind for plant in lost})],
        "cases_planted_n": [len(CASES)],
        "cases_noticed_n": [len(CASES) - sum(plant.kind not in FAILURES for plant in lost)],
        "plants_n": [len(PLANTS)],
        "noticed_n": [len(noticed)],
    }
    path = ROOT / "reports" / "results" / "trust.jsonl"
    rows.record(path, "trust", {"kind": "zoo"}, runs, torch.device("cpu"), "float32")
    print("not noticed:", ", ".join(plant.id for plant in lost) or "none")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] == ["table"]:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    elif sys.argv[1:] == ["record"]:
        record()
    else:
        sys.exit(__doc__)
