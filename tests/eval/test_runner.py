"""Benchmark runner: resume, several processes, failing questions."""

import json
import threading
from dataclasses import replace

import pytest

from tests.eval.checks import refused
from tests.eval.fake_models import FakeModel
from tests.other_process import HOST, PID, locked_elsewhere
from tests.pages import numbers
from vila.core.errors import ContextOverflowError, DataError, DirectoryInUseError, MediaError
from vila.core.system import ProcessInfo
from vila.core.types import Image, Message
from vila.eval.benchmark import Answer, Benchmark, BenchmarkResult, Item, QuestionScore, missing_media
from vila.eval.predictions import read_predictions
from vila.eval.runner import batches, run_benchmark


class Numbers(Benchmark):
    """Questions that are numbers; right answers double them. Three about each image."""

    name = "numbers"
    max_new_tokens = 4

    def __init__(self, count=40):
        self._items = [
            Item(f"q{n}", (Message.of("user", Image(f"{n // 3}.png"), str(n)),), str(2 * n), group=str(n // 3))
            for n in range(count)
        ]

    def load_items(self):
        return self._items

    def score(self, answers, protocol="upstream"):
        by_id = {answer.id: answer.text for answer in answers}
        if len(by_id) < len(self._items):
            raise DataError(f"{len(self._items) - len(by_id)} answers are missing")
        question_scores = tuple(QuestionScore(i.id, float(by_id[i.id] == i.truth), i.group) for i in self._items)
        return BenchmarkResult(
            100 * sum(m.value for m in question_scores) / len(question_scores), "%", {}, question_scores
        )


class Doubler(FakeModel):
    """Doubles numbers; raises for some of them."""

    def __init__(self, fails=(), dies_after=None):
        self.fails, self.dies_after, self.asked = set(fails), dies_after, []

    def generate(self, conversations, sampling):
        numbers = [int(c[-1].text) for c in conversations]
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        if bad := self.fails & set(numbers):
            raise MediaError(f"image of {sorted(bad)[0]}: not an image")
        self.asked += numbers
        return [str(2 * n) for n in numbers]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("vila.eval.runner._BATCH_GROUPS", 4)


def rows(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_predictions_are_in_question_order_with_upstream_keys(tmp_path):
    result = run_benchmark(Doubler(), Numbers(), tmp_path)
    assert result.result.score == 100
    assert [row["id"] for row in rows(tmp_path)] == [f"q{n}" for n in range(40)]
    assert rows(tmp_path)[3] == {"id": "q3", "question_id": "q3", "prompt": "3", "text": "6", "truth": "6"}
    assert json.loads((tmp_path / "scores.json").read_text())["interval"]["groups"] == 14
    assert not list(tmp_path.glob("part-*"))


def test_interrupted_run_generates_only_missing_answers(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Doubler(dies_after=12), Numbers(), tmp_path)
    rest = Doubler()
    assert run_benchmark(rest, Numbers(), tmp_path).answered == 40 - 12
    assert len(rest.asked) == 40 - 12
    whole = tmp_path / "whole"
    run_benchmark(Doubler(), Numbers(), whole)
    assert rows(whole) == rows(tmp_path)


def test_a_directory_that_another_process_fills_is_refused_with_host_and_pid(tmp_path):
    with locked_elsewhere(tmp_path / "out"), pytest.raises(DirectoryInUseError) as caught:
        run_benchmark(Doubler(), Numbers(), tmp_path / "out")
    assert (caught.value.file, caught.value.host, caught.value.pid) == (str(tmp_path / "out"), HOST, PID)
    assert run_benchmark(Doubler(), Numbers(), tmp_path / "out").result.score == 100
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize("change", ["text", "truth"])
def test_questions_that_changed_between_a_stop_and_the_next_run_are_refused(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Doubler(dies_after=12), Numbers(), tmp_path)
    changed = Numbers()
    first = changed._items[0]
    new = {"text": {"messages": (Message.of("user", Image("0.png"), "5"),)}, "truth": {"truth": "1"}}[change]
    changed._items[0] = replace(first, **new)
    with pytest.raises(DataError):
        run_benchmark(Doubler(), changed, tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({key: facts[key] for key in facts if key != "questions_sha256"}))
    assert run_benchmark(Doubler(), Numbers(), tmp_path).result.score == 100  # begun by an earlier version


def test_one_bad_image_costs_one_answer_and_is_asked_again_by_the_next_run(tmp_path):
    result = run_benchmark(Doubler(fails=[7]), Numbers(), tmp_path)
    assert result.result is None
    assert numbers(result.problem) == [1, 1]
    assert result.failed == {"q7": "MediaError: image of 7: not an image"}
    assert rows(tmp_path)[7] == {"id": "q7", "error": "MediaError: image of 7: not an image"}
    with pytest.raises(DataError) as caught:
        _ = result.scores
    assert (caught.value.field, caught.value.problem) == ("numbers", result.problem)
    again = Doubler()
    assert run_benchmark(again, Numbers(), tmp_path).result.score == 100
    assert set(again.asked) >= {7}


def test_generation_limit_is_halved_to_fit_the_context(tmp_path):
    class Small(Doubler):
        def generate(self, conversations, sampling):
            if sampling.max_new_tokens > 100:
                raise ContextOverflowError("the prompt has 400 tokens")
            return super().generate(conversations, sampling)

    questions = Numbers(6)
    questions.max_new_tokens = 1024
    assert run_benchmark(Small(), questions, tmp_path).result.score == 100


def test_two_processes_give_the_report_of_one(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_benchmark(Doubler(), Numbers(), alone)
    barrier = threading.Barrier(2)
    engines = [Doubler(), Doubler()]

    def other():
        assert (
            run_benchmark(engines[1], Numbers(), shared, process=ProcessInfo(1, 2, 1, 2), barrier=barrier.wait) is None
        )

    thread = threading.Thread(target=other)
    thread.start()
    result = run_benchmark(engines[0], Numbers(), shared, process=ProcessInfo(0, 2, 0, 2), barrier=barrier.wait)
    thread.join()
    assert result.result.score == 100
    assert rows(shared) == rows(alone)
    assert (shared / "scores.json").read_text() == (alone / "scores.json").read_text()
    assert not set(engines[0].asked) & set(engines[1].asked)
    assert min(len(engine.asked) for engine in engines) >= 12


def test_a_truncated_line_is_dropped_and_an_invalid_one_named(tmp_path):
    run_benchmark(Doubler(), Numbers(4), tmp_path)
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text() + '{"id": "q9", "te')
    assert len(read_predictions(tmp_path, [f"q{n}" for n in range(4)]).texts) == 4
    path.write_text(path.read_text() + '{"id": "q9", "text": "x"}\n')
    with refused("1 questions", "q9", file=tmp_path.name):
        run_benchmark(Doubler(), Numbers(4), tmp_path)


def test_batches_are_of_like_size_and_keep_images_whole():
    items = [
        Item(f"{n}/{k}", (Message.of("user", Image(f"{n}.png"), "x" * (10 * n + k)),), "", str(n))
        for n in range(9)
        for k in range(2)
    ]
    found = list(batches(items))
    assert [len(batch) for batch in found] == [8, 8, 2]
    assert [batch[0].group for batch in found] == ["8", "4", "0"]
    assert all(a.group == b.group for batch in found for a, b in zip(batch[::2], batch[1::2], strict=True))


def test_a_template_of_its_own_is_a_batch_of_its_own():
    items = [Item(str(n), (Message.of("user", "x"),), "", str(n), template=("a", "b")[n % 2]) for n in range(6)]
    assert [{item.template for item in batch} for batch in batches(items)] == [{"a"}, {"b"}]


def test_images_that_are_not_there_are_listed_once(tmp_path):
    (tmp_path / "here.png").write_bytes(b"x")
    names = [tmp_path / "here.png", tmp_path / "gone.png", tmp_path / "gone.png"]
    items = [Item(str(n), (Message.of("user", Image(name), "x"),), "", "") for n, name in enumerate(names)]
    assert missing_media(items) == [str(tmp_path / "gone.png")]


def test_answer_fields(tmp_path):
    seen = []

    class Asks(Numbers):
        def score(self, answers, protocol="upstream"):
            seen.extend(answers)
            return super().score(answers, protocol)

    run_benchmark(Doubler(), Asks(2), tmp_path)
    assert seen == [Answer("q0", "0", "0", "", "q0"), Answer("q1", "2", "1", "", "q1")]
