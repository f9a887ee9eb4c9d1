"""The text packaged with the starter: instruction pairs, and English prose for perplexity and for calibration.

The files lie in `text/`, where `LICENSES.md` names their sources; `scripts/make_starter_text.py` made them.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

from vila.core.errors import UnknownNameError

TEXT_FILES = ("instructions.jsonl", "english_eval.txt", "english_calibration.txt")


def instruction_pairs() -> list[tuple[str, str, str]]:
    """(id, instruction, response) of every pair, sorted by id; the responses are SmolLM2-135M-Instruct's own."""
    rows = (json.loads(line) for line in _read("instructions.jsonl").decode("ascii").splitlines())
    return [(row["id"], row["instruction"], row["response"]) for row in rows]


def english_eval() -> str:
    """English prose on which perplexity is measured; never trained on and never used for calibration."""
    return _read("english_eval.txt").decode("ascii")


def english_calibration() -> str:
    """English prose for calibrating quantization; shares no run of 8 words with `english_eval`."""
    return _read("english_calibration.txt").decode("ascii")


def text_sha256(name: str) -> str:
    """The SHA-256, in hex, of the packaged file `name`, one of TEXT_FILES: names the exact text behind a figure."""
    return hashlib.sha256(_read(name)).hexdigest()


def _read(name: str) -> bytes:
    if name not in TEXT_FILES:
        raise UnknownNameError("starter text", name, TEXT_FILES)
    return files("vila.starter").joinpath("text", name).read_bytes()
