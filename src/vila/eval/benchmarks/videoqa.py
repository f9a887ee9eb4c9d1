"""Zero-shot video QA: questions about videos with free-form answers, scored by a judge (LLM).

    GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/test_q.json    [{"video_name": ..., "question": ..., "question_id": ...}, ...]
                                       test_a.json    [{"answer": ...}, ...], paired with the questions by position
                                       videos/        NAME.mp4, .avi, .mov or .mkv

The four sets of Video-ChatGPT's evaluation (arXiv 2306.05424): MSVD, MSRVTT, TGIF and ActivityNet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.core.types import Message, Video
from vila.engine.sampling_params import SamplingParams
from vila.eval.annotations import AnnotatedBenchmark, count_notes, format_ids, group_items
from vila.eval.benchmark import (
    Answer,
    BenchmarkResult,
    Item,
    JudgeCase,
    QuestionScore,
    ScoringProtocol,
    Verdict,
    missing_media,
)
from vila.eval.judge import JudgeSummary, summarize_verdicts, verdict_is_yes, verdict_score
from vila.eval.openai_client import ServerError

_FOLDER = "GPT_Zero_Shot_QA"
_SOURCE = (
    "the evaluation data of Video-ChatGPT (quantitative_evaluation/README.md of github.com/mbzuai-oryx/Video-ChatGPT)"
)
_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")
_MAX_NEW_TOKENS = 1024

GREEDY = SamplingParams(max_new_tokens=_MAX_NEW_TOKENS)
ORIGINAL = SamplingParams(max_new_tokens=_MAX_NEW_TOKENS, temperature=0.2)
"""Sampling of the original script, which uses this temperature whatever is requested, but no seed."""


@dataclass(frozen=True, slots=True)
class VideoSet:
    """Location of a set. named_by_id: a video is named like the question id without the last `_part`."""

    name: str
    folder: str
    videos: str
    named_by_id: bool = False


SETS: Mapping[str, VideoSet] = {
    found.name: found
    for found in (
        VideoSet("msvd", "MSVD_Zero_Shot_QA", "videos"),
        VideoSet("msrvtt", "MSRVTT_Zero_Shot_QA", "videos/all"),
        VideoSet("tgif", "TGIF_Zero_Shot_QA", "mp4"),
        VideoSet("activitynet", "Activitynet_Zero_Shot_QA", "all_test", named_by_id=True),
    )
}


class VideoQa(AnnotatedBenchmark):
    """Zero-shot video QA: accuracy by an LLM judge, mean over the data sets that are present.

    `sampling` is greedy, so that runs are reproducible; set it to `ORIGINAL` to sample like the original script.
    """

    name = "videoqa"
    max_new_tokens = _MAX_NEW_TOKENS
    sampling = GREEDY
    needs_judge = True
    directories = (_FOLDER,)
    sets: Sequence[str] = tuple(SETS)

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        is_single = len(self.sets) == 1
        self._paths: dict[str, Path] = {}
        for name in self.sets:
            names = (f"{SETS[name].folder}/test_q.json", *(["test_q.json"] if is_single else []))
            if path := self.find_optional(*names):
                self._paths[name] = path
        if not self._paths:
            self.find_file(f"{SETS[self.sets[0]].folder}/test_q.json", source=_SOURCE)
        self._is_prefixed = not is_single
        self._limit = -(-limit // len(self._paths))
        self._notes: list[str] = []

    def load_items(self) -> list[Item]:
        """Return the questions by video. A video that does not exist has the path of its .mp4."""
        return [item for name, path in self._paths.items() for item in self._set_items(SETS[name], path)]

    def _set_items(self, video_set: VideoSet, path: Path) -> list[Item]:
        """Return the questions of `path`, paired by position with `test_a.json`, whose ids may differ.

        Raises DataError naming file and record for missing fields, and for fewer answers than questions.
        """
        answers_path = path.with_name("test_a.json")
        if not answers_path.is_file():
            raise DataError("no such file", file=answers_path, hint=f"it is in {_SOURCE}")
        questions, answers = _read_list(path), _read_list(answers_path)
        if not questions:
            raise DataError("has no questions", file=path, hint=f"download it: {_SOURCE}")
        if len(answers) < len(questions):
            raise DataError(
                f"{len(answers)} answers for {len(questions)} questions in {path.name}",
                file=answers_path,
                hint="are the files of different releases?",
            )
        folder = path.parent / video_set.videos
        files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        items: list[Item] = []
        differing: list[str] = []
        counts: Counter[str] = Counter()
        for number, (row, answer) in enumerate(zip(questions, answers, strict=False), start=1):
            record = f"row {number}"
            if not isinstance(answer, dict) or "answer" not in answer:
                raise DataError("missing", file=answers_path, record=record, field="answer")
            video = _video_name(row, video_set, path, record)
            name = str(row["question_id"])
            if str(answer.get("question_id", name)) != name:
                differing.append(name)
            counts[name] += 1
            item_id = name if counts[name] == 1 else f"{name}#{counts[name]}"
            candidates = [f"{video}{suffix}" for suffix in _SUFFIXES]
            file = next((candidate for candidate in candidates if candidate in files), candidates[0])
            messages = (Message.of("user", Video(folder / file), str(row["question"])),)
            if self._is_prefixed:
                item_id, video = f"{video_set.name}/{item_id}", f"{video_set.name}/{video}"
            items.append(Item(item_id, messages, str(answer["answer"]), video, video_set.name, row["question_id"]))
        if more := len(answers) - len(questions):
            self._notes.append(f"{video_set.name}: {more} answers after the last question, ignored")
        if differing:
            self._notes.append(
                f"{video_set.name}: {len(differing)} answers have another question_id than the question at their "
                f"position; paired by position, as in the original script: {format_ids(differing)}"
            )
        return group_items(items, self._limit)

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the percentage of answers judged yes among those judged yes or no; the mean over several sets.

        The last of several answers to a question is judged. Questions without an answer are left out, as the original
        script leaves out missing videos; a set without any yes or no gets 0, with a note. Raises DataError without a
        judge, if the judge fails, and for answers to unknown questions.
        """
        if self.judge is None:
            raise DataError("needs a judge", field=self.name, hint="name one, or write its requests to a file")
        judged, repeated = self._cases(answers)
        try:
            verdicts = self.judge.verdicts("video_qa", [case for case, _ in judged])
        except ServerError as error:
            raise DataError(f"the judge failed: {error}", field=self.name) from error
        by_set: dict[str, list[Verdict]] = defaultdict(list)
        for (_, item), verdict in zip(judged, verdicts, strict=True):
            by_set[item.category].append(verdict)
        summaries = {name: summarize_verdicts(own) for name, own in by_set.items()}
        accuracy = sum(each.accuracy for each in summaries.values()) / len(summaries)
        metrics = {
            "accuracy": accuracy,
            "average_score": sum(each.average_score for each in summaries.values()) / len(summaries),
            "judge": self.judge.model,
            "by_set": {name: _metrics(each, len(by_set[name])) for name, each in summaries.items()},
        }
        scores = tuple(
            QuestionScore(
                case.id, float(yes), item.group, item.category, case.fields["pred"], item.truth, _rule(verdict)
            )
            for (case, item), verdict in zip(judged, verdicts, strict=True)
            for yes in [verdict_is_yes(verdict.value)]
            if yes is not None
        )
        notes = tuple(self._score_notes(repeated, judged, verdicts, protocol))
        return BenchmarkResult(accuracy, "%", metrics, scores, notes)

    def _cases(self, answers: Sequence[Answer]) -> tuple[list[tuple[JudgeCase, Item]], list[str]]:
        """Return a case for each answered question, with its last answer, and the ids with several answers."""
        by_id = {item.id: item for item in self._items}
        counts = Counter(str(item.question_id) for item in self._items)
        by_question = {str(i.question_id): i for i in self._items if counts[str(i.question_id)] == 1}
        judged: dict[str, tuple[JudgeCase, Item]] = {}
        repeated: dict[str, None] = {}
        unknown: list[str] = []
        for answer in answers:
            item = (
                by_id.get(answer.id) or by_question.get(str(answer.question_id)) or by_id.get(str(answer.question_id))
            )
            if item is None:
                unknown.append(answer.id or str(answer.question_id))
                continue
            if item.id in judged:
                repeated[item.id] = None
            fields = {"question": item.messages[0].text, "answer": item.truth, "pred": answer.text}
            judged[item.id] = JudgeCase(item.id, fields), item
        if unknown or not judged:
            raise DataError(
                f"{len(unknown)} of {len(answers)} answers have an unknown question_id ({format_ids(unknown)})",
                field=self.name,
                hint="are they to another benchmark or set?",
            )
        self.check_prompts(answers, {name: item.messages[0].text for name, item in by_question.items()})
        return list(judged.values()), list(repeated)

    def _score_notes(
        self,
        repeated: Sequence[str],
        judged: Sequence[tuple[JudgeCase, Item]],
        verdicts: Sequence[Verdict],
        protocol: ScoringProtocol,
    ) -> Iterator[str]:
        yield from self._notes
        if absent := [name for name in self.sets if name not in self._paths]:
            yield f"sets without data: {', '.join(absent)}; the score is the mean of the others"
        if self.sampling == GREEDY:
            yield "greedy decoding; the original script samples at temperature 0.2, so that its scores vary"
        if protocol == "lmms-eval":
            yield "scored with the original protocol; lmms-eval has only ActivityNet, with other prompts and judge"
        answered = {item.id for _, item in judged}
        with_answers = {item.category for _, item in judged}
        if empty := sorted({item.category for item in self._items} - with_answers):
            yield f"sets without answers: {', '.join(empty)}; the score is the mean of the others"
        missing = [item.id for item in self._items if item.id not in answered]
        yield from count_notes(
            (missing, "questions without an answer, left out"),
            (missing_media(self._items) if missing else (), "videos are missing"),
            (repeated, "questions with several answers, the last one counts"),
        )
        decided = {
            item.category
            for (_, item), verdict in zip(judged, verdicts, strict=True)
            if verdict_is_yes(verdict.value) is not None
        }
        if undecided := sorted(with_answers - decided):
            yield f"no verdict of {', '.join(undecided)} is yes or no: 0, where the original script divides by zero"
        summary = summarize_verdicts(verdicts)
        yield from count_notes(
            ([verdict.id for verdict in verdicts if not verdict.readable], "unreadable replies, left out"),
            (summary.no_score, "replies without an integer score: 0 in the average, neither yes nor no"),
            (summary.undecided, "replies with neither yes nor no, counted only in the average"),
        )


