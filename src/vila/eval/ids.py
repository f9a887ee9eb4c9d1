"""Answers as the original's dictionaries would find them, and signs that a file belongs to something else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vila.core.errors import DataError
from vila.eval.benchmark import Answer
from vila.eval.joining import naming, refuse_other_questions


def as_typed(benchmark: str, answers: Sequence[Answer], known: Collection[str | int]) -> tuple[list[Answer], list[str]]:
    """Without rows whose question_id is a number where the questions' are text, or the other way; and notes on them.

    The original looks ids up as they are: to it 7 and "7" are two questions, and the second has no answer.
    Raises DataError when all rows are so: they are another benchmark's, or another program's.
    """
    wanted = set(known)
    other = {str(name) for name in wanted}
    kept: list[Answer] = []
    dropped: list[Answer] = []
    for answer in answers:
        right = answer.question_id in wanted or str(answer.question_id) not in other
        (kept if right else dropped).append(answer)
    if not dropped:
        return kept, []
    shown = naming(repr(answer.question_id) for answer in dropped)
    what = "text" if isinstance(dropped[0].question_id, int) else "numbers"
    problem = f"{len(dropped)} rows whose question_id is not of the questions' type, which are {what}: {shown}"
    if not kept:
        raise DataError(f"{benchmark}: all {problem}; the original would find none of them")
    return kept, [f"{problem}; left out, the original does not find them"]


def size_note(what: str, count: int, published: int, unit: str = "questions") -> list[str]:
    """A note when a file does not hold as many questions as the published one."""
    return [] if count == published else [f"{what} holds {count:,} {unit}, the published one {published:,}"]


def prompt_note(benchmark: str, answers: Sequence[Answer], texts: Mapping[str, str]) -> list[str]:
    """A note when not one row repeats the question that its id has. texts: the questions by id."""
    try:
        refuse_other_questions(benchmark, answers, dict(texts))
    except DataError as error:
        return [str(error)]
    return []
