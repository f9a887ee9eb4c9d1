"""Question files of the original scripts, the location of benchmark files, and matching of answers to questions.

A line of a question file:

    {"question_id": 262144000, "image": "COCO_test2015_000000262144.jpg", "text": "...", "category": "default"}

`text` is the question with the answer-format instruction; the prompt has the image on a line before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import MISSING, DataError
from vila.core.reading import read_jsonl
from vila.core.types import Image, Message
from vila.eval.benchmark import Answer, Item

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""Instruction at the end of every short-answer question, on its own line."""


@dataclass(frozen=True, slots=True)
class Question:
    """Record of a question file. image: path below the benchmark's image folder. file, record: for error messages."""

    question_id: str | int
    image: str
    text: str
    category: str = ""
    file: Path | None = None
    record: str = ""


def read_questions(path: Path) -> list[Question]:
    """Read all questions. Raises DataError naming file, line and field."""
    questions = []
    for number, row in read_jsonl(path):
        record = f"line {number}"
        check_fields(row, path, record, question_id=(str, int), image=str, text=str)
        questions.append(
            Question(row["question_id"], row["image"], row["text"], str(row.get("category", "")), path, record)
        )
    if not questions:
        raise DataError("has no questions", file=path)
    return questions


def question_messages(image: Path, text: str) -> tuple[Message, ...]:
    """Return the conversation of a question: the image on a line of its own, then the text."""
    return (Message.of("user", Image(image), f"\n{text}"),)


def build_items(
    questions: Iterable[Question], images: Path, *, truths: Mapping[str, str] | None = None, limit: int = 0
) -> list[Item]:
    """Build items grouped by image; their id is the question's. Raises DataError for repeated ids.

    truths: reference answers by id. limit: see `group_items`.
    """
    seen: set[str] = set()
    items = []
    for question in questions:
        name = str(question.question_id)
        if name in seen:
            raise DataError(
                "repeated", file=question.file, record=question.record, field="question_id", value=question.question_id
            )
        seen.add(name)
        items.append(
            Item(
                name,
                question_messages(images / question.image, question.text),
                (truths or {}).get(name, ""),
                question.image,
                question.category,
                question.question_id,
                question.text,
            )
        )
    return group_items(items, limit)


def group_items(items: Sequence[Item], limit: int = 0) -> list[Item]:
    """Make the items of each group adjacent, groups in order of first appearance. Groups are not split by `limit`."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    grouped: list[Item] = []
    for group in groups.values():
        if limit and len(grouped) >= limit:
            break
        grouped.extend(group)
    return grouped


EVAL_ZIP_SOURCE = "eval.zip, linked from docs/Evaluation.md of github.com/haotian-liu/LLaVA"
"""Archive with the question files of the original scripts."""


def find_file(folder: Path, benchmark: str, *names: str, source: str = EVAL_ZIP_SOURCE) -> Path:
    """Return the first file or directory of `names` that exists.

    folder: `playground/data/eval`, or the benchmark's own directory in it.
    source: where to download it, for the error.
    Raises DataError naming the file, every path that was tried, and the source.
    """
    found = find_optional(folder, benchmark, *names)
    if found is None:
        tried = ", ".join(map(str, dict.fromkeys(_candidates(folder, benchmark, names))))
        raise DataError(
            f"{Path(names[0]).name} is missing (tried {tried})", field=benchmark, hint=f"download it: {source}"
        )
    return found


def find_optional(folder: Path, benchmark: str, *names: str) -> Path | None:
    """Like `find_file`, but return None if none of `names` exists."""
    return next((path for path in _candidates(folder, benchmark, names) if path.exists()), None)


def image_folder(folder: Path, benchmark: str, *names: str) -> Path:
    """Return the first of `names` that exists, or the expected path of the first; missing images fail later."""
    own = folder / benchmark
    return find_optional(folder, benchmark, *names) or (own if own.is_dir() else folder) / names[0]


def _candidates(folder: Path, benchmark: str, names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        yield folder / benchmark / name
        yield folder / name


class OPTIONAL:
    """Marks a field in `check_fields` as optional."""


_TYPE_NAMES = {
    str: "text",
    int: "an integer",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def check_fields(
    row: Any, file: Path, record: str, /, *, hint: str | None = None, **types: type | tuple[type, ...]
) -> None:
    """Raise DataError unless `row` is an object that has the given fields with values of their types.

    A field may be absent if `OPTIONAL` is one of its types.
    """
    if not isinstance(row, dict):
        raise DataError(file=file, record=record, value=row, expected=f"an object with {', '.join(types)}", hint=hint)
    for name, kind in types.items():
        accepted = kind if isinstance(kind, tuple) else (kind,)
        value = row.get(name, MISSING)
        if value is MISSING:
            if OPTIONAL not in accepted:
                raise DataError("missing", file=file, record=record, field=name, hint=hint)
        elif not isinstance(value, accepted) or (isinstance(value, bool) and not {bool, object} & set(accepted)):
            expected = " or ".join(_TYPE_NAMES[each] for each in accepted if each in _TYPE_NAMES)
            raise DataError(file=file, record=record, field=name, value=value, expected=expected, hint=hint)


HUMAN_ANSWERS = 'a list such as [{"answer": "net"}, ...]'


def are_human_answers(value: Any) -> bool:
    """Return whether a value has the form `[{"answer": "net"}, ...]`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(human, dict) and isinstance(human.get("answer"), str) for human in value)
    )


