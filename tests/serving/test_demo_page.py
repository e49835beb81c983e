"""The page as people use it, in the Chromium of this machine: each tab, two visitors, and what goes wrong."""

from __future__ import annotations

import asyncio
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TINY
from server import ask, serve, wait_until

from llama import checkpoint
from serving.engine import Engine
from serving.room import Room

PROMPT = "Once upon a time, there was a little fox named"
TABS = ("Side by side", "Chat", "Tokens", "Results")


@pytest.fixture(scope="module")
def site(tiny):
    """The page over the embedded model, as demo.py puts it together."""
    pages = pytest.importorskip("serving.page", reason="needs the packages of demo.py: make .venv/demo.stamp")
    engine, said, reached = Engine(4, 8), [], []
    patch, connect = pytest.MonkeyPatch(), socket.socket.connect
    patch.setattr(socket.socket, "connect", lambda self, place: reached.append(place) or connect(self, place))
    room = Room(tiny, engine, draft=checkpoint.load(TINY / "draft", tiny.model.dtype, tiny.device))

    async def made():
        return pages.application(pages.page(room, "tiny", 400, said.append))

    with ThreadPoolExecutor(1) as thread:  # where no loop runs, gradio makes one for each lock, and closes none
        page = thread.submit(asyncio.run, made()).result()
    with serve(tiny, page=page, engine=engine) as found:
        found.room, found.said = room, said
        yield found
    patch.undo()
    assert all(host == "127.0.0.1" for host, *_ in reached)  # the server asks nothing of anybody either


@pytest.fixture
def visit(browser, site, capfd):
    """Opens a page of a visitor; at the end no page has complained, asked for anything elsewhere or left work."""
    pages, messages, requests = [], [], []

    def open_page(tab: str = TABS[0], **settings):
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | settings)
        for event in ("console", "pageerror"):
            page.on(event, lambda message: messages.append(str(getattr(message, "text", message))))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(site.url)
        page.wait_for_selector("#compare-run")
        pages.append(page)
        if tab != TABS[0]:
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(300)
        return page

    yield open_page
    for page in pages:
        page.close()
    wait_until(lambda: site.engine.n_jobs == 0)
    assert not messages and not site.said and not [url for url in requests if not url.startswith((site.url, "data:"))]
    assert "Traceback" not in "".join(capfd.readouterr())


def wait(page, expression: str) -> None:
    page.wait_for_function(expression, timeout=60_000)  # a busy machine takes its time


def text(page, selector: str) -> str:
    return page.locator(selector).inner_text()


def choose(page, selector: str, name: str) -> None:
    page.click(f"{selector} input")
    page.get_by_role("option", name=name, exact=True).click()


def set_tokens(page, n: int) -> None:
    box = page.get_by_label("number input for Tokens").locator("visible=true")
    box.fill(str(n))
    box.press("Tab")


def generated(tiny, n: int = 96, **settings) -> str:
    tokens, _ = tiny.generate([tiny.encode_prompt(PROMPT)], n, temperature=0, **settings)
    return tiny.tokenizer.decode(tokens[0]).strip()


def test_side_by_side_streams_both_columns_and_says_that_they_are_equal(visit, tiny):
    page = visit()
    page.click("#compare-run")
    wait(page, "document.querySelector('#compare-left dd') && document.querySelector('#compare-right dd')")
    counts = [int(text(page, f"#compare-{side} dd >> nth=0")) for side in ("left", "right")]
    wait(page, "document.querySelector('#compare-note').innerText === 'equal: 96 tokens'")
    assert max(counts) < 96  # they were seen on the way
    for side in ("left", "right"):
        assert text(page, f"#compare-{side} .text").strip() == generated(tiny)
        facts = text(page, f"#compare-{side} dl")
        assert re.search(r"tokens/s\s*\d+\.\d", facts) and re.search(r"first token\s*\d+ ms", facts)
    assert "cache" in text(page, "#compare-left dl") and "activations" in text(page, "#compare-right dl")
    lines = page.locator("#compare-chart polyline")
    points = [lines.nth(i).get_attribute("points").split() for i in range(2)]
    assert list(map(len, points)) == [95, 95]
    heights = [sum(float(point.split(",")[1]) for point in line) / 95 for line in points]
    assert heights[0] > heights[1]  # further down, so less time


