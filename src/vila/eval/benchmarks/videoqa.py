"""Video QA without training for it: questions about clips, free answers, judged by a language model.

    GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/test_q.json    [{"video_name": ..., "question": ..., "question_id": ...}, ...]
                                       test_a.json    [{"answer": ...}, ...], paired with the questions by place
                                       videos/        NAME.mp4, .avi, .mov or .mkv

The four sets of Video-ChatGPT's evaluation (arXiv 2306.05424): MSVD, MSRVTT, TGIF and ActivityNet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.core.types import Message, Video
from vila.engine.request import SamplingParams
from vila.eval.annotations import check_prompts, find_file, find_optional, format_ids
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol
from vila.eval.judge import Judge, JudgeCase, JudgeSummary, Verdict, summarize_verdicts, verdict_is_yes, verdict_score
from vila.eval.openai_client import ServerError

# --- video_sets
# Where the sets of Video-ChatGPT's evaluation lie, and their rows: questions and answers paired by place.


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
    return find_optional(folder, _HOME, inside, "test_q.json") if alone else find_optional(folder, _HOME, inside)


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
            f"in the original: {format_ids(differ)}"
        )


def _row(question: Any, answer: Any, each: VideoSet, location: str, answer_where: str) -> VideoRow:
    wanted = ("question", "question_id") if each.named_by_id else ("question", "question_id", "video_name")
    for key in wanted:
        if not isinstance(question, dict) or not isinstance(question.get(key), str | int):
            raise DataError(f"{location}: no {key!r}")
    if not isinstance(answer, dict) or "answer" not in answer:
        raise DataError(f"{answer_where}: no 'answer'")
    name = question["question_id"]
    video = str(name).rpartition("_")[0] if each.named_by_id else str(question["video_name"])
    if not video:
        raise DataError(f"{location}: question_id {name!r} names no clip; expected CLIP_NUMBER")
    return VideoRow(name, video, str(question["question"]), str(answer["answer"]))


def refuse_absent(folder: Path, each: VideoSet) -> None:
    """Raise DataError saying where the questions of a set were looked for and where they are obtained."""
    find_file(folder, _HOME, f"{each.folder}/test_q.json", obtain=_OBTAIN)


_MAX_NEW_TOKENS = 1024

GREEDY = SamplingParams(max_new_tokens=_MAX_NEW_TOKENS)
ORIGINAL = SamplingParams(max_new_tokens=_MAX_NEW_TOKENS, temperature=0.2)
"""The original draws its answers, whatever temperature it is given, without a seed; this has one."""


class VideoQa:
    """The questions of one set, or of all that are there.

    sampling: greedy, so that a run can be repeated; set it to `ORIGINAL` to draw as the original does.
    judge:    whoever gives verdicts; there is no score without.
    """

    max_new_tokens = _MAX_NEW_TOKENS

    def __init__(self, folder: Path, limit: int = 0, sets: Sequence[str] = tuple(SETS), name: str = "videoqa") -> None:
        """limit: about how many questions in all, whole clips at a time; 0: all."""
        self.name, self.sampling, self.judge = name, GREEDY, None
        alone = len(sets) == 1
        places = {each: questions_file(folder, SETS[each], alone=alone) for each in sets}
        self._paths = {each: path for each, path in places.items() if path is not None}
        self._absent = [each for each in sets if each not in self._paths]
        if not self._paths:
            refuse_absent(folder, SETS[sets[0]])
        self._prefixed = not alone
        self._limit = -(-limit // len(self._paths))
        self.notes: list[str] = []

    sampling: SamplingParams
    judge: Judge | None

    def items(self) -> Sequence[Item]:
        """The questions, clip by clip. A clip that is not there has the path of its .mp4."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        return [item for name, path in self._paths.items() for item in self._set_items(SETS[name], path)]

    def _set_items(self, each: VideoSet, path: Path) -> list[Item]:
        items: list[Item] = []
        folder = path.parent / each.videos
        there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        seen: Counter[str] = Counter()
        for row in read_rows(path, each, self.notes):
            seen[str(row.id)] += 1
            own = str(row.id) if seen[str(row.id)] == 1 else f"{row.id}#{seen[str(row.id)]}"
            clip = next((f"{row.video}{end}" for end in ENDINGS if f"{row.video}{end}" in there), f"{row.video}.mp4")
            messages = (Message.of("user", Video(folder / clip), row.question),)
            items.append(Item(own, messages, row.answer, row.video, each.name, row.id))
        if self._prefixed:
            items = [replace(i, id=f"{each.name}/{i.id}", group=f"{each.name}/{i.group}") for i in items]
        return _clip_by_clip(items, self._limit)

    def missing_videos(self) -> list[str]:
        """Paths of clips that are not there, each once, in the order of the questions."""
        clips = {
            str(part.source): None
            for item in self._items
            for part in item.messages[0].parts[:1]
            if isinstance(part, Video)
        }
        return [clip for clip in clips if not Path(clip).is_file()]

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Percent of answers judged yes, among those judged yes or no; of several sets the mean.

        The last of several answers to a question is judged; questions without an answer are left out, as the original
        leaves out those whose clip it does not find; a set without any yes or no gets 0, with a note. Raises DataError
        without a judge, when it does not answer, and for answers to other questions.
        """
        if self.judge is None:
            raise DataError(f"{self.name}: scored by a judge; name one, or have the requests written to a file")
        judged, repeated = self._cases(answers)
        try:
            verdicts = self.judge.verdicts("video_qa", [case for case, _ in judged])
        except ServerError as error:
            raise DataError(f"{self.name}: the judge does not answer: {error}") from error
        by_set: dict[str, list[Verdict]] = defaultdict(list)
        for (_, item), verdict in zip(judged, verdicts, strict=True):
            by_set[item.category].append(verdict)
        tallies = {name: summarize_verdicts(found) for name, found in by_set.items()}
        score = sum(each.accuracy for each in tallies.values()) / len(tallies)
        average = sum(each.average_score for each in tallies.values()) / len(tallies)
        metrics = {
            "accuracy": score,
            "average_score": average,
            "judge": self.judge.model,
            "by_set": {name: _figures(each, len(by_set[name])) for name, each in tallies.items()},
        }
        question_scores = tuple(
            QuestionScore(
                case.id, float(yes), item.group, item.category, case.fields["pred"], item.truth, _rule(verdict)
            )
            for (case, item), verdict in zip(judged, verdicts, strict=True)
            for yes in [verdict_is_yes(verdict.value)]
            if yes is not None
        )
        return BenchmarkResult(
            score, "%", metrics, question_scores, tuple(self._score_notes(repeated, judged, verdicts, protocol))
        )

    def _cases(self, answers: Sequence[Answer]) -> tuple[list[tuple[JudgeCase, Item]], list[str]]:
        """A case for each question with an answer; and the questions that have several.

        The original keeps predictions and verdicts by id, so that of several answers it judges the last.
        """
        by_id = {item.id: item for item in self._items}
        named = Counter(str(item.question_id) for item in self._items)
        by_question = {str(i.question_id): i for i in self._items if named[str(i.question_id)] == 1}
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
                f"{self.name}: {len(unknown)} of {len(answers)} answers are to questions that are not here "
                f"({format_ids(unknown)}); are they another benchmark's, or another set's?"
            )
        check_prompts(self.name, answers, {name: item.messages[0].text for name, item in by_question.items()})
        return list(judged.values()), list(repeated)

    def _score_notes(
        self,
        repeated: Sequence[str],
        judged: Sequence[tuple[JudgeCase, Item]],
        verdicts: Sequence[Verdict],
        protocol: ScoringProtocol,
    ) -> Iterator[str]:
        yield from self.notes
        if self._absent:
            yield f"sets that are not there: {', '.join(self._absent)}; the score is the mean of the others"
        if self.sampling == GREEDY:
            yield "asked greedily; the original draws answers at temperature 0.2, so its figures differ from run to run"
        if protocol == "lmms-eval":
            yield "lmms-eval asks and judges ActivityNet otherwise and has no other set; scored by the original's rules"
        answered = {item.id for _, item in judged}
        if empty := sorted({item.category for item in self._items} - {item.category for _, item in judged}):
            yield f"sets without any answer: {', '.join(empty)}; the score is the mean of the others"
        missing = [item.id for item in self._items if item.id not in answered]
        if missing:
            yield f"{len(missing)} questions without an answer, left out: {format_ids(missing)}"
        if missing and (clips := self.missing_videos()):
            yield f"{len(clips)} clips are missing: {format_ids(clips)}"
        if repeated:
            yield f"{len(repeated)} questions answered more than once, the last answer counts: {format_ids(repeated)}"
        decided = {
            item.category for (_, item), v in zip(judged, verdicts, strict=True) if verdict_is_yes(v.value) is not None
        }
        if silent := sorted({item.category for _, item in judged} - decided):
            yield f"no yes or no to any answer of {', '.join(silent)}: 0, where the original divides by zero"
        counts = summarize_verdicts(verdicts)
        cases = [
            ([v.id for v in verdicts if not v.readable], "replies could not be read, left out"),
            (
                counts.no_score,
                "replies without a whole number as score, counted in the average as 0 and not as yes or no",
            ),
            (counts.undecided, "replies with neither yes nor no, counted in the average alone"),
        ]
        yield from (f"{len(ids)} {what}: {format_ids(ids)}" for ids, what in cases if ids)


def msvd(folder: Path, limit: int = 0) -> VideoQa:
    """MSVD's questions alone."""
    return VideoQa(folder, limit, ("msvd",), "videoqa_msvd")


