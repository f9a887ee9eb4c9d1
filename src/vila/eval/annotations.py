"""The original's question files, and the items made of them.

    {"question_id": 262144000, "image": "COCO_test2015_000000262144.jpg", "text": "...", "category": "default"}

The text holds the whole question with what is asked of the answer's form; the picture's line goes in front of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.core.types import Image, Message
from vila.eval.benchmark import Answer, Item

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What the original's short-answer benchmarks end every question with, on a line of its own."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row. question_id: of the file's own type; image: below the benchmark's folder of pictures."""

    question_id: str | int
    image: str
    text: str
    category: str = ""
    location: str = ""


def read_questions(path: Path) -> list[Question]:
    """All rows. Raises DataError naming file, line and field."""
    out = []
    for number, row in read_jsonl(path):
        location = f"{path} line {number}"
        if not isinstance(row, dict):
            raise DataError(f"{location}: expected a mapping with question_id, image and text, got {str(row)[:60]!r}")
        for field in ("question_id", "image", "text"):
            kinds = (str, int) if field == "question_id" else (str,)
            if not isinstance(row.get(field), kinds) or isinstance(row[field], bool):
                raise DataError(
                    f"{location}: {field} is {row.get(field)!r}; expected {' or '.join(k.__name__ for k in kinds)}"
                )
        out.append(Question(row["question_id"], row["image"], row["text"], str(row.get("category", "")), location))
    if not out:
        raise DataError(f"{path}: holds no question")
    return out


def question_messages(picture: Path, text: str) -> tuple[Message, ...]:
    """The conversation of one question: the picture on a line of its own, then the text."""
    return (Message.of("user", Image(picture), f"\n{text}"),)


def build_items(
    questions: Iterable[Question], pictures: Path, *, truths: Mapping[str, str] | None = None, limit: int = 0
) -> list[Item]:
    """Items whose id is the question's, grouped by picture; truths: by id. Raises DataError for an id given twice."""
    seen: dict[str, str] = {}
    items = []
    for question in questions:
        name = str(question.question_id)
        if name in seen:
            raise DataError(f"{question.location}: question_id {name} is given a second time, first in {seen[name]}")
        seen[name] = question.location
        items.append(
            Item(
                name,
                question_messages(pictures / question.image, question.text),
                (truths or {}).get(name, ""),
                question.image,
                question.category,
                question.question_id,
                question.text,
            )
        )
    return group_items(items, limit)


def group_items(items: Sequence[Item], limit: int = 0) -> list[Item]:
    """Items of one group side by side, groups in order of first appearance; about `limit` of them, 0 for all."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    out: list[Item] = []
    for group in groups.values():
        if limit and len(out) >= limit:
            break
        out.extend(group)
    return out


# --- folders
# Where the files of a benchmark lie: below `playground/data/eval`, or in the benchmark's own folder of it.


EVAL_ZIP_SOURCE = "eval.zip, linked from docs/Evaluation.md of github.com/haotian-liu/LLaVA"
"""What holds the original's question files."""


def find_file(folder: Path, benchmark: str, *places: str, obtain: str = EVAL_ZIP_SOURCE) -> Path:
    """The first of `places`, relative to the benchmark's folder, that exists: a file or a directory.

    folder: `playground/data/eval`, or the benchmark's own folder.
    obtain: where it comes from, for the message.
    Raises DataError naming the file, every path that was looked at, and where it is obtained.
    """
    found = find_optional(folder, benchmark, *places)
    if found is None:
        tried = ", ".join(map(str, dict.fromkeys(_candidates(folder, benchmark, places))))
        raise DataError(f"{benchmark}: {Path(places[0]).name} is missing; looked for {tried}; it comes from {obtain}")
    return found


def find_optional(folder: Path, benchmark: str, *places: str) -> Path | None:
    """Like `find_file`, but None when none of `places` exists."""
    return next((path for path in _candidates(folder, benchmark, places) if path.exists()), None)