@pytest.mark.slow
@pytest.mark.parametrize("what", ["draft: lookup in the text", "draft: a smaller model", "32 or 4 bits"])
def test_other_comparisons(visit, tiny, site, what):
    page = visit()
    choose(page, "#compare-what", what)
    set_tokens(page, 48)
    page.click("#compare-run")
    if "draft" in what:
        wait(page, "document.querySelector('#compare-note').innerText === 'equal: 48 tokens'")
        assert "from the draft" in text(page, "#compare-right dl")
        assert text(page, "#compare-right .text").strip() == generated(tiny, 48)
        return
    wait(page, "[...document.querySelectorAll('.side dd:first-of-type')].length > 1")
    wait(page, "[...document.querySelectorAll('.side dl div:first-child dd')].every(e => e.innerText === '48')")
    left, right = (text(page, f"#compare-{side} .text") for side in ("left", "right"))
    note = text(page, "#compare-note")
    assert left.strip() == generated(tiny, 48)
    if left != right:  # the first token that differs is marked in both, with the margin
        assert re.fullmatch(r"first differ at token \d+: .* against .*, margin on the left .* nats", note)
        assert page.locator("mark").count() == 2
    else:
        assert note == "equal: 48 tokens"
    facts = [text(page, f"#compare-{side} dl") for side in ("left", "right")]
    weights = [float(re.search(r"weights\s*([\d.]+)", words)[1]) for words in facts]
    assert weights[1] < weights[0] / 2


def send(page, message: str) -> None:
    page.fill("#chat-message textarea, #chat-message input", message)
    page.click("#chat-send")


@pytest.mark.slow
def test_a_conversation_keeps_its_cache(visit, tiny):
    page = visit("Chat")
    page.get_by_text("Settings").locator("visible=true").click()
    temperature = page.get_by_label("number input for Temperature").locator("visible=true")
    temperature.fill("0")
    temperature.press("Tab")
    dialog = []
    for question in ("What do cows eat?", "What colour is the sky on a clear day?"):
        send(page, question)
        n = len(dialog) + 2
        wait(page, f"document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]').length === {n}")
        wait(page, "document.querySelector('#chat-note').innerText.includes('in the cache')")
        dialog.append({"role": "user", "content": question})
        answer = tiny.chat_completion([dialog], temperature=0, max_gen_len=400)[0]["generation"]
        assert text(page, "#chat [data-testid=bot] >> nth=-1").strip() == answer["content"].strip()
        dialog.append(answer)
        page.wait_for_timeout(200)
    cached, held = map(int, re.search(r"(\d+) of the (\d+) in the conv", text(page, "#chat-note")).groups())
    assert 20 < cached < held
    page.fill("#chat-system textarea, #chat-system input", "You answer in one word.")
    page.click("#chat-clear")
    wait(page, "document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]').length === 0")
    send(page, "Name two fruits.")
    wait(page, "document.querySelector('#chat-note').innerText.includes('in the cache')")


@pytest.mark.slow
def test_stop_ends_an_answer_and_the_conversation_goes_on(visit, site):
    page = visit("Chat")
    send(page, "Tell me a story about a mouse and a lantern.")
    wait(page, "document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]').length === 2")
    page.click("#chat-stop")
    wait(page, "document.querySelector('#chat-note').innerText.includes('in the cache')")
    assert site.engine.n_jobs == 0
    send(page, "What do cows eat?")
    wait(page, "document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]').length === 4")


@pytest.mark.slow
def test_tokens_shows_pieces_what_was_likely_and_what_a_draft_proposed(visit, tiny):
    page = visit("Tokens")
    ids = tiny.tokenizer.encode(PROMPT, bos=False, eos=False)
    assert page.locator("#tokens-pieces .chip i").all_inner_texts() == [str(i) for i in ids]
    page.fill("#tokens-text textarea", "Hi \U0001f98a!\n")
    wait(page, "document.querySelector('#tokens-pieces').innerText.includes('\u21b5')")
    page.fill("#tokens-text textarea", PROMPT)
    choose(page, "#tokens-draft", "a smaller model")
    page.click("#tokens-run")
    wait(page, "document.querySelectorAll('#tokens-cards .card:not(.rejected)').length === 24")
    said = "".join(page.locator("#tokens-cards .card:not(.rejected) > b").all_text_contents())
    assert said.replace("\u21b5", "\n").strip() == generated(tiny, 24)
    assert page.locator("#tokens-cards .accepted").count() > 3
    assert page.locator("#tokens-cards .card:not(.rejected) tr").count() == 24 * 5
    assert page.locator("#tokens-cards tr.taken").count() == 24  # greedy: the likeliest


@pytest.mark.slow
def test_results_shows_the_measured_tables_and_charts(visit):
    page = visit("Results")
    frame = page.frame_locator("#results iframe")
    frame.locator("table").first.wait_for(timeout=60_000)
    assert frame.locator("table").count() > 20 and frame.locator("figure svg").count() > 5
    assert "what was measured" in frame.locator("h1").inner_text()


