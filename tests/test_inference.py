"""inference.py as a user runs it: what it prints, and one line with the right exit code for whatever goes wrong."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import vocabularies
from conftest import ROOT, SMALL, TINY, random_model

import inference
from benchmarks.stopwatch import Measurement
from llama import Tokenizer, adapters, checkpoint, cli, lora, quantization
from llama.decoding import Decoder
from llama.errors import EnvironmentFailure, InputError, NonFinite
from llama.evaluation import agreement
from llama.quantization import Quantization
from llama.speculative import Counts

PROMPT = "--prompt=The little fox"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with stderr apart."""
    return subprocess.run([sys.executable, "inference.py", *flags], cwd=ROOT, capture_output=True, text=True)


def call(monkeypatch, capsys, *flags: str) -> tuple[int, str, str]:
    """The same without the seconds that starting Python and torch takes."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
    with pytest.raises(SystemExit) as exit_:
        cli.run(inference.main)
    return exit_.value.code, *capsys.readouterr()


def test_without_arguments_it_writes_text_from_the_embedded_model():
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("embedded model, 4,983,040 parameters, float32 on ")
    assert done.stdout.count("\n> ") == len(inference.SAMPLE_PROMPTS)
    assert re.search(r"\[\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, KV cache on\]\n$", done.stdout)
    assert run().stdout.split("[")[0] == done.stdout.split("[")[0]  # the same text every time


def test_compare_shows_both_texts_and_a_verdict(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--compare", "--max_gen_len=24", "--device=cpu")
    assert code == 0
    n = len(inference.SAMPLE_PROMPTS)
    assert out.count("tokens    equal (") == n
    assert len(re.findall(r"time +[\d.]+ s on, [\d.]+ s off: [\d.]+ times as fast", out)) == n
    assert len(re.findall(r"memory +[\d,]+ MB on, [\d,]+ MB off", out)) == n
    assert f"{n} of {n} prompts give equal tokens" in out


def test_compare_names_the_first_difference(tiny, monkeypatch):
    """A planted difference: the margin is that of the two tokens under the model, judged against rounding."""
    prompt = tiny.encode_prompt("The little fox")
    right = tiny.generate([prompt], 8, 0)[0][0]
    wrong = [*right[:3], (right[3] + 1) % 3840, *right[4:]]
    text = agreement.verdict(tiny, prompt, right, wrong, [tiny.tokenizer.eos_id])
    margin = float(re.search(r"first differ at token 4: .* against .*, logit margin ([\d.]+)", text)[1])
    with torch.no_grad():
        logits = tiny.model(torch.tensor([prompt + right[:3]]))[0, -1]
    assert margin == pytest.approx(abs(logits[right[3]] - logits[wrong[3]]).item(), abs=1e-3)
    assert "MORE THAN ROUNDING" in text
    monkeypatch.setitem(agreement.ROUNDING_MARGIN, torch.float32, margin + 1)
    assert "within rounding" in agreement.verdict(tiny, prompt, right, wrong, [tiny.tokenizer.eos_id])
    chat_stops = tiny.tokenizer.stop_tokens
    ended = agreement.verdict(tiny, prompt, right, [*right, 5], chat_stops)
    assert "first differ at token 9" in ended and "<|" in ended  # against the stop token that ended the shorter one


def test_stream_prints_the_same_text(monkeypatch, capsys):
    flags = (PROMPT, "--temperature=0", "--max_gen_len=20", "--device=cpu")
    _, batch, _ = call(monkeypatch, capsys, *flags)
    code, streamed, _ = call(monkeypatch, capsys, *flags, "--stream")
    body = batch.split("> The little fox\n")[1].split("\n\n[")[0]
    assert code == 0 and body in streamed


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_cache=False", PROMPT),
        ("--nothing=1",),
        ("--chat", "--max_gen_len=12"),
        ("--min_p=0.1", "--repetition_penalty=1.1", "--stop=Once,.", PROMPT),
        ("--chat", "--stream", "--max_gen_len=12", "--prompt=Name a fruit."),
        ("--dtype=bfloat16", PROMPT, "--top_k=5", "--top_p=1", "--temperature=1.0", "--seed=4"),
    ],
)
def test_other_ways_to_run(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n\nAnd another one.\n"))  # of a pipe, for --chat
    code, out, err = call(monkeypatch, capsys, *flags, "--device=cpu")
    assert (code, err) == (0, "") if "--nothing=1" not in flags else code == 2
    assert code or out.count("tokens/s") == (2 if flags[:2] == ("--chat", "--max_gen_len=12") else 1)


@pytest.mark.parametrize("decoding", ["auto", "eager"])
def test_the_first_line_says_how_steps_are_decoded(tiny, monkeypatch, capsys, decoding):
    flags = ("--dtype=bfloat16", f"--decoding={decoding}", "--max_gen_len=3", PROMPT, "--device=cpu")
    _, out, _ = call(monkeypatch, capsys, *flags)
    expected = Decoder(copy.deepcopy(tiny.model).bfloat16(), decoding).name
    assert f", {expected} decoding; " in out.splitlines()[0] and (decoding == "auto" or expected == "eager")


def test_prompt_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_bytes("\ufeffThe fox\r\n\nThe bear\u2028and I\r\n".encode())
    (tmp_path / "p.json").write_text(json.dumps(["Question: A?\nAnswer:", "1,2"]))
    flags = ("--max_gen_len=3", "--device=cpu")
    assert "> The fox\n" in (out := call(monkeypatch, capsys, f"--prompt_file={tmp_path}/p.txt", *flags)[1])
    assert "> The bear\u2028and I\n" in out
    assert "> Question: A?\nAnswer:\n" in (
        out := call(monkeypatch, capsys, f"--prompt_file={tmp_path}/p.json", *flags)[1]
    )
    assert "> 1,2\n" in out


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_other_checkpoints_load_by_directory(tmp_path, monkeypatch, capsys, layout):
    model = checkpoint.load(TINY)
    checkpoint.save(model, tmp_path / "m", layout)
    flags = ("--max_gen_len=16", "--temperature=0", "--device=cpu", PROMPT)
    tokenizer = f"--tokenizer_path={TINY}/tokenizer.model"
    code, out, _ = call(monkeypatch, capsys, f"--ckpt_dir={tmp_path}/m", tokenizer, *flags)
    assert code == 0 and out.startswith(f"{tmp_path}/m, 4,983,040 parameters")
    assert out.split("\n> ")[1].split("[")[0] == call(monkeypatch, capsys, *flags)[1].split("\n> ")[1].split("[")[0]


BAD = {
    "--ckpt_dir=/nowhere": r"checkpoint directory /nowhere does not exist",
    "--tokenizer_path=/nowhere": r"tokenizer /nowhere is not a file",
    "--tokenizer_path=/dev/zero": r"tokenizer /dev/zero is not a file",
    "--chat --prompt= ": "message 0 is empty",
    "--chat --draft=lookup": "--draft=lookup: a conversation keeps the cache of one model; give --prompt",
    "--chat --use_cache=False": "--use_cache=False: a conversation keeps",
    "--min_p=1.5": "--min_p=1.5 is out of range",
    "--repetition_penalty=0": "--repetition_penalty=0.0 is out of range",
    "--stop=a,,b": "a string to stop at must have at least one character",
    "--prompt --stream": "flag --prompt needs a value",
    "--seed=-1": "--seed=-1 is out of range",
    "--seed=99999999999999999999": "--seed=99999999999999999999 is out of range",
    "--prompt=": "prompt is empty",
    "--prompt": "needs a value",
    "--prompt=a --prompt=b": "given twice",
    "--prompt=\udcff": "lone surrogate",
    "--prompt=a --prompt_file=b": "exclude each other",
    "--save_prompt=/nowhere/a": "--save_prompt needs a text to keep: --prompt or --prompt_file",
    "--chat --save_prompt=/nowhere/a": "--save_prompt needs a text to keep: --prompt or --prompt_file",
    "--save_prompt=/ --prompt=a": "/ already exists; choose a new name",
    "--load_prompt=/nowhere --compare": "leave out --compare, --draft and --use_cache",
    "--load_prompt=/nowhere --draft=lookup": "leave out --compare, --draft and --use_cache",
    "--load_prompt=/nowhere --use_cache=False": "leave out --compare, --draft and --use_cache",
    "--load_prompt=/nowhere": "saved prompt /nowhere is not a file; check its name",
    "--load_prompt=/dev/zero": "saved prompt /dev/zero is not a file; check its name",
    "--prompt_file=/nowhere": "cannot read /nowhere",
    "--temperature=-1": "--temperature=-1.0 is out of range",
    "--temperature=nan": "--temperature=nan",
    "--temperature=inf": "--temperature=inf",
    "--temperature=1e-46": "--temperature=1e-46",
    "--top_p=nan": "--top_p=nan",
    "--temperature=hot": "--temperature=hot: expected a number",
    "--top_p=0": "--top_p=0.0",
    "--top_p=1.5": "--top_p=1.5",
    "--top_k=0": "--top_k=0",
    "--max_gen_len=-1": "--max_gen_len=-1",
    "--max_gen_len=1.5": "expected an integer",
    "--max_seq_len=0": "--max_seq_len=0",
    "--max_seq_len=3": "outside 1 to --max_seq_len=3; shorten it or raise --max_seq_len",
    "--max_batch_size=2": "exceed --max_batch_size=2",
    "--use_cache=maybe": "expected True or False",
    "--device=tpu": "--device=tpu",
    "--dtype=int3": "--dtype=int3",
    "--promt=x": "unknown flag --promt; did you mean --prompt?",
    "The fox": "unexpected argument 'The'",
    "--compare --stream": "--compare",
    "--draft=/nowhere": "checkpoint directory /nowhere does not exist",
    "--draft=lookup --draft_tokens=0": "--draft_tokens=0 is out of range",
    "--draft=lookup --draft_tokens=2048": "--draft_tokens=2048 leaves no room in --max_seq_len=2048",
    "--draft=lookup --use_cache=False": "needs the KV cache",
    "--draft=lookup --decoding=compiled": "compile anew",
    "--draft_tokens=3": "--draft_tokens needs --draft",
    "--compare --temperature=0.5": "--temperature=0",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, flags):
    code, _, err = call(monkeypatch, capsys, *re.split(r" (?=\S)", flags))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 300
    assert re.search(BAD[flags], err)


def test_a_checkpoint_without_a_chat_format_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, capsys):
    """Also where a conversation would say so only at its first message."""
    vocabularies.write(tmp_path, "llama3", tokenizer_config={"chat_template": "USER: "})
    for flags in (("--chat",), ("--chat", PROMPT)):
        code, out, err = call(monkeypatch, capsys, f"--ckpt_dir={tmp_path}", *flags)
        assert (code, out) == (2, "") and "its template writes another format" in err
    assert call(monkeypatch, capsys, f"--ckpt_dir={tmp_path}", PROMPT)[2].startswith(f"error: {tmp_path}")


def test_a_pipe_that_cannot_be_answered_ends_with_exit_2(monkeypatch, capsys):
    for data, flags, reason in (
        (b"Hello\n", ("--max_seq_len=4",), "of at most --max_seq_len=4"),
        (b"caf\xe9\nHello\n", (), "lone surrogate"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code, out, err = call(monkeypatch, capsys, "--chat", "--device=cpu", *flags)
        assert code == 2 and reason in err and "tokens/s" not in out


def test_a_closed_input_is_an_empty_one_and_no_tokens_are_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert call(monkeypatch, capsys, "--chat", "--device=cpu")[::2] == (0, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert "\n[0 tokens" in call(monkeypatch, capsys, "--chat", "--device=cpu", "--max_gen_len=0")[1]


def test_bad_input_in_a_real_process():
    done = run("--promt=x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown flag --promt; did you mean --prompt?\n"
    done = subprocess.run(
        [sys.executable, "inference.py", b"--prompt=\xff"], cwd=ROOT, capture_output=True, env={**os.environ}
    )
    assert done.returncode == 2 and b"lone surrogate" in done.stderr


STORY = "Once upon a time, there was a little fox.\nThe fox lived in the wo"  # the border is in a word


@pytest.mark.parametrize(("name", "code"), [("file/x", 3), ("x" * 300, 2), ("loop", 2), ("loop/x", 2)])
def test_a_place_that_takes_no_file_is_refused_before_the_prompt_is_read(tmp_path, monkeypatch, capsys, name, code):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    got, out, err = call(monkeypatch, capsys, "--prompt=a", f"--save_prompt={tmp_path / name}")
    assert (got, out) == (code, "") and "; choose another" in err and err.count("\n") == 1


def test_a_saved_prompt_is_read_once_and_its_questions_say_what_fresh_runs_say(tmp_path, monkeypatch, capsys):
    """Of a whole file; questions from another; what goes on is saved, too; other templates are refused."""
    (tmp_path / "book.txt").write_text(STORY)
    questions = ["od. One day", " and I", "od.\nQuestion: Who lived in the wood?\nAnswer:"]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    flags = ("--temperature=0", "--max_gen_len=12", "--device=cpu")
    saving = (f"--prompt_file={tmp_path}/book.txt", f"--save_prompt={tmp_path}/book")
    code, out, err = call(monkeypatch, capsys, *flags, *saving)
    n_tokens = len(Tokenizer(TINY / "tokenizer.model").encode_prompt(STORY))
    assert (code, err) == (0, "") and f"[{n_tokens} tokens kept in {tmp_path}/book, 0.1 MB]" in out
    assert f"> {STORY}\n" in out
    asking = (f"--load_prompt={tmp_path}/book", f"--prompt_file={tmp_path}/questions.json")
    code, out, _ = call(monkeypatch, capsys, *flags, *asking)
    assert code == 0 and f"[{n_tokens} tokens from {tmp_path}/book]" in out
    for question in questions:
        fresh = call(monkeypatch, capsys, *flags, "--stream", f"--prompt={STORY}{question}")[1]
        answer = fresh.split(f"> {STORY}{question}\n")[1].split("\n[")[0]
        assert f"> {question}\n{answer}\n[" in out
    fresh = call(monkeypatch, capsys, *flags, "--stream", f"--prompt={STORY}")[1].split(STORY)[1].split("\n[")[0]
    assert f"> {fresh}\n[" in call(monkeypatch, capsys, *flags, asking[0])[1]  # no prompt: the saved text goes on
    call(monkeypatch, capsys, *flags, asking[0], "--prompt=od.", f"--save_prompt={tmp_path}/longer")
    fresh = call(monkeypatch, capsys, *flags, "--stream", f"--prompt={STORY}od.")[1].split(f"{STORY}od.")[1]
    longer = call(monkeypatch, capsys, *flags, f"--load_prompt={tmp_path}/longer")[1]
    assert f"> {fresh.split('[')[0]}" in longer
    for template in ("--chat", "--alpaca"):
        code, _, err = call(monkeypatch, capsys, *flags, f"--load_prompt={tmp_path}/book", template, "--prompt=a")
        assert code == 2 and "book:tokens: are not those of its text here; use the tokenizer and the template" in err
    code, out, err = call(monkeypatch, capsys, *flags, *asking, f"--max_seq_len={n_tokens + 4}")
    assert (code, out) == (2, "") and err.startswith("error: prompt 2 has ")  # before the first is answered
    other = (f"--ckpt_dir={TINY}/draft", f"--tokenizer_path={TINY}/tokenizer.model")
    code, _, err = call(monkeypatch, capsys, *flags, *asking, *other)
    assert code == 2 and "/book:model_sha256: is of another model" in err and err.count("\n") == 1


def test_a_conversation_begins_behind_a_saved_prompt(tmp_path, monkeypatch, capsys):
    """Its first message, and that after /reset, says what the text and it would say in one; the others stand alone."""
    flags = ("--chat", "--temperature=0", "--max_gen_len=12", "--device=cpu")
    call(monkeypatch, capsys, *flags, f"--prompt={STORY}", f"--save_prompt={tmp_path}/a")
    questions = ("od. What colour is the sky?", "od. Name two fruits.")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{questions[0]}\nAnd what do cows eat?\n/reset\n{questions[1]}\n"))
    code, out, err = call(monkeypatch, capsys, *flags, f"--load_prompt={tmp_path}/a")
    assert (code, err) == (0, "") and out.count(" tokens/s, first after") == 3
    for question in questions:
        fresh = call(monkeypatch, capsys, *flags, "--stream", f"--prompt={STORY}{question}")[1]
        answer = fresh.split(f"> {STORY}{question}\n")[1].split("\n[")[0]
        assert f"> {question}\n{answer}\n[" in out


def test_tokenizer_of_another_vocabulary(tmp_path, monkeypatch, capsys):
    checkpoint.save(random_model(SMALL), tmp_path / "m")
    tokenizer = f"--tokenizer_path={TINY}/tokenizer.model"
    code, _, err = call(monkeypatch, capsys, f"--ckpt_dir={tmp_path}/m", tokenizer, "--device=cpu")
    assert code == 2 and "4096 words, the model 512" in err


def test_draft_of_another_vocabulary_or_tokenizer(tmp_path, monkeypatch, capsys):
    checkpoint.save(random_model(SMALL), tmp_path / "m")
    code, _, err = call(monkeypatch, capsys, f"--draft={tmp_path}/m", "--device=cpu")
    assert code == 2 and "the draft has a vocabulary of 512, the model of 4096" in err and err.count("\n") == 1
    lines = (TINY / "tokenizer.model").read_text().splitlines()
    first, last = lines[-1].split()[0], lines[-2].split()[0]  # the last two words change places
    (tmp_path / "other").write_text("\n".join([*lines[:-2], f"{first} 3838", f"{last} 3839"]) + "\n")
    checkpoint.save(checkpoint.load(TINY / "draft"), tmp_path / "d", tokenizer_path=tmp_path / "other")
    code, _, err = call(monkeypatch, capsys, f"--draft={tmp_path}/d", "--device=cpu")
    assert code == 2 and f"{tmp_path}/d/tokenizer.model is not the model's tokenizer" in err
    checkpoint.save(checkpoint.load(TINY / "draft"), tmp_path / "e", tokenizer_path=TINY / "tokenizer.model")
    code, out, _ = call(monkeypatch, capsys, f"--draft={tmp_path}/e", "--device=cpu", "--max_gen_len=8", PROMPT)
    assert code == 0 and "[draft: " in out


@pytest.mark.parametrize("draft", ["data/tiny/draft", "lookup", "int8", "int4"])
def test_a_draft_changes_no_text_and_its_figures_are_printed(monkeypatch, capsys, draft):
    monkeypatch.chdir(ROOT)
    flags = ("--temperature=0", "--max_gen_len=24", "--device=cpu")
    body = call(monkeypatch, capsys, *flags)[1].split("\n[")[0]
    code, out, err = call(monkeypatch, capsys, *flags, f"--draft={draft}", "--draft_tokens=3")
    assert (code, err) == (0, "") and out.split("\n[")[0] == body
    wanted = r"\n\[draft: (\d+) tokens proposed, (\d+) accepted of (\d+) up to .* rate ([01]\.\d\d)\), ([1-4]\.\d\d) "
    proposed, accepted, seen, acceptance, tokens = map(float, re.search(wanted, out).groups())
    assert 0 < accepted <= seen <= proposed and acceptance == pytest.approx(accepted / seen, abs=0.006) and tokens > 1


def test_a_quantized_model_has_no_form_to_draft_with(tmp_path, monkeypatch, capsys):
    model = checkpoint.load(TINY)
    quantization.quantize(model, Quantization(8))
    checkpoint.save(model, tmp_path / "q", tokenizer_path=TINY / "tokenizer.model")
    code, _, err = call(monkeypatch, capsys, f"--ckpt_dir={tmp_path}/q", "--draft=int4", "--device=cpu")
    assert code == 2 and err == "error: --draft=int4: takes a model of plain weights; the model is quantized already\n"


def test_compare_with_a_draft_compares_with_plain_decoding(monkeypatch, capsys):
    flags = ("--compare", f"--draft={TINY}/draft", "--max_gen_len=16", "--device=cpu")
    code, out, _ = call(monkeypatch, capsys, *flags)
    n = len(inference.SAMPLE_PROMPTS)
    assert code == 0 and out.count("tokens    equal (") == out.count("times as fast with the draft\n") == n
    assert f"{n} of {n} prompts give equal tokens with the draft on and off" in out
    assert re.search(r"\n\[draft: .* tokens per round, expected speed-up \d\.\d\d\]", out)


def test_a_draft_that_does_not_pay_is_said_to():
    assert inference.describe_draft(Counts(10, 20, 10, 5, 12.0)).endswith("expected speed-up 1.67]")
    slow = inference.describe_draft(Counts(10, 20, 1, 10, 12.0))
    assert "expected speed-up 0.92]\nwarning: the draft hardly pays here; leave it out" in slow
    assert "warning" not in inference.describe_draft(Counts())


def test_help_lists_every_flag(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "--help")
    assert code == 0
    for name in ("ckpt_dir", "tokenizer_path", "use_cache", "compare", "max_gen_len", "dtype"):
        assert f"--{name}=" in out + err


def test_environment_errors_exit_3(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(monkeypatch, capsys, "--device=cuda")
    assert code == 3 and err.startswith("error: no CUDA device") and err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = call(monkeypatch, capsys, "--device=cuda:9")
    assert code == 3 and "cuda:9 does not exist; this machine has 1 CUDA devices" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("bad\nthing"), 2, "error: bad thing\n"),
        (EnvironmentFailure("no disk"), 3, "error: no disk\n"),
        (NonFinite("logits are not finite"), 4, "error: logits are not finite\n"),
        (MemoryError(), 3, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 3, "error: out of memory"),
        (OSError(28, "No space left on device", "x.bin"), 3, "error: No space left on device (x.bin)\n"),
        (KeyError("x"), 1, "error: unexpected KeyError: 'x'; this is a bug"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_exceptions_become_one_line_and_a_code(monkeypatch, capsys, error, code, text):
    def main(options: cli.Options) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == code
    assert (err := capsys.readouterr().err).startswith(text) and err.count("\n") == 1
    if isinstance(error, Exception):
        monkeypatch.setattr(sys, "argv", ["script", "--debug"])
        with pytest.raises(type(error)):
            cli.run(main)


def test_a_card_without_kernels_is_named(monkeypatch):
    from llama import device

    def broken(*_args, **_kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _d: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(EnvironmentFailure, match=r"P100.*sm_60.*sm_75 sm_80.*cu126"):
        device.resolve("cuda", "auto")


def test_old_cards_get_float16(monkeypatch):
    from llama import device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d: (6, 0))
    assert device._native_dtype(torch.device("cuda")) is torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d: (9, 0))
    assert device._native_dtype(torch.device("cuda")) is torch.bfloat16
    assert device.resolve("cpu", "auto") == (torch.device("cpu"), torch.float32)


def test_side_by_side_keeps_every_word():
    left, right = "one two " * 30, "three\n\nfour"
    table = cli.side_by_side(left, right)
    halves = [[half.strip() for half in line.split("|")] for line in table.splitlines()]
    assert " ".join(half[0] for half in halves).split() == left.split()
    assert [half[1] for half in halves][:3] == ["three", "", "four"]
    assert all(len(line) <= 2 * cli.COLUMN + 3 for line in table.splitlines())


def test_unmeasurable_memory_says_so():
    assert inference.megabytes(Measurement(1.0, None)) == "not measurable here"
    assert inference.megabytes(Measurement(1.0, 1_234_000_000)) == "1,234 MB"


def test_an_adapter_belongs_to_its_base_in_every_dtype(tmp_path, monkeypatch, capsys):
    """Weights stored in bf16 are rounded when they are used in fp16, as on a P100; the base is still the base."""
    lora.apply(model := checkpoint.load(TINY), lora.LoRAConfig(r=2))
    adapters.save(model, lora.LoRAConfig(r=2), tmp_path / "a", checkpoint.fingerprint(TINY))
    for dtype in ("float32", "float16"):
        flags = (f"--adapter={tmp_path / 'a'}", f"--dtype={dtype}", "--prompt=a", "--max_gen_len=1")
        code, _, err = call(monkeypatch, capsys, *flags)
        assert code == 0, err


def test_several_adapters_and_any_base(tmp_path, monkeypatch, capsys):
    """One that was trained on something else is refused by the flag that takes it; with it, the sum of both runs."""
    lora.apply(model := checkpoint.load(TINY), lora.LoRAConfig(r=2))
    for name, base in (("a", checkpoint.fingerprint(TINY)), ("b", "0" * 64)):
        adapters.save(model, lora.LoRAConfig(r=2), tmp_path / name, base, "elsewhere")
    flags = (f"--adapter={tmp_path}/a,{tmp_path}/b", "--prompt=a", "--max_gen_len=1")
    code, _, err = call(monkeypatch, capsys, *flags)
    assert code == 2 and "/b/" in err and "'elsewhere', sha256 000000000000" in err and "--any_base=True" in err
    path = tmp_path / "rows.jsonl"
    (row,) = rows_of(monkeypatch, capsys, path, f"--adapter={tmp_path}/a,{tmp_path}/b", "--any_base")
    assert row["cell"]["adapter"] == "a,b"
    assert row["cell"]["adapter_sha256"] == adapters.fingerprint(f"{tmp_path}/a,{tmp_path}/b")


def test_an_adapter_that_names_no_base_costs_no_fingerprint(tmp_path, monkeypatch, capsys):
    """PEFT writes none; hashing the weights would take seconds before the first token."""
    lora.apply(model := checkpoint.load(TINY), lora.LoRAConfig(r=2))
    adapters.save(model, lora.LoRAConfig(r=2), tmp_path / "a", base="none")
    path = tmp_path / "a" / adapters.WEIGHTS
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)  # without what we say about the base
    monkeypatch.setattr(checkpoint, "fingerprint", lambda *_: pytest.fail("hashed the weights"))
    code, _, err = call(monkeypatch, capsys, f"--adapter={tmp_path / 'a'}", "--prompt=a", "--max_gen_len=1")
    assert code == 0, err


def test_weights_that_make_decoding_slower_are_warned_of(tiny, monkeypatch):
    """In the lines above the text, in words; where they are fast, nothing."""
    plain = inference.describe(tiny, TINY)
    assert len(plain.splitlines()) == 1
    monkeypatch.setattr(inference.quantization, "slow_reason", lambda model: "int8 weights save memory here")
    assert inference.describe(tiny, TINY) == plain + "warning: int8 weights save memory here\n"


def test_memory_is_announced_and_refused_before_the_weights_are_read(monkeypatch, capsys):
    """A batch counts each prompt, a conversation all slots that it may fill."""
    line = r"\nmemory: weights (\S+) MB, cache (\S+) MB, activations (\S+) MB\n"
    flags = ("--device=cpu", "--max_gen_len=2")
    weights, cache, _ = re.search(line, call(monkeypatch, capsys, *flags, "--stream")[1]).groups()
    assert weights == "20" and float(re.search(line, call(monkeypatch, capsys, *flags)[1])[2]) > 2 * float(cache)
    monkeypatch.setattr(sys, "stdin", None)
    assert re.search(line, call(monkeypatch, capsys, "--chat", "--max_seq_len=32768", "--device=cpu")[1])[2] == "134"
    monkeypatch.setattr(inference.checkpoint, "load", lambda *_: pytest.fail("read the weights"))
    code, out, err = call(monkeypatch, capsys, "--chat", f"--max_seq_len={10**15}", "--device=cpu")
    assert (code, out) == (3, "") and err.count("\n") == 1 and " MB of memory free, and this takes weights 20 MB" in err
    assert err.endswith("--cache_dtype=int8, fewer or shorter texts (--max_batch_size, --max_seq_len)\n")


@pytest.mark.parametrize("length", [40, 41])
def test_texts_beyond_the_models_own_context_are_warned_of(tmp_path, monkeypatch, capsys, length):
    """That of its config.json; what counts is how long the texts may get, not the most that would be allowed."""
    checkpoint.save(checkpoint.load(TINY), tmp_path / "m", "hf", TINY / "tokenizer.model")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    n_prompt = len(Tokenizer(TINY / "tokenizer.model").encode("The little fox", bos=True, eos=False))
    flags = (f"--ckpt_dir={tmp_path / 'm'}", PROMPT, f"--max_gen_len={length - n_prompt}", "--device=cpu")
    code, out, _ = call(monkeypatch, capsys, *flags)
    warning = f"warning: texts may reach {length} tokens, but the model is meant for 40; expect nonsense beyond\n"
    assert code == 0 and (warning in out) == (length > 40)
    saved = f"{tmp_path}/saved"
    monkeypatch.setattr(sys, "stdin", None)
    n_more = len(Tokenizer(TINY / "tokenizer.model").encode("The little fox ran", bos=True, eos=False))
    for others in (
        (*flags[1:], f"--save_prompt={saved}"),
        (f"--load_prompt={saved}", "--prompt= ran", f"--max_gen_len={length - n_more}", "--device=cpu"),
        ("--chat", f"--max_seq_len={length}", "--device=cpu"),
    ):
        code, out, _ = call(monkeypatch, capsys, flags[0], *others)
        assert code == 0 and (warning in out) == (length > 40)


def rows_of(monkeypatch, capsys, path, *flags):
    """The rows that a comparison with these flags appends."""
    given = ("--compare", "--max_gen_len=3", "--device=cpu", PROMPT, f"--results={path}", *flags)
    code, _, err = call(monkeypatch, capsys, *given)
    assert code == 0, err
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("config", [Quantization(8), Quantization(4, 64)], ids=["int8", "int4"])
def test_the_dtype_of_a_comparison_is_that_of_the_computation(tmp_path, monkeypatch, capsys, config):
    """Quantized tables have codes; what computes is the dtype, and the codes are the format of the weights."""
    model = checkpoint.load(TINY)
    quantization.quantize(model, config)
    checkpoint.save(model, tmp_path / "q", tokenizer_path=TINY / "tokenizer.model")
    (row,) = rows_of(monkeypatch, capsys, tmp_path / "rows.jsonl", f"--ckpt_dir={tmp_path / 'q'}", "--dtype=bfloat16")
    assert row["dtype"] == "bfloat16" and row["cell"]["weights"] == f"int{config.bits}"
    assert row["cell"].get("group_size") == config.group_size


def test_what_changes_a_comparison_is_part_of_its_cell(tmp_path, monkeypatch, capsys):
    """Base, two adapters of one name, both templates and two drafts: none hides the figures of another."""
    for scale in (0, 1):
        lora.apply(model := checkpoint.load(TINY), lora.LoRAConfig(r=2))
        for layer in lora.layers(model).values():
            layer.lora_B.data.fill_(scale)
        adapters.save(model, lora.LoRAConfig(r=2), tmp_path / str(scale) / "adapter", checkpoint.fingerprint(TINY))
    more = [[f"--adapter={tmp_path}/{scale}/adapter"] for scale in (0, 1)]
    more += [["--repetition_penalty=1.5"], ["--stop=qqq"]]
    more += [["--chat"], ["--alpaca"], ["--draft=lookup"], ["--draft=lookup", "--draft_tokens=2"]]
    more += [[f"--draft={TINY}/draft"]]
    for flags in ([], *more):
        rows = rows_of(monkeypatch, capsys, tmp_path / "rows.jsonl", *flags)
    cells = {json.dumps(row["cell"], sort_keys=True) for row in rows}
    assert len(cells) == len(rows) and rows[0]["cell"].keys() == {"model", "max_gen_len", "what", "decoding", "prompt"}
