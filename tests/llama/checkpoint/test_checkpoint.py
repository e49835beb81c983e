"""Both layouts read and written, against Hugging Face's implementation; every damaged directory named in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, SMALL, TINY, random_model, write_shards
from support import mutant, same_weights

from llama import ModelArgs, Tokenizer, checkpoint
from llama.config import PRESETS
from llama.decoding import Decoder
from llama.errors import EnvironmentFailure, InputError
from llama.model import apply_rope, rope_frequencies, rope_table
from llama.sampling import Sampling
from llama.speculative import PromptLookup

UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False)
LLAMA2 = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=300, multiple_of=32)


@pytest.mark.parametrize("args", [SMALL, UNTIED, LLAMA2])
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_round_trip_is_bit_equal(tmp_path, args, layout):
    model = random_model(args)
    checkpoint.save(model, tmp_path / "out", layout)
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.args.n_params() == sum(p.numel() for p in loaded.parameters()) == args.n_params()
    assert same_weights(model, loaded)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), loaded(tokens))
    assert not loaded.training


@pytest.mark.parametrize("args", [SMALL, UNTIED, LLAMA2])
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_logits_equal_transformers(tmp_path, args, layout):
    """Ours = LlamaForCausalLM on the same random weights, through both loaders, at positions where scaling acts."""
    from transformers import LlamaForCausalLM

    model = random_model(args)
    checkpoint.save(model, tmp_path / "hf", "hf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    checkpoint.save(model, tmp_path / "meta", "meta")
    ours = checkpoint.load(tmp_path / layout)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab_size, (2, 64), generator=generator)
    for start in (0, 5_000, 20_000, 100_000):
        pos = torch.arange(start, start + 64).expand(2, 64)
        with torch.no_grad():
            expected = theirs(tokens, position_ids=pos).logits
            torch.testing.assert_close(ours(tokens, pos), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_a_sentence_in_a_long_text_is_found_as_by_transformers(tmp_path):
    """30,000 tokens that hide a sentence, then its beginning: the same logits behind it, in parts and with the cache.

    The embedded model, in fp32. The text goes through in parts, the rest of the sentence as tokens to verify.
    """
    from transformers import LlamaForCausalLM

    sentence = Tokenizer(TINY / "tokenizer.model").encode_prompt("The old fox keeps a blue box below the third tree.")[
        1:
    ]
    hay = torch.randint(4096, (30_000,), generator=torch.Generator().manual_seed(1)).tolist()
    known, rest = sentence[:5], sentence[5:]
    prompt = [*hay[:11_111], *sentence, *hay[11_111:], *known]
    model = checkpoint.load(TINY, torch.float32)
    checkpoint.save(model, tmp_path / "hf", "hf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    expected = theirs(torch.tensor([[*prompt, *rest]]), logits_to_keep=len(rest) + 1).logits[0]
    with Decoder(model, "auto").start(1, len(prompt) + len(rest)) as run:
        first = run.last_logits(torch.tensor([prompt]), torch.tensor([len(prompt) - 1]))
        others = run.step(torch.tensor([rest]), torch.arange(len(rest))[None] + len(prompt))[0]
    torch.testing.assert_close(torch.cat((first, others)), expected, atol=1e-4, rtol=0)
    sampling = Sampling(0, 1.0, None, 0.0, 1.0, torch.Generator(), 4096)
    with PromptLookup().start([prompt], len(prompt), sampling) as propose:
        assert propose([prompt], [len(rest)]).tokens == [rest]


def test_transformers_writes_what_we_read(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = dict(rope_type="llama3", rope_theta=500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        rope_parameters={**rope, "original_max_position_embeddings": 8192},
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")  # several files with an index
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = checkpoint.load(tmp_path)
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", ["llama3.2-1b", "llama3.1-8b", "llama2-7b"])
def test_rope_tables_equal_transformers(preset):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    args = PRESETS[preset]
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {"rope_type": "llama3", "factor": args.rope_scale_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=args.dim, num_attention_heads=args.n_heads, rope_parameters=rope)
    pos = torch.tensor([[0, 5_000, 20_000, 100_000]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), pos)
    table = rope_table(pos, rope_frequencies(args))[:, :, 0]
    half = args.head_dim // 2
    torch.testing.assert_close(table[..., 0], cos[..., :half], atol=1e-6, rtol=0)
    torch.testing.assert_close(table[..., 1], sin[..., :half], atol=1e-6, rtol=0)


def test_rope_scaling_is_factor_32_and_matters():
    """Pairs 0-14 keep their frequency, 15-17 are blended, 18-31 are divided by 32 (3.2 1B)."""
    args = PRESETS["llama3.2-1b"]
    plain = rope_frequencies(dataclasses.replace(args, use_scaled_rope=False, rope_scale_factor=None))
    ratio = plain / rope_frequencies(args)
    assert torch.equal(ratio[:15], torch.ones(15))
    assert ((ratio[15:18] > 1) & (ratio[15:18] < 32)).all()
    torch.testing.assert_close(ratio[18:], torch.full((14,), 32.0))
    x = torch.ones(1, 1, 1, 64)
    far = torch.tensor([[20_000]])
    gap = apply_rope(x, rope_table(far, rope_frequencies(args))) - apply_rope(x, rope_table(far, plain))
    assert gap.abs().max() > 0.5


@pytest.mark.parametrize(("args", "embedding_axis"), [(SMALL, 0), (UNTIED, 0), (LLAMA2, 1)])
@pytest.mark.parametrize("n", [1, 2])
def test_shards_merge(tmp_path, args, embedding_axis, n):
    model = random_model(args)
    write_shards(model, tmp_path / "mp", n, embedding_axis)
    if args.tie_word_embeddings:  # released checkpoints list the tied head as a second name
        for path in (tmp_path / "mp").glob("*.pth"):
            shard = torch.load(path, weights_only=True)
            torch.save({**shard, "output.weight": shard["tok_embeddings.weight"]}, path)
    assert same_weights(model, checkpoint.load(tmp_path / "mp"))


@pytest.mark.parametrize("args", [SMALL, UNTIED])
def test_shards_are_written_as_meta_cuts_them(tmp_path, args):
    model = random_model(args)
    write_shards(model, tmp_path / "theirs", 2, 0)
    checkpoint.save(model, tmp_path / "ours", shards=2)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        ours, theirs = (torch.load(tmp_path / d / name, weights_only=True) for d in ("ours", "theirs"))
        theirs.setdefault("output.weight", theirs["tok_embeddings.weight"])  # Meta's code needs the key
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert (tmp_path / "ours" / name).stat().st_size < 1.1 * sum(weight.nbytes for weight in ours.values()) + 9999
    assert same_weights(model, checkpoint.load(tmp_path / "ours"))
    for shards, layout, reason in ((3, "meta", "3 processes cannot share"), (2, "hf", "only weights in Meta's layout")):
        with pytest.raises(InputError, match=reason):
            checkpoint.save(model, tmp_path / "bad", layout, shards=shards)
    assert not (tmp_path / "bad").exists()


def test_shards_of_several_models_are_refused(tmp_path):
    write_shards(random_model(), tmp_path / "mp", 2, 0)
    second = tmp_path / "mp" / "consolidated.01.pth"
    shard = torch.load(second, weights_only=True)
    torch.save({**shard, "norm.weight": shard["norm.weight"] + 1}, second)
    with pytest.raises(InputError, match=r"norm\.weight: the shards hold different copies"):
        checkpoint.load(tmp_path / "mp")
    torch.save({**shard, "layers.0.attention.wq.weight": torch.ones(32, 63)}, second)
    with pytest.raises(InputError, match=r"01\.pth:layers\.0\.attention\.wq\.weight: shape \[32, 63\] does not fit"):
        checkpoint.load(tmp_path / "mp")
    second.unlink()
    with pytest.raises(InputError, match=r"has shape .*, the config says"):
        checkpoint.load(tmp_path / "mp")


def test_vocab_size_of_llama_2_comes_from_the_table(tmp_path):
    write_shards(random_model(LLAMA2), tmp_path / "l2", 2, 1)
    params = json.loads((tmp_path / "l2" / "params.json").read_text())
    for name in ("n_kv_heads", "rope_theta", "use_scaled_rope"):
        del params[name]
    (tmp_path / "l2" / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    for path in (tmp_path / "l2").glob("*.pth"):  # Llama 2 also stores a derived table
        torch.save({**torch.load(path, weights_only=True), "rope.freqs": torch.zeros(8)}, path)
    assert checkpoint.load(tmp_path / "l2").args == LLAMA2


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_change_of_dtype(tmp_path, model, layout):
    checkpoint.save(model.to(torch.bfloat16), tmp_path / "bf16", layout)
    kept, widened = checkpoint.load(tmp_path / "bf16"), checkpoint.load(tmp_path / "bf16", torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    for name, weight in widened.state_dict().items():
        assert torch.equal(weight, kept.state_dict()[name].float())
    assert torch.equal(kept.rope_freqs, rope_frequencies(SMALL))  # never rounded
    assert checkpoint.load(tmp_path / "bf16", torch.float16).rope_freqs.dtype == torch.float32


def test_float16_overflow_is_refused(tmp_path, model):
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 3] = 1e5
    checkpoint.save(model, tmp_path / "big")
    with pytest.raises(InputError, match=r"layers\.1\.feed_forward\.w2\.weight.*float16"):
        checkpoint.load(tmp_path / "big", torch.float16)


def test_save_never_overwrites(tmp_path, model):
    checkpoint.save(model, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        checkpoint.save(model, tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("limit", [10, 30_000])
def test_a_full_disk_is_named_and_nothing_is_left_behind(tmp_path, model, layout, limit):
    """A limit on file size stands for the disk: the operating system refuses the write, at once or half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(EnvironmentFailure, match=r"cannot write .*full"):
            checkpoint.save(model, tmp_path / "full", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["meta", *[pytest.param(name, marks=pytest.mark.slow) for name in ("hf", "gguf")]])
