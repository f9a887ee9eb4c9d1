"""Question files of the original scripts, and `AnnotatedBenchmark`: location of files, matching of answers.

A line of a question file:

    {"question_id": 262144000, "image": "COCO_test2015_000000262144.jpg", "text": "...", "category": "default"}

`text` is the question with the answer-format instruction; the prompt has the image on a line before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vila.core.errors import MISSING, DataError
from vila.core.reading import read_jsonl
from vila.core.types import Image, Message
from vila.eval.benchmark import Answer, Benchmark, Item

T = TypeVar("T")

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


def check_human_answers(row: Any, file: Path, record: str) -> None:
    """Raise DataError unless the field `answers` has the form `[{"answer": "net"}, ...]`."""
    value = row["answers"]
    is_list = isinstance(value, list) and value
    if not is_list or not all(isinstance(human, dict) and isinstance(human.get("answer"), str) for human in value):
        expected = 'a list such as [{"answer": "net"}, ...]'
        raise DataError(file=file, record=record, field="answers", value=value, expected=expected)


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
        return count_notes(
            (self.missing if missing else (), f"questions without an answer, {missing}"),
            (self.repeated, "questions with several answers, the last one counts"),
            (self.unknown, "answers to unknown questions, ignored"),
        )


def prompt_matches(answer: Answer, text: str) -> bool:
    """Return whether the prompt of an answer contains the first line of `text`, ignoring case."""
    return bool(answer.prompt) and text.strip().split("\n")[0].strip().lower() in answer.prompt.lower()


def format_ids(ids: Iterable[str]) -> str:
    """Return the first five ids and the number of the others."""
    names = list(ids)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def count_notes(*cases: tuple[Sequence[str], str]) -> list[str]:
    """Return `NUMBER WHAT: IDS` for each pair of ids and what they are, if there are ids."""
    return [f"{len(ids)} {what}: {format_ids(ids)}" for ids, what in cases if ids]


def submit_hint(server: str) -> str:
    """Return the hint of errors about answers that only a server can score."""
    return f"write the file with `vila submit` and upload it to {server}"


class AnnotatedBenchmark(Benchmark):
    """Base class of benchmarks with questions and references in files of the original scripts.

    directories: of its files below `playground/data/eval`; empty: the name.
    server:      where test answers are uploaded; "": nowhere.
    """

    directories: tuple[str, ...] = ()
    server: str = ""

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit

    def find_file(self, *names: str, source: str = "") -> Path:
        """Return the first file or directory of `names` that exists.

        source: where to download it, for the error; "": the archive with the question files of the original scripts.
        Raises DataError naming the file, every path that was tried, and the source.
        """
        found = self.find_optional(*names)
        if found is None:
            tried = ", ".join(map(str, dict.fromkeys(self._candidates(names))))
            source = source or "eval.zip, linked from docs/Evaluation.md of github.com/haotian-liu/LLaVA"
            raise DataError(
                f"{Path(names[0]).name} is missing (tried {tried})",
                field=self._directories()[-1],
                hint=f"download it: {source}",
            )
        return found

    def find_optional(self, *names: str) -> Path | None:
        """Like `find_file`, but return None if none of `names` exists."""
        return next((path for path in self._candidates(names) if path.exists()), None)

    def image_folder(self, *names: str) -> Path:
        """Return the first of `names` that exists, or the expected path of the first; missing images fail later."""
        own = self._folder / self._directories()[0]
        return self.find_optional(*names) or (own if own.is_dir() else self._folder) / names[0]

    def _candidates(self, names: Sequence[str]) -> Iterator[Path]:
        for name in names:
            yield from (self._folder / directory / name for directory in self._directories())
            yield self._folder / name

    def _directories(self) -> tuple[str, ...]:
        return self.directories or (self.name,)

    def within_limit(self, known: Mapping[str, T]) -> Mapping[str, T]:
        """Return those of `known`, values by item id, that are among the questions of this run."""
        return {item.id: known[item.id] for item in self.items() if item.id in known} if self._limit else known

    def size_note(self, name: str, count: int, published: int, unit: str = "questions") -> list[str]:
        """Return a note if the number of questions in a file differs from the published number."""
        is_expected = self._limit or count == published
        return [] if is_expected else [f"{name} has {count:,} {unit}, the published file {published:,}"]

    def server_only(self, splits: str, problem: str) -> DataError:
        """Return the error for answers to `splits`, which only the server can score."""
        return DataError(
            f"only the server can score {splits}: {problem}", field=self.name, hint=submit_hint(self.server)
        )

    def match(self, answers: Sequence[Answer], known: Collection[str]) -> MatchedAnswers:
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
            ids = f"ids of the answers: {format_ids(unknown)}; of the questions: {format_ids(known)}"
            raise DataError(
                f"none of {len(answers)} answers belongs to one of its questions{f' ({ids})' if unknown else ''}",
                field=self.name,
            )
        return MatchedAnswers(texts, tuple(key for key in known if key not in texts), tuple(repeated), tuple(unknown))

    def check_all_answered(self, matched: MatchedAnswers, reason: str) -> None:
        """Raise DataError naming the questions without an answer."""
        if matched.missing:
            raise DataError(
                f"{len(matched.missing)} questions without an answer ({format_ids(matched.missing)}); {reason}",
                field=self.name,
            )

    def check_prompts(self, answers: Sequence[Answer], texts: Mapping[str, str]) -> None:
        """Raise DataError if no answer repeats the question of its id: the file may be that of another benchmark.

        texts: questions by id; only their first line is compared. Answers without a prompt are ignored.
        """
        asked = [
            (answer, texts[key]) for answer in answers if answer.prompt and (key := str(answer.question_id)) in texts
        ]
        if asked and not any(prompt_matches(answer, text) for answer, text in asked):
            answer, text = asked[0]
            raise DataError(
                f"the prompts are not those of this benchmark: question_id {answer.question_id} has "
                f"{answer.prompt[:80]!r} instead of {text[:80]!r}",
                file=answer.location or None,
                field=self.name,
            )

    def prompt_note(self, answers: Sequence[Answer], texts: Mapping[str, str]) -> list[str]:
        """Return the problem that `check_prompts` finds as a note."""
        try:
            self.check_prompts(answers, texts)
        except DataError as error:
            return [str(error)]
        return []

    def drop_mistyped_ids(
        self, answers: Sequence[Answer], known: Collection[str | int]
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
            raise DataError(f"all {problem}; the original scripts would find none of them", field=self.name)
        return kept, [f"{problem}; ignored, as in the original scripts"]
