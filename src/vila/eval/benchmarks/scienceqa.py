"""ScienceQA: school questions with up to five options, half of them with a picture (Lu et al., NeurIPS 2022).

    llava_test_CQM-A.json   what is asked: [{"id": "4", "image": "4/image.png", "conversations": [{"value": ...}, ...]}]
    problems.json           {"4": {"question": ..., "choices": [...], "answer": 1, "image": "image.png", ...}}
    pid_splits.json         {"test": ["4", ...]}

The published figure is the accuracy over the questions with an image, recognised by `<image>` in an answer's prompt. A
question of the split that has no answer is wrong, but counts as one without an image: the original knows no prompt of
it. lmms-eval takes the image questions from its data set, so that an unanswered one stays in the denominator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.core.types import Image, Message
from vila.eval.annotations import as_typed, find, image_folder, join, odd_field, prompt_note, size_note, together
from vila.eval.benchmark import Answer, Item, Mark, Rules, Scored
from vila.eval.metrics.multiple_choice import (
    NOTHING,
    Reading,
    read_llava_scienceqa,
    read_lmms_scienceqa,
    read_vila_scienceqa,
)

LETTER = "Answer with the option's letter from the given choices directly."
"""What the original's multiple-choice benchmarks end every question with, on a line of its own."""

_ASKED = "llava_test_CQM-A.json"
_PROBLEMS = "problems.json"
_SPLITS = "pid_splits.json"
_SCIENCEQA = "github.com/lupantech/ScienceQA, folder data/scienceqa"
_LETTERS = "ABCDE"
_PUBLISHED = 4241

Read = Callable[[str], Reading]


class ScienceQa:
    """The test split, with and without pictures."""

    name = "scienceqa"
    max_new_tokens = 1024

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._problems_path = find(folder, self.name, _PROBLEMS, obtain=_SCIENCEQA)
        self._splits_path = find(folder, self.name, _SPLITS, obtain=_SCIENCEQA)

    def items(self) -> Sequence[Item]:
        """The questions in the order of their file.

        The original gives these pictures to the tower's own processor whatever the model's image mode is: a
        centre crop where the other benchmarks pad.
        """
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        path = find(self._folder, self.name, _ASKED)
        pictures = image_folder(self._folder, self.name, "images/test")
        rows = read_json(path)
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of questions, got {str(rows)[:60]!r}")
        seen: set[str] = set()
        items = []
        for number, row in enumerate(rows, start=1):
            item = _item(f"{path} row {number}", row, pictures, self._problems)
            if item.id in seen:
                raise DataError(f"{path} row {number}: question {item.id} is given a second time")
            seen.add(item.id)
            items.append(item)
        return together(items, self._limit)

    @cached_property
    def _problems(self) -> dict[str, Any]:
        """The problems of the test split by id. Raises DataError naming what is missing."""
        splits, problems = read_json(self._splits_path), read_json(self._problems_path)
        if not isinstance(splits, dict) or not isinstance(splits.get("test"), list) or not isinstance(problems, dict):
            raise DataError(f"{self._splits_path}: holds no split `test`, or {self._problems_path} no problems")
        for number, key in enumerate(splits["test"], start=1):
            if not isinstance(key, str):
                raise DataError(f"{self._splits_path} test {number}: id is {str(key)[:60]!r}; expected text")
            _check(f"{self._problems_path} question {key}", problems.get(key))
        return {key: problems[key] for key in splits["test"]}

    def score(self, answers: Sequence[Answer], rules: Rules = "upstream") -> Scored:
        """Return the accuracy in percent over the questions with an image; marks are theirs.

        upstream:  by VILA's reading, over answered questions; LLaVA's, and all questions, are in the figures.
        lmms-eval: by its own reading, over all image questions of the split; without an answer they are wrong.
        The last of several answers counts. Raises DataError when no answer is to a question of the split.
        """
        problems = self._problems
        if self._limit:
            problems = {item.id: problems[item.id] for item in self._items if item.id in problems}
        kept, notes = as_typed(self.name, answers, problems)
        joined = join(self.name, kept, problems)
        prompts = {str(answer.question_id): answer.prompt for answer in kept}
        is_lmms = rules == "lmms-eval"
        notes += joined.notes(
            "wrong" if is_lmms else "wrong, and counted as questions without a picture, as upstream does"
        )
        notes += [] if self._limit else size_note(self._splits_path.name, len(problems), _PUBLISHED)
        notes += prompt_note(
            self.name, kept, {key: str(problem.get("question", "")) for key, problem in problems.items()}
        )
        if bare := [key for key in joined.texts if not prompts[key]]:
            notes.append(
                f"{len(bare)} answers repeat no prompt, the first to question {bare[0]}; whether they are about a "
                f"picture is taken from {self._problems_path.name}"
            )
        with_image = {
            key
            for key in (problems if is_lmms else joined.texts)
            if "<image>" in prompts.get(key, "") or ((is_lmms or not prompts[key]) and problems[key].get("image"))
        }
        read: Read = read_lmms_scienceqa if is_lmms else read_vila_scienceqa
        marks = [_mark(key, problem, joined.texts.get(key), read) for key, problem in problems.items()]
        shown = [mark for mark in marks if mark.id in with_image]
        by_llava = [
            _mark(key, problem, joined.texts.get(key), read_llava_scienceqa) for key, problem in problems.items()
        ]
        if not shown:
            notes.append(
                "no answer is to a question with a picture: the accuracy over those is not defined, given as 0"
            )
        subjects: dict[str, list[Mark]] = defaultdict(list)
        for mark in shown:
            subjects[mark.kind].append(mark)
        figures: dict[str, Any] = {
            "image_accuracy": _percent(shown),
            "accuracy": _percent(marks),
            "llava_image_accuracy": _percent([mark for mark in by_llava if mark.id in with_image]),
            "llava_accuracy": _percent(by_llava),
            "questions": len(marks),
            "image_questions": len(shown),
            "unread": sum(mark.rule in (NOTHING.rule, "no answer") for mark in marks),
            "by_subject": {kind: _percent(of_kind) for kind, of_kind in sorted(subjects.items())},
        }
        return Scored(figures["image_accuracy"], "%", figures, tuple(shown), tuple(notes))


