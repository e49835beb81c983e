"""Small tokenizer.json files like those of Llama 3, SmolLM2 and TinyLlama, trained here; and random texts."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

from conftest import ROOT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama.vocabulary.hf import BYTES
from llama.vocabulary.ranks import LLAMA3_PATTERN, llama3_special_tokens

STYLES = ("llama3", "smollm2", "tinyllama")
SMOLLM2_TEMPLATE = (  # of SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (  # of Llama-3-8B-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (  # of Llama-2-7b-chat-hf, without its checks
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR_TEMPLATE = (  # of TinyLlama-1.1B-Chat-v1.0
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# The real SmolLM2 names GPT2Tokenizer, for which transformers 5 leaves out the file's splitting of digits.
CONFIGS = {
    "llama3": {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        "chat_template": LLAMA3_TEMPLATE,
    },
    "smollm2": {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "chat_template": SMOLLM2_TEMPLATE,
    },
    "tinyllama": {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "unk_token": "<unk>",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False,
                      "single_word": False},
        "eos_token": "</s>", "chat_template": LLAMA2_TEMPLATE,
    },
}  # fmt: skip


@functools.cache
def tokenizer_json(style: str) -> str:
    """A tokenizer.json of about 700 tokens in one of STYLES."""
    records = json.loads((ROOT / "data/alpaca_200.json").read_text(encoding="utf-8"))
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    make = {"llama3": _llama3, "smollm2": _smollm2, "tinyllama": _tinyllama}[style]
    return make([*texts, "naïve café 日本語の文 👩‍👩‍👧 1234"]).to_str()


def _llama3(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in llama3_special_tokens()[:16]])
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("word", single_word=True)])
    first = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    template = processors.TemplateProcessing("<|begin_of_text|> $A", None, first)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


def _smollm2(texts: list[str]) -> Tokenizer:
    """Like the real one it has no token for some bytes; what needs them is left out."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    alphabet = [char for char, byte in BYTES.items() if byte not in (4, 6, 19, 20, 22, 29, 0xF1, 0xF2)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tinyllama(texts: list[str]) -> Tokenizer:
    learned = Tokenizer(models.BPE())
    prefix = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    learned.normalizer, learned.pre_tokenizer = prefix, pre_tokenizers.Metaspace(prepend_scheme="never")
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = prefix
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in tokens[:3]])
    return tokenizer


def write(folder: Path, style: str, **files: dict) -> Path:
    """tokenizer.json and tokenizer_config.json in a folder, and other JSON files by their stem; the former's path."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(style), encoding="utf-8")
    for name, content in {"tokenizer_config": CONFIGS[style], **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "tokenizer.json"


ALPHABETS = (
    "abcdefghij XYZ,.!?'\"0123456789",
    "  \t\n\r\u00a0\u2003\u2028\u0085",
    "éüßñçøðЖдшאבגبجدไทย",
    "日本語漢字仮名한국어",
    "👩\u200d👧👋🏽🇩🇪✈\ufe0f",
    "\u0301\u0308\u200b\ufeff\u00ad\ufffd\U000e0041\U0010ffff\ue000\u2581Ġ",
    "".join(map(chr, range(32))),
)
SPELLED = (*llama3_special_tokens()[:10], "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>",
           "<0x0A>", "<tool>", " <tool> ", "word", "words", "don't", "we'LL", "[INST]")  # fmt: skip


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Texts of all scripts, spaces of all kinds, control characters, spelled special tokens."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(0, 6)):
            alphabet = rng.choice([*ALPHABETS, SPELLED])
            parts += rng.choices(alphabet, k=1 if alphabet is SPELLED else rng.randint(1, 8))
        any_char = chr(rng.randrange(0x110000))
        texts.append("".join(parts) + (any_char if not "\ud800" <= any_char <= "\udfff" else ""))
    return texts
