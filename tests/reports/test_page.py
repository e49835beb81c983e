"""The results page says what the rows say and nothing else, and its replay plays what was recorded."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

import benchmark_finetuning
from benchmarks.rows import Row, read_folder
from llama import cli
from reports import build, charts, render, tables
from reports import page as results_page
from reports.training_tables import CHANGED, LINKS, SLOWER

RESULTS = ROOT / "reports" / "results"
VOID = {"meta", "link", "input", "wbr"}


class Element:
    """A piece of a parsed page."""

    def __init__(self, tag: str, attrs: dict[str, str], parent: Element | None) -> None:
        self.tag, self.attrs, self.parent, self.children = tag, attrs, parent, []

    def all(self, tag: str | None = None, **attrs: str) -> list[Element]:
        """Elements below, by tag and by attributes (class: one of the names); in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                names = child.attrs.get("class", "").split()
                fits = all(
                    value in names if key == "class_" else child.attrs.get(key.replace("_", "-")) == value
                    for key, value in attrs.items()
                )
                found += [child] if fits and tag in (None, child.tag) else []
                found += child.all(tag, **attrs)
        return found

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def words(self, without) -> str:
        """The text, without that of elements that `without` holds true of."""
        parts = [child if isinstance(child, str) else child.words(without) for child in self.children]
        return "" if without(self) else " ".join(parts)


