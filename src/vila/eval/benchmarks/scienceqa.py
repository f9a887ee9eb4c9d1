"""ScienceQA: school questions with up to five options, half of them with an image (Lu et al., NeurIPS 2022).

    llava_test_CQM-A.json   questions: [{"id": "4", "image": "4/image.png", "conversations": [{"value": ...}, ...]}]
    problems.json           {"4": {"question": ..., "choices": [...], "answer": 1, "image": "image.png", ...}}
    pid_splits.json         {"test": ["4", ...]}

The published metric is the accuracy over questions with an image. The original script recognises these by `<image>` in
the prompt of an answer, so that a question without an answer counts as one without an image. lmms-eval takes them from
its data set: there an unanswered image question is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.core.types import Image, Message
from vila.eval.annotations import OPTIONAL, AnnotatedBenchmark, check_fields, group_items
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, percent, percent_by
from vila.eval.metrics.multiple_choice import (
    NO_CHOICE,
    ParsedChoice,
    parse_scienceqa_llava,
    parse_scienceqa_lmms,
    parse_scienceqa_vila,
)

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""Instruction at the end of every multiple-choice question, on its own line."""

_QUESTIONS = "llava_test_CQM-A.json"
_PROBLEMS = "problems.json"
_SPLITS = "pid_splits.json"
_SCIENCEQA = "github.com/lupantech/ScienceQA, folder data/scienceqa"
_HINT = f"is it the file of another release? Download it from {_SCIENCEQA}"
_LETTERS = "ABCDE"
_PUBLISHED = 4241

Parser = Callable[[str], ParsedChoice]