@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])
def test_loading_needs_the_weights_once(tmp_path, layout, dtype):
    """Peak resident memory of a fresh process grows by at most 1.15 x the weights, also when their dtype changes."""
    args = ModelArgs(dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, vocab_size=8192, tie_word_embeddings=True)
    checkpoint.save(random_model(args).to(torch.bfloat16), tmp_path / "m", layout)
    program = (
        "import sys, torch\n"
        "from benchmarks.loading import LoadRunner\n"
        "from llama import device\n"
        "LoadRunner('data/tiny', 'float32').measure()\n"  # what the libraries set up at first use
        "assert device.reset_peak_memory(torch.device('cpu'))\n"
        "before = device.peak_memory_bytes(torch.device('cpu'))\n"
        "figures = LoadRunner(sys.argv[1], sys.argv[2]).measure()\n"
        "weights = figures['peak_memory_mb'] / figures['peak_over_weights_x']\n"
        "print((figures['peak_memory_mb'] - before / 1e6) / weights)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "m"), dtype]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 <= float(run.stdout) <= 1.15


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch canary",))


def edit_params(directory, **changes):
    params = json.loads((directory / "params.json").read_text())
    params = {k: v for k, v in {**params, **changes}.items() if v is not None}
    (directory / "params.json").write_text(json.dumps(params))


def edit_weights(directory, change):
    path = directory / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def drop(key):
    return lambda directory: edit_weights(directory, lambda state: state.pop(key))


def put(key, value):
    return lambda directory: edit_weights(directory, lambda state: state.update({key: value}))


META_DAMAGE = {
    "no params": (lambda d: (d / "params.json").unlink(), "neither params.json"),
    "no shard": (lambda d: (d / "consolidated.00.pth").unlink(), "but no .*; download the weights"),
    "gap": (lambda d: (d / "consolidated.00.pth").rename(d / "consolidated.01.pth"), "without a gap"),
    "truncated": (lambda d: os.truncate(d / "consolidated.00.pth", 50_000), "truncated"),
    "empty": (lambda d: os.truncate(d / "consolidated.00.pth", 0), "truncated"),
    "pickle": (lambda d: torch.save({"a": Bomb()}, d / "consolidated.00.pth"), "might run code"),
    "raw pickle": (lambda d: (d / "consolidated.00.pth").write_bytes(pickle.dumps(Bomb())), r"\.pth"),
    "not tensors": (lambda d: torch.save({"a": 1}, d / "consolidated.00.pth"), "flat dictionary"),
    "not JSON": (lambda d: (d / "params.json").write_text("{"), "not valid JSON"),
    "deep JSON": (lambda d: (d / "params.json").write_text("[" * 100_000), "not valid JSON"),
    "JSON list": (lambda d: (d / "params.json").write_text("[]"), "JSON object"),
    "unknown field": (lambda d: edit_params(d, n_experts=8), r"params\.json:n_experts: unknown field"),
    "zero": (lambda d: edit_params(d, n_layers=0), r"params\.json:n_layers"),
    "huge": (lambda d: edit_params(d, vocab_size=1 << 40), r"params\.json:vocab_size"),
    "text": (lambda d: edit_params(d, dim="64"), r"params\.json:dim"),
    "NaN": (lambda d: edit_params(d, norm_eps=float("nan")), r"params\.json:norm_eps"),
    "list": (lambda d: edit_params(d, dim=[64]), r"params\.json:dim"),
    "a million layers": (lambda d: edit_params(d, n_layers=1 << 20), r"params\.json:n_layers"),
    "too many layers": (lambda d: edit_params(d, n_layers=1000), r"layers\.999\.\S+: weight is missing.*1000 layers"),
    "directory": (lambda d: ((d / "params.json").unlink(), (d / "params.json").mkdir()), "is not a file"),
    "indivisible": (lambda d: edit_params(d, n_heads=3), r"params\.json:n_heads"),
    "odd groups": (lambda d: edit_params(d, n_kv_heads=3), r"params\.json:n_kv_heads"),
    "unknown RoPE": (lambda d: edit_params(d, rope_scale_factor=None), r"params\.json:rope_scale_factor.*32"),
    "factor alone": (lambda d: edit_params(d, use_scaled_rope=False), r"params\.json:rope_scale_factor"),
    "no head": (drop("output.weight"), None),
    "undeclared tie": (
        lambda d: (edit_params(d, tie_word_embeddings=None), edit_weights(d, lambda s: s.pop("output.weight"))),
        r"params\.json:tie_word_embeddings",
    ),
    "other head": (lambda d: edit_weights(d, lambda s: s.update({"output.weight": s["norm.weight"]})), "differs"),
    "missing": (drop("layers.2.ffn_norm.weight"), r"layers\.2\.ffn_norm\.weight: weight is missing"),
    "extra": (put("layers.9.x", torch.ones(2)), r"layers\.9\.x: unexpected weight"),
    "shape": (
        put("layers.1.attention.wo.weight", torch.ones(64, 63)),
        r"layers\.1\.attention\.wo\.weight: has shape \[64, 63\]",
    ),
    "no table": (drop("tok_embeddings.weight"), r"tok_embeddings\S+ weight is mis"),
    "number as key": (put(1, torch.ones(1)), "flat dictionary of plain"),
    "sparse": (put("x", torch.eye(2).to_sparse()), "flat dictionary of plain"),
    "several dtypes": (put("norm.weight", torch.ones(64).half()), "dtypes"),
    "integers": (
        put("norm.weight", torch.ones(64, dtype=torch.int8)),
        r"norm\.weight: holds torch\.int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", META_DAMAGE)
def test_damaged_meta_directory(tmp_path, model, monkeypatch, name):
    damage, message = META_DAMAGE[name]
    monkeypatch.chdir(tmp_path)
    checkpoint.save(model, tmp_path / "m")
    damage(tmp_path / "m")
    if message is None:  # no damage after all: a declared tied head needs no second name
        assert same_weights(model, checkpoint.load(tmp_path / "m"))
        return
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_torch_that_can_be_made_to_run_code_is_refused(tmp_path, model, monkeypatch):
    """weights_only=True keeps its promise from 2.10 on."""
    checkpoint.save(model, tmp_path / "m")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    with pytest.raises(EnvironmentFailure, match=r"torch 2\.9\.1\S* can be made to run code.*install torch >= 2\.10"):
        checkpoint.load(tmp_path / "m")


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(directory, change):
    state = safetensors.torch.load_file(directory / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, directory / "model.safetensors")


def write_index(directory, file_name):
    (directory / "model.safetensors").rename(directory / "model-00001-of-2.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file_name}}))


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF_DAMAGE = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "but no .*; download the weights"),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 50_000), "truncated"),
    "no config": (lambda d: (d / "config.json").unlink(), "neither params.json"),
    "architecture": (lambda d: edit_config(d, model_type="mixtral"), r"config\.json:model_type"),
    "bias": (lambda d: edit_config(d, attention_bias=True), r"config\.json:attention_bias"),
    "head size": (
        lambda d: edit_config(d, head_dim=32),
        r"q_proj\.weight: has shape \[64, 64\], the config says \[128, 64\]",
    ),
    "ffn": (lambda d: edit_config(d, intermediate_size=-1), r"config\.json:intermediate_size"),
    "no size": (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), r"config\.json:hidden_size"),
    "rope type": (lambda d: edit_config(d, rope_scaling={"type": "yarn"}), r"config\.json:rope_scaling.*yarn"),
    "rope context": (lambda d: edit_config(d, rope_scaling=LLAMA3_ROPE), r"config\.json:rope_scaling.*original"),
    "missing": (
        lambda d: edit_tensors(d, lambda s: s.pop("model.norm.weight")),
        r"model\.norm\.weight: weight is missing",
    ),
    "extra": (lambda d: edit_tensors(d, lambda s: s.update({"x": torch.ones(1)})), "m:x: unexpected weight"),
    "other head": (
        lambda d: edit_tensors(d, lambda s: s.update({"lm_head.weight": torch.ones(512, 64)})),
        "ties the head, but lm_head differs",
    ),
    "head alone": (
        lambda d: edit_tensors(d, lambda s: s.update({"lm_head.weight": s.pop("model.embed_tokens.weight")})),
        r"model\.embed_tokens\.weight: weight is missing",
    ),
    "Meta's name": (lambda d: edit_tensors(d, lambda s: s.update({"norm.weight": torch.ones(64)})), "Meta's name"),
    "list": (lambda d: edit_config(d, hidden_size=[64]), r"config\.json:hidden_size"),
    "index of lists": (lambda d: write_index(d, [1]), "must map weights to names"),
    "outside": (lambda d: write_index(d, "../secret.safetensors"), "not a plain .safetensors file name"),
    "absolute": (lambda d: write_index(d, "/etc/passwd"), "not a plain .safetensors file name"),
    "absent shard": (lambda d: write_index(d, "model-00002-of-2.safetensors"), "does not exist"),
}


@pytest.mark.parametrize("name", HF_DAMAGE)
def test_damaged_hf_directory(tmp_path, model, name):
    damage, message = HF_DAMAGE[name]
    checkpoint.save(model, tmp_path / "m", "hf")
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["params.json", "consolidated.00.pth", "config.json", "model.safetensors"])
def test_mutated_files_load_or_end_in_one_line(tmp_path, file):
    args = dataclasses.replace(SMALL, head_dim=None, dim=32, n_layers=2, vocab_size=64)
    checkpoint.save(
        random_model(args), tmp_path / "m", "meta" if file in ("params.json", "consolidated.00.pth") else "hf"
    )
    good = (tmp_path / "m" / file).read_bytes()
    rng = random.Random(file)
    refused = 0
    for _ in range(60):
        (tmp_path / "m" / file).write_bytes(mutant(good, rng))
        try:
            checkpoint.load(tmp_path / "m", torch.float32)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    assert refused > 15


def test_missing_directory(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load(tmp_path / "nowhere")
