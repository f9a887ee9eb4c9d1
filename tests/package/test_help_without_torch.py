"""`vila --help` and the lower layers import neither torch nor transformers, which take seconds to import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBID = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Forbid())
"""
HELP = """
from vila.cli.main import main
sys.argv = ["vila", "--help"]
sys.exit(main())
"""
LOWER_LAYERS = """
from importlib import import_module
from pkgutil import walk_packages

import vila.families

for package in ("vila.core", "vila.config"):
    for module in walk_packages(import_module(package).__path__, package + "."):
        import_module(module.name)
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", FORBID + code], capture_output=True, text=True, env=env, timeout=60, check=False
    )


def test_help_prints_without_torch() -> None:
    result = run_without_torch(HELP)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_core_families_and_config_import_without_torch() -> None:
    result = run_without_torch(LOWER_LAYERS)
    assert result.returncode == 0, result.stderr


def test_the_guard_blocks_torch() -> None:
    result = run_without_torch("import torch")
    assert result.returncode != 0
    assert "torch is blocked" in result.stderr
