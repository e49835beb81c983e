"""The notebook is what its script writes, and runs from the first cell to the last."""

from __future__ import annotations

import json
import os

import nbclient
import nbformat
import pytest
from conftest import ROOT

from notebooks import make


def test_the_notebook_is_made_from_its_cells():
    assert make.TARGET.read_text(encoding="utf-8") == make.notebook()
    nbformat.validate(nbformat.from_dict(json.loads(make.notebook())))
    assert (
        sum(text.startswith(("#", "**")) for text in make.CELLS) == (len(make.CELLS) + 1) // 2
    )  # each cell has its prose


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """On a CPU with the embedded model: from the clone to the list of PDFs."""
    settings = {"REPOSITORY": ROOT, "MODEL": "tiny", "MINUTES": 3, "WORK": tmp_path}
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")  # all is installed: nothing else would be asked for
    for name, value in settings.items():
        monkeypatch.setenv(f"COURSE_{name}", str(value))
    notebook = nbformat.read(make.TARGET, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", cwd=os.fspath(tmp_path)).execute()
    last = "".join(str(output) for output in notebook.cells[-1].outputs)
    assert all(f"phase_{i}.pdf" in last for i in (1, 2, 3)) and "Table 1, batch 1" in last
