"""GGUF files read and written, against the gguf package and transformers; every damaged file named in one line."""

from __future__ import annotations

import dataclasses
import random
import resource
import struct

import gguf
import numpy as np
import pytest
import torch
import vocabularies
from conftest import SMALL, random_model
from gguf import GGMLQuantizationType as Kind
from support import mutant, same_weights

from llama import ModelArgs, Tokenizer, checkpoint, gguf_header
from llama.checkpoint import gguf as gguf_layout
from llama.checkpoint import gguf_files
from llama.checkpoint.gguf import names_of
from llama.errors import EnvironmentFailure, InputError
from llama.files import new_file

LLAMA2 = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=300, multiple_of=32, max_seq_len=2048)
LINEAR = dataclasses.replace(LLAMA2, rope_linear_factor=4.0, n_kv_heads=1)
# The widths of real models, with few layers and a small vocabulary.
SHAPES = {
    "Llama 3.2": SMALL,
    "Llama 2": LLAMA2,
    "linear scaling": LINEAR,
    "SmolLM2 135M": ModelArgs(dim=576, n_layers=1, n_heads=9, n_kv_heads=3, vocab_size=320, tie_word_embeddings=True),
    "head_dim 128, 24 heads": ModelArgs(
        dim=1792, n_layers=1, n_heads=24, n_kv_heads=8, head_dim=128, vocab_size=64, ffn_dim_multiplier=0.1
    ),
    "OpenLLaMA 3B": ModelArgs(dim=400, n_layers=2, n_heads=4, head_dim=100, vocab_size=64),
}
DEQUANTIZABLE = [kind for kind in Kind if kind.name.startswith(("Q", "IQ", "TQ", "MX")) and kind.name[-2:] != "_1"]
DEQUANTIZABLE = [kind for kind in DEQUANTIZABLE if kind not in (Kind.Q8_K, Kind.Q1_0)] + [Kind.Q4_1, Kind.Q5_1]


def saved(path, model, kind=None):
    """The model as a file; every matrix as random codes of `kind` where one is given."""
    checkpoint.save(model, path, "gguf")
    return path if kind is None else rewritten(path, kind=kind)


