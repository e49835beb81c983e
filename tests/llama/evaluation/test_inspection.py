"""What changed inside: norms, activations and divergence against direct formulas; what is unchanged is 0."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from conftest import TINY, random_model
from support import lora_model

import evaluate
from llama import adapters, checkpoint, cli, lora, quantization
from llama.evaluation import inspection
from llama.lora import LoRAConfig
from llama.quantization import Quantization
from reports import charts, tables

IDS = torch.randint(512, (50,), generator=torch.Generator().manual_seed(0)).tolist()


def relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return ((new.double() - old.double()).norm() / old.double().norm()).item()


def test_a_model_is_like_itself():
    model = random_model()
    found = inspection.compare(model, copy.deepcopy(model), IDS, 16)
    assert found.total == found.loss == 0 and set(found.activations) == {0} and found.n_same == sum(found.counts) == 50
    assert list(found.updates) == list(lora.META_NAMES) and found.tables == {"tok_embeddings": 0}


def test_an_adapter_changes_its_matrices_and_all_that_comes_after_them():
    """Of layers 2 and 3 alone; merged, it is the same."""
    base, model = random_model(), random_model()
    modules = tuple((f"layers.{i}.{path}", 4, 8.0) for i in (2, 3) for path in ("attention.wv", "feed_forward.w2"))
    lora.apply(model, LoRAConfig(modules=modules))
    for module in lora.layers(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    found = inspection.compare(model, base, IDS, 64)
    for name, moved in found.updates.items():
        path = lora.META_NAMES[name].removesuffix(".weight")
        for layer, value in enumerate(moved):
            adapted = model.layers[layer].get_submodule(path)
            is_adapted = layer >= 2 and name in ("wv", "w2")
            wanted = relative(adapted.update() + adapted.weight, adapted.weight) if is_adapted else 0
            assert value == pytest.approx(wanted, rel=1e-4)
    assert found.activations[:2] == [0, 0] and all(value > 0.01 for value in found.activations[2:])
    tokens = torch.tensor([IDS])
    with torch.no_grad():
        p, p_base = (one(tokens)[0].double().log_softmax(-1) for one in (model, base))
    assert found.loss == pytest.approx((p_base.exp() * (p_base - p)).sum(-1).mean().item(), rel=1e-4)
    assert found.n_same == (p.argmax(-1) == p_base.argmax(-1)).sum()
    lora.merge(model)
    merged = inspection.compare(model, base, IDS, 64)
    assert merged.total == pytest.approx(found.total, rel=1e-4) and merged.loss == pytest.approx(found.loss, rel=1e-3)


def test_windows_do_not_see_each_other():
    model, base = lora_model(), random_model()
    found = inspection.compare(model, base, IDS, 20)
    alone = inspection.compare(model, base, IDS[20:40], 20)
    assert found.counts == [20, 20, 10] and found.sums[1] == pytest.approx(alone.sums[0], rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_what_they_stand_for(bits):
    base, model = random_model(), random_model()
    quantization.quantize(model, Quantization(bits))
    found = inspection.compare(model, base, IDS, 64)
    for name, path in lora.META_NAMES.items():
        layer, plain = (one.layers[1].get_submodule(path.removesuffix(".weight")) for one in (model, base))
        eye = torch.eye(plain.in_features)
        assert found.updates[name][1] == pytest.approx(relative(layer(eye).t(), plain.weight), rel=1e-3)
    low, high = {8: (0.001, 0.02), 4: (0.02, 0.3)}[bits]
    assert low < found.total < high and 0 < found.tables["tok_embeddings"] < 0.02


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--inspect", "--device=cpu", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.run(evaluate.main)
    return exit_.value.code, *capsys.readouterr()


def test_a_row_a_table_and_a_heat_map(tmp_path, monkeypatch, capsys):
    """Of an adapter and of few bits; every figure of the tables stands in the rows."""
    model = checkpoint.load(TINY)
    quantization.quantize(model, Quantization(4))
    checkpoint.save(model, tmp_path / "int4", tokenizer_path=TINY / "tokenizer.model")
    model = checkpoint.load(TINY)
    lora.apply(model, config := LoRAConfig(r=2))
    for module in lora.layers(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.01, generator=torch.Generator().manual_seed(1))
    adapters.save(model, config, tmp_path / "mine", checkpoint.fingerprint(TINY), str(TINY))
    results = tmp_path / "inspection.jsonl"
    given = ["--max_tokens=60", "--context=32", f"--results={results}"]
    code, out, err = call(monkeypatch, capsys, f"--adapter={tmp_path / 'mine'}", *given)
    assert code == 0 and "tiny: what adapter mine changed" in out, err
    assert "| layer | wq | wk | wv | wo | w1 | w2 | w3 | activations |" in out
    code, out, err = call(monkeypatch, capsys, f"--ckpt_dir={tmp_path / 'int4'}", f"--against={TINY}", *given)
    assert code == 0 and "tiny: what int4 in groups of 32 changed" in out, err
    first, second = map(json.loads, results.read_text().splitlines())
    assert first["metrics"]["update_x"]["median"] < second["metrics"]["update_x"]["median"]
    assert all(value == 0 for _, value in first["series"]["wo_update_x"]) and first["series"]["wq_update_x"][0][1] > 0
    rows = tables.Row("inspection.jsonl", 1, first), tables.Row("inspection.jsonl", 2, second)
    assert len(tables.inspection(rows)) == 2
    drawn = charts.inspection(rows)
    assert len(drawn) == 4 and all("inspection-" in name for name in drawn)


REFUSED = {
    "--inspect compares two models; give --adapter, or --against=CHECKPOINT": [],
    "has another shape than": [f"--against={TINY / 'draft'}"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_compared_is_refused(message, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "--max_tokens=60", "--context=32", *REFUSED[message])
    assert code == 2 and message in err and len(err.splitlines()) == 1
