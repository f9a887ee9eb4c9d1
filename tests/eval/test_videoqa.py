"""Video QA: data layout, prompts, pairing of answers, metrics of verdicts."""

import json

import pytest

from tests.eval.chat_server import chat_server
from tests.eval.checks import has_note, refused
from vila.chat.render import render
from vila.chat.templates import find_template
from vila.core.types import Image, Message, Text, Video
from vila.eval.benchmark import BENCHMARKS, Answer, missing_media
from vila.eval.benchmarks.videoqa import GREEDY, ORIGINAL, ActivityNet, Msvd, VideoQa
from vila.eval.judge import NotJudgedError, OpenAIJudge, RequestFile, parse_reply
from vila.eval.openai_client import OpenAIClient, RetryPolicy
from vila.eval.predictions import read_answers

MSVD = [
    {"video_name": "vid1", "question": "what is a man doing?", "question_id": 10},
    {"video_name": "vid2", "question": "who runs?", "question_id": 11},
    {"video_name": "vid1", "question": "what does he ride?", "question_id": 12},
    {"video_name": "gone", "question": "où est-il?", "question_id": 13},
]
MSVD_ANSWERS = [{"answer": "ride"}, {"answer": "dog"}, {"answer": "horse"}, {"answer": "forêt"}]
ACTIVITY = [
    {"video_name": "1Q_x", "question": "is he tall", "question_id": "v_1Q_x_3"},
    {"video_name": "1Q_x", "question": "is it day", "question_id": "v_1Q_x_4"},
]
ACTIVITY_ANSWERS = [
    {"answer": "yes", "question_id": "v_1Q_x_3", "type": 3},
    {"answer": "no", "question_id": "v_1Q_x_4", "type": 3},
]


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA", MSVD, MSVD_ANSWERS, "videos", ["vid1.avi", "vid2.mkv"])
    folder = tmp_path / "GPT_Zero_Shot_QA" / "Activitynet_Zero_Shot_QA"
    write(folder, ACTIVITY, ACTIVITY_ANSWERS, "all_test", ["v_1Q_x.mp4", "v_1Q_x.mkv"])
    return tmp_path


def write(folder, questions, answers, videos, names):
    (folder / videos).mkdir(parents=True)
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))
    for name in names:
        (folder / videos / name).write_bytes(b"not read by any test here")


class Says:
    """A judge with fixed replies by case."""

    model = "fixed"

    def __init__(self, replies):
        self.replies, self.kinds, self.cases = replies, [], []

    def verdicts(self, kind, cases):
        self.kinds.append(kind)
        self.cases += cases
        return [parse_reply(case.id, self.replies[case.id]) for case in cases]


YES, NO = "{'pred': 'yes', 'score': 4}", "{'pred': 'no', 'score': 1}"


def answers(**texts):
    return [Answer(int(name[1:]), text) for name, text in texts.items()]


def test_questions_are_grouped_by_video_and_paired_by_position(root):
    items = Msvd(root).items()
    assert [(i.id, i.question_id, i.truth, i.group) for i in items] == [
        ("10", 10, "ride", "vid1"),
        ("12", 12, "horse", "vid1"),
        ("11", 11, "dog", "vid2"),
        ("13", 13, "forêt", "gone"),
    ]
    folder = root / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA" / "videos"
    videos = [item.messages[0].parts[0].source for item in items]
    assert videos == [folder / "vid1.avi", folder / "vid1.avi", folder / "vid2.mkv", folder / "gone.mp4"]
    assert missing_media(Msvd(root).items()) == [str(folder / "gone.mp4")]


def test_activitynets_videos_are_called_like_the_id_without_its_last_part(root):
    folder = root / "GPT_Zero_Shot_QA" / "Activitynet_Zero_Shot_QA"
    sources = {item.messages[0].parts[0].source for item in ActivityNet(root).items()}
    assert sources == {folder / "all_test" / "v_1Q_x.mp4"}  # .mp4 is looked for before .mkv


