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
from vila.eval.annotations import (
    drop_mistyped_ids,
    field_problem,
    find_file,
    group_items,
    image_folder,
    match_answers,
    prompt_note,
    size_note,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol
from vila.eval.metrics.multiple_choice import (
    NO_CHOICE,
    ParsedChoice,
    parse_scienceqa_llava,
    parse_scienceqa_lmms,
    parse_scienceqa_vila,
)

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""What the original's multiple-choice benchmarks end every question with, on a line of its own."""

_ASKED = "llava_test_CQM-A.json"
_PROBLEMS = "problems.json"
_SPLITS = "pid_splits.json"
_SCIENCEQA = "github.com/lupantech/ScienceQA, folder data/scienceqa"
_LETTERS = "ABCDE"
_PUBLISHED = 4241

Read = Callable[[str], ParsedChoice]


class ScienceQa:
    """The test split, with and without pictures."""

    name = "scienceqa"
    max_new_tokens = 1024

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._problems_path = find_file(folder, self.name, _PROBLEMS, obtain=_SCIENCEQA)
        self._splits_path = find_file(folder, self.name, _SPLITS, obtain=_SCIENCEQA)

    def items(self) -> Sequence[Item]:
        """The questions in the order of their file.

        The original gives these pictures to the tower's own processor whatever the model's image mode is: a
        centre crop where the other benchmarks pad.
        """
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        path = find_file(self._folder, self.name, _ASKED)
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
        return group_items(items, self._limit)

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

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the accuracy in percent over the questions with an image; marks are theirs.

        upstream:  by VILA's reading, over answered questions; LLaVA's, and all questions, are in the figures.
        lmms-eval: by its own reading, over all image questions of the split; without an answer they are wrong.
        The last of several answers counts. Raises DataError when no answer is to a question of the split.
        """
        problems = self._problems
        if self._limit:
            problems = {item.id: problems[item.id] for item in self._items if item.id in problems}
        kept, notes = drop_mistyped_ids(self.name, answers, problems)
        joined = match_answers(self.name, kept, problems)
        prompts = {str(answer.question_id): answer.prompt for answer in kept}
        is_lmms = protocol == "lmms-eval"
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
        read: Read = parse_scienceqa_lmms if is_lmms else parse_scienceqa_vila
        question_scores = [_mark(key, problem, joined.texts.get(key), read) for key, problem in problems.items()]
        shown = [scored for scored in question_scores if scored.id in with_image]
        by_llava = [
            _mark(key, problem, joined.texts.get(key), parse_scienceqa_llava) for key, problem in problems.items()
        ]
        if not shown:
            notes.append(
                "no answer is to a question with a picture: the accuracy over those is not defined, given as 0"
            )
        subjects: dict[str, list[QuestionScore]] = defaultdict(list)
        for scored in shown:
            subjects[scored.category].append(scored)
        metrics: dict[str, Any] = {
            "image_accuracy": _percent(shown),
            "accuracy": _percent(question_scores),
            "llava_image_accuracy": _percent([scored for scored in by_llava if scored.id in with_image]),
            "llava_accuracy": _percent(by_llava),
            "questions": len(question_scores),
            "image_questions": len(shown),
            "unread": sum(scored.rule in (NO_CHOICE.rule, "no answer") for scored in question_scores),
            "by_subject": {category: _percent(of_kind) for category, of_kind in sorted(subjects.items())},
        }
        return BenchmarkResult(metrics["image_accuracy"], "%", metrics, tuple(shown), tuple(notes))


def _item(location: str, row: Any, pictures: Path, problems: Mapping[str, Any]) -> Item:
    try:
        key, text = row["id"], row["conversations"][0]["value"].replace("<image>", "").strip()
    except (AttributeError, LookupError, TypeError) as error:
        raise DataError(f"{location}: no id or question ({error}); expected id and conversations[0].value") from error
    if odd := field_problem(row, id=(str, int), image=str):
        raise DataError(f"{location}: {odd}")
    asked = f"{text}\n{LETTER_INSTRUCTION}"
    problem = problems.get(key)
    truth = _LETTERS[problem["answer"]] if problem else ""
    category = str(problem.get("subject", "")) if problem else ""
    if "image" not in row:
        return Item(str(key), (Message.of("user", asked),), truth, str(key), category, key, asked)
    message = Message.of("user", Image(pictures / row["image"]), f"\n{asked}")
    return Item(str(key), (message,), truth, str(key), category, key, f"<image>\n{asked}", image_mode="square")


def _check(location: str, problem: Any) -> None:
    if not isinstance(problem, dict):
        raise DataError(f"{location}: the split names it, but it is not there; is it another release? See {_SCIENCEQA}")
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{location}: choices is {choices!r}; expected a list of texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(_LETTERS):
        raise DataError(f"{location}: answer is {answer!r}; expected the number of a choice, from 0")


def _mark(key: str, problem: Mapping[str, Any], text: str | None, read: Read) -> QuestionScore:
    letter, rule = NO_CHOICE if text is None else read(text)
    if text is None:
        rule = "no answer"
    elif letter and letter not in _LETTERS[: len(problem["choices"])]:
        letter, rule = "", f"{rule}, but there is no option {letter}"
    truth = _LETTERS[problem["answer"]]
    return QuestionScore(key, float(letter == truth), key, str(problem.get("subject", "")), text or "", truth, rule)


def _percent(question_scores: Sequence[QuestionScore]) -> float:
    return 100 * sum(scored.value for scored in question_scores) / len(question_scores) if question_scores else 0.0
