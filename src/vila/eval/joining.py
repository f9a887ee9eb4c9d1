"""Answers joined with questions by id, and what was noticed on the way, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from vila.core.errors import DataError
from vila.eval.benchmark import Answer


@dataclass(frozen=True)
class Joined:
    """The last answer to each known question.

    texts:    by question, as given; questions without an answer are not in it.
    missing:  known questions without an answer, in their order.
    repeated: known questions that were answered several times. unknown: ids of rows about no known question.
    """

    texts: dict[str, str]
    missing: tuple[str, ...]
    repeated: tuple[str, ...]
    unknown: tuple[str, ...]

    def notes(self, missing: str = "") -> list[str]:
        """A line for each thing noticed. missing: what became of questions without an answer; "" leaves them out."""
        cases = [
            (self.missing if missing else (), f"questions without an answer, {missing}"),
            (self.repeated, "questions answered more than once, the last answer counts"),
            (self.unknown, "answers to questions that are not asked, left out"),
        ]
        return [f"{len(ids)} {what}: {naming(ids)}" for ids, what in cases if ids]


def join(benchmark: str, answers: Sequence[Answer], known: Collection[str]) -> Joined:
    """Join by question_id, whose type does not matter. Raises DataError when no answer belongs to a known question."""
    wanted = known if isinstance(known, set | frozenset | dict) else set(known)
    texts: dict[str, str] = {}
    repeated: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for answer in answers:
        key = str(answer.question_id)
        if key not in wanted:
            unknown[key] = None
            continue
        if key in texts:
            repeated[key] = None
        texts[key] = answer.text
    if not texts:
        shown = f" (theirs: {naming(unknown)}; ours: {naming(known)})" if unknown else ""
        raise DataError(f"{benchmark}: none of {len(answers)} answers is to one of its questions{shown}")
    return Joined(texts, tuple(key for key in known if key not in texts), tuple(repeated), tuple(unknown))


def refuse_missing(benchmark: str, joined: Joined, why: str) -> None:
    """Raise DataError naming the questions without an answer, if there are any."""
    if joined.missing:
        raise DataError(
            f"{benchmark}: {len(joined.missing)} questions without an answer ({naming(joined.missing)}); {why}"
        )


def refuse_other_questions(benchmark: str, answers: Sequence[Answer], texts: dict[str, str]) -> None:
    """Raise DataError when not one row repeats the question that its id has here: another benchmark's ids collide.

    texts: the questions by id. Only the first line counts; rows that repeat no question say nothing.
    """
    first = None
    for answer in answers:
        text = texts.get(str(answer.question_id))
        if text is None or not answer.prompt:
            continue
        if repeats(answer, text):
            return
        first = first or (answer, text)
    if first:
        answer, text = first
        raise DataError(
            f"{benchmark}: the rows repeat other questions than this benchmark's: {answer.where or 'a row'} with "
            f"question_id {answer.question_id} has {answer.prompt[:80]!r}, here it is {text[:80]!r}"
        )


def repeats(answer: Answer, text: str) -> bool:
    """Whether a row repeats the question `text`, in any case; only the first line counts."""
    return bool(answer.prompt) and text.strip().split("\n")[0].strip().lower() in answer.prompt.lower()


def naming(ids: Iterable[str], most: int = 5) -> str:
    """The first few of many ids."""
    names = list(ids)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
