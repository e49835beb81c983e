"""The equality checks pass here, and notice a path that computes something else."""

from __future__ import annotations

import pytest
import torch

from benchmarks import equality, rows
from llama import Transformer
from llama.errors import InternalError
from llama.kernels.cpu.decode_step import NativeStep


def test_every_path_is_compared_in_every_dtype(tmp_path, capsys):
    equality.main(equality.Options(results=str(tmp_path / "rows.jsonl"), device="cpu"))
    found = rows.read_file(tmp_path / "rows.jsonl")
    assert {row.data["dtype"] for row in found} == {"float32", "bfloat16"}
    assert [row.cell["check"] for row in found] == [*equality.CHECKS] * 2
    assert all(row.median("error_x") <= row.median("bound_x") for row in found)
    assert "fast decode step, eager" in capsys.readouterr().out


@pytest.mark.parametrize("check", equality.CHECKS)
def test_a_path_that_differs_is_noticed(tmp_path, monkeypatch, check):
    """Each twin is spoilt by a hundredth part: the second of two calls gives something else."""
    usual, calls = equality.difference, []

    def spoilt(fast: torch.Tensor, slow: torch.Tensor) -> float:
        calls.append(1)
        return usual(fast * 1.1, slow)

    monkeypatch.setattr(equality, "difference", spoilt)
    monkeypatch.setattr(equality, "CHECKS", {check: equality.CHECKS[check]})
    with pytest.raises(InternalError, match=check):
        equality.main(equality.Options(results=str(tmp_path / "rows.jsonl"), device="cpu"))
    assert calls and (tmp_path / "rows.jsonl").exists()


def test_a_wrong_step_is_noticed(monkeypatch):
    model = Transformer.random(equality.ARGS, torch.bfloat16, torch.device("cpu"), 1).eval()
    if equality.Decoder(model, "auto").name != "native":
        pytest.skip("this CPU has no fast step")
    usual = NativeStep.__call__
    monkeypatch.setattr(NativeStep, "__call__", lambda self, tokens, pos: usual(self, tokens, (pos - 1).clamp(0)))
    assert equality.decode_step(model) > equality.BOUNDS[torch.bfloat16]
