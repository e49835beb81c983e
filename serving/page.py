"""The page of demo.py, made with Gradio: four tabs on one model. Nothing is fetched from elsewhere, counted or shared.

A tab's function gives its work to the engine and shows what has come of it several times per second. It ends when the
visitor presses Stop or closes the page. What is shown comes from show.py, what is compared from room.py.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from fastapi.responses import HTMLResponse

from benchmarks.rows import read_folder
from data.prompts import COURSE_PROMPTS
from data.tiny import has_tokenizer
from data.tiny.corpus import SAMPLE_PROMPTS
from llama import cli
from llama.chat import Message
from llama.errors import InputError
from reports import page as results_page
from serving import show
from serving.engine import Job
from serving.room import KINDS, Marked, Room, Side

FONTS = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")
REFRESH = 0.1  # seconds
TOP = 5  # likeliest tokens that are shown
MOST_CHARACTERS = 4000  # of a text that is shown token by token
RESULTS = Path(__file__).parent.parent / "reports" / "results"
LEGEND = (
    '<p class="legend">Under each token the five likeliest at its place. With a draft: <span class="good">accepted'
    '</span> and <span class="bad">rejected</span> tokens of the draft, the others are the model\'s own.</p>'
)
Shown = AsyncIterator[tuple[Any, ...]]


def application(blocks: gr.Blocks, api_key: str | None = None) -> Any:
    """The page as an ASGI application. With an api_key, it is also the password, for any user name."""

    def is_known(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), api_key.encode())

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/results")(results)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=gr.themes.Base(font=FONTS[0], font_mono=FONTS[1]),
        css=show.STYLE.read_text(encoding="utf-8"),
        auth=None if api_key is None else is_known,
        auth_message="Any user name; the password is the API key.",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=True,
    )


@functools.cache
def results() -> HTMLResponse:
    """The results page, as `make page` writes it."""
    return HTMLResponse(results_page.render(read_folder(RESULTS)))


def page(room: Room, about: str, most_tokens: int, log: Callable[[str], None]) -> gr.Blocks:
    """The tabs. about: the model, in a line. most_tokens: of an answer."""
    with gr.Blocks(title="Llama", analytics_enabled=False) as blocks:
        gr.Markdown(f"**{about}**")
        Compare(room, most_tokens, log).build()
        Chat(room, most_tokens, log).build()
        Tokens(room, most_tokens, log).build()
        with gr.Tab("Results"):
            gr.HTML('<iframe src="/results" title="Measured results" loading="lazy"></iframe>', elem_id="results")

        def leave(request: gr.Request) -> None:
            room.forget(request.session_hash)

        blocks.unload(leave)
    blocks.queue(default_concurrency_limit=None, max_size=256)
    return blocks


class Tab:
    """What the tabs have in common. kind: of KINDS."""

    kind: str

    def __init__(self, room: Room, most_tokens: int, log: Callable[[str], None]) -> None:
        self.room, self.most_tokens, self.log = room, most_tokens, log
        self.tokenizer = room.llama.tokenizer
        self.prompt = (SAMPLE_PROMPTS if has_tokenizer(self.tokenizer) else COURSE_PROMPTS)[0]

    def owner(self, request: gr.Request) -> str:
        """The name under which the engine knows a visitor's work in this tab."""
        return f"{request.session_hash} {self.kind}"

    def stop(self, request: gr.Request) -> None:
        """A click on Stop: what has been generated stays."""
        self.room.engine.cancel(self.owner(request))

    def on_run(self, button: gr.Button, box: gr.Textbox, stop: gr.Button, inputs: list, outputs: list) -> None:
        """Start by the button or by Enter; clicks while it runs change nothing."""
        triggers = [button.click, box.submit]
        gr.on(triggers, self.run, inputs, outputs, show_progress="hidden", trigger_mode="once", **PRIVATE)
        stop.click(self.stop, show_progress="hidden", **PRIVATE)

    def encode(self, prompt: str, as_chat: bool) -> list[int]:
        """The ids of a prompt. Raises InputError for one that is empty or too long."""
        llama = self.room.llama
        message = [{"role": "user", "content": prompt}]
        ids = llama.formatter.encode_dialog_prompt(message) if as_chat else llama.encode_prompt(prompt)
        if len(ids) >= llama.max_seq_len:
            raise InputError(f"the prompt has {len(ids)} tokens; there is room for fewer than {llama.max_seq_len}")
        return ids

    def explain(self, error: Exception) -> str:
        """A line for the visitor, and for the terminal where he is not at fault."""
        line, code = cli.explain(error)
        if code in (2, 3):
            return show.note(line)
        self.log(f"page: {line}")
        return show.note("this failed; the terminal says why")


