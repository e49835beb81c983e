"""The house rules that a reader relies on: who imports whom, nothing at import, budgets, no unsafe readers."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.stem != "early"]
PACKAGES = ("llama", "data", "benchmarks", "reports", "serving")
OURS = [ROOT / "early.py", *SCRIPTS, *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in OURS}
A_SCRIPT = tuple(map(name_of, SCRIPTS))

# What requirements-demo.txt brings, and the modules that cannot be imported without it.
FOR_DEMO = ("gradio", "uvicorn", "h11", "fastapi")
NEED_DEMO = ("serving.web", "serving.page")
HAS_DEMO = all(importlib.util.find_spec(name) for name in FOR_DEMO)

# What the modules of a package, or one module, never import. A name stands for all that is below it.
NEVER = {
    **dict.fromkeys(A_SCRIPT, A_SCRIPT),
    "serving": A_SCRIPT,
    "reports": (*A_SCRIPT, "serving"),
    "benchmarks": (*A_SCRIPT, "serving"),
    "data": (*A_SCRIPT, "benchmarks", "reports", "serving", "llama.training"),
    "llama": (*A_SCRIPT, "benchmarks", "reports", "serving", "data", *FOR_DEMO),
    "llama.lora": ("llama.quantization", "llama.pruning"),
    "llama.quantization": ("llama.lora", "llama.pruning"),
    "llama.pruning": ("llama.lora", "llama.quantization"),
    "llama.config": ("torch", "numpy"),
    "llama.model": ("numpy", "os"),
    "llama.generation": ("llama.cli", "argparse", "fire", "json", "io", "os", "safetensors"),
}
# All that a module imports of this repository. What stands here needs torch at most.
ONLY = {
    "early": (),
    "llama.config": (),
    "llama.model": ("llama.config",),
    "llama.sampling": (),
    "llama.surgery": (),
    "llama.frozen": (),
    "llama.training.loss": (),
    "serving.engine": ("llama.errors",),
}
REPORTS_MEASURE_NOTHING = "benchmarks.rows"  # the one module of benchmarks/ that reports/ imports: it reads files


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file imports, also inside functions; `from llama import checkpoint` is llama.checkpoint."""
    imports = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imports |= {name if name in MODULES else node.module for name in names}
    return frozenset(imports)


def is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    """scripts -> serving -> reports, benchmarks -> llama, data -> torch; the core of llama/ knows less."""
    imports = imports_of(MODULES[name])
    forbidden = [other for package, others in NEVER.items() if is_below(name, package) for other in others]
    assert not [module for module in imports if is_below(module, *forbidden)]
    if name in ONLY:
        assert imports & MODULES.keys() <= set(ONLY[name])
    assert name in NEED_DEMO or not [module for module in imports if is_below(module, *FOR_DEMO)]
    if is_below(name, "reports", "serving"):
        assert {module for module in imports if is_below(module, "benchmarks")} <= {REPORTS_MEASURE_NOTHING}


