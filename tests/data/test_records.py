"""Data files are read by what they hold; nothing is read wrongly or in silence."""

from __future__ import annotations

import csv
import io
import json
import random
import time

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mutant

from data import prompts, records
from data.alpaca import Record
from data.records import Chat, Pair, Text, read
from llama.errors import InputError

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def write(path, content):
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def table(rows, delimiter=",") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


# What is read


ONE = {
    "Alpaca": (GOOD, Record("Name a colour.", "", "Blue.")),
    "no input": ({"instruction": "a", "output": "b"}, Record("a", "", "b")),
    "input null": ({**GOOD, "input": None}, Record("Name a colour.", "", "Blue.")),
    "input instead of the instruction": (
        {"instruction": " ", "input": "Translate: hola", "output": "hello"},
        Record("Translate: hola", "", "hello"),
    ),
    "instruction blank": ({**GOOD, "instruction": " \n"}, Record("", "", "Blue.")),
    "messages": ({"messages": HI}, Chat(tuple(HI))),
    "ShareGPT": ({"conversations": SHARED}, Chat(tuple(HI))),
    "mixed": ({"conversations": [SHARED[0], HI[1]]}, Chat(tuple(HI))),
    "pair": ({"prompt": "2 + 2 =", "completion": " 4"}, Pair("2 + 2 =", " 4")),
    "response": ({"prompt": "2 + 2 =", "response": " 4"}, Pair("2 + 2 =", " 4")),
    "text": ({"text": "### Instruction: hi"}, Text("### Instruction: hi")),
}


@pytest.mark.parametrize("name", ONE)
def test_records_are_told_apart_by_their_fields(tmp_path, name):
    """Under any name: as a list, as JSON lines, spread over several lines, and as CSV."""
    entry, wanted = ONE[name]
    for number, content in enumerate(
        (
            json.dumps([entry, entry]),
            json.dumps(entry) + "\r\n\r\n" + json.dumps(entry) + "\n\n",
            "\ufeff" + json.dumps(entry, indent=1) + "\n" + json.dumps(entry, indent=1),
        )
    ):
        for suffix in (".json", ".jsonl", ".csv", ".txt", ""):
            found = read(write(tmp_path / f"data{number}{suffix}", content))
            assert found.records == [wanted, wanted] and found.unused == ()
            assert found.what == f"2 {wanted.kind} ({'JSON lines' if number else 'JSON'})"
    if all(isinstance(value, str) for value in entry.values()):
        for delimiter in ",;\t":
            content = table([entry, entry.values(), [], entry.values()], delimiter)
            for suffix in (".csv", ".json", ".txt") if len(entry) > 1 else (".csv", ".tsv"):
                found = read(write(tmp_path / f"table{suffix}", b"\xef\xbb\xbf" + content.encode()))
                assert found.records == [wanted, wanted] and found.what == f"2 {wanted.kind} (CSV)"


PROSE = [
    "Once upon a time.",
    "[Illustration]\n\nIt was",
    "[1] a note",
    "{\\it TeX}",
    '"Quoted", he said.\n',
    "text",
    "Image, text, and sound\nare all there is.",
    "3",
]


@pytest.mark.parametrize("content", PROSE)
def test_everything_else_is_plain_text_unless_its_name_says_otherwise(tmp_path, content):
    found = read(write(tmp_path / "corpus.txt", content + "\r\n"))
    assert found.what == "plain text" and found.records == [Text(content + "\r\n", has_end=False)]
    with pytest.raises(InputError, match=r"corpus\.jsonl begins with '.*expected JSON, or a CSV header, with instruct"):
        read(write(tmp_path / "corpus.jsonl", content))


def test_fields_that_are_not_used_are_named(tmp_path):
    found = read(write(tmp_path / "data.json", [GOOD, {**GOOD, "text": "a", "id": 7, "score": {"a": [1, None]}}]))
    assert found.unused == ("id", "score", "text") and len(found.records) == 2
    found = read(write(tmp_path / "chats", [{"messages": [{**HI[0], "weight": 0}, HI[1]]}]))
    assert found.unused == ("messages.weight",) and found.records == [Chat(tuple(HI))]
    found = read(write(tmp_path / "data.csv", ",output,instruction,source\n0,b,a,x\n"))  # as pandas writes its index
    assert found.unused == ("", "source") and found.records == [Record("a", "", "b")]


