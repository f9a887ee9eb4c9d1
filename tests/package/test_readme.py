"""Code blocks of README and docs that are tagged `run` are executed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package.readme_blocks import ROOT, Block, parse_blocks, read_blocks
from tests.preloaded import program

BLOCKS = read_blocks(ROOT)
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "runs", "site", "dist", "build")


def as_param(block: Block) -> object:
    # `network` implies `slow`, which `make test-slow` selects.
    names = block.tags - {"run"} | ({"slow"} if "network" in block.tags else set())
    return pytest.param(block, id=block.where, marks=[getattr(pytest.mark, name) for name in sorted(names)])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the repository, shared by all blocks; files that a block writes are available to later blocks."""
    copy = tmp_path_factory.mktemp("readme") / "repo"
    shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND, symlinks=True)
    yield copy
    shutil.rmtree(copy)


@pytest.mark.parametrize("block", [as_param(block) for block in BLOCKS if "run" in block.tags])
def test_documented_block_runs(block: Block, checkout: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    # Slow blocks start the installed `vila`; the others fork it from a process that has imported torch already.
    folders = (
        [Path(sys.executable).parent]
        if block.tags & {"slow", "network"}
        else [program().parent, Path(sys.executable).parent]
    )
    env = {**os.environ, "PATH": os.pathsep.join([*map(str, folders), os.environ["PATH"]])}
    result = subprocess.run(
        [*command, block.code],
        cwd=checkout,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3600 if block.tags & {"slow", "network"} else 120,
        check=False,
    )
    assert result.returncode == 0, f"{block.where}\n{block.code}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"


def test_info_string_gives_language_and_tags() -> None:
    page = "text\n\n```bash run slow\nvila doctor\n```\n\n```text\nno\n```\n\n```python\nimport vila\n```\n"
    first, second = parse_blocks(page, "p.md")
    assert first == Block("p.md", 3, "bash", frozenset({"run", "slow"}), "vila doctor\n")
    assert second == Block("p.md", 11, "python", frozenset(), "import vila\n")


def test_misspelt_tag_is_named() -> None:
    with pytest.raises(ValueError, match="rnu"):
        parse_blocks("```bash rnu\nvila doctor\n```\n", "p.md")