def test_imports_have_no_circle():
    """Each module can be read after those that it imports."""
    rest = {name: imports_of(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while ready := [name for name, imports in rest.items() if not imports & rest.keys()]:
        for name in ready:
            del rest[name]
    assert not rest


def test_the_rules_speak_of_modules_that_exist():
    assert not {*NEVER, *ONLY, *NEED_DEMO, REPORTS_MEASURE_NOTHING} - MODULES.keys()


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_no_unsafe_readers(path):
    """Nothing that runs what a file says: torch.load only with weights_only=True, no pickle, eval, exec, shell."""
    assert not imports_of(path) & {"pickle", "yaml", "marshal", "shelve", "dill"}
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "compile", "__import__", "os.system")
        assert "shell" not in keywords
        if called == "torch.load":
            assert keywords.get("weights_only") == "True"


def test_the_library_knows_no_flags():
    """It names a parameter as Python does, `dtype=float32`; llama/cli.py alone knows how a command line writes that."""
    flags = re.compile(r"--[a-z]\w*")
    known = {name: flags.findall(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    spelled = {name for name, words in known.items() if words and name.split(".")[0] == "llama"}
    assert not spelled - {"llama.cli"}


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_budgets(path):
    """Functions within 60 lines, signature and docstring counted; model.py within 300; a file says what it is."""
    tree = tree_of(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not {f.name for f in functions if f.end_lineno - f.lineno + 1 > 60}
    assert name_of(path) != "llama.model" or len(path.read_text(encoding="utf-8").splitlines()) <= 300
    assert path.name == "__init__.py" or ast.get_docstring(tree), f"{path.name} does not say what it is"


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_public_functions_are_typed(path):
    """Types on every argument and result."""
    scopes = [tree_of(path), *(node for node in tree_of(path).body if isinstance(node, ast.ClassDef))]
    scopes = [scope for scope in scopes if not getattr(scope, "name", "").startswith("_")]
    for node in (node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)):
        if not node.name.startswith("_"):
            arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
            assert all(a.annotation for a in arguments) and node.returns, f"{path}:{node.lineno} is not typed"


def test_nothing_happens_at_import(tmp_path):
    """No module probes a device, sets a default of torch or a thread count, opens a socket, writes or prints."""
    modules = [name for name in MODULES if HAS_DEMO or name not in NEED_DEMO]
    program = (
        "import importlib, logging, os, socket, sys, torch\n"
        "before = dict(os.environ), torch.get_num_threads(), torch.random.get_rng_state().tolist()\n"
        "def never(*args, **options): raise AssertionError('called at import')\n"
        "torch.cuda.is_available = torch.cuda.get_device_capability = torch.cuda.device_count = never\n"
        "socket.socket.connect = socket.getaddrinfo = never\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()\n"
        "assert before == (dict(os.environ), torch.get_num_threads(), torch.random.get_rng_state().tolist())\n"
        "assert not logging.root.handlers\n"
    )
    run = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_start_that_fails_ends_in_one_line(script, tmp_path):
    """Of each script, without its packages; and interrupted while the first of them loads."""
    run = subprocess.run([sys.executable, "-S", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 3 and re.fullmatch(r"error: the package \w+ is not installed for .*\n", run.stderr)
    in_callback = "class C:\n  def __del__(self): raise {}\nC()\nprint('goes on')"  # imports have some
    interrupted, terminated = (130, "", "error: interrupted\n"), (143, "", "")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for content, expected in (
        ("raise KeyboardInterrupt", interrupted),
        (in_callback.format("KeyboardInterrupt"), interrupted),
        (in_callback.format("SystemExit(143)"), terminated),
    ):
        for package in ("torch", "tqdm"):
            (tmp_path / f"{package}.py").write_text(content)
        run = subprocess.run([sys.executable, "-S", str(script)], capture_output=True, text=True, env=environment)
        assert (run.returncode, run.stdout, run.stderr) == expected


@pytest.mark.parametrize("module", ["data.download", "data.model"])
def test_so_does_that_of_a_module(module):
    run = subprocess.run([sys.executable, "-S", "-m", module], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 3 and re.fullmatch(r"error: the package \w+ is not installed for .*\n", run.stderr)


def test_an_old_python_is_named():
    program = "import sys; sys.version_info = (3, 10, 13); import early"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (3, "error: Python 3.10 is too old; use 3.11 or newer\n")


def test_products_of_many_lengths_keep_little_memory():
    """What oneDNN prepares for each; without early.py's word it is 500 MB where a CPU has AMX."""
    program = (
        "import early, psutil, torch\n"
        "import torch.nn.functional as F\n"
        "weights = [torch.randn(n, k, dtype=torch.bfloat16) for n, k in ((576, 576), (1536, 576), (576, 1536))]\n"
        "x, resident = torch.randn(300, 1536, dtype=torch.bfloat16), psutil.Process().memory_info\n"
        "lengths = (range(1, 5), range(50, 300))\n"
        "for of_them in lengths:\n"
        "    before = resident().rss\n"
        "    for n in of_them:\n"
        "        for w in weights:\n"
        "            F.linear(x[:n, : w.shape[1]], w)\n"
        "assert resident().rss - before < 200e6, resident().rss - before\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env=environment)


def test_config_needs_no_torch():
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('config', 'llama/config.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['config'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert module.PRESETS['llama3.2-1b'].n_params() == 1_235_814_400 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, check=True)