def rewritten(path, kind=None, fields=None, tensors=None, drop=()):
    """A file with other content, through the package's own reader and writer."""
    reader = gguf.GGUFReader(path)
    target = path.with_name("rewritten.gguf")
    values = {f.name: f for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, str(values.pop("general.architecture").contents()))
    for name, field in values.items():
        if name not in (fields or {}) and name not in drop:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, (value, value_type) in (fields or {}).items():
        writer.add_key_value(name, value, value_type)
    rng = np.random.default_rng(0)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        if kind is None or len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            continue
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = tensor.shape[::-1]
        codes = rng.integers(0, 60, (rows, columns // block * block_bytes), dtype=np.uint8)  # as fp16, small numbers
        writer.add_tensor(tensor.name, codes, raw_dtype=kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Llama 3.2", torch.float16), ("Llama 3.2", torch.bfloat16), *((name, torch.float32) for name in SHAPES)],
)
def test_round_trip_is_bit_equal(tmp_path, name, dtype):
    model = random_model(SHAPES[name]).to(dtype)
    checkpoint.save(model, tmp_path / "m.gguf", "gguf")
    loaded = checkpoint.load(tmp_path / "m.gguf")
    assert same_weights(model, loaded) and loaded.dtype == dtype
    for field in ("norm_eps", "rope_theta", "rope_scale_factor", "rope_linear_factor", "head_dim", "trained_context"):
        assert getattr(loaded.args, field) == getattr(model.args, field)
    checkpoint.save(model, tmp_path / "meta")
    assert checkpoint.fingerprint(tmp_path / "m.gguf") == checkpoint.fingerprint(tmp_path / "meta")


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(tmp_path, name, monkeypatch):
    """Hugging Face's folder, the GGUF file made of it, and that file in transformers: the same logits."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(LlamaConfig, "__class_validators__", [])  # its network computes 24 heads on 1792, too
    model = random_model(SHAPES[name], std=0.05)
    checkpoint.save(model, tmp_path / "hf", "hf")
    checkpoint.save(checkpoint.load(tmp_path / "hf"), tmp_path / "m.gguf", "gguf")
    from_hf = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    from_gguf = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    loaded = checkpoint.load(tmp_path / "m.gguf")
    tokens = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(1))
    for start in (0, 20_000):
        pos = torch.arange(start, start + 48).expand(2, 48)
        with torch.no_grad():
            expected = from_hf(tokens, position_ids=pos).logits
            torch.testing.assert_close(loaded(tokens, pos), expected, atol=1e-5, rtol=1e-5)
            if (
                not model.args.use_scaled_rope and not model.args.rope_linear_factor
            ):  # which transformers does not take out of a GGUF file
                theirs = from_gguf(tokens, position_ids=pos).logits
                torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: kind.name)
def test_each_type_is_dequantized_as_the_package_does(tmp_path, kind):
    args = ModelArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=1050, multiple_of=256)
    path = saved(tmp_path / "m.gguf", random_model(args), kind)
    model = checkpoint.load(path, torch.float32)
    theirs = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in model.state_dict().items():
        expected = torch.from_numpy(np.array(theirs[names_of(1)[name]]))
        assert torch.equal(weight, expected), name
        assert weight.dim() == 1 or weight.unique().numel() > 4
    assert checkpoint.load(path).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", gguf_layout.DEQUANTIZED, ids=lambda kind: kind.name)
def test_the_usual_types_are_dequantized_bit_for_bit(kind):
    """Any codes, any scales: negative, subnormal, infinite; more blocks than are taken at once."""
    n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    codes = np.random.default_rng(0).integers(0, 256, (2 * gguf_layout.BLOCKS + 5, n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(codes, kind))
    stored = gguf_header.Stored(kind, expected.shape, 4, codes.size)
    ours = gguf_layout._read(torch.cat((torch.zeros(4, dtype=torch.uint8), torch.from_numpy(codes).flatten())), stored)
    is_number = ~expected.isnan()
    assert torch.equal(ours.isnan(), ~is_number) and is_number.any() and not is_number.all()
    assert torch.equal(ours[is_number].view(torch.int32), expected[is_number].view(torch.int32))


def test_q8_0_is_within_the_rounding_of_the_format(tmp_path):
    """Half a step of 1/127 of a block's largest weight, and fp16's rounding of the step; F16 for odd rows."""
    model = random_model(dataclasses.replace(SMALL, multiple_of=24))
    checkpoint.save(model, tmp_path / "meta")
    gguf_files.convert(checkpoint.open_source(tmp_path / "meta"), tmp_path / "m.gguf", None, "q8_0")
    loaded = checkpoint.load(tmp_path / "m.gguf", torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(loaded[name], weight)
        elif weight.shape[1] % 32:
            assert torch.equal(loaded[name], weight.half().float()) and name.endswith("w2.weight")
        else:
            blocks = weight.unflatten(1, (-1, 32))
            bound = blocks.abs().amax(-1, keepdim=True) / 127 * (0.5 + 127 / 2048)
            assert ((loaded[name].unflatten(1, (-1, 32)) - blocks).abs() <= bound).all(), name
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == Kind.Q8_0


def test_a_written_file_is_what_llama_cpp_expects(tmp_path):
    """The fields and tensors that its converter writes, as the package reads them."""
    reader = gguf.GGUFReader(saved(tmp_path / "m.gguf", random_model().half()))
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("llama.", "general"))}
    assert fields.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert fields == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16,
        "general.quantization_version": 2,
        "llama.block_count": 4,
        "llama.context_length": 131_072,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 192,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500_000.0,
        "llama.vocab_size": 512,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # tied
    assert tensors["rope_freqs.weight"].data.tolist()[0] == 1 and tensors["rope_freqs.weight"].data.tolist()[-1] == 32
    assert all((tensor.tensor_type == Kind.F32) == (len(tensor.shape) == 1) for tensor in tensors.values())


def test_a_file_of_mixed_types_has_one_dtype(tmp_path):
    """Norms are float32 in every file; a dtype that is named counts, and what it cannot hold is refused."""
    path = saved(tmp_path / "m.gguf", random_model().bfloat16())
    assert {weight.dtype for weight in checkpoint.load(path).parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in checkpoint.load(path, torch.float32).parameters()} == {torch.float32}
    big = random_model().bfloat16()
    big.layers[1].feed_forward.w1.weight.data[3, 3] = 1e5
    checkpoint.save(big, tmp_path / "big")
    message = r"blk\.1\.ffn_gate\.weight: values exceed float16"
    with pytest.raises(InputError, match=message), new_file(tmp_path / "b") as scratch:
        gguf_files.convert(checkpoint.open_source(tmp_path / "big"), scratch, None, "f16")
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", "big"}


@pytest.mark.parametrize("type_name", [None, "f16"])
def test_weights_of_other_types_are_not_converted(tmp_path, type_name):
    checkpoint.save(random_model(), tmp_path / "m")
    state = torch.load(tmp_path / "m/consolidated.00.pth", weights_only=True)
    torch.save({name: weight.double() for name, weight in state.items()}, tmp_path / "m/consolidated.00.pth")
    with pytest.raises(InputError, match=r"tok_embeddings\.weight: holds torch\.float64"):
        gguf_files.convert(checkpoint.open_source(tmp_path / "m"), tmp_path / "out", None, type_name)


@pytest.mark.parametrize("limit", [10, 30_000])
def test_a_full_disk_is_named_and_nothing_is_left_behind(tmp_path, model, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(EnvironmentFailure, match=r"cannot write .*full"):
            checkpoint.save(model, tmp_path / "full.gguf", "gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_never_replaced(tmp_path, model):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        checkpoint.save(model, tmp_path / "m.gguf", "gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


U32, F32, TEXT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
ARRAY = gguf.GGUFValueType.ARRAY
FIELD_DAMAGE = {
    "architecture": ({"general.architecture": ("qwen2", TEXT)}, r"general\.architecture: 'qwen2' is not supp"),
    "adapter": ({"general.type": ("adapter", TEXT)}, r"general\.type: 'adapter' is not supp"),
    "no layers": ({"llama.block_count": (0, U32)}, r"llama\.block_count: 0 is not"),
    "million layers": ({"llama.block_count": (1 << 20, U32)}, r"llama\.block_count: 1048576 is not"),
    "more layers": ({"llama.block_count": (9, U32)}, r"blk\.8\.attn_norm\.weight: weight is missing.* 9 layers"),
    "fewer layers": ({"llama.block_count": (2, U32)}, r"blk\.2\.\S+: unexpected weight"),
    "text": ({"llama.embedding_length": ("64", TEXT)}, r"llama\.embedding_length: '64'"),
    "heads by layer": ({"llama.attention.head_count_kv": ([2, 2, 2, 2], ARRAY)}, r"head_count_kv: \[2"),
    "width": ({"llama.feed_forward_length": (96, U32)}, r"ffn_gate\.weight: has shape \[192, 64\]"),
    "huge width": ({"llama.feed_forward_length": (1 << 31, U32)}, r"feed_forward_length: 2147483648 is no"),
    "vocabulary": ({"llama.vocab_size": (511, U32)}, r"token_embd\.weight: has shape \[512, 64\]"),
    "theta": ({"llama.rope.freq_base": (float("nan"), F32)}, r"rope\.freq_base: nan"),
    "partial rotary": ({"llama.rope.dimension_count": (8, U32)}, r"rope\.dimension_count: 8 is not supp"),
    "values": ({"llama.attention.value_length": (8, U32)}, r"attention\.value_length: 8 is not supp"),
    "YaRN": ({"llama.rope.scaling.type": ("yarn", TEXT)}, r"rope\.scaling\.type: 'yarn' is not supp"),
    "both": ({"llama.rope.scaling.factor": (2.0, F32)}, r"excludes use_scaled_rope"),
    "experts": ({"llama.expert_count": (8, U32)}, r"expert_count: 8 is not supported, only 0"),
    "unknown": ({"llama.attention.sliding_window": (64, U32)}, r"sliding_window: 64 is not supp"),
    "part": ({"split.count": (3, gguf.GGUFValueType.UINT16)}, r"one of 3 parts; join"),
    "alignment": ({"general.alignment": (48, U32)}, r"general\.alignment: 48 is not a power"),
}


@pytest.mark.parametrize("name", FIELD_DAMAGE)
def test_unsupported_fields(tmp_path, name):
    fields, message = FIELD_DAMAGE[name]
    path = saved(tmp_path / "m.gguf", random_model())
    if "general.architecture" in fields or "general.alignment" in fields:  # which the writer would honour
        (key, (value, _)) = next(iter(fields.items()))
        raw = path.read_bytes()
        new = key.encode() + struct.pack("<I", 4) + struct.pack("<I", value) if value == 48 else None
        name_of = b"general.name" + struct.pack("<IQ", 8, 5) + b"Llama"
        if new is None:
            raw = raw.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"qwen2", 1)
        else:
            raw = raw.replace(struct.pack("<Q", 12) + name_of, struct.pack("<Q", len(key)) + new)
        path.write_bytes(raw)
    else:
        path = rewritten(path, fields=fields)
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_fields_that_change_nothing_pass(tmp_path):
    fields = {"general.author": ("me", TEXT), "llama.expert_count": (0, U32), "other.field": (3, U32)}
    fields |= {"split.count": (0, gguf.GGUFValueType.UINT16)}  # as gguf-split leaves it when it joins parts
    fields |= {"llama.rope.scaling.type": ("none", TEXT), "llama.tensor_data_layout": ("Meta AI original pth", TEXT)}
    path = rewritten(saved(tmp_path / "m.gguf", random_model()), fields=fields, drop=("llama.vocab_size",))
    assert same_weights(checkpoint.load(path), random_model())


def test_a_field_that_is_missing_is_named(tmp_path):
    path = rewritten(saved(tmp_path / "m.gguf", random_model()), drop=("llama.block_count",))
    with pytest.raises(InputError, match=r"rewritten\.gguf:llama\.block_count: is missing"):
        checkpoint.load(path)


def test_an_alignment_is_an_integer(tmp_path):
    path = rewritten(saved(tmp_path / "m.gguf", random_model()), fields={"general.alignment": (32.0, F32)})
    with pytest.raises(InputError, match=r"general\.alignment: 32\.0 is not a power"):
        checkpoint.load(path)


def test_norms_of_a_quantized_type(tmp_path):
    """No converter writes them; one row of blocks, as the package sees them."""
    path = saved(tmp_path / "m.gguf", random_model())
    data = path.read_bytes()
    path.write_bytes(counted(data, info_of(data) + 12, Kind.Q8_0, "I"))
    (norm,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output_norm.weight")
    expected = torch.from_numpy(np.array(gguf.dequantize(norm.data, Kind.Q8_0)))
    torch.testing.assert_close(checkpoint.load(path, torch.float32).norm.weight.data, expected, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_factors_are_those_of_a_known_scaling(tmp_path, factor):
    args = dataclasses.replace(SMALL, rope_scale_factor=factor)
    path = saved(tmp_path / "m.gguf", random_model(args))
    assert checkpoint.read_args(path).rope_scale_factor == factor
    factors = gguf.GGUFReader(path).tensors[-1].data
    wrong = {"short": factors[:4], "long rope": factors * np.linspace(1, 2, len(factors), dtype=np.float32)}
    wrong |= {"NaN": factors * np.float32("nan"), "type": factors.astype(np.float16), "axes": factors.reshape(2, -1)}
    for name, array in wrong.items():
        (tmp_path / "rewritten.gguf").unlink(missing_ok=True)
        other = rewritten(path, drop=("rope_freqs.weight",), tensors={"rope_freqs.weight": array})
        with pytest.raises(InputError, match=r"rope_freqs|rope_scale_factor"):
            checkpoint.load(other)
            pytest.fail(name)


def counted(data, offset, value, code="Q"):
    return data[:offset] + struct.pack(f"<{code}", value) + data[offset + struct.calcsize(code) :]


def info_of(data, name="output_norm.weight"):
    """Where the record of a tensor with one axis begins, behind its name."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


HEAD_DAMAGE = {
    "empty": (lambda d: b"", "truncated or no GGUF"),
    "magic": (lambda d: b"GGUX" + d[4:], "truncated or no GGUF"),
    "pointer": (lambda d: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (lambda d: counted(d, 4, 1, "I"), "version 1"),
    "big-endian": (lambda d: counted(d, 4, 3 << 24, "I"), "big-endian"),
    "tensors": (lambda d: counted(d, 8, 1 << 60), f"{1 << 60} tensors"),
    "fields": (lambda d: counted(d, 16, 1 << 60), f"{1 << 60} fields"),
    "one more field": (lambda d: counted(d, 16, 18), "."),
    "key": (lambda d: counted(d, 24, 1 << 63), "does not fit"),
    "long key": (lambda d: counted(d, 24, 1000), "no name|not UTF-8"),
    "escape": (lambda d: d.replace(b"general.type", b"general\n\x1b[1m"), "is no name"),
    "value type": (lambda d: counted(d, 24 + 8 + 20, 99, "I"), "unknown type 99"),
    "array": (lambda d: counted(counted(counted(d, 52, 9, "I"), 56, 4, "I"), 60, 1 << 50), "array of"),
    "array beyond": (lambda d: counted(counted(counted(d, 52, 9, "I"), 56, 4, "I"), 60, 1 << 20), "truncated"),
    "arrays": (lambda d: counted(counted(d, 52, 9, "I"), 56, 9, "I"), "array of arrays"),
    "twice": (lambda d: d.replace(b"general.type", b"general.name"), "general.name is there twice"),
    "axes": (lambda d: counted(d, info_of(d), 5, "I"), "output_norm.weight has 5 axes"),
    "shape": (lambda d: counted(d, info_of(d) + 4, 1 << 62), "cannot have the shape"),
    "no element": (lambda d: counted(d, info_of(d) + 4, 0), "cannot have the shape"),
    "type": (lambda d: counted(d, info_of(d) + 12, 77, "I"), "type 77"),
    "gone type": (lambda d: counted(d, info_of(d) + 12, 4, "I"), "type 4"),
    "integers": (lambda d: counted(d, info_of(d) + 12, 26, "I"), "output_norm.weight: the type I32"),
    "offset": (lambda d: counted(d, info_of(d) + 16, 1 << 63), "beyond the end"),
    "alignment": (lambda d: counted(d, info_of(d) + 16, 3), "not aligned"),
    "overlap": (lambda d: counted(d, info_of(d) + 16, 0), "output_norm.weight.* overlap|and output_norm"),
    "same name": (lambda d: d.replace(b"blk.1.ffn_norm", b"blk.1.ffn_down"), "there twice"),
    "other name": (lambda d: d.replace(b"blk.1.ffn_norm", b"blk.1.ffn_bias"), "missing"),
    "extra": (lambda d: d.replace(b"rope_freqs.weight", b"output.attn_extra"), "unexpected weight|rope"),
    "Meta's name": (lambda d: d.replace(b"rope_freqs.weight", b"tok_embeddings.wt"), "unexpected weight"),
    "truncated data": (lambda d: d[:-40_000], "beyond the end"),
    "truncated head": (lambda d: d[:300], "truncated|does not fit"),
}


@pytest.mark.parametrize("name", HEAD_DAMAGE)
def test_damaged_file(tmp_path, name):
    damage, message = HEAD_DAMAGE[name]
    path = saved(tmp_path / "m.gguf", random_model())
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_mutated_files_load_or_end_in_one_line(tmp_path):
    """2,500 damaged copies of a model with a tokenizer: an InputError in one line, or a model or tokenizer."""
    source, path = vocabularies.write(tmp_path, "llama3"), tmp_path / "mutant.gguf"
    args = dataclasses.replace(LLAMA2, head_dim=None, dim=32, vocab_size=Tokenizer(source).n_words, n_layers=1)
    checkpoint.save(random_model(args), tmp_path / "m.gguf", "gguf", source)
    good = (tmp_path / "m.gguf").read_bytes()
    rng, refused = random.Random(0), 0
    for i in range(2_500):
        # In the file of weights, or in the metadata alone.
        path.write_bytes(mutant(good, rng) if i % 2 else mutant(good[:30_000], rng) + good[30_000:])
        for read in (checkpoint.load, Tokenizer):
            try:
                read(path)
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
    assert 1_500 < refused < 5_000
