"""Shared fixtures: a small random model, the embedded model, real tokenizers where at hand."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ["PYTHONPATH"] = f"{Path(__file__).parent}/offline:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, one thread each, before torch is imported

import hypothesis
import pytest
import torch
from offline import sitecustomize  # noqa: F401 (no connection leaves this machine)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the GPU's kernels run on the CPU

from llama import Llama, ModelArgs, Tokenizer, Transformer

hypothesis.settings.register_profile(
    "the same examples each time",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # on a busy machine everything is
)
hypothesis.settings.load_profile("the same examples each time")
ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REAL = ROOT / "models" / "smollm2-135m" / "smollm2-135m.gguf"

# 4 layers, grouped heads, tied head, scaled RoPE: every branch of the network in 0.18 M parameters.
SMALL = ModelArgs(
    dim=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=512,
    multiple_of=32,
    rope_theta=500_000.0,
    use_scaled_rope=True,
    rope_scale_factor=32.0,
    tie_word_embeddings=True,
)


def random_model(args: ModelArgs = SMALL, seed: int = 0, std: float = 0.1) -> Transformer:
    """Random weights, norms included (all ones would hide a swapped norm), large enough that tokens matter."""
    model = Transformer(args)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator, std)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model.eval()


def write_shards(model: Transformer, directory: Path, n: int, embedding_axis: int) -> None:
    """Cut a model the way Meta's model-parallel training does."""
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(model.args.to_params()))
    for rank in range(n):
        shard = {}
        for name, weight in model.state_dict().items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            axis = embedding_axis if name.startswith("tok_embeddings") else axis
            shard[name] = weight if weight.dim() == 1 else weight.chunk(n, axis)[rank].clone()
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing connects to another machine; who tried to is told at the end."""
    log = tmp_path_factory.mktemp("offline") / "log"
    log.touch()
    os.environ["OFFLINE_LOG"] = str(log)
    yield
    assert not log.read_text(), "these tried to leave this machine"


@pytest.fixture(scope="module")
def browser():
    """The Chromium of this machine; playwright's own is not downloaded."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium, none of its names is in PATH")
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=path) as found:
        yield found


@pytest.fixture
def model() -> Transformer:
    return random_model()


@pytest.fixture(scope="session")
def tiny() -> Llama:
    return Llama.build(TINY, TINY / "tokenizer.model", max_seq_len=512, max_batch_size=32, device="cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is at hand")
    return torch.device(request.param)


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What the collection leaves lives to the end: not to look through it again and again is a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("model") and not REAL.is_file():
        pytest.skip("a real model is not at hand (`make model` fetches it)")


def asset(name: str) -> Path:
    """A real file that the project may not contain, from the folder in LLAMA_ASSETS; skips the test without it."""
    folder = os.environ.get("LLAMA_ASSETS")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"{name} is not at hand (set LLAMA_ASSETS to a folder that holds it)")
    return Path(folder) / name


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Tokenizer:
    return Tokenizer(asset("llama3_tokenizer.model"))


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Tokenizer:
    return Tokenizer(asset("llama2_tokenizer.model"))
