"""What a shape may be, what is known of the released ones, and which field is named where one is impossible."""

from __future__ import annotations

import pytest

from llama import ModelArgs
from llama.config import KNOWN_SHAPES, PRESETS

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128}
BAD = [
    *(("n_kv_heads", value) for value in (0, -2, 2.0, True, "2", 3, 5)),
    *((name, value) for name in ("dim", "n_layers", "n_heads", "multiple_of") for value in (0, -4, 4.0, False, None)),
    *(("vocab_size", value) for value in (0, -2, 1 << 25, 128.0)),
    *((name, value) for name in ("norm_eps", "rope_theta") for value in (0.0, -1.0, float("nan"), float("inf"), "1")),
    *(("head_dim", value) for value in (0, 15, 16.0)),
    *((name, value) for name in ("use_scaled_rope", "tie_word_embeddings") for value in (1, "true")),
    *(
        (name, value)
        for name in ("rope_scale_factor", "rope_linear_factor", "ffn_dim_multiplier")
        for value in (0, -2.0)
    ),
]
RELEASED = {  # Meta's model cards
    (2048, 16, 32, 8): (32.0, True),
    (3072, 28, 24, 8): (32.0, True),
    (4096, 32, 32, 8): (8.0, False),
    (8192, 80, 64, 8): (8.0, False),
    (16384, 126, 128, 8): (8.0, False),
    (16384, 126, 128, 16): (8.0, False),
}


@pytest.mark.parametrize(("field", "value"), BAD)
def test_what_no_model_can_be_is_refused_by_field(field, value):
    needed = {"rope_scale_factor": {"use_scaled_rope": True}, "use_scaled_rope": {"rope_scale_factor": 8.0}}
    with pytest.raises(ValueError, match=f"^{field}: "):
        ModelArgs(**{**SHAPE, **needed.get(field, {}), field: value})


@pytest.mark.parametrize("shape", RELEASED)
def test_what_the_files_of_a_release_leave_out(shape):
    """Meta's params.json says neither the factor of RoPE nor whether the head is tied."""
    args = ModelArgs(*shape, vocab_size=128_256, use_scaled_rope=True)
    assert (args.rope_scale_factor, args.tie_word_embeddings) == RELEASED[shape] and len(KNOWN_SHAPES) == len(RELEASED)
    old = ModelArgs(*shape, vocab_size=32_000)  # Llama 2 and 3 of the same shape
    assert old.rope_scale_factor is None and not old.tie_word_embeddings


def test_defaults_are_those_that_metas_loader_assumes():
    args = ModelArgs()
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.multiple_of) == (4096, 32, 32, 32, 256)
    assert (args.norm_eps, args.rope_theta, args.use_scaled_rope, args.head_dim) == (1e-5, 10_000.0, False, 128)


@pytest.mark.parametrize(
    ("name", "hidden", "theta", "scaled", "n_parameters"),
    [
        ("llama3.2-1b", 8192, 500_000.0, True, 1_235_814_400),
        ("llama3.2-3b", 8192, 500_000.0, True, 3_212_749_824),
        ("llama3.1-8b", 14_336, 500_000.0, True, 8_030_261_248),
        ("llama3.1-70b", 28_672, 500_000.0, True, 70_553_706_496),
        ("llama2-7b", 11_008, 10_000.0, False, 6_738_415_616),
        ("smollm2-135m", 1536, 100_000.0, False, 134_515_008),
    ],
)
def test_shapes_by_name_are_those_of_the_released_models(name, hidden, theta, scaled, n_parameters):
    """As their files on Hugging Face say."""
    args = PRESETS[name]
    assert (args.ffn_dim, args.rope_theta, args.use_scaled_rope) == (hidden, theta, scaled)
    assert args.n_params() == n_parameters
