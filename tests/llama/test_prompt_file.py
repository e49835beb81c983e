"""A prompt in a file: what follows is what a session that read it would say, and nothing else is taken for one."""

from __future__ import annotations

import random

import pytest
import safetensors.torch
import torch
from conftest import SMALL, random_model
from support import needs_kernel

from llama import KVCache, Llama, lora, prompt_file
from llama.errors import EnvironmentFailure, InputError
from llama.lora import LoRAConfig

TEXT = "".join(random.Random(0).choices("abcdefghij ", k=300))
MODES = [("float32", "auto"), ("float32", "int8"), ("float16", "auto")]
MODES += [pytest.param("bfloat16", kind, marks=needs_kernel) for kind in ("auto", "int8")]


def encode(text: str) -> list[int]:
    """A token for each two characters."""
    return [sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]


def small_llama(dtype: str = "float32", cache_dtype: str = "auto", max_seq_len: int = 256, seed: int = 0) -> Llama:
    model = random_model(seed=seed).to(getattr(torch, dtype))
    return Llama(model, None, max_seq_len=max_seq_len, cache_dtype=cache_dtype)


def last_logits(session, text: str) -> torch.Tensor:
    ids = torch.tensor([encode(text)])
    with torch.no_grad():
        return session.last_logits(ids, torch.tensor([ids.shape[1] - 1]))


@pytest.fixture
def path(tmp_path):
    """A saved prompt of 150 tokens in float32."""
    with small_llama().start_session() as session:
        session.read(encode(TEXT))
        prompt_file.save(tmp_path / "a", session, TEXT)
    return tmp_path / "a"


@pytest.mark.parametrize("behind", ["and more", "", "x"])
@pytest.mark.parametrize(("dtype", "cache_dtype"), MODES)
def test_what_follows_a_saved_prompt_is_what_the_session_that_read_it_says(tmp_path, dtype, cache_dtype, behind):
    """To the bit, with a cache of either kind; in float32 what a fresh run says."""
    text = TEXT[:-1]  # its last token has one character, and the border is in the middle of it
    llama = small_llama(dtype, cache_dtype)
    with llama.start_session() as session:
        session.read(encode(text))
        prompt_file.save(tmp_path / "a", session, text)
        expected, before = last_logits(session, text + behind), session.n_computed
        n_new = session.n_computed - len(encode(text))
        tokens = list(llama.stream(encode(text + behind), 20, 0, session=session))
    again = small_llama(dtype, cache_dtype, max_seq_len=200)  # with other slots
    saved = prompt_file.read(tmp_path / "a", encode)
    with again.start_session() as session:
        saved.restore(session)
        assert torch.equal(last_logits(session, saved.text + behind), expected)
        assert session.n_computed == n_new == before - len(encode(text))
        assert list(again.stream(encode(text + behind), 20, 0, session=session)) == tokens
    if dtype == "float32":
        assert list(llama.stream(encode(text + behind), 20, 0)) == tokens
        if cache_dtype == "auto":
            plain = llama.model(torch.tensor([encode(text + behind)]))[:, -1]
            torch.testing.assert_close(expected, plain, atol=1e-5, rtol=1e-5)


def test_a_file_holds_the_positions_in_use_in_the_bytes_of_the_cache(tmp_path):
    (tmp_path / "any").touch()
    for kind, n_bytes in (("auto", 16 * 4), ("int8", 16 + 4)):  # of a position of a head of 16
        with small_llama("float32", kind, max_seq_len=4096).start_session() as session:
            session.read(encode(TEXT))
            size = prompt_file.save(tmp_path / kind, session, TEXT)
        assert 0 < size - 150 * 2 * SMALL.n_layers * SMALL.n_kv_heads * n_bytes < 150 * 8 + 300 + 1024
        assert size == (tmp_path / kind).stat().st_size
        assert (tmp_path / kind).stat().st_mode == (tmp_path / "any").stat().st_mode  # as the umask says


def refusal(path, session=None) -> str:
    """The line that a file is refused with; its message names it."""
    with pytest.raises(InputError) as error:
        saved = prompt_file.read(path, encode)
        with (session or small_llama()).start_session() as opened:
            saved.restore(opened)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value).replace(str(path), "FILE")


