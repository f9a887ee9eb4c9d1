"""How long a benchmark took and how many tokens that were, over all sessions and processes.

BENCHMARK/speed-RANK.json   of a process in the session that goes on
BENCHMARK/speed.json        {"seconds": ..., "answered": ..., "prompt_tokens": ..., "tokens": ...}   tokens: of answers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila.core.files import write_json
from vila.core.reading import read_json
from vila.eval.asking import Tokens

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
    parts = [read_json(path) for path in sorted(out.glob(_PARTS))]
    forget_parts(out)
    answered = sum(part["answered"] for part in parts)
    if answered:
        path = out / "speed.json"
        before = read_json(path) if path.is_file() else {"seconds": 0.0, "answered": 0, **_NONE}
        counted = {name: _sum([before.get(name), *(part[name] for part in parts)]) for name in _NONE}
        write_json(path, {"seconds": before["seconds"] + seconds, "answered": before["answered"] + answered, **counted})
    return answered


def _sum(values: list[int | None]) -> int | None:
    return None if None in values else sum(value or 0 for value in values)