def test_the_prompt_is_an_image_line_for_each_frame_and_the_bare_question(root):
    from vila.chat.content import expand_videos

    (item, *_) = Msvd(root).items()
    frames = [Image(f"{number}.png") for number in range(8)]
    template = find_template("vicuna_v1")
    messages = expand_videos(item.messages, template.media_gap, lambda video: frames)
    text = "".join(
        "<image>" if s.media else s.text for s in render(messages, template, prompt=True) if s.text != "{bos}"
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\n<image>\n<image>\n<image>\n<image>\n"
        "<image>\n<image>\n<image>\nwhat is a man doing? ASSISTANT:"
    )
    assert item.messages == (Message("user", (Video(item.messages[0].parts[0].source), Text("what is a man doing?"))),)


def test_decoding(root):
    assert (GREEDY.temperature, GREEDY.max_new_tokens) == (0, 1024)
    assert (ORIGINAL.temperature, ORIGINAL.max_new_tokens) == (0.2, 1024)
    assert Msvd(root).sampling == GREEDY


def test_the_judge_is_shown_question_truth_and_answer(root):
    benchmark = Msvd(root)
    benchmark.judge = judge = Says(dict.fromkeys(("10", "11", "12", "13"), YES))
    result = benchmark.score(answers(q13="la forêt\nsombre", q10="", q12="Horse", q11="a dog"))
    assert result.score == 100
    assert judge.kinds == ["video_qa"]
    assert [dict(case.fields) for case in judge.cases][:2] == [
        {"question": "où est-il?", "answer": "forêt", "pred": "la forêt\nsombre"},
        {"question": "what is a man doing?", "answer": "ride", "pred": ""},
    ]


# What was answered to 10, 11, 12, 13; what the judge replies; accuracy, average score, yes, no, judged; rule.
SCORES = [
    ([YES, YES, NO, NO], 50, 2.5, 2, 2, 4, "yes among yes and no; mean score"),
    ([YES, "sorry", NO, NO], 100 / 3, 2, 1, 2, 3, "a reply that cannot be read leaves both denominators"),
    ([YES, "{'pred': 'yes'}", NO, NO], 100 / 3, 1.5, 1, 2, 4, "no score: in the average's denominator alone"),
    ([YES, "{'pred': 'so-so', 'score': 3}", NO, NO], 100 / 3, 9 / 4, 1, 2, 4, "neither: in the average alone"),
    ([YES, None, None, None], 100, 4, 1, 0, 1, "questions without an answer are left out"),
    (["{'pred': 'so-so', 'score': 3}", None, None, None], 0, 3, 0, 0, 1, "no yes or no at all is 0, with a note"),
    (["?", "?", "?", "?"], 0, 0, 0, 0, 0, "nothing readable is 0, with a note"),
]


@pytest.mark.parametrize(
    ("replies", "score", "average", "yes", "no", "judged", "rule"), SCORES, ids=[s[-1] for s in SCORES]
)
def test_figures_by_hand(root, replies, score, average, yes, no, judged, rule):
    benchmark = Msvd(root)
    ids = ["10", "11", "12", "13"]
    benchmark.judge = Says({id: reply for id, reply in zip(ids, replies, strict=True) if reply})
    result = benchmark.score([Answer(int(id), "x") for id in benchmark.judge.replies])
    metrics = result.metrics["by_set"]["msvd"]
    assert result.score == pytest.approx(score)
    assert result.metrics["average_score"] == pytest.approx(average)
    assert (metrics["yes"], metrics["no"], metrics["judged"]) == (yes, no, judged)
    assert metrics["judged"] + metrics["unreadable"] == len(benchmark.judge.replies)
    assert len(result.question_scores) == yes + no
    assert has_note(result.notes, "no verdict of msvd") == (not yes + no)


def test_exclusions_are_noted(root):
    benchmark = Msvd(root)
    benchmark.judge = Says({"10": "?", "11": "{'pred': 'no'}"})
    notes = benchmark.score([Answer(10, "x"), Answer("11", "y")]).notes
    for mentions in (
        ("2 questions without an answer", ": 12, 13"),
        ("1 videos", "gone.mp4"),
        ("1 unreadable", ": 10"),
        ("1 replies without an integer score", ": 11"),
        ("greedy", "0.2"),
    ):
        assert has_note(notes, *mentions)


