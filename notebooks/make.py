"""The notebook for an hour on Kaggle's P100: `python -m notebooks.make` writes kaggle_p100.ipynb from these cells.

Edit this file, not the notebook; a test compares the two, and runs the notebook on a CPU with the embedded model.
"""

from __future__ import annotations

import json
from pathlib import Path

TARGET = Path(__file__).with_name("kaggle_p100.ipynb")

CELLS = [
    """# Llama 3.2 1B on a P100: the whole assignment in an hour

Switch the accelerator to **GPU P100** (or T4) and the internet on, then run all cells. At the end there are three
PDFs, a page of results and a table of what was measured, all from this card.""",
    """**Settings.** `REPOSITORY` is the address of your clone, or the folder of one that is attached as a data set.
Without a Hugging Face token or Kaggle's own Llama 3.2, texts and losses come from SmolLM2-135M, which nobody has to be
asked for, and times and memory from the shape of Llama 3.2 1B with random weights.""",
    """import os

REPOSITORY = os.environ.get("COURSE_REPOSITORY", "https://github.com/YOU/YOUR-CLONE")
MODEL = os.environ.get("COURSE_MODEL", "llama3.2-1b")  # "tiny" runs everything in minutes, on a CPU too
MINUTES = float(os.environ.get("COURSE_MINUTES", 50))
TOKEN = os.environ.get("HF_TOKEN", "")  # of an account that Meta has let in
WORK = os.environ.get("COURSE_WORK", "/kaggle/working")""",
    """**The code.** Cloned, or copied from the attached folder: a data set cannot be written to.""",
    """import shutil
import subprocess
import sys
from pathlib import Path

CODE = Path(WORK) / "code"
if not CODE.exists():
    if Path(REPOSITORY).is_dir():
        shutil.copytree(REPOSITORY, CODE, symlinks=True, ignore=shutil.ignore_patterns(".venv", "runs"))
    else:
        subprocess.run(["git", "clone", REPOSITORY, str(CODE)], check=True)
os.chdir(CODE)""",
    """**The card, and torch for it.** The preinstalled torch may have no kernels for a P100 (compute capability 6.0);
the wheels of PyTorch's cu126 line have. The rest of the requirements follows.""",
    """def run(*command):
    print("$", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}"


card = shutil.which("nvidia-smi") and subprocess.run(
    ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
).stdout.split()
pip = [sys.executable, "-m", "pip", "install", "-q"]
if card and float(card[0]) < 7.5:
    run(*pip, "torch==2.13.0", "--index-url", "https://download.pytorch.org/whl/cu126")
run(*pip, "-r", "requirements.txt", "typst", "transformers", "peft")""",
    """**The weights.** Kaggle's mount of Llama 3.2 1B if it is attached, else Meta's from Hugging Face if there is a
token, else SmolLM2.""",
    """mounts = [path.parent for path in Path("/kaggle/input").rglob("config.json")]
mounts = [path for path in mounts if "llama-3.2" in str(path).lower() and "1b" in str(path).lower()]
weights = []
if MODEL != "tiny" and mounts:
    weights = [f"--ckpt_dir={mounts[0]}"]
elif MODEL != "tiny" and TOKEN:
    from huggingface_hub import snapshot_download

    name, others = "meta-llama/Llama-3.2-1B", ["original/*"]
    folder = snapshot_download(name, token=TOKEN, ignore_patterns=others, local_dir="Llama-3.2-1B")
    weights = [f"--ckpt_dir={folder}"]
elif MODEL != "tiny":
    run(sys.executable, "-m", "data.model")
print(weights or "random weights for times and memory")""",
    """**What this machine can do**, and what would be missing.""",
    """run(sys.executable, "course.py", "--doctor", *weights)""",
    """**Everything, within the budget.** It can be stopped and run again: what has been measured is kept.""",
    """command = [sys.executable, "course.py", f"--model={MODEL}", f"--minutes={MINUTES:g}", *weights]
command.append(f"--out_dir={WORK}/course")
with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
    for line in process.stdout:
        print(line, end="", flush=True)
assert process.returncode == 0""",
    """**What came of it.** The PDFs and the page are among the notebook's output files.""",
    """from IPython.display import Markdown, display

display(Markdown((Path(WORK) / "course" / "measured.md").read_text()))
print(*sorted(str(path) for path in (Path(WORK) / "course").glob("*.pdf")), sep="\\n")""",
]


def notebook() -> str:
    """The file, in the notebooks' format 4.5. A cell that begins with prose marks is Markdown."""
    cells = []
    for number, text in enumerate(CELLS):
        source = text.splitlines(keepends=True)
        if text.startswith(("#", "**")):
            cell = {"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}, "source": source}
        else:
            cell = {"cell_type": "code", "execution_count": None, "id": f"cell-{number}", "metadata": {}, "outputs": []}
            cell["source"] = source
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(notebook(), encoding="utf-8")
    print(TARGET)
