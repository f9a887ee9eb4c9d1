"""MME: two yes-or-no questions about every image, in fourteen categories (Fu et al., arXiv 2306.13394).

    llava_mme.jsonl                                     questions; question_id OCR/0001.jpg, or
                                                        artwork/images/0001.jpg if the category has subfolders
    MME_Benchmark_release_version/OCR/0001.txt          two lines: question, tab, Yes or No
    .../artwork/questions_answers_YN/0001.txt           in five categories texts and images have subfolders

The score of a category is acc + acc+: percent of correct questions, and of images with both questions correct. The
published metric is the sum over the ten perception categories, at most 2,000 points.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vila.core.errors import DataError
from vila.core.reading import read_text
from vila.eval.annotations import (
    SHORT_ANSWER,
    AnnotatedBenchmark,
    count_notes,
    format_ids,
    group_items,
    question_messages,
    read_questions,
)
from vila.eval.benchmark import AggregateMetric, Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_QUESTIONS = "llava_mme.jsonl"
_RELEASE = "MME_Benchmark_release_version"
_MME = "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation (by application)"
_PUBLISHED = 2374

_YES_NO = "Please answer yes or no."

Key = tuple[str, str, str]
"""Category, name of the image's text file, question in that file."""


class MatchedAnswer(NamedTuple):
    """An answer matched to its question."""

    key: Key
    question_id: str
    text: str


Pair = tuple[MatchedAnswer, MatchedAnswer]
Pairs = Mapping[str, Mapping[str, Sequence[Pair]]]
"""Pairs of answers about an image, one or several, by category and image."""


