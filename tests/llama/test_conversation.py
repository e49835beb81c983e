"""Conversations: a kept cache says what a fresh run says; texts end at strings; tokens that repeat are punished."""

from __future__ import annotations

import builtins
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from conftest import random_model

import inference
from llama import Llama
from llama.conversation import Conversation
from llama.errors import InputError
from llama.speculative import PromptLookup, Speculation
from llama.stops import StopStrings, cut

GREEDY = {"temperature": 0, "max_gen_len": 24}
QUESTIONS = ("What colour is the sky on a clear day?", "And what do cows eat?", "Name two fruits.", "Hello", "Why?")


def fresh_answer(llama: Llama, dialog: list) -> str:
    ids = llama.formatter.encode_dialog_prompt(dialog)
    return llama.tokenizer.decode(list(llama.stream(ids, **GREEDY))).strip()


@pytest.mark.parametrize("system", [None, "You answer in one word."])
def test_each_turn_says_what_a_fresh_run_says_and_computes_only_what_is_new(tiny, system):
    with tiny.start_session() as session:
        conversation = Conversation(tiny, session, GREEDY)
        conversation.reset(system)
        for question in QUESTIONS:
            before, known = session.n_computed, len(session.tokens)
            dialog = [*conversation.messages, {"role": "user", "content": question}]
            said = "".join(conversation.answer(question))
            assert said.strip() == fresh_answer(tiny, dialog) == conversation.messages[-1]["content"]
            prompt = len(tiny.formatter.encode_dialog_prompt(dialog))
            new = session.n_computed - before
            assert new <= prompt - known + conversation.n_drawn + 3  # the end of the last answer may be encoded anew
        assert len(conversation.messages) == 2 * len(QUESTIONS) + (system is not None)


def test_the_first_message_begins_with_the_opening_and_no_other_does(tiny):
    """Also after a reset; the cache holds it, so it is not computed again."""
    story = "Once upon a time, there was a little fox. The fox lived in the wood. "
    dialog = [{"role": "user", "content": story + QUESTIONS[0]}]
    with tiny.start_session() as session:
        session.read(tiny.formatter.encode_dialog_prompt([{"role": "user", "content": story}]))
        before = session.n_computed
        conversation = Conversation(tiny, session, GREEDY)
        conversation.opening = story
        for system in (None, "You answer in one word."):
            conversation.reset(system)
            start = [] if system is None else [{"role": "system", "content": system}]
            assert "".join(conversation.answer(QUESTIONS[0])).strip() == fresh_answer(tiny, start + dialog)
            if system is None:
                n_known = len(tiny.tokenizer.encode(story, bos=False, eos=False)) - 1  # a token may span the border
                n_all = len(tiny.formatter.encode_dialog_prompt(dialog)) + conversation.n_drawn
                assert session.n_computed - before <= n_all - n_known
            assert "".join(conversation.answer(QUESTIONS[1])) and conversation.messages[-2]["content"] == QUESTIONS[1]


def test_a_session_takes_any_prompt_after_any_other():
    """Shorter, longer, the same again, one that shares nothing: token by token what a fresh generation draws."""
    llama = Llama(random_model(), None, max_seq_len=64)
    base = [int(i) for i in torch.randint(512, (40,), generator=torch.Generator().manual_seed(1))]
    prompts = [base[:20], base, base, base[:5], [7], [*base[:30], 3, 4], base[::-1], base]
    with llama.start_session() as session:
        for prompt in prompts:
            settings = {"max_gen_len": 9, "temperature": 0}
            assert list(llama.stream(prompt, **settings, session=session)) == list(llama.stream(prompt, **settings))
        before = session.n_computed
        next(iter(llama.stream(base, 9, 0, session=session)))
        assert session.n_computed - before == 1  # the same prompt again: its last token alone


def test_an_answer_that_is_stopped_is_what_was_said_so_far(tiny):
    with tiny.start_session() as session:
        conversation = Conversation(tiny, session, GREEDY)
        said = list(itertools.islice(answer := conversation.answer(QUESTIONS[1]), 3))
        answer.close()
        assert conversation.messages[-1] == {"role": "assistant", "content": "".join(said).strip()}
        dialog = [*conversation.messages, {"role": "user", "content": QUESTIONS[2]}]
        assert "".join(conversation.answer(QUESTIONS[2])).strip() == fresh_answer(tiny, dialog)
        next(answer := conversation.answer("never mind"), None)
        conversation.reset()
        assert "".join(conversation.answer(QUESTIONS[0])).strip() == "Blue."


def test_a_full_conversation_is_said(tiny):
    llama = Llama(tiny.model, tiny.tokenizer, max_seq_len=40)
    with llama.start_session() as session:
        conversation = Conversation(llama, session, {"temperature": 0, "max_gen_len": 40, "stop_tokens": []})
        list(conversation.answer("Hello"))
        assert conversation.is_full
        with pytest.raises(InputError, match=r"the conversation has \d+ tokens, of at most max_seq_len=40"):
            list(conversation.answer("Hello again"))
        assert len(conversation.messages) == 2