def msrvtt(folder: Path, limit: int = 0) -> VideoQa:
    """MSRVTT's questions alone."""
    return VideoQa(folder, limit, ("msrvtt",), "videoqa_msrvtt")


def tgif(folder: Path, limit: int = 0) -> VideoQa:
    """TGIF's questions alone."""
    return VideoQa(folder, limit, ("tgif",), "videoqa_tgif")


def activitynet(folder: Path, limit: int = 0) -> VideoQa:
    """ActivityNet's questions alone."""
    return VideoQa(folder, limit, ("activitynet",), "videoqa_activitynet")


def _clip_by_clip(items: Sequence[Item], limit: int) -> list[Item]:
    order = {group: place for place, group in enumerate(dict.fromkeys(item.group for item in items))}
    sizes = Counter(item.group for item in items)
    kept, count = set(), 0
    for group in order:
        if limit and count >= limit:
            break
        kept.add(group)
        count += sizes[group]
    return sorted((item for item in items if item.group in kept), key=lambda item: order[item.group])


def _figures(counts: JudgeSummary, asked: int) -> dict[str, Any]:
    return {
        "accuracy": counts.accuracy,
        "average_score": counts.average_score,
        "yes": counts.yes,
        "no": counts.no,
        "judged": counts.count,
        "unreadable": asked - counts.count,
        "no_score": len(counts.no_score),
    }


def _rule(verdict: Verdict) -> str:
    return f"judge: {'yes' if verdict_is_yes(verdict.value) else 'no'}, score {verdict_score(verdict.value)}"