PRIVATE: dict[str, Any] = {"api_visibility": "private", "queue": True}


class Compare(Tab):
    """One prompt in two columns."""

    kind = KINDS[0]

    def build(self) -> None:
        """The tab's components."""
        names = list(self.room.comparisons)
        with gr.Tab("Side by side"):
            prompt = gr.Textbox(self.prompt, label="Prompt", lines=2, max_lines=8, elem_id="compare-prompt")
            with gr.Row():
                what = gr.Dropdown(names, value=names[0], label="Compare", min_width=240, elem_id="compare-what")
                n = gr.Slider(1, self.most_tokens, min(96, self.most_tokens), step=1, label="Tokens", min_width=240)
            as_chat = gr.Checkbox(False, label="As a chat message", visible=self.room.can_chat)
            with gr.Row():
                run, stop = gr.Button("Run", variant="primary", elem_id="compare-run"), gr.Button("Stop")
            status = gr.HTML(elem_id="compare-note")
            with gr.Row(elem_id="compare-sides"):
                sides = [gr.HTML(elem_id=f"compare-{name}") for name in ("left", "right")]
            chart = gr.HTML(elem_id="compare-chart")
            self.on_run(run, prompt, stop, [prompt, what, n, as_chat], [status, *sides, chart])

    async def run(self, prompt: str, what: str, n: int, as_chat: bool, request: gr.Request) -> Shown:
        """Both columns, until both texts have ended."""
        try:
            sides, found = self.room.comparisons[what], ([], [])
            ids = self.encode(prompt or "", as_chat)
            with ExitStack() as stack:
                works = [side.start(ids, int(n), TOP) for side in sides]
                jobs = [stack.enter_context(self.room.engine.run(work, self.owner(request))) for work in works]
                async for _ in reading(*zip(jobs, found, strict=True)):
                    yield self.shown(sides, found, len(ids))
            yield self.shown(sides, found, len(ids), have_ended=True)
        except Exception as error:
            yield self.explain(error), gr.skip(), gr.skip(), gr.skip()

    def shown(
        self, sides: Sequence[Side], found: Sequence[list[Marked]], n_prompt: int, have_ended: bool = False
    ) -> tuple[str, ...]:
        """Note, columns and chart."""
        first, words = show.difference(self.tokenizer, *found, have_ended)
        columns = (show.column(side, have, n_prompt, first) for side, have in zip(sides, found, strict=True))
        times = [(side.label, [one.piece.seconds for one in have]) for side, have in zip(sides, found, strict=True)]
        return (show.note(words), *columns, show.chart(times))


class Chat(Tab):
    """A conversation, whose cache is kept from turn to turn. Its messages are in the visitor's page."""

    kind = KINDS[1]

    def build(self) -> None:
        """The tab's components."""
        with gr.Tab("Chat"):
            if not self.room.can_chat:
                gr.Markdown("This model has no chat format; load one that is tuned to answer.")
                return
            box = gr.Chatbot(show_label=False, elem_id="chat", height=420, feedback_options=None, buttons=["copy"])
            status = gr.HTML(elem_id="chat-note")
            message = gr.Textbox("", label="Message", placeholder="Type a message, and Enter", elem_id="chat-message")
            with gr.Row():
                run = gr.Button("Send", variant="primary", elem_id="chat-send")
                stop, clear = (
                    gr.Button("Stop", elem_id="chat-stop"),
                    gr.Button("New conversation", elem_id="chat-clear"),
                )
            with gr.Accordion("Settings", open=False):
                system = gr.Textbox(value="", label="System text", elem_id="chat-system")
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0.6, step=0.05, label="Temperature")
                    top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p")
                    ends = gr.Textbox(
                        value="", label="Stop at", info="several are separated by a comma", elem_id="chat-ends"
                    )
            self.on_run(run, message, stop, [box, message, system, temperature, top_p, ends], [box, message, status])
            clear.click(lambda: ([], ""), None, [box, status], show_progress="hidden", **PRIVATE)

    async def run(
        self,
        history: list[dict[str, Any]],
        message: str,
        system: str,
        temperature: float,
        top_p: float,
        ends: str,
        request: gr.Request,
    ) -> Shown:
        """The answer as it comes; what the model sees is what the page shows."""
        try:
            stop = tuple(end for end in (ends or "").split(",") if end)
            settings = {"temperature": temperature, "top_p": top_p, "stop": stop, "max_gen_len": self.most_tokens}
            dialog = [{"role": "system", "content": system}] * bool((system or "").strip()) + turns(history)
            asked, said = [*turns(history), {"role": "user", "content": message or ""}], []
            work = self.answer(request.session_hash, dialog, message or "", settings, note := [])
            with self.room.engine.run(work, self.owner(request)) as job:
                async for _ in reading((job, said)):
                    yield [*asked, {"role": "assistant", "content": "".join(said)}], "", ""
            yield [*asked, {"role": "assistant", "content": "".join(said)}], "", show.note("".join(note))
        except Exception as error:
            yield gr.skip(), message, self.explain(error)

    def answer(
        self, visitor: str, dialog: list[Message], message: str, settings: dict[str, Any], note: list[str]
    ) -> Iterator[str]:
        """The worker's part of a turn. note: gets what to say at its end, wherever that is."""
        talk = self.room.conversation(visitor)
        talk.messages, talk.settings, before = dialog, settings, talk.session.n_computed
        try:
            yield from talk.answer(message)
        finally:
            computed, held = talk.session.n_computed - before, len(talk.session.tokens)
            note.append(f"{talk.n_drawn} tokens; {held - computed} of the {held} in the conversation were in the cache")
            note.append("; it is full: begin a new one" if talk.is_full else "")