def test_a_session_and_a_draft_exclude_each_other(tiny):
    with tiny.start_session() as session, pytest.raises(InputError, match="a session keeps its cache"):
        next(tiny.stream([1, 2], 4, session=session, speculation=Speculation(PromptLookup())))
    with pytest.raises(InputError, match="repetition_penalty changes with every token"):
        tiny.generate([[1, 2]], 4, repetition_penalty=1.2, speculation=Speculation(PromptLookup()))


@hypothesis.given(
    st.lists(st.text("ab#\n", max_size=4), max_size=12), st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3)
)
@hypothesis.settings(max_examples=300)
def test_a_text_ends_before_the_first_of_the_strings_however_it_comes(pieces, strings):
    text, stop, shown = "".join(pieces), StopStrings(strings), ""
    for piece in pieces:
        shown += stop.push(piece)
        assert text.startswith(shown) and not any(string in shown for string in strings)
    shown += stop.flush()
    starts = [text.find(string) for string in strings if string in text]
    # The string that is complete first ends the text; one that begins earlier and ends later was possible until then.
    ends = [text.find(string) + len(string) for string in strings if string in text]
    assert stop.found == bool(starts)
    if not starts:
        assert shown == text
    else:
        assert min(starts) <= len(shown) < min(ends)
    assert cut(text, strings) == (text[: min(starts)] if starts else text)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_with_the_token_that_completes_a_string(tiny, use_cache):
    """In a batch each text at its own place; streamed; with a draft; and nothing is lost that has no such string."""
    prompts = [tiny.encode_prompt(text) for text in ("The little fox", "Question: What do cows eat?\nAnswer:")]
    whole, _ = tiny.generate(prompts, 40, 0, stop_tokens=[], use_cache=use_cache)
    texts = [tiny.tokenizer.decode(ids) for ids in whole]
    string = texts[0][25:28]
    cut_ids, _ = tiny.generate(prompts, 40, 0, stop_tokens=[], use_cache=use_cache, stop=[string])
    for ids, full, text in zip(cut_ids, whole, texts, strict=True):
        assert ids == full[: len(ids)]
        shown = tiny.tokenizer.decode(ids)
        assert (string in shown) == (string in text) and string not in tiny.tokenizer.decode(ids[:-1])
    assert len(cut_ids[0]) < 40
    assert list(tiny.stream(prompts[0], 40, 0, stop_tokens=[], use_cache=use_cache, stop=[string])) == cut_ids[0]
    if use_cache:
        draft = Speculation(PromptLookup())
        assert tiny.generate(prompts, 40, 0, stop_tokens=[], stop=[string], speculation=draft)[0] == cut_ids
    with pytest.raises(InputError, match="at least one character"):
        tiny.generate(prompts, 4, stop=["a", ""])


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_repetition_penalty_sees_prompt_and_answer(use_cache):
    """Greedy tokens of a ragged batch, against each step worked out by hand."""
    llama, prompts = Llama(random_model(), None), [[1, 2, 3, 4], [9, 9]]
    drawn, _ = llama.generate(prompts, 12, 0, repetition_penalty=1.5, use_cache=use_cache)
    for prompt, tokens in zip(prompts, drawn, strict=True):
        text = list(prompt)
        for token in tokens:
            logits = llama.model(torch.tensor([text]))[0, -1].detach()
            seen = torch.tensor(sorted(set(text)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
            assert logits.argmax() == token
            text.append(token)
    assert drawn != llama.generate(prompts, 12, 0, use_cache=use_cache)[0]


def typed(monkeypatch, *lines) -> None:
    """A terminal at which these are typed; an exception is Ctrl-C or Ctrl-D."""
    rest = iter([*lines, EOFError()])

    def type_(_prompt=""):
        line = next(rest)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", type_)
    monkeypatch.setattr(inference.sys, "stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))


def test_the_terminal_knows_its_commands(tiny, monkeypatch, capsys):
    typed(monkeypatch, QUESTIONS[0], "/system Be brief.", "", "Name a fruit.", "/reset", "/nonsense", "/quit", "Never")
    seen, usual = [], Conversation.answer
    monkeypatch.setattr(
        Conversation, "answer", lambda self, text: (seen.append([*self.messages]), usual(self, text))[1]
    )
    inference.converse(tiny, GREEDY)
    out = capsys.readouterr().out
    assert seen == [[], [{"role": "system", "content": "Be brief."}]]
    assert "Blue." in out and out.count("[a new conversation]") == 2 and "/nonsense is unknown" in out


def test_ctrl_c_ends_an_answer_and_then_the_program(tiny, monkeypatch, capsys):
    typed(monkeypatch, QUESTIONS[1], KeyboardInterrupt(), QUESTIONS[0], KeyboardInterrupt(), KeyboardInterrupt())
    usual, stream = Llama.stream, []

    def interrupted(self, *args, **named):
        for i, token in enumerate(usual(self, *args, **named)):
            if not stream and i == 2:
                stream.append("stopped")
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Llama, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inference.converse(tiny, GREEDY)
    out = capsys.readouterr().out
    assert out.count("[stopped]") == 1 and out.count("[/quit or Ctrl-D ends]") == 2 and "Blue." in out