class Page(HTMLParser):
    """An HTML file as a tree; fails where elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.top = self.at = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.top, f"<{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"<{self.at.tag}> ends as </{tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def made_row(experiment: str, cell: dict, metrics: dict, **changes) -> dict:
    """A row as bench.py writes it; metrics are medians, or lists of median, least and most."""
    spreads = {}
    for name, value in metrics.items():
        median, low, high = value if isinstance(value, list) else (value, value, value)
        spreads[name] = {"median": median, "min": low, "max": high, "n": 3 if isinstance(value, list) else 1}
    about = {"device": {"kind": "cpu", "name": "A CPU"}, "dtype": "float32", "threads": 2, "torch": "2.13.0"}
    about |= {"commit": "abc", "seed": 1, "command": "python x.py", "time": "2026-11-22T10:00:00+00:00"}
    return {"experiment": experiment, "cell": cell, "metrics": spreads, **about, **changes}


def steps(peak: float = 200.0) -> list[dict]:
    """Rows of every table of fine-tuning: plain and lean, with accumulation and without, a peer, one out of memory."""
    kinds = dict.fromkeys(("weights", "optimizer", "gradients", "copies", "activations", "temporary"), 10.0)
    rows = []
    cells = [cell for name in ("table2", "course", "lean", "half") for cell in benchmark_finetuning.SETS[name]]
    for i, cell in enumerate(dict.fromkeys([*cells, *benchmark_finetuning.PEERS[1:]])):
        known = {**kinds, "weights": 100 + 40.5 * cell.amp, "gradients": 100 - 99.0 * cell.lora}
        known |= {"activations": 40.25 * cell.batch_size / (1 + 9 * cell.checkpointing)}
        metrics = {f"{kind}_{when}_mb": size for kind, size in known.items() for when in ("at_peak", "most")}
        metrics |= {"step_s": [1 + i / 7, 1.0, 9.5], "floor_step_s": 0.7, "step_over_floor_x": (1 + i / 7) / 0.7}
        metrics |= {"peak_memory_mb": peak + i, "expected_peak_memory_mb": peak, "step_tflop": 1.0 + cell.checkpointing}
        if cell.lean and cell.amp:
            metrics = {}
        place = {"model": "x", **vars(cell), "seq_len": 64, "memory_limit_gb": None}
        rows.append(made_row("benchmark_finetuning", place, metrics))
    return rows


def recordings(tokens: int = 12, slow: float = 3.0, text: bool = True, seconds: float = 0.05) -> list[dict]:
    rows = []
    for use_cache in (True, False):
        at = [round(seconds * (i + 1) * (1 if use_cache else slow), 4) for i in range(tokens)]
        cell = {"model": "tiny" if text else "big", "use_cache": use_cache, "batch_size": 1, "decoding": "eager"}
        cell |= {"prompt": "A < B" if text else None, "input_len": 3, "output_len": tokens}
        series = {"token_s": at} | ({"text": [f" w{i}" for i in range(tokens)]} if text else {})
        rows.append(made_row("replay", cell, {"replayed_s": at[-1], "runtime_s": at[-1]}, series=series))
    return rows


def losses() -> list[dict]:
    curve = [[i, 3 / i] for i in range(1, 30)]
    row = made_row("finetuning", {"model": "tiny", "preset": "p"}, {"held_out_loss_nats": 0.5, "step_s": 0.25})
    return [{**row, "series": {"loss_nats": curve, "held_out_loss_nats": [[0, 2.5], [29, 0.5]]}}]


def rungs() -> list[dict]:
    """A ladder with a row that changes another, one that ran out of memory, and one that speculates."""
    rows = []
    for i, (name, changes) in enumerate([("no cache", None), ("KV cache", 1), ("int8", 2), ("lookup", 2)], 1):
        cell = {"model": "x", "row": i, "name": name, "changes": changes, "text": "its own", "weights": "whole"}
        cell |= {"prompts": 1, "input_len": 3, "output_len": 64, "draft": "lookup" if name == "lookup" else None}
        metrics = {"runtime_s": [12.0 / i, 1.0, 13.0], "weights_mb": 99.5, "peak_memory_mb": 120.0 + i}
        metrics |= {"perplexity_x": 1.5} | ({"tokens_equal": 64} if changes else {})
        metrics |= {"acceptance": 0.75, "tokens_a_round": 1.5} if name == "lookup" else {}
        rows.append(made_row("ladder", cell, {} if name == "int8" else metrics, series={"test": [f"tests/t.py::t{i}"]}))
    return rows


def generations() -> list[dict]:
    """Plain weights beside quantized ones, one of which ran out of memory."""
    cell = {"model": "x", "engine": "llama", "batch_size": 1, "use_cache": True, "input_len": 8, "output_len": 4}
    cell |= {"decoding": "native", "memory_limit_gb": None}
    metrics = {"ttft_s": 0.5, "tpot_s": 0.01, "peak_memory_mb": 99.5}
    return [
        made_row("formats", {**cell, "weights": "bf16"}, {**metrics, "runtime_s": [3.0, 2.0, 4.0]}),
        made_row("formats", {**cell, "weights": "int8"}, {**metrics, "runtime_s": [1.5, 1.0, 2.5]}),
        made_row("formats", {**cell, "weights": "int4"}, {}),
    ]


def operations() -> list[dict]:
    """A kernel beside its plain twin, and a plain one that this machine has no kernel for."""
    cell = {"model": "x", "part": "decode", "operation": "product", "shape": "x [1, 64]", "weights": "int8", "rows": 1}
    cell |= {"equality": "test_it"}
    ours = {"run_s": [0.002, 0.001, 0.003], "plain_over_kernel_x": 2.5, "moved_gb_s": 20.5, "of_reading_x": 0.75}
    twin = {"run_s": [0.005, 0.004, 0.006]}
    return [
        made_row("kernels", {**cell, "engine": "kernel"}, ours),
        made_row("kernels", {**cell, "engine": "plain"}, twin),
        made_row("kernels", {**cell, "engine": "plain", "part": "train"}, twin),
    ]


def cuts() -> list[dict]:
    """Two shares, of which one way was not measured for the larger; the dense model; and the speed of both sizes."""
    place, rows = {"model": "x", "method": "dimensions", "batch_size": 4, "lr": 0.001}, []
    for part, share, loss in (("iterative", 0.5, 0.75), ("one-shot", 0.5, 0.625), ("iterative", 0.25, 0.5)):
        metrics = {"parameters": 1000 * (1 - share), "stored_mb": 2 * (1 - share), "zeros": 0, "loss_nats": loss}
        rows.append(made_row("pruning", {**place, "part": part, "share": share, "steps": 12}, metrics))
    dense = {**place, "part": "dense", "method": "none", "share": 0.0, "steps": 0}
    rows.append(made_row("pruning", dense, {"parameters": 1000, "stored_mb": 2.0, "zeros": 0, "loss_nats": 0.375}))
    for share, step in ((0.5, 0.002), (0.0, 0.003)):
        metrics = {"parameters": 1000 * (1 - share), "stored_mb": 2 * (1 - share), "ttft_s": 0.5 - share / 2}
        metrics |= {"tpot_s": [step, step / 2, step * 2], "floor_tpot_s": step / 2}
        rows.append(
            made_row("pruning", {"model": "x", "part": "speed", "method": "dimensions", "share": share}, metrics)
        )
    return rows


def attentions() -> list[dict]:
    """Both forms at two lengths; of the longer one the textbook does not fit."""
    place, rows = {"model": "x", "heads": 4, "kv_heads": 1, "textbook_limit_gb": 0.5}, []
    for positions, engine, second in ((64, "textbook", 0.004), (64, "fused", 0.002), (128, "fused", 0.0075)):
        metrics = {"forward_s": [second, second / 2, second * 2], "backward_s": 3 * second, "forward_error_x": 2.5e-7}
        metrics |= {"forward_peak_mb": 1000 * second, "backward_peak_mb": 1500 * second, "backward_error_x": 1.25e-6}
        rows.append(made_row("attention", {**place, "positions": positions, "engine": engine}, metrics))
    return [*rows, made_row("attention", {**place, "positions": 128, "engine": "textbook"}, {})]


def contexts() -> list[dict]:
    """A context with each cache and a peer, and the memory of fewer layers."""
    place, rows = {"model": "x", "steps": 8, "n_layers": 16, "context": 64}, []
    for engine, cache, step in (
        ("llama", "bfloat16", 0.02),
        ("llama", "int8", 0.01),
        ("transformers", "bfloat16", 0.05),
    ):
        metrics = {"tpot_s": [step, step / 2, step * 2], "ttft_s": 100 * step}
        metrics |= {"floor_tpot_s": 0.01, "tpot_over_floor_x": 100 * step} if engine == "llama" else {}
        rows.append(made_row("context", {**place, "engine": engine, "cache": cache}, metrics))
    few = {**place, "n_layers": 2, "context": 128, "engine": "llama", "cache": "int8"}
    return [made_row("context", few, {"peak_memory_mb": 123.0}), *rows]


def strange() -> list[dict]:
    """Experiments that the page has no section for."""
    nasty = {"model": "</td><script>alert(1)</script>", "layers": [0, 3], "bits": 4, "note": None}
    rows = [
        made_row("other", {**nasty, "bits": bits}, {"perplexity": 10.0 / bits, "step_s": 0.00123}) for bits in (4, 8)
    ]
    return [*rows, made_row("other", {**nasty, "bits": 16}, {})]


def write(folder, rows: list[dict]):
    """Rows as files of a results folder."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        with (folder / f"{row['experiment']}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module", params=["committed", "every kind"])