@dataclass(frozen=True)
class MatchedAnswers:
    """The last answer to each known question.

    texts:    by question id.
    missing:  ids of questions without an answer, in order.
    repeated: ids of questions with several answers. unknown: ids of answers to no known question.
    """

    texts: dict[str, str]
    missing: tuple[str, ...]
    repeated: tuple[str, ...]
    unknown: tuple[str, ...]

    def notes(self, missing: str = "") -> list[str]:
        """Return a note per irregularity. missing: how missing answers are scored; "": do not mention them."""
        cases = [
            (self.missing if missing else (), f"questions without an answer, {missing}"),
            (self.repeated, "questions with several answers, the last one counts"),
            (self.unknown, "answers to unknown questions, ignored"),
        ]
        return [f"{len(ids)} {what}: {format_ids(ids)}" for ids, what in cases if ids]


def match_answers(benchmark: str, answers: Sequence[Answer], known: Collection[str]) -> MatchedAnswers:
    """Match answers to questions by question_id as text. Raises DataError if no answer matches."""
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
        ids = f" (ids of the answers: {format_ids(unknown)}; of the questions: {format_ids(known)})" if unknown else ""
        raise DataError(f"none of {len(answers)} answers belongs to one of its questions{ids}", field=benchmark)
    return MatchedAnswers(texts, tuple(key for key in known if key not in texts), tuple(repeated), tuple(unknown))


def check_all_answered(benchmark: str, matched: MatchedAnswers, reason: str) -> None:
    """Raise DataError naming the questions without an answer."""
    if matched.missing:
        raise DataError(
            f"{len(matched.missing)} questions without an answer ({format_ids(matched.missing)}); {reason}",
            field=benchmark,
        )


def check_prompts(benchmark: str, answers: Sequence[Answer], texts: Mapping[str, str]) -> None:
    """Raise DataError if no answer repeats the question of its id: the file may be that of another benchmark.

    texts: questions by id; only their first line is compared. Answers without a prompt are ignored.
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
            f"the prompts are not those of this benchmark: question_id {answer.question_id} has {answer.prompt[:80]!r} "
            f"instead of {text[:80]!r}",
            file=answer.location or None,
            field=benchmark,
        )


def prompt_matches(answer: Answer, text: str) -> bool:
    """Return whether the prompt of an answer contains the first line of `text`, ignoring case."""
    return bool(answer.prompt) and text.strip().split("\n")[0].strip().lower() in answer.prompt.lower()


def prompt_note(benchmark: str, answers: Sequence[Answer], texts: Mapping[str, str]) -> list[str]:
    """Return the problem that `check_prompts` finds as a note."""
    try:
        check_prompts(benchmark, answers, texts)
    except DataError as error:
        return [str(error)]
    return []


def format_ids(ids: Iterable[str], max_ids: int = 5) -> str:
    """Return the first ids and the number of the others."""
    names = list(ids)
    return ", ".join(names[:max_ids]) + (f" and {len(names) - max_ids} more" if len(names) > max_ids else "")


def drop_mistyped_ids(
    benchmark: str, answers: Sequence[Answer], known: Collection[str | int]
) -> tuple[list[Answer], list[str]]:
    """Drop answers whose question_id is a number where the question's is text, or vice versa; also return notes.

    The original scripts look ids up unconverted: 7 and "7" are two questions, and the second has no answer.
    Raises DataError if all answers are of this kind.
    """
    wanted = set(known)
    as_text = {str(name) for name in wanted}
    kept: list[Answer] = []
    dropped: list[Answer] = []
    for answer in answers:
        is_found = answer.question_id in wanted or str(answer.question_id) not in as_text
        (kept if is_found else dropped).append(answer)
    if not dropped:
        return kept, []
    shown = format_ids(repr(answer.question_id) for answer in dropped)
    expected = "text" if isinstance(dropped[0].question_id, int) else "numbers"
    problem = f"{len(dropped)} answers whose question_id has the wrong type (expected {expected}): {shown}"
    if not kept:
        raise DataError(f"all {problem}; the original scripts would find none of them", field=benchmark)
    return kept, [f"{problem}; ignored, as in the original scripts"]


def size_note(name: str, count: int, published: int, unit: str = "questions") -> list[str]:
    """Return a note if the number of questions in a file differs from the published number."""
    return [] if count == published else [f"{name} has {count:,} {unit}, the published file {published:,}"]