class Mme(AnnotatedBenchmark):
    """MME: perception score of yes-or-no answers, at most 2,000 points."""

    name = "mme"
    max_new_tokens = 128
    directories = ("MME",)

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._release = self.find_file(_RELEASE, source=_MME)

    def load_items(self) -> list[Item]:
        """Return the questions by image. Ids are `QUESTION_ID#N`: N-th question of the image, from 1."""
        items = []
        for question in read_questions(self.find_file(_QUESTIONS)):
            question_id = question.question_id
            if not isinstance(question_id, str) or "/" not in question_id:
                raise DataError(
                    file=question.file,
                    record=question.record,
                    field="question_id",
                    value=question_id,
                    expected="CATEGORY/FILE",
                )
            key = _question_key(question_id, question.text, self._truths)
            name, group = self._item_id(question_id, key), _image_of(key)
            messages = question_messages(self._release / question.image, question.text)
            truth = self._truths.get(key, "")
            items.append(Item(name, messages, truth, group, key[0], question_id, question.text))
        if repeated := [name for name, count in Counter(item.id for item in items).items() if count > 1]:
            raise DataError(f"repeated questions: {format_ids(repeated)}", file=_QUESTIONS)
        return group_items(items, self._limit)

    @cached_property
    def _truths(self) -> dict[Key, str]:
        """Yes or No by question."""
        truths: dict[Key, str] = {}
        for category in sorted(path for path in self._release.iterdir() if path.is_dir()):
            own = category / "questions_answers_YN"
            for path in sorted((own if (category / "images").is_dir() or own.is_dir() else category).glob("*.txt")):
                truths.update({(category.name, path.name, question): truth for question, truth in _read_truths(path)})
        if not truths:
            raise DataError("has no questions with answers", file=self._release, hint=f"download it from {_MME}")
        return truths

    @cached_property
    def _positions(self) -> dict[Key, int]:
        """Position of each question in its text file, from 1."""
        counts: Counter[str] = Counter()
        positions = {}
        for key in self._truths:
            counts[_image_of(key)] += 1
            positions[key] = counts[_image_of(key)]
        return positions

    def _item_id(self, question_id: str, key: Key) -> str:
        return f"{question_id}#{self._positions.get(key, key[2])}"

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the perception points; the metrics have cognition and each category.

        upstream:  yes or no within the first four characters. A repeated pair of answers counts again, an image without
                   answers does not count.
        lmms-eval: ends and full stops are stripped first, a single y or n counts. A repeated pair is an error, an image
                   without answers counts as two empty answers.
        The two answers about an image are matched wherever they are in the file. Categories without answers give no
        points. Raises DataError naming ids: unknown questions, and images whose two questions have different numbers of
        answers; the original script fails there or pairs answers about different images.
        """
        is_lmms = protocol == "lmms-eval"
        matched, notes = self._match(answers, single_line=not is_lmms)
        pairs = _pair_answers(self.name, matched, once=is_lmms)
        notes += self._pair_notes(pairs, "wrong" if is_lmms else "not counted") + _order_note(matched)
        absent = [name for name in (*PERCEPTION, *COGNITION) if name not in pairs]
        if is_lmms:
            self._add_unanswered(pairs)
        parse = parse_lmms if is_lmms else parse_upstream
        by_category: dict[str, dict[str, Any]] = {}
        scores: list[QuestionScore] = []
        for category, own in pairs.items():
            row, category_scores = self._score_category(category, own, parse)
            by_category[category] = row
            scores += category_scores
            if row["other"] == row["questions"]:
                notes.append(f"{category}: no answer is yes or no; 0 points, where the original script fails")
        if absent:
            notes.append(
                f"categories without answers, which give no points (the original script fails): {', '.join(absent)}"
            )
        metrics: dict[str, Any] = {
            part: sum(by_category[name]["score"] for name in categories if name in pairs)
            for part, categories in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        metrics.update(questions=len(scores), missing_categories=absent, by_category=by_category)
        counted = [name for name in PERCEPTION if name in pairs]
        aggregate = AggregateMetric(_terms(scores, counted), _points, stratified=True)
        return BenchmarkResult(metrics["perception"], "points", metrics, tuple(scores), tuple(notes), aggregate)

    def _match(self, answers: Sequence[Answer], *, single_line: bool) -> tuple[list[MatchedAnswer], list[str]]:
        """Match answers to questions; also return notes. single_line: replace line breaks and tabs by spaces."""
        matched, unknown, multiline, unscored = [], [], [], []
        for answer in answers:
            name = answer.question_id
            key = _question_key(name, answer.prompt, self._truths) if isinstance(name, str) and answer.prompt else None
            if key is None or key not in self._truths:
                unknown.append(f"{name} ({answer.prompt[:60]!r})")
                continue
            if key[0] not in (*PERCEPTION, *COGNITION):
                unscored.append(str(name))
                continue
            text = answer.text
            if single_line and any(char in text for char in "\t\n\r"):
                text = " ".join(text.split())
                multiline.append(str(name))
            matched.append(MatchedAnswer(key, str(name), text))
        if unknown:
            raise DataError(
                f"{len(unknown)} answers have no prompt or an unknown one: {format_ids(unknown)}",
                field=self.name,
            )
        if not matched:
            raise DataError(
                f"none of {len(answers)} answers belongs to a question of a scored category", field=self.name
            )
        return matched, count_notes(
            (multiline, "answers with tabs or line breaks, replaced by spaces (the original script fails)"),
            (unscored, "answers in categories that are not scored, ignored"),
        )

    def _pair_notes(self, pairs: Pairs, unanswered: str) -> list[str]:
        """Return notes on images without answers, which are `unanswered`, and images with several pairs."""
        missing = [image for image in self._unanswered(pairs) if image.split("/")[0] in pairs]
        repeated = [image for own in pairs.values() for image, given in own.items() if len(given) > 1]
        return self.size_note(self._release.name, len(self._truths), _PUBLISHED) + count_notes(
            (missing, f"images without answers, {unanswered}"),
            (repeated, "images with several pairs of answers, each counts"),
        )

    def _unanswered(self, pairs: Pairs) -> list[str]:
        """Return the images of scored categories without answers."""
        known = {_image_of(key) for key in self._truths if key[0] in (*PERCEPTION, *COGNITION)}
        if self._limit:
            known &= {item.group for item in self._items}
        return sorted(known - {image for own in pairs.values() for image in own})

    def _add_unanswered(self, pairs: dict[str, dict[str, list[Pair]]]) -> None:
        """Add two empty answers for each image that has none, as lmms-eval scores them."""
        keys: dict[str, list[Key]] = {image: [] for image in self._unanswered(pairs)}
        for key in self._truths:
            if _image_of(key) in keys:
                keys[_image_of(key)].append(key)
        for image, own in keys.items():
            if len(own) == 2:
                first, second = (MatchedAnswer(key, image, "") for key in own)
                pairs.setdefault(image.split("/")[0], {})[image] = [(first, second)]

    def _score_category(
        self, category: str, own: Mapping[str, Sequence[Pair]], parse: Callable[[str], str]
    ) -> tuple[dict[str, Any], list[QuestionScore]]:
        """Return the metrics and question scores of a category."""
        scores: list[QuestionScore] = []
        both = count = other = 0
        for image, given in own.items():
            for repetition, pair in enumerate(given):
                correct = []
                for answer in pair:
                    predicted, truth = parse(answer.text), self._truths[answer.key]
                    correct.append(predicted == truth.lower())
                    other += predicted == "other"
                    name = self._item_id(answer.question_id, answer.key) + (
                        f" ({repetition + 1})" if repetition else ""
                    )
                    rule = f"parsed as {predicted}"
                    scores.append(QuestionScore(name, float(correct[-1]), image, category, answer.text, truth, rule))
                both += all(correct)
                count += 1
        acc, acc_plus = 100 * sum(score.value for score in scores) / len(scores), 100 * both / count
        metrics = {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus}
        return {**metrics, "questions": len(scores), "images": count, "other": other}, scores


def _terms(scores: Sequence[QuestionScore], categories: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Return per score, for each category in turn: questions, correct ones, images, images with both correct.

    The two scores of an image are adjacent; the second one carries the terms of the image.
    """
    offsets = {category: 4 * index for index, category in enumerate(categories)}
    terms = []
    for index, score in enumerate(scores):
        row = [0.0] * (4 * len(offsets))
        if score.category in offsets:
            start, is_second = offsets[score.category], index % 2
            row[start : start + 4] = [1, score.value, is_second, is_second * score.value * scores[index - 1].value]
        terms.append(tuple(row))
    return tuple(terms)


