"""compress.py as a user runs it, and what every other part makes of a quantized directory, sound or damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import crash
import pytest
import safetensors.torch
import torch
from conftest import SMALL, TINY, random_model
from support import mutant, same_weights, widened
from torch import nn

import benchmark_inference
import compress
import evaluate
import finetuning
import inference
from benchmarks.hardware import decode_bytes
from data.tiny.corpus import SAMPLE_PROMPTS
from data.tiny.sequences import SEQ_LEN, held_out
from llama import Llama, adapters, checkpoint, cli, lora, quantization
from llama.calibration import calibrate
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.lora import LoRAConfig
from llama.quantization import Quantization, quantize
from llama.speculative import ModelDraft, Speculation
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training import verdict
from llama.training.batch import Batch
from llama.training.step import Settings, Trainer

CONFIGS = {"int8": Quantization(8), "int4": Quantization(4), "int4-g64": Quantization(4, 64)}
CONFIGS |= {"int4-zero": Quantization(4, 32, True), "int8-g32": Quantization(8, 32)}
CONFIGS["mixed"] = Quantization(4, 32, True, "gptq", ("layers.0.attention.wq", "layers.2.feed_forward.w2"))
FITTING = dataclasses.replace(SMALL, vocab_size=4096)  # the tokenizer's
TOKENS = torch.randint(0, SMALL.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def call(monkeypatch, capsys, script, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.run(getattr(script, "COMMANDS", None) or script.main)
    return exit_.value.code, *capsys.readouterr()


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A small random checkpoint of 16 bits, with a tokenizer file."""
    path = tmp_path_factory.mktemp("plain") / "model"
    checkpoint.save(random_model(FITTING).to(torch.bfloat16), path, tokenizer_path=TINY / "tokenizer.model")
    return path


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> dict[str, Path]:
    """The embedded model in 8 and in 4 bits."""
    work, found = tmp_path_factory.mktemp("embedded"), {}
    for name in ("int8", "int4"):
        model = checkpoint.load(TINY)
        quantize(model, CONFIGS[name])
        found[name] = work / name
        checkpoint.save(model, found[name], tokenizer_path=TINY / "tokenizer.model")
    return found


def quantized(plain: Path, target: Path, config: Quantization) -> Path:
    model = checkpoint.load(plain)
    quantize(model, config)
    checkpoint.save(model, target, tokenizer_path=plain / "tokenizer.model")
    return target


# The command

BESIDE = ("tokenizer_config.json", "generation_config.json")  # which say what tokenizer.json does not