def test_tables_as_excel_writes_them(tmp_path):
    """A first line for Excel alone, columns that were used once, rows that were emptied."""
    table = 'instruction;input;output;;\r\n"Say ""hi""";;"Hi\r\nthere";;\r\n;;;;\r\na;;b;;\r\n;;;;\r\n'
    wanted = [Record('Say "hi"', "", "Hi\r\nthere"), Record("a", "", "b")]
    for start in ("\ufeff", "sep=;\r\n", "\ufeffsep=;\r\n"):
        assert read(write(tmp_path / "data.csv", start + table)).records == wanted
    spaced = '"instruction", output, "note, or none"\na, "b, c", d\na,b,\n'  # as people write them
    assert read(write(tmp_path / "data", spaced)).records == [Record("a", "", "b, c"), Record("a", "", "b")]
    assert read(write(tmp_path / "data", "instruction,output\na, b\n")).records == [Record("a", "", " b")]
    assert read(write(tmp_path / "data", '"a,' + "b" * (1 << 20))).what == "plain text"  # longer than csv's fields


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(ANY.filter(str.strip), ANY, ANY), min_size=1, max_size=5), st.sampled_from(",;\t"), st.booleans()
)
def test_what_was_written_is_read(tmp_path_factory, rows, delimiter, ascii):
    """Quotes, delimiters, line ends, anything."""
    folder = tmp_path_factory.mktemp("data")
    wanted = [Record(*row) for row in rows]
    names = ("instruction", "input", "output")
    lines = "\n".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=ascii) for row in rows)
    assert read(write(folder / "a.jsonl", lines)).records == wanted
    assert read(write(folder / "a.csv", table([names, *rows], delimiter))).records == wanted


# What is refused

