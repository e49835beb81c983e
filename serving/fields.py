"""A request's body in OpenAI's form, checked field by field: what is unknown, unsupported or out of range is refused.

    ask = read(json_of(body), "chat", model="tiny", llama=llama, most=512)     # or raises Refused, with its status

Of a field that would change the answer, every value is either honoured or refused by name; `null` is the default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from llama import Llama
from llama.errors import InputError

MOST_STOPS = 4
USUAL_TOKENS = {"text": 16}  # OpenAI's; in a chat as many as a request may have
# Fields that are taken with values that change nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "suffix": ("",), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
    "store": (False,), "modalities": (["text"],), "service_tier": ("auto", "default"), "metadata": ({},),
}  # fmt: skip


class Refused(Exception):
    """A request that gets an error as its answer: status, message, and OpenAI's type, param and code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict[str, Any]:
        """The answer's body."""
        types = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}
        kind = types.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """A request that can be answered. settings: of `text.pieces`."""

    ids: list[int]
    settings: dict[str, Any]
    top: int | None = None  # likeliest tokens to list with their log-probabilities; None: no log-probabilities
    stream: bool = False
    with_usage: bool = False  # a last part of a stream counts the tokens
    opening: str = ""  # what an echoed text begins with


def json_of(body: bytes) -> dict[str, Any]:
    """Raises Refused for what is no JSON object."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number")

    try:
        content = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(content, dict):
        raise Refused(400, "the body must be a JSON object")
    return content


def read(body: dict[str, Any], form: str, model: str, llama: Llama, most: int) -> Ask:
    """What a body asks for. form: "text" (completions) or "chat". most: tokens that an answer may have.

    Raises Refused; InputError for a dialog that the model's chat format cannot express.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _check_model(body.pop("model", None), model)
    _drop_without_effect(body)
    ids, text = _dialog(body, llama) if form == "chat" else _prompt(body, llama)
    if len(ids) >= llama.max_seq_len:
        message = f"the prompt has {len(ids)} tokens; with its answer there is room for {llama.max_seq_len}"
        raise Refused(400, message, "messages" if form == "chat" else "prompt", "context_length_exceeded")
    name = "max_completion_tokens" if form == "chat" and "max_completion_tokens" in body else "max_tokens"
    settings = {
        "max_gen_len": _number(body, name, min(USUAL_TOKENS.get(form, most), most), 1, most, int),
        "temperature": _number(body, "temperature", 1.0, 0, 2),
        "top_p": _number(body, "top_p", 1.0, 1e-6, 1),
        "seed": _number(body, "seed", None, 0, (1 << 63) - 1, int),
        "stop": _stops(body),
    }
    stream = _flag(body, "stream")
    options = _take(body, "stream_options", {}, "an object", lambda value: isinstance(value, dict) and stream)
    with_usage = _flag(options := dict(options), "include_usage")
    top = _top(body, form)
    echo = form == "text" and _flag(body, "echo")
    if echo and top is not None:
        raise Refused(400, "echo with logprobs is not supported; leave one out", "echo")
    if unknown := [*body, *(f"stream_options.{name}" for name in options)]:
        raise Refused(400, f"the field {unknown[0]} is not known here; leave it out", unknown[0], "unknown_parameter")
    return Ask(ids, settings, top, stream, with_usage, text if echo else "")


def _check_model(name: Any, served: str) -> None:
    if name is None:
        raise Refused(400, f"model is missing; this server has {served}", "model")
    if name != served:
        message = f"the model {str(name)[:60]!r} does not exist; this server has {served}"
        raise Refused(404, message, "model", "model_not_found")


def _drop_without_effect(body: dict[str, Any]) -> None:
    body.pop("user", None)  # a name for statistics
    for name, neutral in WITHOUT_EFFECT.items():
        value = body.pop(name, neutral[0])
        if value not in neutral or isinstance(value, bool) != isinstance(neutral[0], bool):
            raise Refused(400, f"{name} is not supported here; leave it out", name, "unsupported_parameter")


def _prompt(body: dict[str, Any], llama: Llama) -> tuple[list[int], str]:
    """The ids of a text, alone or as a list's only element."""
    prompt = body.pop("prompt", None)
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(prompt, str):
        raise Refused(400, "prompt must be a text, or a list of one; token ids and several are not supported", "prompt")
    try:
        return llama.encode_prompt(prompt), prompt
    except InputError as error:
        raise Refused(400, str(error), "prompt") from None


def _dialog(body: dict[str, Any], llama: Llama) -> tuple[list[int], str]:
    messages = body.pop("messages", None)
    if not isinstance(messages, list):
        raise Refused(400, "messages must be a list of objects with role and content", "messages")
    dialog = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise Refused(400, f"messages[{i}] must have a role and a content, and nothing else", f"messages[{i}]")
        content = message["content"]
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message["role"], str):
            raise Refused(400, f"messages[{i}].content must be text, or parts of the type text", f"messages[{i}]")
        dialog.append({"role": message["role"], "content": content})
    try:
        return llama.formatter.encode_dialog_prompt(dialog), ""
    except InputError as error:
        raise Refused(400, str(error), "messages") from None


def _is_text_part(part: Any) -> bool:
    is_part = isinstance(part, dict) and set(part) == {"type", "text"}
    return is_part and part["type"] == "text" and isinstance(part["text"], str)


def _take(body: dict[str, Any], name: str, usual: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
    """A field's value, out of the body. Raises Refused for one that does not fit."""
    if name not in body:
        return usual
    value = body.pop(name)
    if not fits(value):
        raise Refused(400, f"{name}={str(value)[:60]} is out of range; use {expected}", name)
    return value


def _number(
    body: dict[str, Any], name: str, usual: Any, least: float, most: float, kind: type | tuple[type, ...] = (int, float)
) -> Any:
    def fits(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most

    return _take(body, name, usual, f"{'an integer' if kind is int else 'a number'} from {least:g} to {most}", fits)


def _flag(body: dict[str, Any], name: str) -> bool:
    return _take(body, name, False, "true or false", lambda value: isinstance(value, bool))


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    def fits(value: Any) -> bool:
        words = [value] if isinstance(value, str) else value
        return isinstance(words, list) and len(words) <= MOST_STOPS and all(isinstance(w, str) and w for w in words)

    stop = _take(body, "stop", [], f"a text, or a list of at most {MOST_STOPS}, none of them empty", fits)
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _top(body: dict[str, Any], form: str) -> int | None:
    """How many likeliest tokens are asked for: by a number of completions, a flag and a number of chats."""
    if form == "text":
        return _number(body, "logprobs", None, 0, 5, int)
    is_on, top = _flag(body, "logprobs"), _number(body, "top_logprobs", None, 0, 20, int)
    if top is not None and not is_on:
        raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return (top or 0) if is_on else None
