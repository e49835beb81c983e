"""Pruning: zeros that stay zeros, models that are really smaller, and compress.py as a user runs it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, TINY, random_model

import compress
import evaluate
import finetuning
import inference
from data import text
from llama import Llama, checkpoint, cli, lora, pruning
from llama.config import PRESETS
from llama.decoding import Decoder
from llama.errors import InputError, NonFinite
from llama.evaluation import perplexity
from llama.model import rope_table
from llama.tokenizer import Tokenizer
from llama.training import snapshot, verdict
from llama.training import step as training
from llama.training.batch import Batch
from llama.training.step import Settings, Trainer

FFN = SMALL.ffn_dim  # 192
EIGHT_HEADS = dataclasses.replace(SMALL, n_heads=8, n_kv_heads=4, head_dim=8, vocab_size=PRESETS["tiny"].vocab_size)
ONE_LAYER = dataclasses.replace(SMALL, n_layers=1, vocab_size=128)
TOKENS = torch.arange(40).view(2, 20)


def window(number: int) -> list[Batch]:
    """Any text."""
    tokens = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(number))
    return [Batch(tokens[:, :-1], None, torch.arange(32), tokens[:, 1:].flatten())]


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: module.weight == 0 for name, module in pruning.projections(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Magnitude


def of_row(share: float, weight: torch.Tensor) -> int:
    """How many weights of each row go."""
    return round(share * weight.shape[1])


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_exactly_so_many_of_each_row_are_chosen(n):
    """Also where many are equal, as in 16 bits."""
    size = torch.tensor([[3.0, 1, 1, 0], [0, 2, 2, 1], [1, 1, 1, 1]])
    chosen = pruning.smallest(size, n)
    assert chosen.sum(1).tolist() == 3 * [n]
    if 0 < n < 4:
        for row, mask in zip(size, chosen, strict=True):
            assert row[mask].max() <= row[~mask].min()


@pytest.mark.parametrize("share", [0.125, 0.5, 0.9])
@pytest.mark.parametrize("measured", [False, True])
def test_that_share_of_each_row_is_zero_and_nothing_else_changes(model, share, measured):
    """What goes adds least to its output: the weight by the root mean square of its input, or by 1 without a text."""
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    powers = pruning.input_powers(model, TOKENS) if measured else None
    pruning.zero_smallest(model, share, powers)
    assert len(zeros(model)) == 7 * SMALL.n_layers
    for name, is_zero in zeros(model).items():
        assert (is_zero.sum(1) == of_row(share, is_zero)).all()
        size = before[f"{name}.weight"].abs() * (powers[name].sqrt() if measured else 1)
        largest_gone, least_kept = size.where(is_zero, 0).amax(1), size.where(~is_zero, torch.inf).amin(1)
        assert (largest_gone <= least_kept).all()
    for name, weight in model.named_parameters():
        kept = ~zeros(model).get(name.removesuffix(".weight"), torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(weight[kept], before[name][kept])
    n_zeros, n_all = pruning.count_zeros(model)
    assert n_zeros == sum(int(is_zero.sum()) for is_zero in zeros(model).values())
    assert n_all == SMALL.n_layers * SMALL.block_linear_params()


def test_powers_are_the_mean_squares_of_what_each_matrix_is_given(model):
    """Compared with the network written out for its first block, and with masks in the place of matrices."""
    powers = pruning.input_powers(model, TOKENS)
    block, x = model.layers[0], model.tok_embeddings(TOKENS)
    freqs = rope_table(torch.arange(TOKENS.shape[1])[None], model.rope_freqs)
    normed = block.attention_norm(x)
    h = x + block.attention(normed, freqs, None, None, None)
    gated = block.ffn_norm(h)
    hidden = F.silu(block.feed_forward.w1(gated)) * block.feed_forward.w3(gated)
    expected = {"attention.wq": normed, "attention.wv": normed, "feed_forward.w3": gated, "feed_forward.w2": hidden}
    for name, inputs in expected.items():
        torch.testing.assert_close(powers[f"layers.0.{name}"], inputs.square().mean((0, 1)))
    assert powers.keys() == zeros(model).keys() and not any(module._forward_pre_hooks for module in model.modules())
    masked = pruning.input_powers(pruning.zero_smallest(model, 0.5), TOKENS)
    assert masked.keys() == powers.keys()
    torch.testing.assert_close(masked["layers.0.attention.wq"], powers["layers.0.attention.wq"])


@pytest.mark.parametrize("method", pruning.METHODS)
def test_a_text_in_which_inputs_differ_makes_a_better_cut(method):
    """Half of the inputs are a hundredth of the others: a cut that measures them loses less of what is computed."""
    model = random_model()
    with torch.no_grad():
        for block in model.layers:  # the weights that read small inputs are larger, so that their size misleads
            for reader, writer in ((block.feed_forward.w2, block.feed_forward.w3), (block.attention.wo, None)):
                half = reader.weight.shape[1] // 2
                reader.weight[:, :half] *= 3
                (block.attention.wv if writer is None else writer).weight[: half if writer else half // 2] *= 0.01
    whole = model(TOKENS)
    errors = [
        (pruning.cut(copy.deepcopy(model), method, 0.5, model.args, tokens)(TOKENS) - whole).norm().item()
        for tokens in (TOKENS, None)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_pruning_again_keeps_the_zeros_that_are_there(model):
    first = zeros(pruning.zero_smallest(model, 0.3))
    second = zeros(pruning.zero_smallest(model, 0.6))
    assert all((second[name] | ~first[name]).all() for name in first)
    assert pruning.count_zeros(model)[0] == sum(len(z) * of_row(0.6, z) for z in second.values())


DECAY = {"weight_decay": 0.1}


@pytest.mark.parametrize(
    ("n_steps", "options"),
    [
        (16, {"momentum": 0.9, "amp": "bf16"}),
        pytest.param(100, {"momentum": 0.9, "amp": "bf16"}, marks=pytest.mark.slow),
        pytest.param(100, {"momentum": 0.9, "amp": "fp16"}, marks=pytest.mark.slow),
        pytest.param(100, {"optimizer": "adamw", "clip_norm": 1.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_zeros_stay_zero_and_a_resumed_run_keeps_them(tmp_path, n_steps, options):
    """Interrupted half-way by a snapshot on the disk: the same bits, and every zero where it was."""
    settings = Settings(lr=1e-2, **DECAY, **options)

    def start(masked: torch.nn.Module) -> Trainer:
        return Trainer(masked.requires_grad_(True), settings, n_steps)

    straight = start(pruning.zero_smallest(random_model(ONE_LAYER), 0.6))
    first = zeros(straight.model)
    for number in range(n_steps // 2):
        straight.step(window(number))
    snapshot.save(tmp_path, n_steps // 2, straight.snapshot(), "run", keep=1)
    for number in range(n_steps // 2, n_steps):
        straight.step(window(number))
    # The masks come from the snapshot: those of the fresh model are others.
    resumed = start(pruning.zero_smallest(random_model(ONE_LAYER, seed=5), 0.6))
    assert not same(zeros(resumed.model), first)
    resumed.restore(snapshot.load(snapshot.listed(tmp_path)[0]))
    for number in range(n_steps // 2, n_steps):
        resumed.step(window(number))
    for trainer in (straight, resumed):
        assert trainer.progress.steps > 0.9 * n_steps and same(zeros(trainer.model), first)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_masks_they_come_back():
    """What the masks are for."""
    model = pruning.remove_masks(pruning.zero_smallest(random_model(), 0.6))
    first = pruning.count_zeros(model)[0]
    trainer = Trainer(model.requires_grad_(True), Settings(lr=1e-2, momentum=0.9), 3)
    for number in range(3):
        trainer.step(window(number))
    assert pruning.count_zeros(model)[0] < first / 2


def test_kept_weights_train_as_if_the_others_were_not_there():
    """The gradient of a kept weight is that of the plain model with the same zeros."""
    masked = pruning.zero_smallest(random_model(), 0.5)
    plain = pruning.remove_masks(copy.deepcopy(masked))
    gradients = []
    for model in (masked, plain):
        trainer = Trainer(model.requires_grad_(True), Settings(), 1)
        trainer.back_propagate(window(0)[0], 32)
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gone in zeros(masked).items():
        found, expected = (g[f"{name}.weight"] for g in gradients)
        assert torch.equal(found, expected.masked_fill(gone, 0)) and expected[gone].any()


def test_a_snapshot_without_the_masks_is_not_resumed_nor_one_with_masks_by_a_plain_model():
    masked = Trainer(pruning.zero_smallest(random_model(), 0.5).requires_grad_(True), Settings(), 1)
    plain = Trainer(random_model().requires_grad_(True), Settings(), 1)
    for trainer, other in ((masked, plain), (plain, masked)):
        with pytest.raises(InputError, match="masks:layers"):
            trainer.restore(other.snapshot())


def test_sgd_inside_the_backward_pass_would_move_zeros_and_is_refused():
    with pytest.raises(InputError, match="lean"):
        Trainer(pruning.zero_smallest(random_model(), 0.5).requires_grad_(True), Settings(lean=True), 1)


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_dense_checkpoint_comes_out_and_its_zeros_can_be_held_again(tmp_path, layout):
    """Equal to the masked model; and pruning writes nothing into the file that the weights are mapped from."""
    checkpoint.save(random_model().bfloat16(), tmp_path / "whole", layout)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / "whole").iterdir())]
    masked = pruning.zero_smallest(checkpoint.load(tmp_path / "whole"), 0.5)
    logits, first = masked(TOKENS), zeros(masked)
    checkpoint.save(pruning.remove_masks(masked), tmp_path / "pruned", layout)
    assert digests == [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((tmp_path / "whole").iterdir())]
    loaded = checkpoint.load(tmp_path / "pruned")
    assert torch.equal(loaded(TOKENS), logits) and same(zeros(loaded), first)
    assert same(zeros(pruning.keep_zeros(loaded)), first) and torch.equal(loaded(TOKENS), logits)
    with pytest.raises(InputError, match="no weight of the model is zero"):
        pruning.keep_zeros(random_model())


@pytest.mark.slow
def test_fine_tuning_holds_the_zeros_of_a_pruned_checkpoint(base, tmp_path, monkeypatch, capsys):
    """finetuning.py --keep_zeros, stopped and resumed, exports the zeros that it was given, and without it does not."""
    model = pruning.remove_masks(pruning.zero_smallest(checkpoint.load(base / "base"), 0.5))
    checkpoint.save(model, tmp_path / "pruned", "meta", TINY / "tokenizer.model")
    flags = ["--lora=False", "--lr=0.01", "--accumulation=1", "--max_seq_len=128", "--held_out=0", "--device=cpu"]
    flags += [f"--ckpt_dir={tmp_path / 'pruned'}", "--max_steps=4", "--optimizer=adamw"]
    monkeypatch.setattr(verdict, "ANSWER_LEN", 2)
    results = {}
    for name, extra in (("kept", ["--keep_zeros"]), ("filled", [])):
        options = [*flags, *extra, f"--data={TINY / 'alpaca_200.json'}", f"--out_dir={tmp_path / name}"]
        code, out, err = call(monkeypatch, capsys, *options, main=finetuning.main)
        assert code == 0, err
        results[name] = checkpoint.load(tmp_path / name / "merged")
    n_zeros, n_all = pruning.count_zeros(model)
    assert same(zeros(results["kept"]), zeros(model)) and pruning.count_zeros(results["filled"])[0] < n_zeros / 2
    assert not torch.equal(results["kept"].norm.weight, model.float().norm.weight)  # it has trained
    saved = snapshot.load(snapshot.listed(tmp_path / "kept" / "snapshots")[-1])
    assert sum((~mask).sum().item() for mask in saved.tensors["masks"].values()) == n_zeros == n_all / 2
    code, out, err = call(monkeypatch, capsys, f"--out_dir={tmp_path / 'kept'}", "--resume", main=finetuning.main)
    assert code == 0 and "resumed    after step 4" in out, err


@pytest.mark.parametrize(("flags", "message"), [("", "lora=True"), ("--lora=False --lean --accumulation=1", "lean")])
def test_zeros_that_would_be_filled_in_are_not_promised(base, tmp_path, monkeypatch, capsys, flags, message):
    given = [*flags.split(), f"--ckpt_dir={base / 'base'}", f"--out_dir={tmp_path / 'run'}", "--keep_zeros"]
    code, _, err = call(monkeypatch, capsys, *given, main=finetuning.main)
    assert code == 2 and message in err and not (tmp_path / "run").exists()


# Dimensions and heads


@pytest.mark.parametrize("n_units", [32, 96, 160])
@pytest.mark.parametrize("measured", [False, True])
def test_the_strongest_units_are_left_in_their_order(model, n_units, measured):
    """The smaller model computes what the whole one does with the other units silenced."""
    powers = pruning.input_powers(model, TOKENS) if measured else None
    smaller = pruning.keep_units(model, n_units, powers)
    assert smaller.args.ffn_dim == n_units and smaller.args.with_ffn_dim(FFN) == model.args.with_ffn_dim(FFN)
    assert sum(p.numel() for p in smaller.parameters()) == smaller.args.n_params()
    assert model.args.n_params() - smaller.args.n_params() == SMALL.n_layers * 3 * SMALL.dim * (FFN - n_units)
    silenced = copy.deepcopy(model)
    for i, block in enumerate(silenced.layers):
        w2 = block.feed_forward.w2.weight
        norms = w2.norm(dim=0) * (powers[f"layers.{i}.feed_forward.w2"].sqrt() if measured else 1)
        with torch.no_grad():
            w2[:, norms < norms.sort(descending=True).values[n_units - 1]] = 0
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), silenced(TOKENS), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(smaller(TOKENS), model(TOKENS), atol=1e-3)


@pytest.mark.parametrize("n_heads", [1, 2, 3])
@pytest.mark.parametrize("measured", [False, True])
def test_the_strongest_heads_are_left_with_their_query_heads(n_heads, measured):
    """The same for heads: 8 query heads of 4 key/value heads, of which some are silenced in wo."""
    model = random_model(EIGHT_HEADS)
    powers = pruning.input_powers(model, TOKENS) if measured else None
    smaller = pruning.keep_heads(model, n_heads, powers)
    args = smaller.args
    assert (args.n_kv_heads, args.n_heads, args.head_dim) == (n_heads, 2 * n_heads, EIGHT_HEADS.head_dim)
    assert sum(p.numel() for p in smaller.parameters()) == args.n_params() < model.args.n_params()
    silenced = copy.deepcopy(model)
    for i, block in enumerate(silenced.layers):
        wo = block.attention.wo.weight
        power = wo.square().sum(0) * (powers[f"layers.{i}.attention.wo"] if measured else 1)
        with torch.no_grad():
            for head in power.view(4, -1).sum(1).argsort()[: 4 - n_heads]:
                wo.view(len(wo), 4, -1)[:, head] = 0
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), silenced(TOKENS), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(smaller(TOKENS), model(TOKENS), atol=1e-3)


@pytest.mark.parametrize("layout", ["meta", "hf", "gguf"])
def test_every_layout_describes_fewer_heads(tmp_path, layout):
    """What is loaded computes the same, with and without the cache; `transformers` reads its own layout."""
    smaller = pruning.keep_heads(random_model(EIGHT_HEADS), 2)  # `transformers` wants a number that divides dim
    target = tmp_path / ("out.gguf" if layout == "gguf" else "out")
    tokenizer = TINY / "tokenizer.model"
    checkpoint.save(smaller, target, layout, tokenizer)
    loaded = checkpoint.load(target, torch.float32)
    assert (loaded.args.n_heads, loaded.args.n_kv_heads, loaded.args.head_dim) == (4, 2, EIGHT_HEADS.head_dim)
    exact = {"atol": 0.02, "rtol": 0.02} if layout == "gguf" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(loaded(TOKENS), smaller(TOKENS), **exact)
    on, off = (
        Llama(loaded, None, 32, 2).generate([[1, 2, 3], [4, 5]], 6, 0, use_cache=use)[0] for use in (True, False)
    )
    assert on == off
    if layout == "hf":
        from transformers import LlamaForCausalLM

        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(theirs(TOKENS).logits, loaded(TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_every_loader_takes_a_smaller_model_as_it_comes(tmp_path, layout):
    """Meta's params.json describes it in Meta's fields; `transformers` reads the other layout."""
    smaller = pruning.keep_units(random_model(), 96)
    checkpoint.save(smaller, tmp_path / "out", layout)
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.args.ffn_dim == 96 and torch.equal(loaded(TOKENS), smaller(TOKENS))
    if layout == "hf":
        from transformers import LlamaForCausalLM

        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(theirs(TOKENS).logits, loaded(TOKENS), atol=1e-5, rtol=0)
    else:
        params = json.loads((tmp_path / "out" / "params.json").read_text())
        assert params.keys() <= {field.name for field in dataclasses.fields(SMALL)}
        hidden = int(params["ffn_dim_multiplier"] * int(2 * 4 * params["dim"] / 3))  # Meta's own arithmetic
        multiple = params["multiple_of"]
        assert multiple * ((hidden + multiple - 1) // multiple) == 96


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.1-8b", "llama2-7b", "tiny"])
def test_any_hidden_size_can_be_described(name):
    args = PRESETS[name]
    assert args.with_ffn_dim(args.ffn_dim).ffn_dim == args.ffn_dim
    for n_units in range(32, args.ffn_dim, 32 if name == "tiny" else 992):
        found = args.with_ffn_dim(n_units)
        assert found.ffn_dim == n_units and type(args).from_params(found.to_params()) == found


def test_kernels_take_every_share_of_the_real_shape():
    args = PRESETS["llama3.2-1b"]
    for percent in range(1, 100):
        n_units = pruning.kept_count(args, "dimensions", percent / 100)
        assert n_units % 32 == 0 and abs(n_units / args.ffn_dim - (1 - percent / 100)) <= 16 / args.ffn_dim


def test_a_smaller_model_generates_on_every_path():
    """Cache on and off, on the fast path where the machine has one."""
    args = dataclasses.replace(SMALL, head_dim=None, dim=128, n_heads=4, n_kv_heads=2)
    whole = random_model(args).bfloat16()
    smaller = pruning.keep_units(whole, 96)
    assert Decoder(smaller, "auto").name == Decoder(whole, "auto").name
    for decoding in ("auto", "eager"):
        llama = Llama(smaller.float() if decoding == "eager" else smaller, None, 32, 2, decoding=decoding)
        on, off = (llama.generate([[1, 2, 3], [4, 5]], 6, 0, use_cache=use)[0] for use in (True, False))
        assert [len(row) for row in on] == [6, 6] and (decoding == "auto" or on == off)


def test_adapters_train_on_a_smaller_model():
    smaller = pruning.keep_units(random_model(), 96)
    lora.apply(smaller, lora.LoRAConfig(r=2, alpha=4, dropout=0, targets=("w1", "w2")))
    trainer = Trainer(smaller, Settings(lr=0.1), 2)
    before = trainer.loss_sum(window(0)[0]).item()
    for _ in range(2):
        trainer.step(window(0))
    assert trainer.loss_sum(window(0)[0]).item() < before


# Text


def test_rows_train_on_every_next_token_and_never_on_what_validates(base):
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    ids = text.read(base / "text.txt", tokenizer)
    source = text.from_file(base / "text.txt", tokenizer, 64, 4, seed=1)
    n_training = len(ids) - len(source.validation)
    assert source.validation == ids[n_training:] and 0 < len(source.validation) <= 0.1 * len(ids)
    trained = []
    for number in range(-(-n_training // 63 // 4)):
        for sample in source.samples(number):
            start = int(sample.name.split()[1])
            assert list(sample.tokens) == ids[start : min(start + 64, n_training)]
            assert sample.answers == (range(1, len(sample.tokens)),)
            trained += range(start + 1, start + len(sample.tokens))
    assert sorted(trained) == list(range(1, n_training))  # each token once in an epoch
    with pytest.raises(InputError, match="it takes at least 100001"):
        text.from_file(base / "text.txt", tokenizer, 90_000, 4, seed=1)


@pytest.mark.parametrize(("most", "scored"), [(None, 64 * 64), (100, 100)])
def test_another_file_validates_and_all_of_the_first_trains(base, tmp_path, most, scored):
    """Its start alone is scored, as many tokens as are asked for."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    (tmp_path / "other.txt").write_text("Once there was another fox.\n" * 900)
    source = text.from_file(base / "text.txt", tokenizer, 64, 4, 1, tmp_path / "other.txt", most)
    assert source.validation == text.read(tmp_path / "other.txt", tokenizer)[:scored]
    assert len(source.validation) == scored
    n_ids = len(text.read(base / "text.txt", tokenizer))
    numbers = range(-(-n_ids // 63 // 4))
    trained = [len(sample.tokens) - 1 for number in numbers for sample in source.samples(number)]
    assert sum(trained) >= n_ids - 1  # the last step begins the next epoch
    (tmp_path / "short.txt").write_text("A fox.")
    with pytest.raises(InputError, match=r"short.txt has \d+ tokens; to train on it takes at least 64"):
        text.from_file(tmp_path / "short.txt", tokenizer, 64, 4, 1, base / "text.txt")


# Rounds


@pytest.mark.parametrize("method", pruning.METHODS)
def test_rounds_cut_equal_parts_with_training_between(method):
    args = dataclasses.replace(SMALL, n_heads=6, n_kv_heads=6)
    seen = []

    def fine_tune(rest, number):
        training.fine_tune(rest, window, range(2 * number - 2, 2 * number), Settings(optimizer="adamw", lr=1e-3))
        seen.append((number, rest.args.ffn_dim, rest.args.n_kv_heads, pruning.count_zeros(rest)[0]))

    validate = lambda rest: rest(TOKENS).sum().item()  # noqa: E731
    cuts = list(pruning.gradually(random_model(args), method, 0.5, 3, fine_tune, validate, TOKENS))
    assert [cut.share for cut in cuts] == pytest.approx([1 / 6, 1 / 3, 1 / 2]) and cuts[-1].share == 0.5
    assert all(cut.loss != cut.loss_cut for cut in cuts)
    if method == "magnitude":
        weights = [module.weight for module in pruning.projections(cuts[-1].model).values()]
        at = [sum(len(weight) * of_row(share, weight) for weight in weights) for share in (1 / 6, 1 / 3, 1 / 2)]
        assert seen == [(number, FFN, 6, at[number - 1]) for number in (1, 2, 3)]
    else:
        left = [(160, 6), (128, 6), (96, 6)] if method == "dimensions" else [(FFN, 5), (FFN, 4), (FFN, 3)]
        assert seen == [(number, *sizes, 0) for number, sizes in enumerate(left, 1)]


# compress.py


def call(monkeypatch, capsys, *flags: str, main=None) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["compress.py", *flags])
    with pytest.raises(SystemExit) as exit_:
        cli.run(main or compress.COMMANDS)
    return exit_.value.code, *capsys.readouterr()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random model with the embedded tokenizer, in 16 bits, and a text."""
    work = tmp_path_factory.mktemp("prune")
    args = dataclasses.replace(SMALL, vocab_size=PRESETS["tiny"].vocab_size)
    checkpoint.save(random_model(args, std=0.02).bfloat16(), work / "base", "meta", TINY / "tokenizer.model")
    lines = [f"The little fox number {i} saw {i % 7} birds, and they were {i % 3} years old.\n" for i in range(700)]
    (work / "text.txt").write_text("".join(lines))
    return work


@pytest.mark.parametrize("method", pruning.METHODS)
def test_prune_writes_what_it_says(base, tmp_path, monkeypatch, capsys, method):
    """The count printed is the count found; the loss printed is that of the file, in its dtype."""
    flags = (f"--ckpt_dir={base / 'base'}", f"--data={base / 'text.txt'}", "--iterative", "--steps=6")
    flags += (f"--method={method}", "--share=0.5", f"--out_dir={tmp_path / 'out'}", "--batch_size=2", "--device=cpu")
    flags += (f"--rounds={1 if method == 'heads' else 2}",)
    code, out, err = call(monkeypatch, capsys, "prune", *flags)
    assert code == 0, err
    written = checkpoint.load(tmp_path / "out")
    assert {weight.dtype for weight in written.parameters()} == {torch.bfloat16}
    n_zeros, n_all = pruning.count_zeros(written)
    if method == "magnitude":
        assert f"zeros      {n_zeros:,} of {n_all:,} weights in 28 matrices" in out and n_zeros == n_all / 2
    else:
        assert n_zeros == 0
        assert (written.args.ffn_dim, written.args.n_kv_heads) == ((96, 2) if method == "dimensions" else (FFN, 1))
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    source = text.from_file(base / "text.txt", tokenizer, compress.CONTEXT, 2, 1)
    assert f"validation loss {source.loss(written.float()):.4f}" in out.splitlines()[-1]
    rounds = [line for line in out.splitlines() if line.startswith("round")]
    assert "after 6 steps" in rounds[-1] and "reached    share 0.5" in out
    cut, tuned = map(float, re.search(r"loss ([\d.]+) cut, ([\d.]+) after", rounds[-1]).groups())
    assert tuned < cut


def test_the_loss_is_that_of_the_text_which_validates(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.txt").write_text("Once there was another fox.\n" * 100)
    flags = (f"--ckpt_dir={base / 'base'}", f"--data={base / 'text.txt'}", f"--eval_data={tmp_path / 'other.txt'}")
    flags += ("--share=0.5", "--eval_tokens=300", f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    code, out, err = call(monkeypatch, capsys, "prune", *flags)
    assert code == 0, err
    ids = text.read(tmp_path / "other.txt", Tokenizer(TINY / "tokenizer.model"))[:300]
    for model, line in ((base / "base", out.splitlines()[0]), (tmp_path / "out", out.splitlines()[-1])):
        loss = perplexity.evaluate(checkpoint.load(model, torch.float32), ids, compress.CONTEXT).loss
        assert f"validation loss {loss:.4f}" in line


def test_the_loss_bound_stops_before_it_is_passed(base, tmp_path, monkeypatch, capsys):
    """What is written is the last model within it; where there is none, nothing is."""
    found = iter([1.0, 1.3, 1.1, 1.5, 1.2, 1.9, 1.4, 1.2])  # before; cut and tuned, round by round; as written
    monkeypatch.setattr(text.Text, "loss", lambda *_: next(found))
    flags = (f"--ckpt_dir={base / 'base'}", f"--data={base / 'text.txt'}", "--iterative", "--rounds=3", "--steps=3")
    flags += ("--share=0.5", "--batch_size=1", "--device=cpu", "--lr=0.001")
    code, out, err = call(
        monkeypatch, capsys, "prune", *flags, f"--out_dir={tmp_path / 'out'}", "--max_loss_increase=0.3"
    )
    assert code == 0, err
    assert "stopped    the loss is above 1.3000" in out and "kept       share 0.333333 of --share=0.5" in out
    assert checkpoint.load(tmp_path / "out").args.ffn_dim == 128
    found = iter([1.0, 1.9, 1.9])
    code, _, err = call(
        monkeypatch, capsys, "prune", *flags, f"--out_dir={tmp_path / 'none'}", "--max_loss_increase=0.3"
    )
    assert code == 2 and "the first round passes it" in err and not (tmp_path / "none").exists()


def test_a_round_that_diverges_leaves_the_last_good_one(base, tmp_path, monkeypatch, capsys):
    """With a bound, which a loss that is no number passes; without one the run fails, and nothing is written."""
    losses = [1.0, 1.3, 1.1, NonFinite("the loss is not finite"), 1.2]  # before; cut and tuned; cut; as written

    def loss(*_):
        found = losses.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(text.Text, "loss", loss)
    flags = (f"--ckpt_dir={base / 'base'}", f"--data={base / 'text.txt'}", "--iterative", "--rounds=2", "--steps=2")
    flags += ("--share=0.5", "--batch_size=1", "--device=cpu", f"--out_dir={tmp_path / 'out'}")
    code, out, err = call(monkeypatch, capsys, "prune", *flags, "--max_loss_increase=0.3")
    assert code == 0 and "stopped    round 2: the loss is not finite" in out, err
    assert "kept       share 0.166667 of --share=0.5" in out and checkpoint.load(tmp_path / "out").args.ffn_dim == 160
    losses[:] = [1.0, 1.3, 1.1, NonFinite("the loss is not finite")]
    code, _, err = call(monkeypatch, capsys, "prune", *flags[:-1], f"--out_dir={tmp_path / 'none'}")
    assert code == 4 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", pruning.METHODS)
def test_zeros_of_a_sparse_model_are_not_filled_in(method):
    """More of them than the cut asks for, or a cut of another kind: training moves the others alone."""
    model = pruning.remove_masks(pruning.zero_smallest(random_model(), 0.8))
    before = pruning.count_zeros(model)[0]

    def fine_tune(rest, number):
        training.fine_tune(rest, window, range(3), Settings(optimizer="adamw", lr=1e-3))

    (cut,) = pruning.gradually(model, method, 0.5, 1, fine_tune, lambda rest: 0.0)
    zeros, n_all = pruning.count_zeros(cut.model)
    assert zeros == before if method == "magnitude" else 0.6 < zeros / n_all < 0.9


def test_a_few_zeros_do_not_make_a_model_sparse():
    """A dense model of 16 bits has some; what is left of it has plain layers, and so the fast step."""
    model = random_model()
    model.layers[0].attention.wq.weight.data[3, :4] = 0
    (cut,) = pruning.gradually(model, "dimensions", 0.5, 1, lambda rest, number: None, lambda rest: 0.0)
    assert {type(module) for module in pruning.projections(cut.model).values()} == {torch.nn.Linear}


def test_weights_that_are_no_numbers_are_not_pruned(base, tmp_path, monkeypatch, capsys):
    model = checkpoint.load(base / "base")
    model.layers[1].attention.wq.weight.data[3, 4] = float("nan")
    checkpoint.save(model, tmp_path / "broken", "meta", TINY / "tokenizer.model")
    flags = (f"--ckpt_dir={tmp_path / 'broken'}", "--method=magnitude", f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    code, _, err = call(monkeypatch, capsys, "prune", *flags)
    assert code == 2 and "layers.1.attention.wq.weight: holds values that are not finite" in err
    assert not (tmp_path / "out").exists()


def test_without_a_text_it_cuts_and_measures_nothing(base, tmp_path, monkeypatch, capsys):
    args = dataclasses.replace(SMALL, vocab_size=4095)
    checkpoint.save(random_model(args), tmp_path / "other", "meta", TINY / "tokenizer.model")
    (tmp_path / "other" / "tokenizer.model").write_bytes(
        b"".join((TINY / "tokenizer.model").read_bytes().splitlines(True)[:-1])  # another one
    )
    flags = (f"--ckpt_dir={tmp_path / 'other'}", "--method=dimensions", "--share=0.25", "--device=cpu")
    iterative = (f"--out_dir={tmp_path / 'no'}", "--iterative", "--rounds=1")
    code, out, err = call(monkeypatch, capsys, "prune", *flags, f"--out_dir={tmp_path / 'out'}")
    assert code == 0 and "loss" not in out, err
    assert checkpoint.load(tmp_path / "out").args.ffn_dim == 160  # 144 is no multiple of 32
    assert "reached    share 0.166667 of --share=0.25" in out
    code, _, err = call(monkeypatch, capsys, "prune", *flags, *iterative)
    assert code == 2 and err == "error: --data is missing; fine-tuning takes a text file, and so does --iterative\n"


BAD = {
    "share 0": ("--share=0", r"--share=0: expected a number between 0 and 1"),
    "share 1": ("--share=1", r"--share=1: expected a number between 0 and 1"),
    "negative": ("--share=-0.5", r"--share=-0.5"),
    "nan": ("--share=nan", r"--share=nan"),
    "everything": ("--share=0.95", r"none of 192 hidden units would be left"),
    "nothing": ("--share=0.05", r"all of 192 hidden units would be left"),
    "every weight": ("--method=magnitude --share=0.99999", r"none of the 64 weights of a row would be left"),
    "no weight": ("--method=magnitude --share=0.00001", r"all of the 64 weights of a row would be left"),
    "every head": (
        "--method=heads --share=0.8",
        r"none of 2 key/value heads would be left; possible are multiples of 0.5",
    ),
    "a round for nothing": (
        "--iterative --rounds=4",
        r"--rounds=4: this share is 3 times 32 hidden units; use --rounds=3",
    ),
    "rounds of one": ("--rounds=3", r"--rounds=3: needs --iterative"),
    "method": ("--method=luck", r"--method=luck: expected one of magnitude, dimensions, heads"),
    "no directory": ("--ckpt_dir=nowhere", r"nowhere does not exist"),
    "no data": ("--data=nowhere.txt", r"cannot read nowhere.txt: No such file"),
    "no text to train on": ("--eval_data=wiki.txt", r"--eval_data=wiki.txt: needs --data"),
    "no eval data": (f"--data={__file__} --eval_data=nowhere.txt", r"cannot read nowhere.txt: No such file"),
    "steps": ("--iterative --steps=3", r"--steps=3: expected at least 8"),
    "bound": ("--max_loss_increase=0.1", r"with --iterative"),
    "lr": ("--lr=-1", r"--lr=-1"),
    "rounds": ("--iterative --rounds=0", r"--rounds=0"),
    "flag": ("--shares=0.5", r"did you mean --share\?"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(base, tmp_path, monkeypatch, capsys, name):
    flags, message = BAD[name]
    given = {"--ckpt_dir": str(base / "base"), "--out_dir": str(tmp_path / "out"), "--device": "cpu"}
    given |= dict(flag.partition("=")[::2] for flag in flags.split())
    code, out, err = call(monkeypatch, capsys, "prune", *(f"{k}={v}" if v else k for k, v in given.items()))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_an_output_directory_with_files_is_left_alone(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("precious")
    code, _, err = call(monkeypatch, capsys, "prune", f"--ckpt_dir={base / 'base'}", f"--out_dir={tmp_path}")
    assert code == 2 and "already exists and is not an empty directory" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_quantized_model_is_refused(model):
    class Int8Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)

    model.layers[1].attention.wq = Int8Linear()
    with pytest.raises(InputError, match=r"layers\.1\.attention\.wq\.weight is quantized \(torch\.int8\)"):
        pruning.require_plain(model)


def test_a_quantized_checkpoint_is_one_line(base, tmp_path, monkeypatch, capsys):
    state = checkpoint.load(base / "base").state_dict()
    state["layers.0.attention.wq.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    state["layers.0.attention.wq.scales"] = torch.ones(64)
    (tmp_path / "q").mkdir()
    torch.save(state, tmp_path / "q" / "consolidated.00.pth")
    for name in ("params.json", "tokenizer.model"):
        (tmp_path / "q" / name).write_bytes((base / "base" / name).read_bytes())
    code, _, err = call(monkeypatch, capsys, "prune", f"--ckpt_dir={tmp_path / 'q'}", f"--out_dir={tmp_path / 'out'}")
    assert code == 2 and err.count("\n") == 1 and "layers.0.attention.wq" in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_command_is_named(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "prone", "--share=0.5")
    assert code == 2 and err.startswith("error: expected a command: compress.py quantize, compress.py prune, ")
    assert call(monkeypatch, capsys, "prune", "--help")[0] == 0
    assert ROOT.joinpath("compress.py").exists()


def test_a_pruned_model_goes_through_every_script(tmp_path, monkeypatch, capsys):
    """The README's commands on the embedded model, with less text and fewer steps."""
    monkeypatch.setattr(text, "VALIDATION", 1)
    out_dir = tmp_path / "pruned"
    flags = ("--method=dimensions", "--share=0.5", "--iterative", "--rounds=2", "--steps=2", "--batch_size=1")
    code, out, err = call(monkeypatch, capsys, "prune", *flags, "--device=cpu", f"--out_dir={out_dir}")
    assert code == 0 and "written" in out, err
    scripts = {
        inference.main: ("--prompt=The little fox", "--max_gen_len=4", "--device=cpu"),
        evaluate.main: ("--max_tokens=64", f"--against={TINY}", "--device=cpu"),
    }
    for main, given in scripts.items():
        code, out, err = call(monkeypatch, capsys, f"--ckpt_dir={out_dir}", *given, main=main)
        assert code == 0, err
    assert "pruned" in out and "tiny" in out
