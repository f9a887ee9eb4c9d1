"""Where the sets of Video-ChatGPT's evaluation lie, and their rows: questions and answers paired by place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.folders import find, look
from vila.eval.joining import naming

_HOME = "GPT_Zero_Shot_QA"
_OBTAIN = (
    "the evaluation data of Video-ChatGPT (quantitative_evaluation/README.md of github.com/mbzuai-oryx/Video-ChatGPT)"
)
ENDINGS = (".mp4", ".avi", ".mov", ".mkv")


@dataclass(frozen=True, slots=True)
class VideoSet:
    """Where one set lies. named_by_id: its clip is called like the question's id without the last `_part`."""

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


@dataclass(frozen=True, slots=True)
class VideoRow:
    """One question. video: the clip's name, without its ending."""

    id: str | int
    video: str
    question: str
    answer: str


def questions_file(folder: Path, each: VideoSet, *, alone: bool) -> Path | None:
    """Where the questions of a set lie, if anywhere. alone: `folder` may be the set's own."""
    inside = f"{each.folder}/test_q.json"
    return look(folder, _HOME, inside, "test_q.json") if alone else look(folder, _HOME, inside)


def read_rows(path: Path, each: VideoSet, notes: list[str]) -> Iterator[VideoRow]:
    """The questions of `path` with their answers, paired by place; what was noticed is added to `notes`.

    Raises DataError naming file and row for what is missing, and for fewer answers than questions.
    """
    answers_path = path.with_name("test_a.json")
    if not answers_path.is_file():
        raise DataError(f"{each.name}: {answers_path} is missing; it comes with {path.name} from {_OBTAIN}")
    questions, answers = read_json(path), read_json(answers_path)
    if not (isinstance(questions, list) and isinstance(answers, list)):
        raise DataError(f"{path}, {answers_path}: expected a list each")
    if not questions:
        raise DataError("holds no question", file=path, hint=f"it comes from {_OBTAIN}")
    if len(answers) < len(questions):
        raise DataError(
            f"{each.name}: {len(questions)} questions in {path} but {len(answers)} answers in {answers_path.name}; "
            "they are of different releases"
        )
    if len(answers) > len(questions):
        notes.append(f"{each.name}: {len(answers) - len(questions)} answers behind the last question, not used")
    differ = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=False), start=1):
        row = _row(question, answer, each, f"{path} row {number}", f"{answers_path} row {number}")
        if str(answer.get("question_id", row.id)) != str(row.id):
            differ.append(str(row.id))
        yield row
    if differ:
        notes.append(
            f"{each.name}: {len(differ)} answers name another question than stands in their place, paired by place as "
            f"in the original: {naming(differ)}"
        )


def _row(question: Any, answer: Any, each: VideoSet, where: str, answer_where: str) -> VideoRow:
    wanted = ("question", "question_id") if each.named_by_id else ("question", "question_id", "video_name")
    for key in wanted:
        if not isinstance(question, dict) or not isinstance(question.get(key), str | int):
            raise DataError(f"{where}: no {key!r}")
    if not isinstance(answer, dict) or "answer" not in answer:
        raise DataError(f"{answer_where}: no 'answer'")
    name = question["question_id"]
    video = str(name).rpartition("_")[0] if each.named_by_id else str(question["video_name"])
    if not video:
        raise DataError(f"{where}: question_id {name!r} names no clip; expected CLIP_NUMBER")
    return VideoRow(name, video, str(question["question"]), str(answer["answer"]))


def refuse_absent(folder: Path, each: VideoSet) -> None:
    """Raise DataError saying where the questions of a set were looked for and where they are obtained."""
    find(folder, _HOME, f"{each.folder}/test_q.json", obtain=_OBTAIN)
