"""The house rules that a reader relies on: who imports whom, nothing at import, budgets, no unsafe readers."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

LIBRARY = sorted((ROOT / "llama").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
OURS = [*LIBRARY, *SCRIPTS, *sorted((ROOT / "data").rglob("*.py")), *sorted((ROOT / "reports").rglob("*.py"))]

NEVER = {
    "llama.config": {"torch", "numpy"},
    "llama.generation": {"argparse", "fire", "json", "io", "os", "safetensors"},
    "llama.model": {"numpy", "os"},
}


def name_of(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path) -> set[str]:
    """Every module that a file imports, also inside functions; `from llama import checkpoint` is llama.checkpoint."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            below = [ROOT.joinpath(*node.module.split("."), f"{alias.name}.py") for alias in node.names]
            is_module = {alias.name: file.exists() for alias, file in zip(node.names, below, strict=True)}
            found |= {f"{node.module}.{alias}" if is_module[alias] else node.module for alias in is_module}
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_imports_run_one_way(path):
    name = name_of(path)
    ours = {module for module in imports_of(path) if module.split(".")[0] in ("llama", "data")}
    if name != "llama":  # the package's front door re-exports
        assert not {module.split(".")[0] for module in ours} - {"llama"}
    assert not {module.split(".")[0] for module in imports_of(path)} & NEVER.get(name, set())


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_never_import_each_other(path):
    others = {name_of(script) for script in SCRIPTS}
    assert not {module.split(".")[0] for module in imports_of(path)} & others


def test_library_never_imports_data():
    assert not any(module.split(".")[0] == "data" for path in LIBRARY for module in imports_of(path))


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_no_unsafe_readers(path):
    """Nothing that runs what a file says: torch.load only with weights_only=True, no pickle, eval, exec, shell."""
    assert not imports_of(path) & {"pickle", "yaml", "marshal", "shelve", "dill"}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "compile", "__import__", "os.system")
        assert "shell" not in keywords
        if called == "torch.load":
            assert keywords.get("weights_only") == "True"


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_budgets(path):
    """Functions within 60 lines, model.py within 300, and every file says what it is."""
    source = path.read_text()
    assert name_of(path) != "llama.model" or len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - (body[0].lineno if body else node.end_lineno) + 1
            assert lines <= 60, f"{path.name}:{node.lineno} {node.name} has {lines} lines"
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(source)), f"{path.name} does not say what it is"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_public_functions_are_typed_and_described(path):
    """Types on every argument and result; a docstring on every class and function but the plainest properties."""
    tree = ast.parse(path.read_text())
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for node in (node for scope in scopes for node in scope.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))):
        if node.name.startswith("_"):
            continue
        place = f"{path.name}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), f"{place} has no docstring"
            continue
        arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
        assert all(a.annotation for a in arguments) and node.returns, f"{place} is not typed"
        is_plain = node.decorator_list or node.name == "forward" or len(node.body) == 1
        assert ast.get_docstring(node) or is_plain, f"{place} has no docstring"


def test_nothing_happens_at_import():
    """Importing the package probes no device, sets no default dtype, opens no socket, prints nothing."""
    program = (
        "import socket, sys, torch\n"
        "socket.socket = None\n"
        "torch.cuda.is_available = torch.cuda.get_device_capability = None\n"
        "import llama, inference, benchmarks.rows, llama.cli\n"
        "assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_config_needs_no_torch():
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('config', 'llama/config.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['config'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert module.PRESETS['llama3.2-1b'].n_params() == 1_235_814_400 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, check=True)