def turns(history: list[dict[str, Any]]) -> list[Message]:
    """The dialog that a page shows. A question that got no answer is left out."""
    found: list[Message] = []
    for question, reply in itertools.pairwise(history):
        texts = [text_of(message["content"]) for message in (question, reply)]
        if (question["role"], reply["role"]) == ("user", "assistant") and all(texts):
            found += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return found


def text_of(content: Any) -> str:
    """The text of a message as Gradio has it: text, or parts of which some are text."""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(parts).strip()


class Tokens(Tab):
    """What the tokenizer makes of a text, and what the model might have said."""

    kind = KINDS[2]

    def build(self) -> None:
        """The tab's components."""
        with gr.Tab("Tokens"):
            text = gr.Textbox(self.prompt, label="Text", lines=2, max_lines=8, elem_id="tokens-text")
            found = gr.HTML(show.pieces_of(self.tokenizer, self.ids(self.prompt)), elem_id="tokens-pieces")
            text.change(self.pieces, text, found, show_progress="hidden", trigger_mode="always_last", **PRIVATE)
            with gr.Row():
                drafts = gr.Dropdown(
                    ["none", *self.room.drafts], value="none", label="Draft", min_width=240, elem_id="tokens-draft"
                )
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", min_width=240)
                n = gr.Slider(1, 64, min(24, self.most_tokens), step=1, label="Tokens")
            with gr.Row():
                run, stop = gr.Button("Generate", variant="primary", elem_id="tokens-run"), gr.Button("Stop")
            status, cards = gr.HTML(elem_id="tokens-note"), gr.HTML(elem_id="tokens-cards")
            gr.HTML(LEGEND)
            self.on_run(run, text, stop, [text, drafts, temperature, n], [status, cards])

    def ids(self, text: str) -> list[int]:
        """Of a text, without what a prompt begins with."""
        return self.tokenizer.encode(text[:MOST_CHARACTERS], bos=False, eos=False)

    def pieces(self, text: str) -> str:
        """What the tokenizer makes of a text while it is typed."""
        try:
            return show.pieces_of(self.tokenizer, self.ids(text or ""))
        except Exception as error:
            return self.explain(error)

    async def run(self, text: str, draft: str, temperature: float, n: int, request: gr.Request) -> Shown:
        """The tokens as they come."""
        try:
            found, side = [], Side("", lambda: self.room.llama, draft=self.room.drafts.get(draft))
            work = side.start(self.encode(text or "", as_chat=False), int(n), TOP, temperature=temperature)
            with self.room.engine.run(work, self.owner(request)) as job:
                async for _ in reading((job, found)):
                    words = f"{sum(one.is_accepted for one in found)} of {len(found)} tokens are the draft's"
                    yield show.note(words if side.draft else ""), show.likely(self.tokenizer, found)
        except Exception as error:
            yield self.explain(error), gr.skip()


async def reading(*jobs: tuple[Job[Any], list[Any]]) -> AsyncIterator[None]:
    """Fill a list with what each job yields, until all have ended; a turn of the loop every REFRESH seconds.

    Raises what a job raises. The piece that only says why a text ends is left out.
    """

    async def fill(job: Job[Any], into: list[Any]) -> None:
        async for item in job:
            if not isinstance(item, Marked) or item.piece.token is not None:
                into.append(item)

    tasks = {asyncio.create_task(fill(job, into)) for job, into in jobs}
    while tasks:
        done, tasks = await asyncio.wait(tasks, timeout=REFRESH)
        yield
        for task in done:
            task.result()
