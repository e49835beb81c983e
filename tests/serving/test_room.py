"""What one loaded model offers: forms that share weights, drafts that are watched, conversations that make place."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY
from server import wait_until

from llama import Llama, adapters, checkpoint, lora, memory
from llama.lora import LoRAConfig
from llama.quantization import Quantization, quantized_copy
from llama.speculative import Draft, ModelDraft, Proposal
from serving import room, show
from serving.engine import Engine
from serving.room import Marked, Room, Side
from serving.text import Piece

PROMPT = "Once upon a time, there was a little fox named"


@pytest.fixture(scope="module")
def engine():
    found = Engine()
    yield found
    found.close()


@pytest.fixture(scope="module")
def offered(tiny, engine) -> Room:
    return Room(tiny, engine, draft=checkpoint.load(TINY / "draft", tiny.model.dtype, tiny.device))


class Wrong(Draft):
    """Proposes three times the same token, which is never right, and then nothing, in turn."""

    def __init__(self) -> None:
        self.n = 0

    def start(self, prompts, max_len, sampling, target=None):
        from contextlib import nullcontext

        def propose(texts, limits):
            self.n += 1
            return Proposal([[5] * min(3, limits[0]) if self.n % 2 else []], None)

        return nullcontext(propose)


def test_every_comparison_gives_what_generate_gives(offered, tiny):
    ids = tiny.encode_prompt(PROMPT)
    plain = tiny.generate([ids], 24, temperature=0)[0][0]
    assert len(offered.comparisons) == 7
    for name, sides in offered.comparisons.items():
        for side in sides:
            *found, last = side.start(ids, 24, 5)
            tokens = [one.piece.token for one in found]
            expected = side.build().generate([ids], 24, temperature=0)[0][0]
            assert tokens == expected and last.piece.finish, (name, side.label)
            assert tokens == plain or "bits" in side.label
    assert offered.form(8) is offered.form(8)


def test_tokens_of_a_draft_are_marked(tiny):
    ids = tiny.encode_prompt(PROMPT)
    draft = ModelDraft(checkpoint.load(TINY / "draft", tiny.model.dtype, tiny.device))
    found = list(Side("", lambda: tiny, draft=lambda: draft).start(ids, 40, 5))
    accepted = [one for one in found if one.is_accepted]
    assert len(accepted) > 10 and not any(one.rejected for one in accepted)
    *wrong, last = Side("", lambda: tiny, draft=Wrong).start(ids, 40, 5)
    assert not any(one.is_accepted for one in wrong) and last == Marked(last.piece)
    assert {one.rejected for one in wrong} <= {(), (5,), (5, 5), (5, 5, 5)} and wrong[1].rejected == (5, 5, 5)
    assert [one.piece.token for one in wrong] == tiny.generate([ids], 40, temperature=0)[0][0]


def test_an_adapter_stands_on_the_weights_of_its_base(tiny, engine, tmp_path):
    base = Llama.build(TINY, TINY / "tokenizer.model", max_seq_len=256, max_batch_size=1, device="cpu")
    trained = checkpoint.load(TINY, torch.float32)
    lora.apply(trained, config := LoRAConfig(r=4))
    with torch.no_grad():
        for layer in lora.layers(trained).values():
            layer.lora_B.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    adapters.save(trained, config, tmp_path / "adapter", "", "tiny")
    adapted = room.with_adapter(base, str(tmp_path / "adapter"), None)
    assert not lora.layers(base.model) and lora.layers(adapted.model)
    places = {tensor.data_ptr() for tensor in base.model.parameters()}
    own = [name for name, tensor in adapted.model.named_parameters() if tensor.data_ptr() not in places]
    assert own and all("lora_" in name for name in own)
    offered, ids = Room(base, engine, adapted), tiny.encode_prompt(PROMPT)
    left, right = offered.comparisons["base or adapter"]
    texts = [[one.piece.token for one in side.start(ids, 24, 5)][:-1] for side in (left, right)]
    assert texts[0] == tiny.generate([ids], 24, temperature=0)[0][0] != texts[1]
    assert offered.llama is adapted
    with torch.no_grad():
        assert torch.equal(adapted.model(torch.tensor([ids])), trained.eval()(torch.tensor([ids])))


def test_a_quantized_model_offers_no_forms_of_itself(tiny, engine):
    offered = Room(room.like(tiny, quantized_copy(tiny.model, Quantization(8))), engine)
    assert list(offered.comparisons) == ["KV cache on or off", "draft: lookup in the text"]


def test_memory_is_that_of_the_estimate(offered):
    source = checkpoint.open_source(TINY)
    for side in offered.comparisons["KV cache on or off"]:
        estimate = memory.estimate(source, torch.float32, "auto", 1, 100, side.use_cache)
        weights, rest = side.memory(100)
        assert weights == pytest.approx(estimate.weights, rel=0.01)  # and the tables of RoPE
        assert rest == estimate.cache if side.use_cache else rest < estimate.activations


def test_conversations_make_place_and_are_forgotten(offered):
    first = offered.conversation("0")
    first.settings = {"max_gen_len": 24}
    assert offered.conversation("0") is first
    for i in range(1, room.CONVERSATIONS + 3):
        offered.conversation(str(i))
    assert offered.conversation("0") is not first and len(offered._conversations) == room.CONVERSATIONS
    assert "".join(first.answer("What do cows eat?"))  # whoever is in the middle of a turn keeps its cache
    offered.forget("0")
    offered.forget("never was here")
    wait_until(lambda: len(offered._conversations) == room.CONVERSATIONS - 1)


def marked(tokens, likeliest=(), seconds=0.01) -> list[Marked]:
    return [Marked(Piece(token, "<b>", 0, seconds, -0.1, likeliest)) for token in tokens]


def test_differences_are_named_with_their_margin(tiny):
    left = marked([300, 301, 302], [(301, -0.1), (400, -0.35), (500, -2.1)])
    assert show.difference(tiny.tokenizer, left, left[:2], False) == (None, "equal so far: 2 tokens")
    assert show.difference(tiny.tokenizer, left, left, True) == (None, "equal: 3 tokens")
    assert "one of them ends" in show.difference(tiny.tokenizer, left, left[:2], True)[1]
    first, words = show.difference(tiny.tokenizer, left, marked([300, 400, 302]), True)
    assert first == 1 and words.startswith("first differ at token 2: ") and words.endswith("left 0.2500 nats")
    assert show.difference(tiny.tokenizer, left, marked([300, 999]), True)[1].endswith("more than 2.00 nats")


def test_text_stays_text(tiny, offered):
    """Of the model, of the tokenizer and of visitors."""
    side = offered.comparisons["KV cache on or off"][0]
    ids = tiny.tokenizer.encode('<script>"&\n', bos=False, eos=False)
    shown = [
        show.note("<script>"),
        show.pieces_of(tiny.tokenizer, ids),
        show.column(side, marked([300]), 3, 0),
        show.likely(tiny.tokenizer, marked(ids, [(ids[0], -0.5)])),
    ]
    for html in shown:
        assert "<script" not in html and "&lt;" in html
    assert "\u21b5" in shown[1] and "<mark>&lt;b&gt;</mark>" in shown[2] and "60.7%" in shown[3]


def test_a_chart_has_a_line_for_each_side_and_leaves_the_first_token_out():
    html = show.chart([("on", [9.0, 0.001, 0.002, 0.001]), ("off", [9.0, 0.004, 0.011])])
    assert html.count("<polyline") == 2 and ">20<" in html and "token 4" in html
    assert show.chart([("on", [1.0]), ("off", [])]) == ""
    assert [show.nice(value) for value in (0.0, 0.7, 1, 1.1, 3, 51)] == [0.001, 1, 1, 2, 5, 100]
