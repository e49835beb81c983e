"""What a request may hold: every field is honoured, or refused by its name."""

from __future__ import annotations

import json

import pytest

from serving.fields import Refused, json_of, read

TEXT = {"model": "tiny", "prompt": "The little fox"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What do cows eat?"}]}


def refusal(tiny, form: str, **changes) -> Refused:
    with pytest.raises(Refused) as end:
        read({**(CHAT if form == "chat" else TEXT), **changes}, form, "tiny", tiny, most=64)
    return end.value


def test_what_is_left_out_is_openais_default(tiny):
    ask = read(dict(TEXT), "text", "tiny", tiny, most=64)
    assert ask.ids == tiny.encode_prompt("The little fox")
    assert (ask.settings["max_gen_len"], ask.settings["temperature"], ask.settings["top_p"]) == (16, 1.0, 1.0)
    assert (ask.settings["seed"], ask.settings["stop"], ask.top, ask.stream) == (None, (), None, False)
    assert read(dict(CHAT), "chat", "tiny", tiny, most=64).settings["max_gen_len"] == 64
    assert read(dict(TEXT), "text", "tiny", tiny, most=8).settings["max_gen_len"] == 8
    nulls = dict.fromkeys(("temperature", "stop", "seed", "logprobs", "stream", "n", "logit_bias", "max_tokens"))
    assert read({**TEXT, **nulls}, "text", "tiny", tiny, most=64) == ask


def test_what_is_asked_for_is_passed_on(tiny):
    body = {
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 5,
        "stop": ["a", "b"],
        "stream": True,
        "user": "me",
    }
    ask = read({**TEXT, **body, "user": "me", "prompt": ["Hi"], "n": 1, "logprobs": 4}, "text", "tiny", tiny, most=64)
    assert ask.ids == tiny.encode_prompt("Hi") and (ask.top, ask.stream, ask.with_usage) == (4, True, False)
    assert ask.settings == {"max_gen_len": 7, "temperature": 0, "top_p": 0.5, "seed": 5, "stop": ("a", "b")}
    body |= {"max_completion_tokens": body.pop("max_tokens"), "stop": "a", "stream_options": {"include_usage": True}}
    parts = [{"role": "user", "content": [{"type": "text", "text": "What do "}, {"type": "text", "text": "cows eat?"}]}]
    ask = read({**CHAT, **body, "messages": parts, "logprobs": True}, "chat", "tiny", tiny, most=64)
    assert ask.ids == tiny.formatter.encode_dialog_prompt(CHAT["messages"]) and ask.settings["stop"] == ("a",)
    assert (ask.settings["max_gen_len"], ask.top, ask.with_usage) == (7, 0, True)
    assert read({**TEXT, "echo": True}, "text", "tiny", tiny, most=64).opening == "The little fox"


@pytest.mark.parametrize("form", ["text", "chat"])
@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_tokens": (0, -1, 65, 1.5, "7", True, 10**400),
        "temperature": (-0.1, 2.1, "hot", True, [], 10**400),
        "top_p": (0, -1, 1.1, False),
        "seed": (-1, 1 << 63, 0.5, "x", True),
        "stop": ("", [""], [1], 5, ["a"] * 5, {}),
        "stream": (1, "yes"),
        "stream_options": ({"include_usage": True}, 5),  # without stream
        "n": (2, 0, "1", True),
        "presence_penalty": (0.5, -1, False),
        "frequency_penalty": (1,),
        "logit_bias": ({"5": 100}, []),
        "unheard_of": (0, "", False, [None]),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_out_of_range_or_unknown_is_refused_by_name(tiny, form, name, values):
    for value in values:
        error = refusal(tiny, form, **{name: value})
        assert (error.status, error.param) == (400, name) and name in str(error), value
        assert len(str(error)) < 200


@pytest.mark.parametrize(
    ("form", "changes", "param"),
    [
        ("text", {"prompt": None}, "prompt"),
        ("text", {"prompt": ""}, "prompt"),
        ("text", {"prompt": ["a", "b"]}, "prompt"),
        ("text", {"prompt": [1, 2]}, "prompt"),
        ("text", {"prompt": "\ud800"}, "prompt"),
        ("text", {"messages": CHAT["messages"]}, "messages"),
        ("text", {"logprobs": 6}, "logprobs"),
        ("text", {"logprobs": True}, "logprobs"),
        ("text", {"best_of": 2}, "best_of"),
        ("text", {"echo": True, "logprobs": 1}, "echo"),
        ("text", {"suffix": "x"}, "suffix"),
        ("text", {"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ("chat", {"prompt": "x"}, "prompt"),
        ("chat", {"echo": True}, "echo"),
        ("chat", {"logprobs": 1}, "logprobs"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"messages": "hello"}, "messages"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [5]}, "messages[0]"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0]"),
        ("chat", {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0]"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0]"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0]"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ("chat", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": " "}]}, "messages"),
    ],
)
def test_prompts_and_combinations_that_are_refused(tiny, form, changes, param):
    error = refusal(tiny, form, **changes)
    assert (error.status, error.param) == (400, param)
    content = error.content["error"]
    assert content["message"] == str(error) and content["type"] == "invalid_request_error"


def test_the_model_and_the_length_of_a_prompt(tiny):
    assert (refusal(tiny, "text", model=None).status, refusal(tiny, "text", model=None).param) == (400, "model")
    assert (refusal(tiny, "chat", model="gpt-4").status, refusal(tiny, "chat", model="gpt-4").code) == (
        404,
        "model_not_found",
    )
    for form, changes in (
        ("text", {"prompt": "fox " * 600}),
        ("chat", {"messages": [{"role": "user", "content": "fox " * 600}]}),
    ):
        error = refusal(tiny, form, **changes)
        assert (error.status, error.code) == (400, "context_length_exceeded") and "512" in str(error)


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "5", "null", '"x"', "{} {}", '{"a": NaN}', '{"a": Infinity}', "\x00", "[" * 100_000, "9" * 5000]
    + ['{"a":' * 50_000, "'{}'"],
    ids=lambda body: body[:12],
)
def test_what_is_no_json_object(body):
    with pytest.raises(Refused) as end:
        json_of(body.encode())
    assert end.value.status == 400 and len(str(end.value)) < 200


def test_bytes_that_are_no_text():
    for body in (b"\xff\xfe{}", b'{"a": "\xc3"}', json.dumps(TEXT).encode("utf-16")[:-1]):
        with pytest.raises(Refused):
            json_of(body)
