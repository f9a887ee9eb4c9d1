"""`vila score --judge`: answers about videos in the original's files, judged by replies from a file, or not yet."""

import json

import pytest


@pytest.fixture
def videos(tmp_path):
    """Data of one set, and the original's chunks of answers: the folders of both."""
    home = tmp_path / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA"
    home.mkdir(parents=True)
    rows = [{"video_name": f"vid{n}", "question": f"what is {n}?", "question_id": n} for n in range(4)]
    (home / "test_q.json").write_text(json.dumps(rows))
    (home / "test_a.json").write_text(json.dumps([{"answer": f"a{n}"} for n in range(4)]))
    (tmp_path / "answers").mkdir()
    for chunk in range(2):
        rows = [
            {"id": n, "question": f"what is {n}?", "answer": f"a{n}", "pred": f"it is {n}"}
            for n in (2 * chunk, 2 * chunk + 1)
        ]
        path = tmp_path / "answers" / f"2_{chunk}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, tmp_path / "answers"


def test_without_a_judge_the_requests_are_written_and_that_is_no_error(vila, videos):
    data, answers = videos
    call = ("score", "videoqa_msvd", "--data", data, "--predictions", answers, "--judge", "none")
    code, text, _ = vila(*call)
    path = data / "videoqa_msvd-requests.jsonl"
    assert code == 0
    assert str(path) in text
    assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == ["0", "1", "2", "3"]
    code, text, _ = vila(*call, "--json")
    row = json.loads(text)
    assert (code, row["benchmark"], row["score"]) == (0, "videoqa_msvd", None)
    assert str(path) in row["problem"]


def test_verdicts_that_the_originals_judge_left_are_scored(vila, videos):
    data, answers = videos
    (data / "judged").mkdir()
    for number, verdict in enumerate([{"pred": "yes", "score": 4.8}, {"pred": "no", "score": 2}, {"pred": "Yes"}]):
        (data / "judged" / f"{number}.json").write_text(json.dumps([verdict, {"q": "", "a": "", "pred": ""}]))
    code, text, _ = vila(
        "score", "videoqa_msvd", "--data", data, "--predictions", answers, "--judge", data / "judged", "--json"
    )
    row = json.loads(text)
    assert code == 0
    # 4.8 is cut to 4; the third has no score, and counts in the average alone; the fourth was never judged.
    assert (row["score"], row["average_score"]) == (50, 2)