def results(request, tmp_path_factory):
    if request.param == "committed":
        return RESULTS
    return write(
        tmp_path_factory.mktemp("page") / "results",
        [
            *steps(),
            *recordings(),
            *recordings(text=False),
            *losses(),
            *rungs(),
            *generations(),
            *operations(),
            *cuts(),
            *attentions(),
            *contexts(),
            *strange(),
        ],
    )


@pytest.fixture(scope="module")
def rendered(results) -> str:
    return results_page.render(read_folder(results))


@pytest.fixture(scope="module")
def page(rendered) -> Element:
    """The parsed page, which the tests only read."""
    return Page(rendered).top


def value_of(folder, source: str) -> float:
    """What a source on the page stands for, looked up in the files by the rules that the page gives."""
    place = re.compile(r"([\w.-]+):(\d+) ([^\s()]+)")
    return eval(place.sub(lambda match: repr(field_of(folder, *match.groups())), source), {"exp": math.exp})


@functools.cache
def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def field_of(folder, file: str, line: str, path: str) -> float:
    found = rows_of(folder / file)[int(line) - 1]
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def is_rounding(shown: str, value: float) -> bool:
    """Whether a number as it is written is the value, up to half of its last place."""
    digits = shown.replace(",", "")
    place = 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) - value) <= place / 2 * (1 + 1e-9) + 1e-12


def source_of(figure: Element) -> str:
    """Where a figure stands, which its title begins with."""
    return figure.attrs["title"].split(" (median of")[0]


def test_every_figure_is_what_its_row_says(results, page):
    figures = page.all("data")
    assert len(figures) > 50
    for figure in figures:
        source, scale = source_of(figure), float(figure.attrs.get("data-scale", 1))
        assert is_rounding(figure.text(), value_of(results, source) * scale), (source, figure.text())
        spread = re.search(r"median of (\d+), (\S+) to (\S+)\)", figure.attrs.get("title", ""))
        if spread is not None:
            for shown, name in zip(spread.groups(), ("n", "min", "max"), strict=True):
                value = value_of(results, f"{source.rpartition('.')[0]}.{name}")
                assert float(shown) == pytest.approx(value, rel=1e-5), source


