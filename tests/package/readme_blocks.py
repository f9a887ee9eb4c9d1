"""Fenced code blocks of README.md and docs/, and the tags in their info strings.

    ```bash run             executed in every test session
    ```bash run slow        takes minutes; executed by `make test-slow`
    ```bash run network     downloads; executed by `make test-slow`
    ```python run           executed by Python

Blocks without `run` are not executed.
"""

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<code>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
LANGUAGES = ("bash", "python")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A code block. page: path from the root of the repository; line: line of the opening fence."""

    page: str
    line: int
    language: str
    tags: frozenset[str]
    code: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(root: Path) -> list[Block]:
    """Return the bash and python blocks of all pages, in reading order."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [block for page in pages for block in parse_blocks(page.read_text("utf-8"), str(page.relative_to(root)))]


def parse_blocks(text: str, page: str) -> list[Block]:
    """Return the bash and python blocks of one page. Raises ValueError for unknown tags."""
    blocks = []
    for match in FENCE.finditer(text):
        language, *tags = match["info"].split()
        if language not in LANGUAGES:
            continue
        line = text.count("\n", 0, match.start()) + 1
        if unknown := set(tags) - {"run", "slow", "network", "gpu"}:
            raise ValueError(f"{page}:{line}: unknown tags {sorted(unknown)}; known are run, slow, network, gpu")
        blocks.append(Block(page, line, language, frozenset(tags), match["code"]))
    return blocks
