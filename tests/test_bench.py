"""What is measured, and what a row says about it."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import ROOT

ROW = "bench.append_row(pathlib.Path(sys.argv[1]), 'x', {}, {}, torch.device('cpu'), 'float32', 0)"


def test_a_row_names_a_command_that_can_be_typed_in_the_repository(tmp_path):
    """No path of the machine that measured it, and `-m` where a module was run."""
    script, results = tmp_path / "measure.py", tmp_path / "rows.jsonl"
    script.write_text(
        f"import pathlib, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nfrom llama import bench\n{ROW}\n"
    )
    for command in ([str(script)], ["-m", "measure"]):
        subprocess.run([sys.executable, *command, results], cwd=tmp_path, check=True)
    commands = [json.loads(line)["command"] for line in results.read_text().splitlines()]
    assert commands == [f"python measure.py {results}", f"python -m measure {results}"]