def test_last_of_several_answers_is_judged(root):
    benchmark = Msvd(root)
    benchmark.judge = Says({"10": YES, "11": NO})
    result = benchmark.score([Answer(11, "early"), Answer(10, "x"), Answer("11", "late")])
    assert [(case.id, case.fields["pred"]) for case in benchmark.judge.cases] == [("11", "late"), ("10", "x")]
    assert (result.score, result.metrics["by_set"]["msvd"]["judged"]) == (50, 2)
    assert has_note(result.notes, "1 questions", ": 11")


def test_several_sets_give_the_mean_of_their_accuracies(root):
    benchmark = BENCHMARKS["videoqa"](root, 0)
    assert [item.id for item in benchmark.items()][:2] == ["msvd/10", "msvd/12"]
    replies = dict.fromkeys((item.id for item in benchmark.items()), NO) | {"activitynet/v_1Q_x_3": YES}
    benchmark.judge = Says(replies)
    result = benchmark.score([Answer(item.question_id, "x", id=item.id) for item in benchmark.items()])
    assert result.score == pytest.approx((0 + 50) / 2)
    assert {name: row["accuracy"] for name, row in result.metrics["by_set"].items()} == {"msvd": 0, "activitynet": 50}
    assert has_note(result.notes, ": msrvtt, tgif")


def test_each_set_is_a_benchmark_of_its_own(root):
    for name in ("msvd", "activitynet"):
        assert BENCHMARKS[f"videoqa_{name}"](root, 0).name == f"videoqa_{name}"
    for name, place in (("msrvtt", "MSRVTT_Zero_Shot_QA"), ("tgif", "TGIF_Zero_Shot_QA")):
        with refused(f"{place}/test_q.json", "Video-ChatGPT"):
            BENCHMARKS[f"videoqa_{name}"](root, 0)


