"""Words that this project once used in a sense of its own; code and docs use the word of the field."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BANNED = {
    r"\bpictures?\b": "image",
    r"\b(?-i:(?:a|the|each|every|of|one|whole|this) clips?)\b": "video",
    r"\bnumber types?\b": "dtype",
    r"\bso many\b": "up to N, the number of",
    r"\blearnt\b": "trained, trainable",
    r"\baloud\b": "logged",
    r"\bdealt\b": "sharded",
    r"\blikeliest\b": "most likely",
    r"\bgoes on where\b": "resumes",
    r"\bwho sees whom\b": "attention mask",
    r"\bas it were\b": "(leave out)",
}
ALLOWED = {"src/vila/data/readers/records.py": "picture"}  # a key in the data of users


def hits() -> list[str]:
    """`path:line: word; instead` of every banned word in src and docs."""
    found = []
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]):
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            for pattern, instead in BANNED.items():
                match = re.search(pattern, line, re.IGNORECASE)
                if match and match[0] != ALLOWED.get(name):
                    found.append(f"{name}:{number}: {match[0]!r}; say {instead!r}")
    return found


def test_code_and_docs_use_the_words_of_the_field() -> None:
    assert not hits()
