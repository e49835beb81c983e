"""The benchmark of long texts: every cell has what its table needs, and the limits are of the bytes that are read."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import random_model

from benchmarks import context as benchmark
from benchmarks import hardware
from benchmarks.rows import Row, read_file
from llama import cli
from llama.config import PRESETS
from llama.decoding import Decoder
from llama.errors import InputError
from reports import charts, render, tables

FLAGS = ("--model=tiny", "--device=cpu", "--prefill_up_to=8", "--steps=2", "--repeats=2")
SETTINGS = benchmark.Options(model="tiny", steps=2, repeats=2)


def measure(folder, *flags: str) -> list[Row]:
    path = folder / "rows.jsonl"
    cli.call(benchmark.main, [f"--results={path}", f"--figures={folder}", *FLAGS, *flags])
    return read_file(path)


def test_every_context_is_measured_with_every_cache_and_beside_the_peer(tmp_path, capsys):
    pytest.importorskip("transformers")
    found = measure(tmp_path, "--contexts=8,24")
    cells = [(row.cell["context"], row.cell["engine"], row.cell["cache"]) for row in found]
    sides = [("llama", "bfloat16"), ("llama", "int8"), ("transformers", "bfloat16")]
    assert cells == [(n, *side) for n in (8, 24) for side in sides]
    for row in found:
        is_ours, reads = row.cell["engine"] == "llama", row.cell["context"] == 8
        assert row.metrics["tpot_s"]["n"] == 2 and row.median("tpot_s") > 0
        assert row.has("ttft_s", "floor_ttft_s", "ttft_over_floor_x") == reads
        assert row.has("floor_tpot_s", "tpot_over_floor_x", "read_gb_s") == is_ours
        assert row.has("peak_memory_mb") == (is_ours and reads)
        assert row.cell["n_layers"] == PRESETS["tiny"].n_layers
    [table] = tables.context(found)
    assert len(table.body) == len(found) and render.markdown([table]) in capsys.readouterr().out
    assert all((tmp_path / f"{name}.svg").exists() for name in charts.context(found))


def test_of_fewer_layers_only_the_memory_is_measured(tmp_path):
    [row] = measure(tmp_path, "--n_layers=2", "--contexts=8", "--caches=int8")
    assert row.cell["n_layers"] == 2 and row.cell["cache"] == "int8" and set(row.metrics) == {"peak_memory_mb"}


def test_memory_is_counted_beyond_weights_and_cache(monkeypatch):
    """The peak less what was there before them, and less their bytes."""
    model, decoder = random_model(), Decoder(random_model(), "auto")
    measured = benchmark.stopwatch.Measurement(1.0, 50_000_000)
    monkeypatch.setattr(benchmark.stopwatch, "measure", lambda work, device: (work(), measured))
    cache = 2 * model.args.n_layers * model.args.n_kv_heads * model.args.head_dim * 40 * 4
    expected = (50_000_000 - 7_000_000 - cache - hardware.weight_bytes(model)) / 1e6
    assert benchmark.peak_memory(decoder, 40, 7_000_000) == {"peak_memory_mb": [pytest.approx(expected)]}


@pytest.mark.parametrize(("cache", "width"), [("auto", 4), ("int8", 1 + 4 / 16)])
def test_a_step_reads_weights_and_the_cache_in_use(cache, width):
    """fp32 values; of int8 one byte, and a scale of four for the 16 of a head."""
    model, order = random_model(), benchmark.random.Random(0)
    with benchmark.Ours.start(Decoder(model, "auto", cache), 10, SETTINGS) as ours:
        found = benchmark.take_turns({"x": ours}, model, 10, SETTINGS, order)["x"]
        assert all(getattr(ours.run.cache, name).ne(0).any(-1).all() for name in ours.run.cache.parts)
    values = 2 * model.args.n_layers * model.args.n_kv_heads * model.args.head_dim * 11
    assert found["step_bytes_gb"][0] == pytest.approx((hardware.weight_bytes(model) + width * values) / 1e9)
    assert found["floor_tpot_s"][0] == pytest.approx(found["step_bytes_gb"][0] / found["read_gb_s"][0])


def test_only_the_steps_are_timed_and_the_first_round_is_not_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(hardware, "read_bandwidth", lambda model: {"sum": 1e9, "max": 2e9})
    monkeypatch.setattr(hardware, "product_rate", lambda model: {"few": 1e12})

    class Side:
        rounds = 0

        def read(self):
            clock[0] += 7.0

        def prepare(self):
            clock[0] += 1000.0
            self.rounds += 1
            seconds = 500.0 if self.rounds == 1 else 6.0

            def work():
                clock[0] += seconds

            return work

    side = Side()
    found = benchmark.take_turns({"x": side}, random_model(), 8, SETTINGS, benchmark.random.Random(0))["x"]
    assert side.rounds == 3 and found["tpot_s"] == [3.0, 3.0] and found["ttft_s"] == [7.0, 7.0]


def test_the_peer_computes_what_we_do():
    """With weights in its order of rotated pairs; as they are, it takes the same time and says something else."""
    pytest.importorskip("transformers")
    model = random_model()
    theirs = benchmark.peer_of(model, SETTINGS)
    assert theirs.model.layers[0].mlp.up_proj.weight.data_ptr() == model.layers[0].feed_forward.w3.weight.data_ptr()
    tokens, _ = benchmark.prompt_of(model, 1)  # position 0 is not rotated, so here the texts are the same
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens))
    side = benchmark.Theirs(theirs, 5, SETTINGS)
    with torch.no_grad():
        side.read()
        side.prepare()()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contexts=16,x", "--contexts=16,x: expected different numbers above 0"),
        ("--model=tiny --contexts=9,131065", "--contexts=9,131065 --steps=8: more than the model's 131,072"),
        ("--caches=int4", "--caches=int4: expected a choice of auto,int8, each once"),
        ("--n_layers=1", "--n_layers=1: expected at least 2"),
        ("--n_layers=2 --ckpt_dir=data/tiny", "--n_layers=2: a checkpoint has its own"),
        ("--against=vllm", "--against=vllm: expected one of transformers, none"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark.main, [*flags.split(), "--device=cpu", f"--results={tmp_path / 'rows.jsonl'}"])