def _read_list(path: Path) -> list[Any]:
    value = read_json(path)
    if not isinstance(value, list):
        raise DataError(file=path, value=value, expected="a list")
    return value


def _video_name(row: Any, video_set: VideoSet, path: Path, record: str) -> str:
    """Return the name of the video without suffix, after checking the fields of a question."""
    for key in ("question", "question_id", *(() if video_set.named_by_id else ("video_name",))):
        if not isinstance(row, dict) or not isinstance(row.get(key), str | int):
            raise DataError("missing", file=path, record=record, field=key)
    name = row["question_id"]
    video = str(name).rpartition("_")[0] if video_set.named_by_id else str(row["video_name"])
    if not video:
        raise DataError(file=path, record=record, field="question_id", value=name, expected="VIDEO_NUMBER")
    return video


class Msvd(VideoQa):
    """MSVD-QA, zero-shot: accuracy by an LLM judge."""

    name, sets = "videoqa_msvd", ("msvd",)


class Msrvtt(VideoQa):
    """MSRVTT-QA, zero-shot: accuracy by an LLM judge."""

    name, sets = "videoqa_msrvtt", ("msrvtt",)


class Tgif(VideoQa):
    """TGIF-QA, zero-shot: accuracy by an LLM judge."""

    name, sets = "videoqa_tgif", ("tgif",)


class ActivityNet(VideoQa):
    """ActivityNet-QA, zero-shot: accuracy by an LLM judge."""

    name, sets = "videoqa_activitynet", ("activitynet",)


def _metrics(summary: JudgeSummary, answers: int) -> dict[str, Any]:
    return {
        "accuracy": summary.accuracy,
        "average_score": summary.average_score,
        "yes": summary.yes,
        "no": summary.no,
        "judged": summary.count,
        "unreadable": answers - summary.count,
        "no_score": len(summary.no_score),
    }


def _rule(verdict: Verdict) -> str:
    return f"judge: {'yes' if verdict_is_yes(verdict.value) else 'no'}, score {verdict_score(verdict.value)}"