@pytest.mark.slow
def test_two_visitors_at_once_each_get_their_own_text(visit, tiny):
    one, two = visit(), visit()
    two.fill("#compare-prompt textarea", "The little mouse")
    for page in (one, two):
        set_tokens(page, 48)
        page.click("#compare-run")
    expected = {}
    for page, prompt in ((one, PROMPT), (two, "The little mouse")):
        wait(page, "document.querySelector('#compare-note').innerText.startsWith('equal: ')")
        tokens, _ = tiny.generate([tiny.encode_prompt(prompt)], 48, temperature=0)
        expected[page] = tiny.tokenizer.decode(tokens[0]).strip()
    for page, said in expected.items():
        assert {text(page, f"#compare-{side} .text").strip() for side in ("left", "right")} == {said}


@pytest.mark.slow
def test_what_goes_wrong_is_a_line_and_nothing_hangs(visit, site):
    page = visit()
    for prompt, said in (("", "the prompt is empty"), ("fox " * 5000, "there is room for fewer than 512")):
        page.fill("#compare-prompt textarea", prompt)
        page.click("#compare-run")
        wait(page, f"document.querySelector('#compare-note').innerText.includes('{said}')")
    page.fill("#compare-prompt textarea", "\U0001f98a <b>&amp;\x01")
    for _ in range(10):
        page.click("#compare-run", no_wait_after=True)
    wait(page, "document.querySelector('#compare-note').innerText.startsWith('equal: ')")
    assert site.engine.n_jobs == 0
    page.get_by_role("tab", name="Chat").click()
    page.wait_for_timeout(300)
    page.click("#chat-send")
    wait(page, "document.querySelector('#chat-note').innerText.includes('is empty')")


@pytest.mark.slow
def test_a_closed_page_ends_its_generation_and_frees_its_cache(visit, site):
    page = visit()
    set_tokens(page, 400)
    page.click("#compare-run")
    wait_until(lambda: site.engine.n_jobs == 2)
    jobs = list(site.engine._jobs)
    page.close()
    wait_until(lambda: site.engine.n_jobs == 0)
    assert all(job.is_cancelled for job in jobs)
    page = visit("Chat")
    send(page, "What do cows eat?")
    wait(page, "document.querySelector('#chat-note').innerText.includes('in the cache')")
    assert site.room._conversations
    page.close()
    wait_until(lambda: not site.room._conversations)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_a_phone(visit, scheme):
    page = visit(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.click("#compare-run")
    wait(page, "document.querySelector('#compare-note').innerText.startsWith('equal: ')")
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('.gradio-container')).color,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    dark_ink, dark_paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (ink, paper))
    assert (dark_ink, dark_paper) == (scheme == "light", scheme == "dark")


def test_the_page_takes_and_gives_no_files_and_keeps_to_itself(site):
    upload = {"content_type": "multipart/form-data; boundary=x", "body": b"--x--"}
    for path in ("/gradio_api/upload", "//gradio_api/upload", "/gradio_api/%75pload", "/upload"):
        assert ask(site, path=path, **upload)[0] in (404, 405)
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/docs"):
        status, _, content = ask(site, "GET", path)
        assert status in (200, 404) and "root:" not in str(content)
    assert ask(site, "GET", "/", host="evil.example")[0] == 403
    assert ask(site, path="/gradio_api/queue/join", body=b" " * 300_000)[0] == 413
    assert ask(site, path="/gradio_api/queue/join", origin="http://evil.example", body={})[0] == 403
    status, headers, content = ask(site, "GET", "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert "fonts.g" not in content["text"] and "cdn" not in content["text"].lower()


@pytest.mark.slow
def test_with_a_key_the_page_asks_for_it(browser, tiny):
    pages = pytest.importorskip("serving.page")
    engine = Engine()
    app = pages.application(pages.page(Room(tiny, engine), "tiny", 64, print), "sesame")
    with serve(tiny, page=app, engine=engine, api_key="sesame") as site:
        page = browser.new_page()
        page.goto(site.url)
        for password, is_right in (("wrong", False), ("sesame", True)):
            page.fill("input[type=text], textarea", "me")
            page.fill("input[type=password]", password)
            page.get_by_role("button", name="Login").click()
            page.wait_for_timeout(1000)
            if is_right:
                page.wait_for_selector("#compare-run")
            assert (page.locator("#compare-run").count() == 1) == is_right
        page.close()
