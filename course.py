"""The whole assignment in one command: what this machine can do, Tables 1 to 3, fine-tuning, texts, the three reports.

    python course.py                              # Llama 3.2 1B's shape, random weights; SmolLM2 for texts and losses
    python course.py --ckpt_dir=Llama-3.2-1B      # real weights for everything
    python course.py --minutes=50                 # what fits: each part once, then again with more repeats
    python course.py --model=tiny                 # the embedded model: minutes on a CPU
    python course.py --doctor                     # only: card, torch build, what is missing

Each part is a script of this repository, in a process of its own, whose rows appear in `out_dir`/rows when it is done.
Started again, it goes on: what has rows of this device and commit is not measured again, and a training that was
stopped is resumed. A part that fails, or runs out of memory, ends no other. At the end: the reports as PDFs, the
page of results, and a table of what was measured, what was not, and why.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks import doctor
from benchmarks import options as shared
from benchmarks.parts import Part, Parts
from llama import checkpoint, cli
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.errors import InputError
from llama.training import snapshot

SMALL = Path(os.path.relpath(Path(__file__).parent / "models" / "smollm2-135m"))  # what `make model` fetches


@dataclass(frozen=True)
class Options(cli.Options):
    """Measure everything that the assignment asks for, and make the reports."""

    ckpt_dir: str | None = option(None, "real weights for all of it; default: random ones, and SmolLM2 if it is here")
    model: str = option("llama3.2-1b", shared.MODEL, choices=PRESETS)
    text: str | None = option(None, "a text file in UTF-8 to measure perplexity on; the embedded model needs none")
    minutes: float | None = option(None, "time budget; default: as long as it takes", above=0)
    memory_limit_gb: float | None = option(None, "hold a larger GPU to this much memory; a P100 has 16", above=0)
    device: str = option("auto", cli.DEVICE)
    out_dir: str = option("runs/course", "directory of rows, trainings and reports")
    doctor: bool = option(False, "only say what this machine can do, and what is missing")


def main(options: Options) -> None:
    quality = options.ckpt_dir or (None if options.model == "tiny" else str(SMALL) if SMALL.exists() else None)
    here = [path for path in map(Path, filter(None, (options.ckpt_dir, quality, SMALL))) if path.exists()]
    print("\n".join(map(str, doctor.findings(doctor.look(list(dict.fromkeys(here)))))), flush=True)
    if options.doctor:
        return
    device, _ = devices.resolve(options.device)
    for place in filter(None, (options.ckpt_dir, options.text)):
        if not Path(place).expanduser().exists():
            raise InputError(f"{place} does not exist; correct its path")
    label = options.model if options.ckpt_dir is None else checkpoint.locate(options.ckpt_dir).name
    out = Path(options.out_dir).resolve()
    with snapshot.lock(out):
        course = Parts(out, devices.device_name(device), options.minutes)
        course.measure(parts(options, quality, device.type))
        make_reports(course, label)
        text = course.summary()
        (out / "measured.md").write_text(text, encoding="utf-8")
        print(f"\n{text}")


def parts(options: Options, quality: str | None, device_type: str) -> list[Part]:
    """What is measured, what matters most first. quality: weights that say something, None for the embedded model's."""
    on = () if options.device == "auto" else (f"--device={options.device}",)
    weights = f"--model={options.model}" if options.ckpt_dir is None else f"--ckpt_dir={options.ckpt_dir}"
    speed = (weights, *on)
    if options.memory_limit_gb is not None and device_type == "cuda":
        speed += (f"--memory_limit_gb={options.memory_limit_gb:g}",)
    real = on if quality is None else (f"--ckpt_dir={quality}", *on)
    peer = ("--against=transformers",) if importlib.util.find_spec("transformers") else ()
    peers = ("--against=peers",) if peer and importlib.util.find_spec("peft") else ()
    steps = ("benchmark_finetuning.py", *speed, *("--seq_len=128",) * (options.model == "tiny"))
    table_1 = ("benchmark_inference.py", *speed, *peer)
    found = [
        Part("equality", ("-m", "benchmarks.equality", *on)),
        Part("texts", ("inference.py", *real, "--compare", "--max_gen_len=48")),
        Part("Table 1, batch 1", (*table_1, "--batch_sizes=1"), "repeated", True),
        Part("fine-tuning, course", ("finetuning.py", *real, "--export=none"), "training"),
        Part("Table 3", (*steps, "--cells=course"), "repeated", True),
        Part("Table 1, batch 8", (*table_1, "--batch_sizes=8"), "repeated", True),
        Part("Table 2", (*steps, "--cells=table2"), "repeated", True),
        Part("fine-tuning, learn", ("finetuning.py", *real, "--preset=learn", "--export=none"), "training"),
        Part("Table 1, batch 16", (*table_1, "--batch_sizes=16"), "repeated", True),
        Part("lean steps and peers", (*steps, "--cells=lean,half", *peers), "repeated", True),
        Part("replay", ("-m", "benchmarks.replay", *real)),
        Part("ladder", ("-m", "benchmarks.ladder", f"--model={options.model}", *on), "repeated", True),
        Part("kernels", ("-m", "benchmarks.kernels", f"--model={options.model}", *on), "repeated"),
    ]
    if quality is None or options.text is not None:
        text = (f"--data={options.text}",) if options.text is not None else ()
        found.insert(3, Part("perplexity", ("evaluate.py", *real, *text)))
    return found


def make_reports(course: Parts, label: str) -> None:
    """PDFs and page of the rows that there are."""
    if not any((course.out / "rows").iterdir()):
        course.state["reports"] = "not made: nothing was measured"
        return
    given = f"--results={course.out / 'rows'}"
    pdf = ("-m", "reports.build", "pdf", f"--out_dir={course.out}", f"--model={label}", f"--device={course.device}")
    page = ("-m", "reports.build", "page", f"--page={course.out / 'index.html'}")
    for name, command in (("reports", pdf), ("page", page)):
        reason = course.call(name, (*command, given))
        course.state[name] = f"in {course.out}" if reason is None else f"not made: {reason}"


if __name__ == "__main__":
    cli.run(main)
