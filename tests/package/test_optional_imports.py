"""Packages of extras are imported by `vila.core.optional`, or in modules that are imported after such a check."""

import ast
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.extras import ROOT
from vila.core.optional import EXTRAS

SRC = ROOT / "src"
MODULE_NAMES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "protobuf": "google", "pyyaml": "yaml"}
GUARDED = ("vila.serve",)
"""Modules with module-level imports of extras; commands import them after `require_extra`."""
# Triton is part of PyTorch's CUDA builds; lmms-eval imports its plugin.
OTHERS = {
    "vila.kernels.triton": {"triton"},
    "vila.eval.lmms": {"lmms_eval"},
    "vila.eval.submit": {"openpyxl"},
}


def modules():
    for path in sorted((SRC / "vila").rglob("*.py")):
        yield ".".join(path.relative_to(SRC).with_suffix("").parts), ast.parse(path.read_text())


def imports(tree):
    """Line and name of every import outside of `if TYPE_CHECKING`."""
    typing_only = {
        below
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for below in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    base = {MODULE_NAMES.get(name, name.replace("-", "_")) for name in names} | set(sys.stdlib_module_names) | {"vila"}
    wrong = []
    for module, tree in modules():
        allowed = base | OTHERS.get(module, set())
        if module.startswith(GUARDED):
            # Starlette is a dependency of FastAPI, h11 of uvicorn.
            allowed |= {*EXTRAS["serve"], *EXTRAS["demo"], "starlette", "h11"}
        wrong += [f"{module}: {name}" for _, name in imports(tree) if name.partition(".")[0] not in allowed]
    assert wrong == []


def test_the_server_is_imported_only_after_require_extra():
    wrong = []
    for module, tree in modules():
        if module.startswith("vila.serve"):
            continue
        guards = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and "require_extra" in ast.dump(n.func)]
        first = min(guards, default=sys.maxsize)
        wrong += [
            f"{module}:{line}: {name}" for line, name in imports(tree) if name.startswith(GUARDED) and line < first
        ]
    assert wrong == []
