"""How long a benchmark took and how many tokens that were, over all sessions and processes.

BENCHMARK/speed-RANK.json   of a process in the session that goes on
BENCHMARK/speed.json        {"seconds": ..., "answered": ..., "prompt_tokens": ..., "tokens": ...}   tokens: of answers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila.core.fields import Fields
from vila.core.files import write_json
from vila.eval.asking import Tokens

_MAX = 2**53
_PARTS = "speed-*.json"
_NONE: dict[str, Any] = {"prompt_tokens": 0, "tokens": 0}
_UNCOUNTED: dict[str, Any] = {"prompt_tokens": None, "tokens": None}


def forget_parts(out: Path) -> None:
    """Delete what a session that was killed left: its time is not known."""
    for path in out.glob(_PARTS):
        path.unlink()


def note_part(out: Path, rank: int, answered: int, tokens: Tokens | None) -> None:
    """What this process has answered in this session. tokens: None when they were not counted."""
    counted = {"prompt_tokens": tokens.prompt, "tokens": tokens.new} if tokens else _UNCOUNTED
    write_json(out / f"speed-{rank}.json", {"answered": answered, **(counted if answered else _NONE)})


def note_speed(out: Path, seconds: float) -> int:
    """Add what all processes answered in this session to the earlier ones; how many questions that were.

    Tokens are noted as long as they were counted in every session and process, and else as not known.
    """
    parts = [_counts(path) for path in sorted(out.glob(_PARTS))]
    forget_parts(out)
    answered = sum(part["answered"] for part in parts)
    if answered:
        path = out / "speed.json"
        before = _counts(path) if path.is_file() else {"answered": 0, **_NONE}
        earlier = Fields.of_file(path).number("seconds") if path.is_file() else 0.0
        counted = {name: _sum([before[name], *(part[name] for part in parts)]) for name in _NONE}
        write_json(path, {"seconds": earlier + seconds, "answered": before["answered"] + answered, **counted})
    return answered


def _counts(path: Path) -> dict[str, Any]:
    """Read the counts of a file; tokens are None where they were not counted. Raises DataError for other values."""
    facts = Fields.of_file(path)
    tokens = {name: facts.integer(name, None, maximum=_MAX) for name in _NONE}
    return {"answered": facts.integer("answered", maximum=_MAX), **tokens}


def _sum(values: list[int | None]) -> int | None:
    return None if None in values else sum(value or 0 for value in values)