BAD = {
    "empty file": ("", "is empty"),
    "blank file": ("\n \r\n", "is empty"),
    "no record": ([], "holds no record"),
    "a number": ("3", "begins with '3'"),
    "cut off": (json.dumps([GOOD])[:-5], "is not valid JSON: "),
    "line cut off": (json.dumps(GOOD) + '\n{"instruction": "a"', "is not valid JSON behind record 1: "),
    "two documents": ("[][]", "something follows the list"),
    "nested deep": ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
    "long number": ("[" + '{"a": ' + "9" * 5000 + "}]", "is not valid JSON"),
    "other fields": (
        [{"question": "a", "answer": "b"}],
        "record 1 has the fields question, answer; expected instruction",
    ),
    "records below": ({"version": 1, "data": [GOOD]}, "record 1 has the fields version, data"),
    "no field": ([{}], "record 1 has the fields ; expected"),
    "record is a list": ([["a"]], "record 1 must be an object with fields, not list"),
    "record is a text": (["a"], "record 1 must be an object with fields, not str"),
    "record is null": ([GOOD, None], "record 2 must be an object with fields, not NoneType"),
    "other format": ([GOOD, {"messages": HI}], "record 2:instruction: is missing, beside messages"),
    "no output": ([GOOD, {"instruction": "x"}], "record 2:output: is missing, beside instruction"),
    "instruction null": ([{**GOOD, "instruction": None}], "record 1:instruction: must be a text"),
    "instruction a number": ([{**GOOD, "instruction": 7}], "record 1:instruction: must be a text, not int"),
    "output true": ([{**GOOD, "output": True}], "record 1:output: must be a text, not bool"),
    "input a dict": ([{**GOOD, "input": {}}], "record 1:input: must be a text"),
    "NaN literal": ('[{"instruction": NaN, "output": "x"}]', "record 1:instruction: must be a text, not float"),
    "field twice": ('[{"instruction": "a", "instruction": "b", "output": "c"}]', "record 1:instruction: stands twice"),
    "value with a field twice": ('{"instruction": {"a": 1, "a": 2}, "output": "c"}', "instruction: must be a text"),
    "lone surrogate": (
        '[{"instruction": "\\ud800", "output": "c"}]',
        "record 1:instruction: holds half of a surrogate",
    ),
    "huge field": ([{**GOOD, "output": "x" * (10 << 20)}], "record 1:output: has 10,485,760 characters"),
    "messages a text": ([{"messages": "hi"}], "record 1:messages: must be a list, not str"),
    "message a text": ([{"messages": HI}, {"messages": ["hi"]}], "record 2:messages 1 must be an object"),
    "message without content": ([{"messages": [HI[0], {"role": "user"}]}], "record 1:messages 2:content: is missing"),
    "content null": ([{"messages": [{"role": "assistant", "content": None}]}], "messages 1:content: must be a text"),
    "unknown role": ([{"messages": [{"role": "tool", "content": "3"}]}], "messages 1:role: is 'tool'; expected system"),
    "unknown speaker": ([{"conversations": [{"from": "bot", "value": "3"}]}], "conversations 1:from: is 'bot'"),
    "message twice": (
        '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "messages 1:role: stands twice",
    ),
    "CSV columns": ("question,answer\na,b\n", "begins with 'question,answer'"),
    "CSV column twice": ("instruction,output,output\na,b,c\n", "a column stands twice in the header"),
    "CSV ragged": ("instruction,output\na,b\nc\n", "record 2: has 1 fields, the header 2"),
    "CSV too wide": (
        "instruction,output\na,b,c\n",
        "record 1: has 3 fields, the header 2; quote a field that holds ','",
    ),
    "CSV quote open": ('instruction,output\na,b\nc,"d\n', "record 2: is not valid CSV"),
    "CSV text behind a quote": ('instruction,output\n"a"b,c\n', "record 1: is not valid CSV"),
    "CSV without rows": ("instruction,output\n", "holds no record"),
    "CSV chats": ("messages\nhi\n", "record 1:messages: must be a list"),
    "NUL": ("instruction,output\na,b\0\n", "holds NUL"),
    "UTF-16": (json.dumps([GOOD]).encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "UTF-16 without a mark": (json.dumps([GOOD]).encode("utf-16-le"), "NUL characters: it is binary, or UTF-16"),
    "Latin-1": ('[{"instruction": "Gr\xfc\xdfe"}]'.encode("latin-1"), "not UTF-8 text"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file; save it as JSON lines"),
    "gzip": (b"\x1f\x8b\x08", "is compressed by gzip"),
    "Excel": (b"PK\x03\x04\x14", "is a zip archive, as .xlsx files are"),
    "git-LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a git-LFS pointer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(tmp_path, case):
    """One line with the file, the record and the field."""
    content, message = BAD[case]
    with pytest.raises(InputError) as error:
        read(write(tmp_path / ("data.csv" if "CSV" in case else "data.json"), content))
    assert message in str(error.value) and "data." in str(error.value)
    assert len(str(error.value)) < 500 and len(str(error.value).splitlines()) == 1
    assert csv.field_size_limit() == 131072  # of this process, as it was


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent\.json"):
        read(tmp_path / "absent.json")
    for name in ("a.jsonl", "b.txt", "c.py"):
        (tmp_path / name).write_text("a")
    with pytest.raises(InputError, match=r"it is a directory; pass a file of a\.jsonl, b\.txt$"):
        read(tmp_path)


def test_long_texts_are_read(tmp_path):
    """A book in one field: the limit of the csv module, 131,072 characters, is not that of the file."""
    book = "All happy families are alike. " * 50_000
    assert read(write(tmp_path / "a.csv", table([["text"], [book]]))).records == [Text(book)]
    assert read(write(tmp_path / "a.jsonl", {"text": book})).records == [Text(book)]


# Prompts


def test_prompts_are_lines_strings_or_a_field(tmp_path):
    wanted = ["The fox", "The bear"]
    for content in (
        "The fox\r\n\r\nThe bear\r\n",
        wanted,
        [{"prompt": text, "text": "other"} for text in wanted],
        '{"prompt": "The fox"}\n{"instruction": "The bear", "output": ""}\n',
        "id,prompt\n1,The fox\n2,The bear\n",
    ):
        assert prompts.read(write(tmp_path / "prompts", content)) == wanted
    for content, message in (
        ([["a"]], "record 1 must be an object"),
        ([{"q": "a"}], "fields q; expected prompt, or instruction"),
    ):
        with pytest.raises(InputError, match=message):
            prompts.read(write(tmp_path / "prompts", content))


# Damaged files


@pytest.mark.slow
def test_mutants_are_records_or_one_line(tmp_path):
    """2,500 damaged files of each format."""
    rows = [["instruction", "input", "output"], *(['Name, "a"\ncolour.', "", f"Blü {i}"] for i in range(40))]
    lines = "\n".join(json.dumps({"messages": HI, "id": i}) for i in range(40))
    good = {
        "a.csv": table(rows),
        "a.jsonl": lines,
        "a.json": (ROOT / "data" / "alpaca_200.json").read_text()[:9000] + '"}]',
    }
    rng, outcomes = random.Random(0), []
    for name, content in good.items():
        for _ in range(2500):
            path = write(tmp_path / name, mutant(content.encode(), rng))
            start = time.perf_counter()
            try:
                outcomes.append(len(records.read(path).records) > 0)
            except InputError as error:
                outcomes.append(False)
                assert len(" ".join(str(error).split())) < 600
            assert time.perf_counter() - start < 2
    assert len(outcomes) == 7500 and 500 < sum(outcomes) < 7000


def test_a_file_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"text": "a fox"}\n')
    monkeypatch.setattr(records, "MAX_FILE_BYTES", path.stat().st_size)
    assert read(path)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"a\.jsonl is larger than .*; split it"):
        read(path)