def test_a_sets_own_folder_will_do(root):
    assert len(Msvd(root / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA").items()) == 4
    assert len(Msvd(root / "GPT_Zero_Shot_QA").items()) == 4
    with refused("test_q.json"):
        VideoQa(root / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA")  # it would be taken for all four


def test_a_limit_takes_whole_videos_of_every_set(root):
    assert [item.id for item in Msvd(root, 1).items()] == ["10", "12"]
    ids = [item.id for item in VideoQa(root, 2).items()]
    assert ids == ["msvd/10", "msvd/12", "activitynet/v_1Q_x_3", "activitynet/v_1Q_x_4"]


def test_without_a_judge_there_is_no_score(root, tmp_path):
    benchmark = Msvd(root)
    with refused("judge", field="videoqa_msvd"):
        benchmark.score(answers(q10="x"))
    benchmark.judge = RequestFile(tmp_path / "r.jsonl")
    with refused(error=NotJudgedError, file="r.jsonl"):
        benchmark.score(answers(q10="x"))
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert row["custom_id"] == "10"
    assert "Correct Answer: ride\nPredicted Answer: x\n" in row["body"]["messages"][1]["content"]


def test_a_real_judge_end_to_end(root, tmp_path):
    def answer(body, number):
        return YES if "Predicted Answer: right" in body["messages"][1]["content"] else NO

    benchmark = Msvd(root)
    with chat_server(answer) as served:
        benchmark.judge = OpenAIJudge(OpenAIClient(served.url, key=""), tmp_path / "cache", model="m")
        result = benchmark.score(answers(q10="right", q11="wrong", q12="right", q13="wrong"))
    assert (result.score, result.metrics["judge"]) == (50, "m")
    assert {mark.id: (mark.value, mark.rule) for mark in result.question_scores}["11"] == (0, "judge: no, score 1")


def test_failing_judge_raises_data_error(root, tmp_path):
    benchmark = Msvd(root)
    with chat_server(lambda body, number: (403, {}, b"go away")) as served:
        benchmark.judge = OpenAIJudge(OpenAIClient(served.url, key="", retry_policy=RetryPolicy(attempts=1)), tmp_path)
        with refused("403", "go away", field="videoqa_msvd"):
            benchmark.score(answers(q10="x"))


@pytest.mark.parametrize(
    ("rows", "mention"),
    [([Answer(99, "x"), Answer(10, "y")], "1 of 2"), ([Answer("v_1Q_x_3", "x")], "v_1Q_x_3"), ([], "0 of 0")],
)
def test_answers_to_other_questions_are_refused(root, rows, mention):
    benchmark = Msvd(root)
    benchmark.judge = Says({"10": YES})
    with refused(mention, field="videoqa_msvd"):
        benchmark.score(rows)


def test_answers_to_another_set_with_the_same_ids_are_refused(root, tmp_path):
    benchmark = Msvd(root)
    benchmark.judge = Says({"10": YES})
    path = tmp_path / "merge.jsonl"
    path.write_text(json.dumps({"id": 10, "question": "what is on the table?", "answer": "a cup", "pred": "x"}) + "\n")
    with refused("question_id 10", "'what is on the table", file="merge.jsonl, line 1"):
        benchmark.score(read_answers(path).answers)
    path.write_text(json.dumps({"id": 10, "question": "what is a man doing?", "answer": "ride", "pred": "x"}) + "\n")
    assert benchmark.score(read_answers(path).answers).score == 100


@pytest.mark.parametrize(
    ("questions", "given", "file", "record", "field"),
    [
        (MSVD, MSVD_ANSWERS[:3], "test_a.json", None, None),
        ([*MSVD[:3], {"video_name": "v", "question": "q"}], MSVD_ANSWERS, "test_q.json", "row 4", "question_id"),
        ([{"question_id": 1, "question": "q"}], MSVD_ANSWERS, "test_q.json", "row 1", "video_name"),
        (MSVD, [{"answer": "a"}, {}, {"answer": "a"}, {"answer": "a"}], "test_a.json", "row 2", "answer"),
        ({"rows": MSVD}, MSVD_ANSWERS, "test_q.json", None, None),
    ],
)
def test_files_of_another_release_are_named(tmp_path, questions, given, file, record, field):
    write(tmp_path / "MSVD_Zero_Shot_QA", questions, given, "videos", [])
    with refused(file=file, record=record, field=field):
        Msvd(tmp_path).items()


def test_a_file_of_answers_that_is_missing_is_named(root):
    (root / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA" / "test_a.json").unlink()
    with refused("Video-ChatGPT", file="test_a.json"):
        Msvd(root).items()


def test_answers_are_paired_by_place_and_other_ids_are_noted(tmp_path):
    given = [{"answer": "a", "question_id": 11}, {"answer": "b", "question_id": 10}, {"answer": "c"}, {"answer": "d"}]
    write(tmp_path / "MSVD_Zero_Shot_QA", MSVD, [*given, {"answer": "e"}], "videos", [])
    benchmark = Msvd(tmp_path)
    assert {item.id: item.truth for item in benchmark.items()} == {"10": "a", "11": "b", "12": "c", "13": "d"}
    benchmark.judge = Says({"10": YES})
    notes = benchmark.score(answers(q10="x")).notes
    assert has_note(notes, "msvd: 1 answers") and has_note(notes, "msvd: 2 answers", "10, 11")


def test_equal_question_ids_stay_apart(tmp_path):
    rows = [
        {"video_name": "a", "question": "q", "question_id": 1},
        {"video_name": "b", "question": "r", "question_id": 1},
    ]
    write(tmp_path / "MSVD_Zero_Shot_QA", rows, MSVD_ANSWERS[:2], "videos", [])
    assert [item.id for item in Msvd(tmp_path).items()] == ["1", "1#2"]


def test_lmms_evals_rules_are_not_pretended(root):
    benchmark = Msvd(root)
    benchmark.judge = Says({"10": YES})
    notes = benchmark.score(answers(q10="x"), "lmms-eval").notes
    assert has_note(notes, "lmms-eval")