def image_folder(folder: Path, benchmark: str, *places: str) -> Path:
    """The first of `places` that exists, or where the first of them belongs: absent pictures are not an error here."""
    home = folder / benchmark
    return find_optional(folder, benchmark, *places) or (home if home.is_dir() else folder) / places[0]


def _candidates(folder: Path, benchmark: str, places: tuple[str, ...]) -> Iterator[Path]:
    for place in places:
        yield folder / benchmark / place
        yield folder / place


# --- fields
# Fields of annotation files that hold another kind of value than they should, in words.


_WORDS = {str: "text", int: "a whole number", list: "a list", dict: "a mapping", type(None): "nothing"}


def field_problem(row: Mapping[str, Any], /, **kinds: type | tuple[type, ...]) -> str:
    """The first of the fields that `row` has with a value of none of its kinds: "image is 5; expected text"; or ""."""
    for name, kind in kinds.items():
        if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool)):
            wanted = kind if isinstance(kind, tuple) else (kind,)
            return f"{name} is {str(row[name])[:60]!r}; expected {' or '.join(_WORDS[each] for each in wanted)}"
    return ""


def are_human_answers(humans: Any) -> bool:
    """Whether the answers of several humans are there: `[{"answer": "net"}, ...]`."""
    return (
        isinstance(humans, list)
        and bool(humans)
        and all(isinstance(human, dict) and isinstance(human.get("answer"), str) for human in humans)
    )


# --- joining
# Answers joined with questions by id, and what was noticed on the way, in words.


@dataclass(frozen=True)
class MatchedAnswers:
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
        return [f"{len(ids)} {what}: {format_ids(ids)}" for ids, what in cases if ids]


def match_answers(benchmark: str, answers: Sequence[Answer], known: Collection[str]) -> MatchedAnswers:
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
        shown = f" (theirs: {format_ids(unknown)}; ours: {format_ids(known)})" if unknown else ""
        raise DataError(f"{benchmark}: none of {len(answers)} answers is to one of its questions{shown}")
    return MatchedAnswers(texts, tuple(key for key in known if key not in texts), tuple(repeated), tuple(unknown))


def check_all_answered(benchmark: str, joined: MatchedAnswers, why: str) -> None:
    """Raise DataError naming the questions without an answer, if there are any."""
    if joined.missing:
        raise DataError(
            f"{benchmark}: {len(joined.missing)} questions without an answer ({format_ids(joined.missing)}); {why}"
        )


def check_prompts(benchmark: str, answers: Sequence[Answer], texts: dict[str, str]) -> None:
    """Raise DataError when not one row repeats the question that its id has here: another benchmark's ids collide.

    texts: the questions by id. Only the first line counts; rows that repeat no question say nothing.
    """
    first = None
    for answer in answers:
        text = texts.get(str(answer.question_id))
        if text is None or not answer.prompt:
            continue
        if prompt_matches(answer, text):
            return
        first = first or (answer, text)
    if first:
        answer, text = first
        raise DataError(
            f"{benchmark}: the rows repeat other questions than this benchmark's: {answer.location or 'a row'} with "
            f"question_id {answer.question_id} has {answer.prompt[:80]!r}, here it is {text[:80]!r}"
        )


def prompt_matches(answer: Answer, text: str) -> bool:
    """Whether a row repeats the question `text`, in any case; only the first line counts."""
    return bool(answer.prompt) and text.strip().split("\n")[0].strip().lower() in answer.prompt.lower()


def format_ids(ids: Iterable[str], most: int = 5) -> str:
    """The first few of many ids."""
    names = list(ids)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- ids
# Answers as the original's dictionaries would find them, and signs that a file belongs to something else.


def drop_mistyped_ids(
    benchmark: str, answers: Sequence[Answer], known: Collection[str | int]
) -> tuple[list[Answer], list[str]]:
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
    shown = format_ids(repr(answer.question_id) for answer in dropped)
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
        check_prompts(benchmark, answers, dict(texts))
    except DataError as error:
        return [str(error)]
    return []