def test_no_other_number_is_on_the_page(results, page):
    """Every number in the text outside of figures stands literally in some row, is a row's place, or is in a name."""

    def is_checked_elsewhere(element: Element) -> bool:
        is_tick = "tick_" in element.attrs.get("id", "")  # round numbers beside an axis
        return element.tag in ("data", "script", "style") or is_tick

    named = f"Llama 3.2 1B; Table 1 2 3; P100; 16 bits; 1x 4x; 1 x 2 to 2 x 1; 1.00 = limit; 95 %; {CHANGED:.0%}"
    named += "".join(f"; {link} {rate:g};" for link, rate in LINKS.items())
    measured = "".join(path.read_text() for path in results.glob("*.jsonl")) + named + f"{SLOWER:.0%}"
    literal = set(re.findall(r"\d+(?:[.,]\d+)*", measured))
    found = re.findall(r"\d+(?:[.,]\d+)*", page.words(is_checked_elsewhere))
    assert len(found) > 20
    assert not set(found) - literal


def test_every_row_is_on_the_page(results, rendered):
    rows = read_folder(results)
    for row in (row for found in rows.values() for row in found if row.metrics):
        assert f"{row.file}:{row.line} " in rendered
    for row in (row for found in rows.values() for row in found):
        for name in ("commit", "command", "torch"):
            assert row.data[name] in rendered
        assert row.data["device"]["name"] in rendered and row.data["time"][:10] in rendered


def test_charts_are_those_of_the_rows(results, rendered, page):
    """Every curve, bar and mark that reports/charts.py draws, in the page's colours; what they are: test_charts.py."""
    rows = read_folder(results)
    shown = [set(path.attrs["d"] for path in svg.all("path")) for svg in page.all("svg")]
    drawn = [
        {path.attrs["d"] for path in Page(render.svg(figure)).top.all("path")}
        for anchor, _, experiment, *_ in results_page.SECTIONS
        if experiment in charts.CHARTS and anchor != "table-2"
        for figure in charts.CHARTS[experiment](rows.get(experiment, [])).values()
    ]
    assert shown == drawn and len(drawn) >= 6
    bodies = re.findall(r"(?s)<svg.*?</svg>", rendered)
    assert not any(colour in svg for colour in results_page.COLOURS for svg in bodies)


def test_replays_are_the_recorded_runs(results, page):
    assert len(page.all(class_="replay")) == 2
    assert [side.attrs["data-cache"] for side in page.all(class_="side")] == ["on", "off"] * 2
    assert [title.text() for title in page.all("h4")] == ["with KV cache", "without"] * 2
    for side in page.all(class_="side"):
        (tokens,) = [element for element in side.all() if "data-series" in element.attrs]
        recorded = value_of(results, tokens.attrs["data-series"])
        spans = [span for span in tokens.all("span") if "data-s" in span.attrs]
        assert [float(span.attrs["data-s"]) for span in spans] == recorded
        if "text" in tokens.attrs["class"]:
            source = tokens.attrs["data-series"].replace("token_s", "text")
            assert [span.text() for span in spans] == value_of(results, source)
        use_cache = value_of(results, f"{tokens.attrs['data-series'].split()[0]} cell.use_cache")
        assert use_cache == (side.attrs["data-cache"] == "on")


def test_arrows_are_those_of_the_benchmark(tmp_path):
    rows = steps()
    page = Page(results_page.render(read_folder(write(tmp_path / "r", rows)))).top
    (section,) = (part for part in page.all("section") if part.attrs["aria-labelledby"] == "table-2")
    shown = "".join(sign for cell in section.all("td") for sign in re.findall("^[=↑↓]", cell.text()))
    found = tables.table_2([Row("r", i, row) for i, row in enumerate(rows, 1)])
    expected = re.findall(r"(?<=\| )[=↑↓]", render.markdown(found))
    assert shown == "".join(expected) and len(shown) == 7 * 3 + 7 * 4 and len(set(shown)) == 3