def _points(sums: Sequence[float]) -> float:
    """Return the sum of the points of the categories from the sums of `_terms`."""
    rows = [sums[start : start + 4] for start in range(0, len(sums), 4)]
    return sum(100 * correct / questions + 100 * both / images for questions, correct, images, both in rows)


def _question_key(question_id: str, prompt: str, truths: Mapping[Key, str]) -> Key:
    """Return the question of an answer, found as in the original converter.

    It removes the short-answer instruction from the prompt, and tries two spaces before the yes-or-no instruction.
    """
    category, file = question_id.split("/")[0], question_id.split("/")[-1].split(".")[0] + ".txt"
    if SHORT_ANSWER in prompt:
        prompt = prompt.replace(SHORT_ANSWER, "").strip()
    if _YES_NO not in prompt:
        one, two = f"{prompt} {_YES_NO}", f"{prompt}  {_YES_NO}"
        return (category, file, one if (category, file, one) in truths else two)
    return category, file, prompt


def parse_upstream(text: str) -> str:
    """Return `yes`, `no` or `other`: the word within the first four characters, yes first."""
    return _yes_no(text.lower()[:4])


def parse_lmms(text: str) -> str:
    """Like `parse_upstream` after stripping ends and full stops; a single y or n also counts."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _yes_no(text[:4])


def _yes_no(text: str) -> str:
    return "yes" if "yes" in text else "no" if "no" in text else "other"


def _image_of(key: Key) -> str:
    """Return the image of a question: `OCR/0001`."""
    return f"{key[0]}/{key[1].removesuffix('.txt')}"


def _read_truths(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the questions of an image's text file with their Yes or No. Raises DataError with file and line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.strip().split("\t")
        if len(cells) != 2 or cells[1].lower() not in ("yes", "no"):
            raise DataError(file=path, record=f"line {number}", value=line, expected="a question, a tab and Yes or No")
        yield cells[0], cells[1]


def _order_note(answers: Sequence[MatchedAnswer]) -> list[str]:
    """Return a note if the original script, which pairs adjacent answers, would pair answers about other images."""
    by_category: dict[str, list[MatchedAnswer]] = defaultdict(list)
    for answer in answers:
        by_category[answer.key[0]].append(answer)
    wrong = [
        category
        for category, own in by_category.items()
        if any(_image_of(a.key) != _image_of(b.key) for a, b in zip(own[::2], own[1::2], strict=False))
    ]
    if not wrong:
        return []
    return [
        f"the two answers about an image are not adjacent in {', '.join(wrong)}: the original script pairs adjacent "
        "answers and would report another acc+"
    ]


def _pair_answers(name: str, answers: Sequence[MatchedAnswer], once: bool) -> dict[str, dict[str, list[Pair]]]:
    """Pair the two answers about each image, by category and image.

    once: repeated pairs are an error. Raises DataError naming images with unequal numbers of answers.
    """
    by_image: dict[str, dict[str, list[MatchedAnswer]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        by_image[_image_of(answer.key)][answer.key[2]].append(answer)
    pairs: dict[str, dict[str, list[Pair]]] = {}
    unequal, repeated = [], []
    for image, questions in by_image.items():
        counts = [len(given) for given in questions.values()]
        if len(counts) != 2 or counts[0] != counts[1]:
            unequal.append(f"{image} ({' and '.join(map(str, counts))})")
            continue
        if once and counts[0] > 1:
            repeated.append(image)
        pairs.setdefault(image.split("/")[0], {})[image] = list(zip(*questions.values(), strict=True))
    if unequal:
        raise DataError(
            f"{len(unequal)} images whose two questions have different numbers of answers: {format_ids(unequal)}",
            field=name,
        )
    if repeated:
        raise DataError(f"{len(repeated)} images with several pairs of answers: {format_ids(repeated)}", field=name)
    return pairs
