"""The three course reports as PDFs, from our own text and the measured rows of one device.

The text is in reports/phase_*.typ, in Typst, and holds no measured figure: tables, charts, figures in sentences and the
texts that models wrote come from rows. What was not measured on the device says so, with the command that measures it.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.rows import Row, group
from llama.config import PRESETS
from llama.errors import EnvironmentFailure, InputError
from reports.cells import NOT_MEASURED, chosen, figure, newest, ratio
from reports.charts import CHARTS
from reports.facts import facts
from reports.render import Provenance, svg, text, typst
from reports.tables import TABLES
from reports.training_tables import run_label

SOURCES = Path(__file__).parent
PHASES = ("phase_1", "phase_2", "phase_3")
QUOTED = re.compile(r'#quoted\("([^"]+)", "([^"]+)"')  # file and function whose code a report shows
COMMANDS = {  # what measures the rows of an experiment
    "inference": "python benchmark_inference.py --against=transformers",
    "comparison": "python inference.py --compare --max_gen_len=48 --results=reports/results/comparison.jsonl",
    "benchmark_finetuning": "python benchmark_finetuning.py --cells=course,lean,half,table2 --against=peers",
    "finetuning": "python finetuning.py --preset=learn --results=reports/results/finetuning.jsonl",
    "sweep": "python finetuning.py --preset=learn --lr=5e-4 --seed=2 --results=reports/results/sweep.jsonl",
    "pretraining": "python finetuning.py --data=TEXT --lora=False --results=reports/results/pretraining.jsonl",
    "leaderboard": "python -m benchmarks.leaderboard --ckpt_dir=models/smollm2-135m --data=TEXT",
    "ladder": "python -m benchmarks.ladder",
    "pruning": "python -m benchmarks.pruning",
    "attention": "python -m benchmarks.attention",
    "context": "python -m benchmarks.context",
}
TRAINED = ("comparison", "finetuning", "sweep", "pretraining", "leaderboard")  # experiments that need trained weights


def choose_device(rows: Sequence[Row], wanted: str | None) -> str | None:
    """The measured device whose name holds `wanted`; without it that of the newest Table 1, or else the newest row.

    None where nothing was measured. Raises InputError where the name fits no device, or more than one.
    """
    names = sorted({row.device_name for row in rows})
    if wanted is not None:
        found = [name for name in names if wanted.lower() in name.lower()]
        found = [name for name in found if wanted.lower() == name.lower()] or found
        if len(found) != 1:
            what = f"fits {len(found)} devices" if found else "fits no measured device"
            raise InputError(f"device={wanted}: {what}; measured are {', '.join(names) or 'none'}")
        return found[0]
    table_1 = [row for row in rows if row.data["experiment"] == "inference"]
    last = max(table_1 or rows, key=lambda row: row.data["time"], default=None)
    return last and last.device_name


def gather(rows: dict[str, list[Row]], device: str | None, model: str) -> dict[str, Any]:
    """Everything that the reports show, as text. model: whose rows fill Tables 1 to 3.

    Raises InputError for a device that was not measured and for a row that lacks what a table needs.
    """
    device = choose_device([row for found in rows.values() for row in found], device)
    code = [pair for phase in PHASES for pair in QUOTED.findall((SOURCES / f"{phase}.typ").read_text("utf-8"))]
    try:
        here = rows_of(rows, device, model)
        found: dict[str, list[dict[str, Any]]] = {}
        for experiment in COMMANDS:
            for table in itertools.chain.from_iterable(make(here[experiment]) for make in TABLES.get(experiment, ())):
                found.setdefault(table.name, []).append(typst(table))
        charts = {name: CHARTS[name](here[name]) for name in CHARTS if name in here}
        return {
            "device": device or "no device",
            "model": model,
            "facts": facts(PRESETS["llama3.2-1b"]),
            "figures": figures(here["inference"]),
            "tables": found,
            "commands": COMMANDS,
            "charts": {name: [svg(chart) for chart in drawn.values()] for name, drawn in charts.items()},
            "comparisons": comparisons(here["comparison"]),
            "log": [loss_log(row) for row in here["finetuning"]],
            "code": {f"{file}:{name}": quote(SOURCES.parent / file, name) for file, name in code},
        }
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"a row lacks {error}; it is not of this version, measure it again") from None


def rows_of(rows: dict[str, list[Row]], device: str | None, model: str) -> dict[str, list[Row]]:
    """The rows of a device by experiment, oldest first, without those that belong to tables of an earlier setting.

    Texts, losses and answers are those of real weights, where any were measured.
    """
    here = {}
    for name in COMMANDS:
        own = [row for row in rows.get(name, []) if row.device_name == device]
        if name in TRAINED:  # what a model says depends on its weights: real ones, wherever they ran
            own = [row for row in rows.get(name, []) if row.cell["model"] != "tiny"] or own
        here[name] = sorted(own, key=lambda row: row.data["time"])
    generation, steps = (chosen(here[name], model=model) for name in ("inference", "benchmark_finetuning"))
    here["inference"] = like_the_newest(generation, "input_len", "output_len", "memory_limit_gb")
    here["benchmark_finetuning"] = like_the_newest(steps, "seq_len", "memory_limit_gb", dtype=False)
    here["ladder"] = like_the_newest(here["ladder"])
    return here


def like_the_newest(rows: Sequence[Row], *names: str, dtype: bool = True) -> list[Row]:
    """The rows that agree with the last one in these keys of their cells, and in their dtype."""
    settings = [[row.data["dtype"] if dtype else "", *(row.cell[name] for name in names)] for row in rows]
    return [row for row, own in zip(rows, settings, strict=True) if own == settings[-1]]


def figures(rows: Sequence[Row]) -> dict[str, str]:
    """Single figures that sentences need: what the cache gains, and the bytes of a step, by batch size."""
    found = {}
    for size in (1, 8, 16):
        on, off = (newest(rows, engine="llama", batch_size=size, use_cache=use_cache) for use_cache in (True, False))
        found |= {f"speedup_{size}": ratio(off, on, "runtime_s"), f"step_gb_{size}": figure(on, "step_bytes_gb", ".2f")}
    return {name: "not measured" if cell == NOT_MEASURED else text(cell) for name, cell in found.items()}


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Texts with the cache and without, by model and setting."""
    found = []
    for same in group(chosen(rows, what="KV cache"), "model"):
        prompts = [
            {name: row.data["series"][name][0] for name in ("text_on", "text_off", "verdict")}
            | {"prompt": row.cell["prompt"]}
            for row in same
        ]
        n_equal = sum(prompt["text_on"] == prompt["text_off"] for prompt in prompts)
        title, about = f"{same[0].cell['model']}, {same[0].data['dtype']}", vars(Provenance.of(same))
        found.append({"title": title, "about": about, "prompts": prompts, "n_equal": n_equal})
    return found