def test_table_3_has_every_combination_and_x_where_memory_ran_out(tmp_path):
    page = Page(results_page.render(read_folder(write(tmp_path / "r", steps())))).top
    plain, lean = (
        [[cell.text() for cell in line.all() if cell.tag in ("th", "td")] for line in table.all("tbody")[0].all("tr")]
        for table in page.all("table")
        if re.search("per sequence(, lean)?$", table.all("caption")[0].text())
    )
    assert len({tuple(line[:3]) for line in plain}) == len({tuple(line[:3]) for line in lean}) == len(plain) == 8
    assert all((line[3] == "x") == (line[1] == "yes") for line in lean) and "x" not in {line[3] for line in plain}


def section_of(tmp_path, rows: list[dict], name: str) -> tuple[Element, list[list[str]]]:
    """A section of the page of these rows, and the texts of its first table, line by line."""
    page = Page(results_page.render(read_folder(write(tmp_path / "r", rows)))).top
    section = next(part for part in page.all("section") if part.attrs["aria-labelledby"] == name)
    lines = section.all("tbody")[0].all("tr")
    return section, [[cell.text() for cell in line.all() if cell.tag in ("th", "td")] for line in lines]


def test_quantized_weights_stand_beside_plain_ones(tmp_path):
    _, lines = section_of(tmp_path, generations(), "formats")
    assert [line[0].split(", ")[-1] for line in lines] == ["bf16", "int8", "int4"]
    assert [line[-1] for line in lines] == ["1.00", "0.50", "x"] and lines[2][1] == "x"


def test_kernels_stand_beside_their_twins(tmp_path):
    section, lines = section_of(tmp_path, operations(), "kernels")
    assert len(section.all("table")) == 2 and len(lines) == 1
    assert lines[0][0] == "product, int8" and lines[0][2].startswith("2") and lines[0][3].startswith("5")
    assert lines[0][4:] == ["2.50", "-", "-", "20.5", "0.75", "test_it"]


def test_ways_of_pruning_stand_beside_each_other(tmp_path):
    """In order of their share whatever that of the rows is, what was not measured as a dash, ratios to the whole."""
    section, lines = section_of(tmp_path, cuts(), "pruning")
    dense, *cut = lines
    assert [line[0] for line in cut] == ["0.25", "0.5"]
    assert [line[5:] for line in cut] == [["-", "-", "-", "-", "0.500"], ["-", "-", "-", "0.625", "0.750"]]
    assert dense[:2] == ["0", "0"] and set(dense[5:]) == {"0.375"}
    speed = [[cell.text() for cell in line.all("td")] for line in section.all("tbody")[1].all("tr")]
    assert [(line[-4], line[-2]) for line in speed] == [("1.00", "1.00"), ("2.00", "1.50")]
    assert len(section.all("svg")) == 3


def test_contexts_stand_beside_the_peer(tmp_path):
    """The whole model first; times as fast as transformers; of fewer layers the memory alone."""
    section, lines = section_of(tmp_path, contexts(), "context")
    engines = ["llama, bf16 cache", "llama, int8 cache", "transformers, bf16 cache", "llama, int8 cache"]
    assert [line[2] for line in lines] == engines
    assert [line[5] for line in lines] == ["2.50", "5.00", "-", "-"] == [line[8] for line in lines]
    assert [line[7] for line in lines] == ["2.00", "1.00", "-", "-"] and lines[3][3:] == ["-"] * 6 + ["123"]
    assert len(section.all("svg")) == 1


def test_attention_stands_beside_the_textbook_of_its_length(tmp_path):
    section, lines = section_of(tmp_path, attentions(), "attention")
    assert [line[:3] for line in lines] == [
        [n, "fp32", engine] for n in ("64", "128") for engine in ("textbook", "fused")
    ]
    assert [line[4] for line in lines] == ["-", "2.00", "-", "x"] and [line[3] for line in lines][2:] == ["x", "7.50"]
    assert lines[0][6] == "0.25" and len(section.all("svg")) == 2


def test_the_ladder_stands_beside_the_row_that_it_changes(tmp_path):
    section, lines = section_of(tmp_path, rungs(), "ladder")
    assert [line[:2] for line in lines] == [
        ["1. no cache", "-"], ["2. KV cache", "1"], ["3. int8", "2"], ["4. lookup", "2"]
    ]  # fmt: skip
    assert [line[5] for line in lines] == ["-", "2.00", "x", "2.00"]
    assert lines[2][3] == "x" and [line[-1] for line in lines] == [f"t{i}" for i in range(1, 5)]
    (draft,) = section.all("tbody")[1].all("tr")
    assert [cell.text() for cell in draft.all("td")][-2:] == ["0.75", "1.50"]