def _item(where: str, row: Any, pictures: Path, problems: Mapping[str, Any]) -> Item:
    try:
        key, text = row["id"], row["conversations"][0]["value"].replace("<image>", "").strip()
    except (AttributeError, LookupError, TypeError) as error:
        raise DataError(f"{where}: no id or question ({error}); expected id and conversations[0].value") from error
    if odd := odd_field(row, id=(str, int), image=str):
        raise DataError(f"{where}: {odd}")
    asked = f"{text}\n{LETTER}"
    problem = problems.get(key)
    truth = _LETTERS[problem["answer"]] if problem else ""
    kind = str(problem.get("subject", "")) if problem else ""
    if "image" not in row:
        return Item(str(key), (Message.of("user", asked),), truth, str(key), kind, key, asked)
    message = Message.of("user", Image(pictures / row["image"]), f"\n{asked}")
    return Item(str(key), (message,), truth, str(key), kind, key, f"<image>\n{asked}", image_mode="square")


def _check(where: str, problem: Any) -> None:
    if not isinstance(problem, dict):
        raise DataError(f"{where}: the split names it, but it is not there; is it another release? See {_SCIENCEQA}")
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{where}: choices is {choices!r}; expected a list of texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(_LETTERS):
        raise DataError(f"{where}: answer is {answer!r}; expected the number of a choice, from 0")


def _mark(key: str, problem: Mapping[str, Any], text: str | None, read: Read) -> Mark:
    letter, rule = NOTHING if text is None else read(text)
    if text is None:
        rule = "no answer"
    elif letter and letter not in _LETTERS[: len(problem["choices"])]:
        letter, rule = "", f"{rule}, but there is no option {letter}"
    truth = _LETTERS[problem["answer"]]
    return Mark(key, float(letter == truth), key, str(problem.get("subject", "")), text or "", truth, rule)


def _percent(marks: Sequence[Mark]) -> float:
    return 100 * sum(mark.value for mark in marks) / len(marks) if marks else 0.0