class ScienceQa(AnnotatedBenchmark):
    """ScienceQA test split: multiple-choice accuracy on questions with an image (SQA-I)."""

    name = "scienceqa"
    max_new_tokens = 1024

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._problems_path = self.find_file(_PROBLEMS, source=_SCIENCEQA)
        self._splits_path = self.find_file(_SPLITS, source=_SCIENCEQA)

    def load_items(self) -> list[Item]:
        """Return the questions in the order of their file.

        Images are centre-cropped whatever the model's image mode is: the original script gives them to the image
        processor of the vision tower.
        """
        path, images = self.find_file(_QUESTIONS), self.image_folder("images/test")
        rows = read_json(path)
        if not isinstance(rows, list):
            raise DataError(file=path, value=rows, expected="a list of questions")
        seen: set[str] = set()
        items = []
        for number, row in enumerate(rows, start=1):
            item = _item(path, f"row {number}", row, images, self._problems)
            if item.id in seen:
                raise DataError("repeated", file=path, record=f"row {number}", field="id", value=item.id)
            seen.add(item.id)
            items.append(item)
        return group_items(items, self._limit)

    @cached_property
    def _problems(self) -> dict[str, Any]:
        """Problems of the test split by id."""
        splits, problems = read_json(self._splits_path), read_json(self._problems_path)
        if not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
            raise DataError("missing", file=self._splits_path, field="test", hint=_HINT)
        if not isinstance(problems, dict):
            raise DataError(file=self._problems_path, value=problems, expected="problems by id", hint=_HINT)
        for number, key in enumerate(splits["test"], start=1):
            if not isinstance(key, str):
                raise DataError(file=self._splits_path, record=f"test {number}", value=key, expected="text")
            _check(self._problems_path, f"question {key}", problems.get(key))
        return {key: problems[key] for key in splits["test"]}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the accuracy in percent over the questions with an image; the question scores are theirs.

        upstream:  with VILA's parser, over answered questions; the metrics have LLaVA's parser and all questions.
        lmms-eval: with its own parser, over all image questions of the split; without an answer they are wrong.
        The last of several answers counts. Raises DataError if no answer is to a question of the split.
        """
        problems = self.within_limit(self._problems)
        kept, notes = self.drop_mistyped_ids(answers, problems)
        matched = self.match(kept, problems)
        prompts = {str(answer.question_id): answer.prompt for answer in kept}
        is_lmms = protocol == "lmms-eval"
        notes += matched.notes(
            "wrong" if is_lmms else "wrong, and counted as questions without an image, as in the original script"
        )
        notes += self.size_note(self._splits_path.name, len(problems), _PUBLISHED)
        notes += self.prompt_note(kept, {key: str(row.get("question", "")) for key, row in problems.items()})
        if bare := [key for key in matched.texts if not prompts[key]]:
            notes.append(
                f"{len(bare)} answers have no prompt (first question: {bare[0]}); whether they have an image is taken "
                f"from {self._problems_path.name}"
            )
        with_image = {
            key
            for key in (problems if is_lmms else matched.texts)
            if "<image>" in prompts.get(key, "") or ((is_lmms or not prompts[key]) and problems[key].get("image"))
        }
        parse: Parser = parse_scienceqa_lmms if is_lmms else parse_scienceqa_vila
        scores = [_score_question(key, problem, matched.texts.get(key), parse) for key, problem in problems.items()]
        shown = [score for score in scores if score.id in with_image]
        by_llava = [
            _score_question(key, problem, matched.texts.get(key), parse_scienceqa_llava)
            for key, problem in problems.items()
        ]
        if not shown:
            notes.append("no answers to questions with an image: their accuracy is undefined and reported as 0")
        metrics: dict[str, Any] = {
            "image_accuracy": percent(score.value for score in shown),
            "accuracy": percent(score.value for score in scores),
            "llava_image_accuracy": percent(score.value for score in by_llava if score.id in with_image),
            "llava_accuracy": percent(score.value for score in by_llava),
            "questions": len(scores),
            "image_questions": len(shown),
            "unread": sum(score.rule in (NO_CHOICE.rule, "no answer") for score in scores),
            "by_subject": percent_by((score.category, score.value) for score in shown),
        }
        return BenchmarkResult(metrics["image_accuracy"], "%", metrics, tuple(shown), tuple(notes))


def _item(path: Path, record: str, row: Any, images: Path, problems: Mapping[str, Any]) -> Item:
    try:
        key, text = row["id"], row["conversations"][0]["value"].replace("<image>", "").strip()
    except (AttributeError, LookupError, TypeError) as error:
        raise DataError(
            f"no id or question ({error})", file=path, record=record, expected="id and conversations[0].value"
        ) from error
    check_fields(row, path, record, id=(str, int), image=(str, OPTIONAL))
    prompt = f"{text}\n{LETTER_INSTRUCTION}"
    problem = problems.get(key)
    truth = _LETTERS[problem["answer"]] if problem else ""
    category = str(problem.get("subject", "")) if problem else ""
    if "image" not in row:
        return Item(str(key), (Message.of("user", prompt),), truth, str(key), category, key, prompt)
    message = Message.of("user", Image(images / row["image"]), f"\n{prompt}")
    return Item(str(key), (message,), truth, str(key), category, key, f"<image>\n{prompt}", image_mode="square")


def _check(path: Path, record: str, problem: Any) -> None:
    if not isinstance(problem, dict):
        raise DataError("missing, but in the split", file=path, record=record, hint=_HINT)
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not choices:
        raise DataError(file=path, record=record, field="choices", value=choices, expected="a list of texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(_LETTERS):
        raise DataError(file=path, record=record, field="answer", value=answer, expected="index of a choice, from 0")


def _score_question(key: str, problem: Mapping[str, Any], text: str | None, parse: Parser) -> QuestionScore:
    letter, rule = NO_CHOICE if text is None else parse(text)
    if text is None:
        rule = "no answer"
    elif letter and letter not in _LETTERS[: len(problem["choices"])]:
        letter, rule = "", f"{rule}, but option {letter} does not exist"
    truth = _LETTERS[problem["answer"]]
    return QuestionScore(key, float(letter == truth), key, str(problem.get("subject", "")), text or "", truth, rule)