def loss_log(row: Row) -> dict[str, Any]:
    """The loss of about a dozen steps of a run, the first and the last among them."""
    points = row.data.get("series", {}).get("loss_nats", [])
    shown = [*points[: -1 : max(1, math.ceil(len(points) / 12))], *points[-1:]]
    about = {"model": row.cell["model"], "preset": run_label(row)}
    return about | {"points": [[str(step), f"{loss:.3f}"] for step, loss in shown]}


def quote(path: Path, name: str) -> str:
    """The source of a function, `name` or `Class.name`, without docstring. Raises InputError where there is none."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be quoted: {error.strerror}; correct the report's source") from None
    node: Any = ast.parse(source)
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            raise InputError(f"{path} has no {name}; correct the report's source")
    lines = source.splitlines()
    docstring = range(node.body[0].lineno, node.body[0].end_lineno + 1) if ast.get_docstring(node) else ()
    kept = [lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in docstring]
    return "\n".join(line[node.col_offset :] for line in kept)


def build(phase: str, shown: dict[str, Any], form: str = "pdf") -> Any:
    """One report as bytes; as "png" a list of them, one per page. The same arguments give the same bytes."""
    try:
        import typst as compiler
    except ImportError:
        raise EnvironmentFailure("the reports need the typst package; pip install -r requirements-dev.txt") from None
    fonts = [str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")]  # that of the charts
    options = {"root": str(SOURCES), "ignore_system_fonts": True, "font_paths": fonts}
    options |= {"sys_inputs": {"shown": json.dumps(shown)}, "ppi": 110 if form == "png" else None}
    try:
        found = compiler.compile(str(SOURCES / f"{phase}.typ"), format=form, **options)
    except compiler.TypstError as error:
        raise InputError(f"reports/{phase}.typ: {error.message}; {'; '.join(error.hints) or 'correct it'}") from error
    return found if form == "pdf" or isinstance(found, list) else [found]