def test_damage_is_noticed(path):
    """A bit of any part, and any end."""
    good, rng = path.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(good[:8], "little")
    spots = [*range(0, header, 5), *(rng.randrange(header, len(good)) for _ in range(100)), len(good) - 1]
    for spot in spots:
        data = bytearray(good)
        data[spot] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert refusal(path)
    path.write_bytes(bytes(data))
    assert "FILE:sha256: differs from that of the content, which is damaged; save the prompt anew" in refusal(path)
    for length in (0, 7, header - 1, header, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert refusal(path) == "FILE is truncated or no safetensors file; save the prompt anew"
    path.write_bytes(good)
    prompt_file.read(path, encode)


def test_a_file_whose_hashes_are_right_is_not_trusted_either(path):
    """Each tensor of a wrong kind in turn: no text, a scalar, nothing, other numbers, other sizes."""
    held = prompt_file.read(path, encode)
    good = {
        **held.parts,
        "tokens": torch.tensor(held.tokens),
        "text": torch.frombuffer(bytearray(TEXT.encode()), dtype=torch.uint8),
    }
    changes = {"text": [torch.tensor([255, 254], dtype=torch.uint8), torch.tensor(1), torch.zeros(0)]}
    changes["tokens"] = [torch.tensor(1), torch.zeros(0), torch.zeros(2, 3), torch.tensor(held.tokens[:-1])]
    changes["k"] = [
        torch.tensor(1.0),
        torch.zeros(0),
        good["k"].double(),
        good["k"][:, :, 1:],
        good["k"].to(torch.float8_e4m3fn),
    ]
    changes["v"] = [torch.tensor(1.0), good["v"][:1], good["v"][..., :1].contiguous()]
    for name, tensors in changes.items():
        for tensor in tensors:
            content = {**good, name: tensor.contiguous()}
            hashes = {"model_sha256": held.model_sha256, "sha256": prompt_file._digest(content, held.model_sha256)}
            safetensors.torch.save_file(content, path, hashes)
            assert refusal(path)
    safetensors.torch.save_file(good, path, hashes | {"sha256": prompt_file._digest(good, held.model_sha256)})
    prompt_file.read(path, encode)


@pytest.mark.parametrize("what", ["weights", "adapter", "alpha", "rope"])
def test_keys_and_values_of_another_model_are_refused(path, what):
    llama = small_llama(seed=int(what == "weights"))
    if what == "rope":
        llama.model.rope_freqs.mul_(1.01)
    if what in ("adapter", "alpha"):
        lora.apply(llama.model, LoRAConfig(r=2, alpha=4.0))
    if what == "alpha":
        path.unlink()
        with llama.start_session() as session:
            session.read(encode(TEXT))
            prompt_file.save(path, session, TEXT)
        prompt_file.read(path, encode)
        for layer in lora.layers(llama.model).values():
            layer.scale *= 2
    assert refusal(path, llama).startswith("FILE:model_sha256: is of another model, adapter or dtype of weights; use")


def test_what_does_not_fit_is_refused_with_a_remedy(path, tmp_path):
    assert refusal(path, small_llama("bfloat16")) == (
        "FILE:k: is a KV cache in float32, this run's is in bfloat16; use cache_dtype=auto with dtype=float32"
    )
    assert "this run's is in int8; use cache_dtype=auto" in refusal(path, small_llama("float32", "int8"))
    assert refusal(path, small_llama(max_seq_len=149)) == "FILE:tokens: are 150, of at most max_seq_len=149; raise that"
    with pytest.raises(InputError, match=r"a:tokens: are not those of its text here; use the tokenizer and the"):
        prompt_file.read(path, lambda text: [1, *encode(text)])
    assert refusal(tmp_path / "none") == "saved prompt FILE is not a file; check its name"
    safetensors.torch.save_file({"lora_A": torch.zeros(2)}, tmp_path / "b")
    assert refusal(tmp_path / "b") == "FILE: holds lora_A; a saved prompt holds tokens, text, k and v"
    held = safetensors.torch.load_file(path)
    safetensors.torch.save_file(held, tmp_path / "c")  # without the hashes
    assert refusal(tmp_path / "c").startswith("FILE:sha256: differs")
    with small_llama("float32", "int8").start_session() as session:
        session.read(encode(TEXT))
        prompt_file.save(tmp_path / "d", session, TEXT)
        assert refusal(tmp_path / "d").endswith("this run's is in float32; use cache_dtype=int8")
        with pytest.raises(InputError, match=r"already exists; choose a new name"):
            prompt_file.save(path, session, TEXT)
        with pytest.raises(InputError, match=r"the prompt has 257 tokens, outside 1 to max_seq_len=256"):
            session.read([1] * 257)


def test_a_full_disk_leaves_nothing_behind(path, tmp_path, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with small_llama().start_session() as session, pytest.raises(EnvironmentFailure, match="is the disk full"):
        session.read(encode(TEXT))
        prompt_file.save(tmp_path / "b", session, TEXT)
    assert list(tmp_path.iterdir()) == [path]


def test_unused_slots_of_a_restored_cache_stay_empty(path):
    with small_llama().start_session() as session:
        prompt_file.read(path, encode).restore(session)
        cache: KVCache = session.run.cache
        assert cache.k[:, :, :, :150].count_nonzero() and not cache.k[:, :, :, 150:].count_nonzero()