def test_without_rows_it_says_not_measured(tmp_path):
    page = Page(results_page.render(read_folder(write(tmp_path / "empty", [])))).top
    sections = page.all("section")
    assert len(sections) == len(results_page.SECTIONS) + 1
    assert all("Not measured yet." in section.text() for section in sections)
    assert not page.all("table") and not page.all("svg") and "Nothing has been measured yet." in page.text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:-9], r"x.jsonl:2: "),
        (lambda line: "[]", "x.jsonl:2: it is not a JSON object"),
        (lambda line: line.replace('"median": 2.0', '"median": NaN'), "x.jsonl:2: NaN is not a number"),
        (lambda line: line.replace('"median": 2.0', '"median": "2"'), "x.jsonl:2: metrics.step_s is not"),
        (lambda line: line.replace('"n": 1', '"m": 1'), "x.jsonl:2: metrics.step_s is not"),
        (lambda line: line.replace('"commit"', '"comit"'), "x.jsonl:2: commit is missing"),
        (lambda line: line.replace('"name": "A CPU"', '"name": 5'), "x.jsonl:2: device has no kind or no name"),
        (lambda line: line[:-1] + ', "series": [1]}', "x.jsonl:2: series is not lists by name"),
        (lambda line: "", "x.jsonl:2: "),
    ],
)
def test_a_broken_row_ends_it_with_one_line(change, message, tmp_path, monkeypatch, capsys):
    good = json.dumps(made_row("x", {"model": "x"}, {"step_s": 2.0}))
    folder = write(tmp_path / "r", [])
    (folder / "x.jsonl").write_text(f"{good}\n{change(good)}\n")
    code, _, err = called(monkeypatch, capsys, f"--results={folder}", f"--page={tmp_path / 'page.html'}")
    assert code == 2 and len(err.splitlines()) == 1 and re.search(message, err)
    assert err.startswith("error: broken row in") and "; restore the line or remove it" in err
    assert not (tmp_path / "page.html").exists()


def called(monkeypatch, capsys, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["build.py", "page", *flags])
    with pytest.raises(SystemExit) as end:
        cli.run(build.COMMANDS)
    return end.value.code, *capsys.readouterr()


def test_a_folder_or_a_page_that_is_not_there(tmp_path, monkeypatch, capsys):
    code, _, err = called(monkeypatch, capsys, f"--results={tmp_path / 'none'}")
    assert code == 2 and "does not exist; pass --results" in err
    folder = write(tmp_path / "r", [])
    (tmp_path / "file").touch()
    code, _, err = called(monkeypatch, capsys, f"--results={folder}", f"--page={tmp_path / 'file' / 'page.html'}")
    assert code == 3 and "cannot write" in err


def test_the_newest_row_of_a_cell_counts(tmp_path):
    old, new = (made_row("other", {"bits": 4}, {"step_s": value}) for value in (111.0, 222.0))
    text = results_page.render(read_folder(write(tmp_path / "r", [old, new])))
    assert ">222<" in text and ">111<" not in text


def test_the_page_is_one_file_and_what_rows_hold_is_no_markup(rendered, page):
    assert not re.search(r"https?:|@import|url\((?!#)|<(img|iframe|object)", rendered)
    links = [element.attrs["href"] for element in page.all() if "href" in element.attrs]
    anchors = {f"#{element.attrs['id']}" for element in page.all() if "id" in element.attrs}
    assert set(links) <= anchors | {"data:,"} and not any("src" in element.attrs for element in page.all())
    assert len(anchors) == len([element for element in page.all() if "id" in element.attrs])
    assert len(page.all("script")) == 1 and "alert(1)" not in page.all("script")[0].text()


def test_charts_and_tables_can_be_read_without_seeing_them(page):
    by_id = {element.attrs["id"]: element for element in page.all() if "id" in element.attrs}
    for svg in page.all("svg"):
        assert svg.attrs["role"] == "img"
        named = svg.attrs["aria-labelledby"].split()
        assert all(by_id[name].text() for name in named) and len(named) == 2
    for table in page.all("table"):
        assert table.all("caption")[0].text()
        assert all(cell.attrs["scope"] for cell in table.all("th"))
    shown = [source_of(figure) for figure in page.all("data")]
    for svg in page.all("svg"):  # what a chart shows is in a table too
        sources = {element.attrs["data-from"] for element in svg.all() if "data-from" in element.attrs}
        rows = {source.split(" ")[0] for source in sources}
        assert all(any(row in source for source in shown) for row in rows)


