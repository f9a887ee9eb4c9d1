"""Parameters of the chat protocol that this server does not have: which may be ignored, and which are refused.

What would change the answer is refused, unless it has the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "service_tier",
        "prediction",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""They are for the bookkeeping of whoever serves, or make an answer faster at most."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "add_generation_prompt": (True,),
}
"""Values, besides null, with which a parameter says what is done anyway."""


IGNORED_IN_MESSAGES = frozenset({"name", "reasoning_content", "reasoning"})
"""No template has a place for them: the speaker's name, and what a model thought before an earlier answer."""
MAX_NAMES = 20
"""Names that are examined for a message; any more are counted."""
_LONGEST_NAME = 60


def problems(extra: Mapping[str, Any], known: list[str]) -> Iterator[str]:
    """What is wrong with the parameters of a request that its schema does not have; `known` are those it has."""
    wrong = [
        name
        for name, value in extra.items()
        if name not in IGNORED and not (name in NEUTRAL and (value is None or value in NEUTRAL[name]))
    ]
    for name in wrong[:MAX_NAMES]:
        if name in NEUTRAL:
            yield f"{name}: is not supported here, and would change the answer; leave it out"
            continue
        near = get_close_matches(name, known, n=1) if len(name) <= _LONGEST_NAME else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield f"{_short(name)}: unknown parameter{hint}"
    yield from _rest(wrong)


def message_problems(extra: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the further fields of a message. Those of an earlier answer, sent back, are empty."""
    wrong = [
        name
        for name, value in extra.items()
        if not (name in IGNORED_IN_MESSAGES and isinstance(value, str)) and value not in (None, [], "", {})
    ]
    for name in wrong[:MAX_NAMES]:
        yield f"{_short(name)}: is not supported in a message; leave it out"
    yield from _rest(wrong)


def _rest(wrong: list[str]) -> Iterator[str]:
    if len(wrong) > MAX_NAMES:
        yield f"and {len(wrong) - MAX_NAMES:,} more"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
