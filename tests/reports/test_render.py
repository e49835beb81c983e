"""Markdown, HTML and Typst show the same texts; hostile text stays text; a chart has the same bytes each time."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure as Plot
from support import measured_row, tables_of_committed_rows

from llama.errors import EnvironmentFailure
from reports import render
from reports.cells import Figure, Table, figure, spread

TABLES = tables_of_committed_rows()
NASTY = '</td><script>alert(1)</script> | a\nb & "c" [d](javascript:e) \\'


class Cells(HTMLParser):
    """The texts of tables in HTML, line by line, their figures with all that they say, and every element's name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines, self.figures, self.tags, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "wbr":  # where a long name may break; it has no end
            self.open.append(tag)
        if tag == "tr":
            self.lines.append([])
        elif tag in ("th", "td"):
            self.lines[-1].append("")
        elif tag == "data":
            self.figures.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self.open):
            self.lines[-1][-1] += data
        if "data" in self.open:
            self.figures[-1] = (self.figures[-1][0], self.figures[-1][1] + data)


def lines_of(markdown: str) -> list[list[str]]:
    """The cells of the tables in a Markdown text, without its escapes."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    plain = [[re.sub(r"\\(.)", r"\1", c).replace("&lt;", "<").replace("&amp;", "&") for c in line] for line in cells]
    return [line for line in plain if not all(re.fullmatch("---:?", cell) for cell in line)]


def one_space(line) -> list[str]:
    return [" ".join(render.text(cell).split()) for cell in line]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_all_three_show_the_same_texts(table):
    expected = [one_space(line) for line in (table.head, *table.body)]
    markdown, shown = render.markdown([table]), render.typst(table)
    assert lines_of(markdown) == expected
    page = Cells(str(render.html([table])))
    assert [one_space(line) for line in page.lines] == expected
    assert [one_space(line) for line in (shown["head"], *shown["rows"])] == expected
    assert json.loads(json.dumps(shown)) == shown and table.title == shown["title"] and table.title in markdown
    figures = [part for line in (*table.body, table.note) for c in line for part in render.parts(c)]
    figures = [part for part in figures if isinstance(part, Figure)]
    assert [(attrs["title"], text) for attrs, text in page.figures] == [(one.title, one.text) for one in figures]
    assert all(one.title.split(" (median of")[0] == one.source for one in figures)
    assert all(float(attrs["value"]) == one.value for (attrs, _), one in zip(page.figures, figures, strict=True))
    for paragraph in shown["note"]:
        assert " ".join(paragraph.split()) in " ".join(markdown.replace("\\", "").split())


def test_hostile_text_stays_text():
    rows = [measured_row({"step_s": 1.0})]
    rows[0].data["command"] = rows[0].data["device"]["name"] = NASTY
    table = Table("t", NASTY, [NASTY, "b"], [[NASTY, figure(rows[0], "step_s", ".1f")]], [(NASTY, "x")], rows)
    assert lines_of(render.markdown([table])) == [one_space(line) for line in (table.head, *table.body)]
    assert "<script>" not in render.markdown([table]) and "](" not in render.markdown([table])
    page = Cells(str(render.html([table])))
    assert not {"script", "a"} & set(page.tags) and page.tags.count("td") == 1
    assert one_space(page.lines[1]) == one_space(table.body[0])


def test_what_is_missing_is_marked():
    lost, whole = measured_row({}), measured_row({"step_s": [1.0, 0.5, 1.5]}, 2)
    body = [["a", figure(lost, "step_s", ".1f")], ["b", spread(whole, "step_s", ".1f")], ["c", figure(None, "s", "")]]
    table = Table("t", "T", ["", "time (s)"], body, rows=[lost, whole])
    assert table.numeric == [False, True]
    text, page = render.markdown([table]), str(render.html([table]))
    assert "| a | x |" in text and "| b | 1.0 (0.5 to 1.5) |" in text and "| c | - |" in text
    assert "x: out of memory." in text and "---:" in text
    assert '<abbr title="out of memory">x</abbr>' in page and '<small>(<data value="0.5"' in page
    assert 'class="n none"' in page and page.count('class="n"') == 3


def test_tables_of_one_setting_name_it_once():
    rows, other = [measured_row({"step_s": [1.0, 0.5, 1.5]})], [measured_row({"step_s": 2.0}, 2)]
    other[0].data["dtype"] = "bfloat16"
    parts = [Table("t", f"T{i}", ["a"], [["b"]], rows=found) for i, found in enumerate((rows, rows, other, ()))]
    text = render.markdown(parts)
    assert re.findall(r"\*\*(T\d)\*\*|^(A CPU.*)$", text, re.MULTILINE) == [
        ("T0", ""),
        ("T1", ""),
        ("", "A CPU, 2 threads, torch 2.13.0, float32; medians (least to most) of 3 steps."),
        ("T2", ""),
        ("", "A CPU, 2 threads, torch 2.13.0, bfloat16."),
        ("T3", ""),
    ]
    assert str(render.html(parts)).count('class="source"') == 2
    assert render.markdown([]) == "" and not Cells(str(render.html([]))).tags


def test_provenance_names_everything_that_rows_were_measured_with():
    rows = [measured_row({"run_s": [1.0, 0.5, 1.5]}, memory_limit_gb=16.0), measured_row({"run_s": 1.0})]
    rows[1].data["time"] = "2026-11-24T10:00:00+00:00"
    rows[1].data["command"] = "python y.py"
    about = render.Provenance.of(rows)
    assert about.where.endswith("float32, held to 16 GB; medians (least to most) of 1 to 3 runs")
    assert about.when == "2026-11-22 to 2026-11-24, commit 0123456789ab"
    assert about.commands == ("python x.py", "python y.py")


def test_a_chart_has_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        plot = Plot()
        plot.subplots().plot([1, 2], [3, 4], label="c")
        render.save_svg(plot, tmp_path / f"{name}.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes() and b"<svg" in first and b"dc:date" not in first


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    render.write(path, b"old")
    monkeypatch.setattr(render.Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(EnvironmentFailure, match=r"cannot write .*page\.html: disk full"):
        render.write(path, b"new")
    assert path.read_bytes() == b"old" and [found.name for found in path.parent.iterdir()] == ["page.html"]