@pytest.mark.parametrize("results", ["committed"], indirect=True)
def test_the_committed_page_is_made_of_the_committed_rows(rendered):
    assert build.PAGE.read_text(encoding="utf-8") == rendered, "run make page"
    assert build.PAGE.stat().st_size < 1.2e6


# In a browser

DONE = "document.querySelector('#replay-1 [data-cache={}]').dataset.state === 'done'"
# Tokens as they appear on each side, and when each side was done, read after every change of the page.
WATCH = """
window.seen = {on: [], off: []}; window.ended = [];
new MutationObserver(() => {
  for (const side of document.querySelectorAll('#replay-1 .side')) {
    const name = side.dataset.cache, tokens = [...side.querySelectorAll('[data-s]')];
    const isThere = (token) => getComputedStyle(token).visibility === 'visible';
    const there = tokens.map((token, i) => isThere(token) ? i : -1).filter((i) => i >= 0);
    if (there.length !== seen[name].at(-1)?.length) seen[name].push(there);
    if (side.dataset.state === 'done' && seen[name].length > 1 && !ended.includes(name)) ended.push(name);
  }
}).observe(document.querySelector('#replay-1'), {subtree: true, attributes: true});
"""


def test_a_click_replays_tokens_in_order_and_the_cached_side_ends_first(browser, tmp_path):
    """And the keyboard does what the mouse does."""
    folder = write(tmp_path / "r", [*recordings(tokens=8, seconds=0.02, slow=5), *recordings(text=False)])
    file = tmp_path / "page.html"
    file.write_text(results_page.render(read_folder(folder)))
    page, messages, requests = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    for event in ("console", "pageerror"):
        page.on(event, lambda message: messages.append(str(message)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    label = "document.querySelector('#replay-1 .toggle').textContent"
    assert page.evaluate(DONE.format("on")) and page.evaluate(label) == "Play"
    page.evaluate(WATCH)
    page.click("#replay-1 .toggle")
    assert page.evaluate(label) == "Pause" and not page.evaluate(DONE.format("off"))
    page.wait_for_function(DONE.format("off"))
    seen, ended = page.evaluate("seen"), page.evaluate("ended")
    assert ended == ["on", "off"] and page.evaluate(label) == "Play"
    for there in seen.values():
        assert all(shown == list(range(len(shown))) for shown in there), "a token before the one that it follows"
        counts = [len(shown) for shown in there]
        assert counts == sorted(counts) and counts[0] < 8 and counts[-1] == 8
    assert len(seen["off"]) > 4  # it was played, not shown at once
    # Keyboard: restart, pause with Space, and another speed with an arrow.
    page.focus("#replay-1 .restart")
    page.keyboard.press("Enter")
    page.focus("#replay-1 .toggle")
    page.keyboard.press("Space")
    assert page.evaluate(label) == "Play" and not page.evaluate(DONE.format("off"))
    time = "document.querySelector('#replay-1 [data-cache=off] .time').textContent"
    paused = page.evaluate(time)
    for key in ("Tab", "Tab", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("document.querySelector('#replay-1 input:checked').value") == "4"
    assert page.evaluate(time) == paused
    page.click("#replay-1 .toggle")
    page.wait_for_function(DONE.format("off"))
    assert messages == []
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_or_overflows(browser, tmp_path, width):
    rows = [json.loads(line) for path in RESULTS.glob("*.jsonl") for line in path.read_text().splitlines()]
    file = tmp_path / "page.html"
    file.write_text(results_page.render(read_folder(write(tmp_path / "r", [*steps(), *losses(), *strange(), *rows]))))
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(wide + ".map(e => [e.ariaLabel, e.scrollWidth, e.clientWidth])") == []
        beyond = (
            "[...document.querySelectorAll('main *')].filter(e => {const r = e.getBoundingClientRect(); "
            "return r.width && !e.closest('thead') && (r.right > innerWidth || r.left < 0)})"
            ".map(e => e.outerHTML.slice(0, 120))"
        )
        assert page.evaluate(beyond) == []
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        dark_ink, dark_paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (ink, paper))
        assert (dark_ink, dark_paper) == (scheme == "light", scheme == "dark")