@pytest.mark.parametrize(
    "name", ["int8", "int4", "int4-zero", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int4-g64", "int8-g32"))]
)
@pytest.mark.parametrize("layout", ["meta", pytest.param("hf", marks=pytest.mark.slow)])
def test_quantize_then_load_is_load_then_quantize(plain, tmp_path, monkeypatch, capsys, name, layout):
    """To the bit, in the dtype of the file and in another."""
    config, source = CONFIGS[name], plain
    if layout == "hf":
        source = tmp_path / "hf"
        checkpoint.save(checkpoint.load(plain), source, "hf", plain / "tokenizer.model")
    flags = [
        f"--{field}={getattr(config, field)}"
        for field in ("bits", "group_size", "zero_points")
        if getattr(config, field)
    ]
    flags += [f"--ckpt_dir={source}", f"--out_dir={tmp_path / 'out'}"]
    code, out, err = call(monkeypatch, capsys, compress, "quantize", *flags)
    assert code == 0, err
    tokenizer = {"meta": ["tokenizer.model"]}.get(layout, ["tokenizer.json", *BESIDE])
    files_out = {path.name for path in (tmp_path / "out").iterdir()}
    assert files_out == {"params.json", "model.safetensors", *tokenizer}
    assert json.loads((tmp_path / "out" / "params.json").read_text())["quantization"]["bits"] == config.bits
    assert checkpoint.read_quantization(tmp_path / "out") == config and checkpoint.read_quantization(plain) is None
    for dtype in (None, torch.float32, torch.float16):
        now = checkpoint.load(source, dtype)
        quantize(now, config)
        loaded = checkpoint.load(tmp_path / "out", dtype)
        assert same_weights(now, loaded) and loaded.dtype is now.dtype is (dtype or torch.bfloat16)
        assert torch.equal(now(TOKENS), loaded(TOKENS)) and loaded(TOKENS).dtype is loaded.dtype
    assert len(re.findall(r"^\d ", out, re.MULTILINE)) == SMALL.n_layers and "worst: " in out


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """A text to calibrate on: some 3,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The little fox saw a bird in the tall grass, and the bird sang of the sea.\n" * 160)
    return path


@pytest.mark.parametrize("bits", ["4", pytest.param("5", marks=pytest.mark.slow)])
def test_calibrated_codes(plain, story, tmp_path, monkeypatch, capsys, bits):
    """Those of the library for the first sequences of the text, with what they lose beside the nearest codes."""
    target = tmp_path / "out"
    flags = [f"--ckpt_dir={plain}", f"--bits={bits}", "--zero_points", f"--calibration={story}", "--sequences=3"]
    code, out, err = call(monkeypatch, capsys, compress, "quantize", *flags, f"--out_dir={target}")
    assert code == 0, err
    tables = [re.findall(r"^\d .*", table, re.MULTILINE) for table in out.split("of each matrix (%)")]
    assert [len(table) for table in tables] == [0, SMALL.n_layers, SMALL.n_layers] and out.count("worst: ") == 2
    ids = Tokenizer(plain / "tokenizer.model").encode(story.read_text(), bos=True, eos=False)[: 3 * 512]
    now, budget = checkpoint.load(plain), None if bits == "4" else 5.0
    outcomes = calibrate(now, CONFIGS["int4-zero"], torch.tensor(ids).view(3, 512), budget)
    loaded = checkpoint.load(target)
    assert same_weights(now, loaded) and quantization.quantization_of(now) == checkpoint.read_quantization(target)
    assert json.loads((target / "params.json").read_text())["quantization"]["method"] == "gptq"
    worst = max(outcomes.values(), key=lambda outcome: outcome.chosen)
    assert f"{worst.chosen:.2%}" in out
    assert ("the matrices that keep 8 bits" in out) == (bits == "5")


def test_converting_there_and_back_keeps_every_bit(plain, tmp_path, monkeypatch, capsys):
    """Meta's layout -> GGUF -> Hugging Face's -> GGUF -> Meta's: weights, shape, tokenizer; and what scripts read."""
    source = plain
    for name, to in (("a.gguf", "gguf"), ("hf", "hf"), ("b.gguf", "gguf"), ("meta", "meta")):
        flags = [f"--ckpt_dir={source}", f"--to={to}", f"--out_dir={tmp_path / name}"]
        code, out, err = call(monkeypatch, capsys, compress, "convert", *flags)
        assert code == 0 and "MB now" in out, err
        source = tmp_path / name
        assert same_weights(checkpoint.load(plain), checkpoint.load(source))
        assert Tokenizer(find_tokenizer(source)).is_same(Tokenizer(find_tokenizer(plain)))
    assert checkpoint.fingerprint(tmp_path / "a.gguf") == checkpoint.fingerprint(plain)
    texts = [
        call(monkeypatch, capsys, inference, f"--ckpt_dir={place}", "--max_gen_len=4", "--device=cpu", "--seed=1")[1]
        for place in (tmp_path / "a.gguf", plain)
    ]
    assert texts[0].split("\n> ", 1)[1].split("\n[")[0] == texts[1].split("\n> ", 1)[1].split("\n[")[0]
    for kind, dtype in (("f32", torch.float32), ("q8_0", torch.bfloat16)):
        flags = [f"--ckpt_dir={plain}", f"--type={kind}", f"--out_dir={tmp_path / kind}.gguf"]
        assert call(monkeypatch, capsys, compress, "convert", *flags)[0] == 0
        assert checkpoint.load(tmp_path / f"{kind}.gguf").dtype is dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_of_the_first_layout_still_loads(tmp_path, bits):
    """Written out here: params.json and tensors as they were before zero-points, groups of int8 and calibration."""
    folder, generator = tmp_path / f"int{bits}", torch.Generator().manual_seed(bits)
    folder.mkdir()
    about = {"method": "absmax", "bits": 8} if bits == 8 else {"method": "least-squares", "bits": 4, "group_size": 32}
    (folder / "params.json").write_text(json.dumps(SMALL.to_params() | {"quantization": about}))
    plain, state = random_model(), {}
    for name, weight in plain.state_dict().items():
        if "norm" in name:
            state[name] = weight
            continue
        n, k = weight.shape
        scales = torch.rand(n, 1 if bits == 8 or "embed" in name else k // 32, generator=generator) / 1000
        if bits == 8 or "embed" in name:
            stored = codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        else:
            stored, scales = torch.randint(0, 256, (n, k // 2), generator=generator).byte(), scales.bfloat16()
            low, high = ((part.int() - 8).view(n, -1, 16) for part in (stored & 15, stored >> 4))
            codes = torch.cat([low, high], 2).flatten(1)
        wide = codes.float() * scales.float().repeat_interleave(k // scales.shape[1], 1)
        state |= {name: stored, name.replace("weight", "scales"): scales.squeeze(1)}
        plain.get_submodule(name.removesuffix(".weight")).weight.data = wide
    safetensors.torch.save_file(state, folder / "model.safetensors")
    model = checkpoint.load(folder)
    assert checkpoint.read_quantization(folder) == CONFIGS[f"int{bits}"]
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert torch.equal(widened(model.get_submodule(name)).float(), module.weight)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_embedded_model_in_8_bits_is_half_and_runs_everywhere(tmp_path, monkeypatch, capsys):
    """compress.py without --ckpt_dir, then each script that takes a checkpoint, with no more flags."""
    target = tmp_path / "int8"
    code, out, err = call(monkeypatch, capsys, compress, "quantize", f"--out_dir={target}")
    assert code == 0, err
    share = (target / "model.safetensors").stat().st_size / checkpoint.read_args(TINY).weight_bytes(2)
    assert share <= 0.51 and f"({share:.3f} of it)" in out
    assert (target / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    flags = [f"--ckpt_dir={target}", "--prompt=The little fox", "--max_gen_len=4", "--device=cpu", "--compare"]
    code, out, err = call(monkeypatch, capsys, inference, *flags)
    assert code == 0 and "over int8 weights" in out and "1 of 1 prompts give equal tokens" in out, err
    flags = [f"--ckpt_dir={target}", "--max_tokens=300", "--device=cpu"]
    code, out, err = call(monkeypatch, capsys, evaluate, *flags)
    assert code == 0 and "| int8, int8, float32 |" in out, err
    llama = Llama.build(
        target, target / "tokenizer.model", max_seq_len=64, max_batch_size=2, dtype="bfloat16", device="cpu"
    )
    assert llama.text_completion(["Once"], max_gen_len=3)[0]["generation"]


@pytest.mark.slow
def test_the_benchmark_takes_it(plain, tmp_path):
    """The tokens with the cache on and off, and limits from the bytes that are really read."""
    target = quantized(plain, tmp_path / "q", CONFIGS["int4"])
    options = benchmark_inference.Options(input_len=8, output_len=3, device="cpu", dtype="float32", warm_up=0, seed=0)
    cell = benchmark_inference.GenerationCell("llama", 1, True)
    check = benchmark_inference.TokenCheck(options, target)
    runner = benchmark_inference.GenerationRunner(options, cell, target)
    for one in (check, runner):
        one.prepare()
    assert check.measure()["tokens_equal"] == 16
    figures = runner.measure()
    model, whole = checkpoint.load(target, torch.float32), checkpoint.load(plain, torch.float32)
    assert decode_bytes(whole, 2, 30) == whole.args.weight_bytes(4) + whole.args.kv_cache_bytes(2, 30, 4)  # tied
    assert figures["step_bytes_gb"] * 1e9 == pytest.approx(decode_bytes(model, 1, 9))
    assert decode_bytes(model, 1, 0) < 0.27 * decode_bytes(whole, 1, 0)


REFUSED = {
    "output in use": (["quantize", "--out_dir={plain}"], "already exists"),
    "bits": (["quantize", "--out_dir={new}", "--bits=3"], "--bits=3 is not 8 or 4"),
    "bits in between": (["quantize", "--out_dir={new}", "--bits=4.5"], "--bits=4.5: needs --calibration"),
    "fewer bits": (["quantize", "--out_dir={new}", "--bits=3.5"], "--bits=3.5 is not 8 or 4"),
    "no text": (["quantize", "--out_dir={new}", "--sequences=9"], "--sequences=9: needs --calibration"),
    "absent text": (["quantize", "--out_dir={new}", "--calibration={new}"], "cannot read"),
    "short text": (
        ["quantize", "--out_dir={new}", "--ckpt_dir={plain}", "--calibration={text}", "--sequences=99"],
        "tokens, not 99 times 512; use --sequences=",
    ),
    "no sequence": (
        ["quantize", "--out_dir={new}", "--ckpt_dir={plain}", "--calibration={plain}/params.json"],
        "a sequence takes 512",
    ),
    "zero-points of int8": (["quantize", "--out_dir={new}", "--zero_points"], "--zero_points=True has no effect"),
    "group": (["quantize", "--out_dir={new}", "--bits=4", "--group_size=48"], "--group_size=48 is not one of"),
    "twice": (["quantize", "--out_dir={new}", "--ckpt_dir={quantized}"], "is quantized already, in 8 bits"),
    "absent": (["quantize", "--out_dir={new}", "--ckpt_dir={new}"], "does not exist"),
    "no tokenizer": (["quantize", "--out_dir={new}", "--tokenizer_path={new}"], "is not a file"),
    "converting codes": (["convert", "--out_dir={new}.gguf", "--ckpt_dir={quantized}"], "convert the original"),
    "no .gguf": (["convert", "--out_dir={new}"], "ends in .gguf"),
    "type": (["convert", "--to=hf", "--type=q8_0", "--out_dir={new}"], "--type=q8_0: needs --to=gguf"),
    "converting over": (["convert", "--to=hf", "--out_dir={plain}"], "already exists"),
    "no command": ([], "expected a command: compress.py quantize"),
    "other command": (["squeeze"], "expected a command: compress.py quantize"),
    "unknown flag": (["quantize", "--bit=8"], "did you mean --bits?"),
    "not finite": (["quantize", "--out_dir={new}", "--ckpt_dir={damaged}"], "layers.1.attention.wo.weight: holds"),
    "merging": (
        ["--ckpt_dir={quantized}", "--out_dir={new}", "--export=meta"],
        "an adapter cannot be merged into the quantized weights",
    ),
    "nothing to merge": (["merge", "--out_dir={new}"], "--adapter is missing"),
    "merging into codes": (["merge", "--out_dir={new}", "--ckpt_dir={quantized}", "--adapter=x"], "merge into the"),
    "suffix": (["merge", "--out_dir={new}", "--adapter={new}", "--to=gguf"], "a name ends in .gguf where --to=gguf"),
    "no adapter": (["merge", "--out_dir={new}", "--adapter={new}"], "adapter directory"),
    "all weights": (["--ckpt_dir={quantized}", "--out_dir={new}", "--lora=False"], "codes cannot be trained"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(plain, story, tmp_path_factory) -> dict[str, Path]:
    """Directories that are refused."""
    work, damaged = tmp_path_factory.mktemp("refused"), random_model(FITTING)
    damaged.layers[1].attention.wo.weight.data[3, 3] = torch.inf
    checkpoint.save(damaged, work / "damaged", tokenizer_path=TINY / "tokenizer.model")
    codes = quantized(plain, work / "q", CONFIGS["int8"])
    return {"plain": plain, "damaged": work / "damaged", "quantized": codes, "text": story}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_leaves_nothing(places, tmp_path, monkeypatch, capsys, name):
    arguments, message = REFUSED[name]
    places = {**places, "new": tmp_path / "new"}
    script = finetuning if name in ("merging", "all weights") else compress
    code, _, err = call(monkeypatch, capsys, script, *(argument.format(**places) for argument in arguments))
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("new", ".lock")]


def test_help_names_the_commands_and_their_flags(monkeypatch, capsys):
    assert "quantize" in "".join(call(monkeypatch, capsys, compress, "--help")[1:])
    assert "--group_size" in "".join(call(monkeypatch, capsys, compress, "quantize", "--help")[1:])


def test_hugging_faces_layout_is_refused(plain, tmp_path):
    model = checkpoint.load(quantized(plain, tmp_path / "q", CONFIGS["int8"]))
    with pytest.raises(InputError, match="cannot be written as hf"):
        checkpoint.save(model, tmp_path / "hf", "hf")
    checkpoint.save(model, tmp_path / "again")
    assert same_weights(model, checkpoint.load(tmp_path / "again"))


# What it costs


@pytest.mark.slow
def test_perplexity_hardly_grows(tiny, embedded):
    """On an eighth of the embedded model's held-out text, against the model of 16 bits that both were made from."""
    ids = held_out(tiny.tokenizer, n=32).flatten().tolist()
    plain, int8, int4 = (
        perplexity.evaluate(checkpoint.load(path, torch.float32), ids, SEQ_LEN + 1, batch_size=8).perplexity
        for path in (TINY, embedded["int8"], embedded["int4"])
    )
    assert int8 <= 1.005 * plain and int4 <= 1.05 * plain


# Adapters


def dequantized(model: nn.Module) -> nn.Module:
    """A plain model with the weights that the codes stand for."""
    twin = random_model().double()
    for name, module in twin.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            n, k = module.weight.shape
            module.weight.data = model.get_submodule(name).widen(slice(0, n), torch.empty(n, k, dtype=torch.float64))
        elif hasattr(module, "weight"):
            module.weight.data = model.get_submodule(name).weight.detach().double()
    return twin


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("lean", [False, True])
def test_adapters_over_codes_learn_as_over_the_weights_they_stand_for(name, lean):
    """Loss and every gradient of the adapters, with the plain parts and with the lean ones, in fp64."""
    model = random_model()
    quantize(model, CONFIGS[name])
    model.double()
    twin = dequantized(model)
    ids = TOKENS[:, :-1]
    batch = Batch(ids, None, torch.arange(ids.numel()), TOKENS[:, 1:].flatten())
    gradients, losses = [], []
    for network in (model, twin):
        lora.apply(network, LoRAConfig(r=4, dropout=0.0, targets=tuple(lora.META_NAMES)))
        network.double()
        generator = torch.Generator().manual_seed(1)
        for weight in (weight for weight in network.parameters() if weight.requires_grad):
            weight.data.normal_(std=0.1, generator=generator)
        trainer = Trainer(network, Settings(lean=lean), 1)
        losses.append(trainer.back_propagate(batch, 1).item())
        gradients.append({key: weight.grad for key, weight in trainer.weights.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 7 * SMALL.n_layers
    for key, gradient in gradients[0].items():
        assert (gradient - gradients[1][key]).norm() <= 1e-10 * gradients[1][key].norm(), key
    assert not any(weight.requires_grad for key, weight in model.named_parameters() if "lora_" not in key)


def test_adapters_of_a_quantized_base_are_counted_removed_and_not_merged(plain, tmp_path):
    model = checkpoint.load(quantized(plain, tmp_path / "q", CONFIGS["int4"]), torch.float32)
    before = copy.deepcopy(model.state_dict())
    lora.apply(model, LoRAConfig())
    trained, whole = lora.trainable_share(model)
    assert whole - trained == FITTING.n_params()
    with pytest.raises(InputError, match="cannot be merged into quantized weights"):
        lora.merge(model)
    lora.remove(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_finetuning_over_a_quantized_base(tmp_path, monkeypatch, capsys, name):
    """It trains, keeps the adapter and nothing merged, and inference.py takes base and adapter together."""
    monkeypatch.setattr(verdict, "ANSWER_LEN", 2)
    crash.options_in(tmp_path)
    base, root = quantized(tmp_path / "base", tmp_path / "q", CONFIGS[name]), tmp_path / "run"
    given = {
        **crash.FLAGS,
        "ckpt_dir": base,
        "data": tmp_path / "data.json",
        "out_dir": root,
        "lr": 0.05,
        "amp": "none",
        "epochs": 1,
        "save_every": 9,
    }
    given.pop("export", None)
    flags = [f"--{key}={value}" for key, value in given.items() if value is not None]
    code, out, err = call(monkeypatch, capsys, finetuning, *flags)
    assert code == 0 and f", {name}" in out, err
    assert (root / "adapter").is_dir() and not (root / "merged").exists()
    adapted = checkpoint.load(base, torch.float32)
    base_logits = adapted(TOKENS)
    adapters.load(adapted, root / "adapter", lambda: checkpoint.fingerprint(base))
    assert not torch.equal(adapted.eval()(TOKENS), base_logits)
    with pytest.raises(InputError, match="different base model"):
        adapters.load(checkpoint.load(tmp_path / "base"), root / "adapter", lambda: "0" * 64)
    flags = [
        f"--ckpt_dir={base}",
        f"--adapter={root / 'adapter'}",
        "--prompt=Say fox.",
        "--max_gen_len=2",
        "--device=cpu",
    ]
    code, _, err = call(monkeypatch, capsys, inference, *flags)
    assert code == 0, err


def adapter_for(base: Path, target: Path) -> Path:
    """An adapter with a small update, trained on `base` by what it says."""
    model = checkpoint.load(base, torch.float32)
    lora.apply(model, config := LoRAConfig(r=4))
    for module in lora.layers(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.003, generator=torch.Generator().manual_seed(1))
    adapters.save(model, config, target, checkpoint.fingerprint(base), str(base))
    return target


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.bfloat16), (["--to=hf", "--dtype=float32"], torch.float32)])
def test_adapters_of_a_quantized_base_merge_into_its_original(plain, tmp_path, monkeypatch, capsys, flags, dtype):
    """Behind the flag; the sum of two; in the layout and dtype that are asked for, else those of the base."""
    small = quantized(plain, tmp_path / "q", CONFIGS["int8"])
    adapter = f"{adapter_for(plain, tmp_path / 'a')},{adapter_for(small, tmp_path / 'b')}"
    flags = ["merge", f"--ckpt_dir={plain}", f"--adapter={adapter}", f"--out_dir={tmp_path / 'out'}", *flags]
    code, _, err = call(monkeypatch, capsys, compress, *flags)
    assert code == 2 and "/q', sha256" in err and "--any_base=True uses it" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    code, out, err = call(monkeypatch, capsys, compress, *flags, "--any_base")
    assert code == 0 and ("lost to rounding" in out) == (dtype is torch.bfloat16), err
    merged, model = checkpoint.load(tmp_path / "out"), checkpoint.load(plain, dtype)
    adapters.load(model, adapter)
    lora.merge(model)
    lora.remove(model)
    assert merged.dtype is dtype and same_weights(merged, model)
    assert (tmp_path / "out" / "config.json").exists() == ("--to=hf" in flags)
    adapters.load(over_codes := checkpoint.load(small, torch.float32), tmp_path / "a")  # and back
    adapters.load(over_weights := checkpoint.load(plain, torch.float32), tmp_path / "a")
    torch.testing.assert_close(over_codes(TOKENS), over_weights(TOKENS), rtol=0, atol=0.2)


# A draft


@pytest.mark.parametrize("name", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_quantized_model_drafts_for_its_original(tiny, embedded, name):
    """Identical tokens under greedy decoding, nearly all of its proposals accepted."""
    prompts = [tiny.encode_prompt(text) for text in SAMPLE_PROMPTS[:3]]
    speculation = Speculation(ModelDraft(checkpoint.load(embedded[name], torch.float32)), 4)
    drafted = tiny.generate(prompts, 24, 0, speculation=speculation)[0]
    assert drafted == tiny.generate(prompts, 24, 0)[0]
    assert speculation.counts.proposed > 20 and speculation.counts.acceptance > 0.8
    assert ModelDraft(checkpoint.load(embedded[name], torch.float32)).cost(tiny.decoder) < 0.9


def test_inference_takes_it_as_a_draft(embedded, monkeypatch, capsys):
    flags = [f"--draft={embedded['int8']}", "--compare", "--prompt=The little fox", "--max_gen_len=8", "--device=cpu"]
    code, out, err = call(monkeypatch, capsys, inference, *flags)
    assert code == 0 and "1 of 1 prompts give equal tokens" in out and "tokens proposed" in out, err


# Damage


def edit_params(directory: Path, **changes) -> None:
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps({**params, **changes}))


def edit_tensors(directory: Path, change) -> None:
    state = safetensors.torch.load_file(directory / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, directory / "model.safetensors")


INT8 = {"method": "absmax", "bits": 8}
INT4 = {"method": "least-squares", "bits": 4, "group_size": 32}
WQ = "layers.0.attention.wq"
DAMAGE = {
    "another width": (lambda d: edit_params(d, quantization=INT8), r"wq\.weight: holds uint8, 8 bits have int8"),
    "another group": (
        lambda d: edit_params(d, quantization={**INT4, "group_size": 64}),
        r"wq\.scales: has shape \[64, 2\], the config says \[64, 1\]",
    ),
    "group": (
        lambda d: edit_params(d, quantization={**INT4, "group_size": 7}),
        r"params\.json:quantization\.group_size=7",
    ),
    "bits": (lambda d: edit_params(d, quantization={**INT8, "bits": 2}), r"params\.json:quantization\.bits=2"),
    "list of bits": (lambda d: edit_params(d, quantization={**INT8, "bits": [8]}), r"quantization\.bits=\[8\]"),
    "no method": (lambda d: edit_params(d, quantization={"bits": 8}), r"params\.json:quantization: "),
    "method": (lambda d: edit_params(d, quantization={**INT4, "method": "absmax"}), r"quantization\.method='absmax'"),
    "unknown field": (lambda d: edit_params(d, quantization={**INT8, "zero": 1}), r"params\.json:quantization: "),
    "zero-points": (
        lambda d: edit_params(d, quantization={**INT4, "zero_points": 1}),
        r"params\.json:quantization\.zero_points=1",
    ),
    "int8 matrices": (
        lambda d: edit_params(d, quantization={**INT4, "int8": ["layers.9.attention.wq"]}),
        r"params\.json:quantization\.int8: the blocks have no matrix 'layers\.9\.attention\.wq'",
    ),
    "list of int8": (
        lambda d: edit_params(d, quantization={**INT4, "int8": WQ}),
        r"params\.json:quantization\.int8='layers\.0\.attention\.wq' is no list",
    ),
    "int8 that is not there": (
        lambda d: edit_params(d, quantization={**INT4, "int8": [WQ]}),
        r"wq\.weight: holds uint8, 8 bits have int8",
    ),
    "zero-points that are not there": (
        lambda d: edit_params(d, quantization={**INT4, "zero_points": True}),
        r"wq\.scales: holds bfloat16, 4 bits have float16",
    ),
    "offsets without zero-points": (
        lambda d: edit_tensors(d, lambda s: s.update({f"{WQ}.offsets": torch.zeros(64, 2, dtype=torch.half)})),
        r"wq\.offsets: unexpected weight",
    ),
    "no object": (lambda d: edit_params(d, quantization=True), r"params\.json:quantization: True is not"),
    "vocabulary": (lambda d: edit_params(d, vocab_size=-1), r"params\.json:vocab_size"),
    "shape": (lambda d: edit_params(d, dim=128), r"the config says"),
    "layers": (lambda d: edit_params(d, n_layers=1000), r"layers\.999\.\S+: weight is missing"),
    "no field": (
        lambda d: (d / "params.json").write_text(json.dumps(SMALL.to_params())),
        r"but no consolidated\.\*\.pth",
    ),
    "no scales": (lambda d: edit_tensors(d, lambda s: s.pop(f"{WQ}.scales")), r"wq\.scales: weight is missing"),
    "extra": (lambda d: edit_tensors(d, lambda s: s.update({"output.weight": torch.ones(2)})), "unexpected weight"),
    "plain weight": (
        lambda d: edit_tensors(d, lambda s: s.update({f"{WQ}.weight": torch.ones(64, 32)})),
        r"wq\.weight: holds float32, 4 bits have uint8",
    ),
    "scales dtype": (
        lambda d: edit_tensors(d, lambda s: s.update({f"{WQ}.scales": s[f"{WQ}.scales"].float()})),
        r"wq\.scales: holds float32, 4 bits have bfloat16",
    ),
    "infinite scale": (
        lambda d: edit_tensors(d, lambda s: s[f"{WQ}.scales"].fill_(torch.inf)),
        r"wq\.scales: holds scales that are no finite numbers",
    ),
    "a scale beyond fp32": (
        lambda d: edit_tensors(d, lambda s: s[f"{WQ}.scales"].fill_(3e38)),
        r"wq\.scales: holds scales that are no finite numbers",
    ),
    "norm": (
        lambda d: edit_tensors(d, lambda s: s.update({"norm.weight": torch.ones(64, dtype=torch.int8)})),
        r"norm\.weight: holds torch\.int8",
    ),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 9_000), "truncated or no safetensors"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), "but no model.safetensors; download"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directory(plain, tmp_path, name):
    damage, message = DAMAGE[name]
    target = quantized(plain, tmp_path / "q", CONFIGS["int4"])
    damage(target)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(target)
    assert "\n" not in str(caught.value)


OFFSETS = {
    "no offsets": (lambda s: s.pop(f"{WQ}.offsets"), r"wq\.offsets: weight is missing"),
    "shape": (lambda s: s.update({f"{WQ}.offsets": torch.zeros(64, 1).half()}), r"wq\.offsets: has shape \[64, 1\]"),
    "dtype": (
        lambda s: s.update({f"{WQ}.offsets": s[f"{WQ}.offsets"].bfloat16()}),
        r"wq\.offsets: holds bfloat16, 4 bits have float16",
    ),
    "infinite": (lambda s: s[f"{WQ}.offsets"].fill_(-torch.inf), r"wq\.scales: holds scales that are no finite"),
    "no number": (lambda s: s[f"{WQ}.scales"].fill_(torch.nan), r"wq\.scales: holds scales that are no finite"),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_damaged_zero_points(plain, tmp_path, name):
    damage, message = OFFSETS[name]
    target = quantized(plain, tmp_path / "q", CONFIGS["int4-zero"])
    edit_tensors(target, damage)
    with pytest.raises(InputError, match=message):
        checkpoint.load(target)


def test_scales_that_fp16_cannot_hold_are_refused(tmp_path):
    for name, value in (("int4", 1e6), ("int4-zero", 0.0)):
        model = random_model()
        model.layers[1].feed_forward.w2.weight.data[3, 3] = value
        quantize(model, CONFIGS[name])
        if name == "int4-zero":  # each alone is within the range
            layer = model.layers[1].feed_forward.w2
            layer.scales[2, 0], layer.offsets[2, 0] = 3000, 40_000
        checkpoint.save(model, tmp_path / name)
        checkpoint.load(tmp_path / name, torch.bfloat16)
        with pytest.raises(InputError, match=r"layers\.1\.feed_forward\.w2\.scales: values exceed float16"):
            checkpoint.load(tmp_path / name, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int8-g32", "int4", "int4-zero", "mixed"])
@pytest.mark.parametrize("file", ["params.json", "model.safetensors"])
def test_a_thousand_mutants_of_a_file_run_or_end_in_one_line(plain, story, tmp_path, monkeypatch, capsys, name, file):
    """Exit code 2, or 4 where a number that was changed makes the loss infinite; never a traceback. 10,000 in all."""
    target = quantized(plain, tmp_path / "q", CONFIGS[name])
    flags = (f"--ckpt_dir={target}", f"--data={story}", "--max_tokens=5", "--context=5", "--device=cpu")
    good, rng, codes = (target / file).read_bytes(), random.Random(f"{name} {file}"), Counter()
    for _ in range(1000):
        (target / file).write_bytes(mutant(good, rng))
        code, _, err = call(monkeypatch, capsys, evaluate, *flags)
        codes[code] += 1
        assert code in (0, 2, 4) and len(err) < 600, err
        assert (err == "") if code == 0 else (err.startswith("error: ") and err.count("\n") == 1), err
        if code != 2:
            checkpoint.fingerprint(target)
    assert codes[2] > 250, codes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4", "int4-zero", "mixed"])
def test_changed_fields_of_params_load_or_end_in_one_line(plain, tmp_path, name):
    """Every field, and every field of `quantization`, as something else."""
    target = quantized(plain, tmp_path / "q", CONFIGS[name])
    good = json.loads((target / "params.json").read_text())
    values = (None, True, -1, 0, 1, 7, 8, 4, 64, 1 << 40, 0.5, float("nan"), "8", "absmax", [], [8], {}, {"bits": 8})
    for value in values:
        changed = [{**good, field: value} for field in good]
        changed += [{**good, "quantization": {**good["quantization"], field: value}} for field in good["quantization"]]
        for params in changed:
            (target / "params.json").write_text(json.dumps(params))
            try:
                checkpoint.load(target)
            except InputError as error:
                assert "\n" not in str(error)
    assert quantization.Quantization.from_params(good["quantization"]) == CONFIGS[name]


@pytest.mark.parametrize("command", ["quantize --bits=8", "prune --share=0.5 --method=magnitude"])
def test_a_tokenizer_of_a_different_vocabulary_is_refused_before_the_weights_are_read(
    tmp_path, monkeypatch, capsys, command
):
    checkpoint.save(random_model(), tmp_path / "small", tokenizer_path=TINY / "tokenizer.model")
    monkeypatch.setattr("llama.checkpoint.load", lambda *_args, **_named: pytest.fail("read the weights"))
    flags = [*command.split(), f"--ckpt_dir={tmp_path / 'small'}", f"--out_dir={tmp_path / 'out'}"]
    code, _, err = call(monkeypatch, capsys, compress, *flags)
    assert code == 2 and "the tokenizer has 4096 words, the model 512" in err


@pytest.mark.parametrize("command", [("quantize",), ("prune", "--method=magnitude")])
def test_weights_of_several_dtypes_take_the_dtype_that_is_asked_for(plain, tmp_path, monkeypatch, capsys, command):
    """As published files have them, norms in fp32: the flag that the refusal names is there, and helps."""
    mixed = tmp_path / "mixed"
    shutil.copytree(plain, mixed)
    state = torch.load(mixed / "consolidated.00.pth", weights_only=True)
    torch.save({**state, "norm.weight": state["norm.weight"].float()}, mixed / "consolidated.00.pth")
    flags = (*command, f"--ckpt_dir={mixed}", f"--out_dir={tmp_path / 'out'}")
    code, _, err = call(monkeypatch, capsys, compress, *flags)
    assert code == 2 and "several dtypes" in err and "pass --dtype=float32" in err
    assert call(monkeypatch, capsys, compress, *flags, "--dtype=bfloat16")[0] == 0
    assert checkpoint.load(tmp_path / "out").norm.weight.dtype == torch.bfloat16
