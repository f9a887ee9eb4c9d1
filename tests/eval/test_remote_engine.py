"""`RemoteEngine`: request bodies, order, failures, and the runner on top."""

import base64
import io
import json
import threading

import pytest
from PIL import Image as PilImage

from tests import tiny
from tests.eval.chat_server import chat_server, completion
from tests.eval.checks import refused
from tests.model.test_exif_orientation import sideways
from vila.core.errors import ConfigError, MediaError
from vila.core.types import Image, Message, Video
from vila.engine.sampling_params import SamplingParams
from vila.eval.benchmark import Benchmark, BenchmarkResult, Item, QuestionScore
from vila.eval.openai_client import ChatCompletion, RemoteEngine, RetryPolicy, ServerError, data_url, request_body
from vila.eval.runner import run_benchmark

QUICK = RetryPolicy(attempts=2, backoff_s=0.01, max_wait_s=1)
GREEDY = SamplingParams(max_new_tokens=16)


def encoded(kind, colour=(200, 10, 10), size=(8, 6), **options):
    stream = io.BytesIO()
    PilImage.new("RGB", size, colour).save(stream, kind, **options)
    return stream.getvalue()


def decoded(url):
    head, _, content = url.partition(",")
    return head, base64.b64decode(content)


def engine(served, **options):
    return RemoteEngine(served.url, "m", **{"key": "", "retry_policy": QUICK, **options})


def texts(completions):
    return [one.text for one in completions]


def asked(text):
    return (Message.of("user", text),)


def test_request_body_with_two_images(tmp_path):
    jpeg, png = encoded("JPEG"), encoded("PNG")
    (tmp_path / "a.jpg").write_bytes(jpeg)
    conversation = [
        Message.of("system", "Be brief."),
        Message.of("user", Image(tmp_path / "a.jpg"), "\nWhat?"),
        Message.of("assistant", "red"),
        Message.of("user", "And ", Image(png), "\n\nhere?\n"),
    ]
    with chat_server(lambda body, number: " red\n") as served:
        assert texts(engine(served).complete([conversation], GREEDY, template="vicuna_v1")) == ["red"]
    assert served.bodies == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"},
                        },
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": "red"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "And "},
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"},
                        },
                        {"type": "text", "text": "\nhere?\n"},
                    ],
                },
            ],
            "temperature": 0.0,
            "max_tokens": 16,
        }
    ]
    assert "authorization" not in served.headers[0]


def test_exif_orientation_false_sends_the_stored_pixels():
    content = sideways()
    assert decoded(data_url(Image(content)))[1] == content
    upright = tiny.image(1, (40, 20)).source
    assert decoded(data_url(Image(upright), exif_orientation=False))[1] == upright
    sent = decoded(data_url(Image(content), exif_orientation=False))[1]
    with PilImage.open(io.BytesIO(sent)) as image, PilImage.open(io.BytesIO(upright)) as stored:
        assert image.getexif() == {}
        assert image.tobytes() == stored.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF"])
def test_other_formats_are_sent_as_png(kind):
    head, content = decoded(data_url(Image(encoded(kind, lossless=True))))
    assert head == "data:image/png;base64"
    with PilImage.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("PNG", (8, 6))


def test_image_in_memory_is_sent_as_png():
    image = PilImage.new("RGB", (3, 2), (1, 2, 3))
    head, content = decoded(data_url(Image(image)))
    with PilImage.open(io.BytesIO(content)) as sent:
        assert (head, sent.getpixel((0, 0))) == ("data:image/png;base64", (1, 2, 3))


def test_video_is_sent_as_frames():
    images = [PilImage.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(6)]
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:])
    for video, frames in ((Video(stream.getvalue()), 3), (Video(stream.getvalue(), num_frames=2), 2)):
        (message,) = request_body([Message.of("user", video, "what?")], "m", num_frames=3)["messages"]
        assert [part["type"] for part in message["content"]] == ["image_url"] * frames + ["text"]
        with PilImage.open(io.BytesIO(decoded(message["content"][0]["image_url"]["url"])[1])) as first:
            assert first.size == (8, 8)


def test_sampling_parameters_have_the_names_of_vllm():
    sampling = SamplingParams(max_new_tokens=9, temperature=0.2, top_p=0.9, top_k=5, seed=3, stop=("###",))
    body = request_body(asked("q"), "m", sampling, max_tokens_key="max_completion_tokens")
    assert {name: value for name, value in body.items() if name not in ("model", "messages")} == {
        "temperature": 0.2,
        "max_completion_tokens": 9,
        "seed": 3,
        "stop": ["###"],
        "top_p": 0.9,
        "top_k": 5,
    }


def test_requests_run_in_parallel_and_answers_are_in_order():
    gate = threading.Barrier(4, timeout=10)

    def answer(body, number):
        gate.wait()  # opens only when four requests are here together
        return body["messages"][0]["content"].upper()

    with chat_server(answer) as served:
        remote = engine(served, concurrency=4)
        found = remote.complete([asked(f"q{n}") for n in range(8)], GREEDY)
        assert found == [ChatCompletion(f"Q{n}", "stop", 100, 10) for n in range(8)]
        assert served.most_at_once == 4


def test_one_failing_question_does_not_repeat_the_others():
    def answer(body, number):
        text = body["messages"][0]["content"]
        return (400, {}, {"error": {"message": "too long"}}) if text == "q2" else text

    questions = [asked(f"q{n}") for n in range(5)]
    with chat_server(answer) as served:
        remote = engine(served)
        with pytest.raises(ServerError) as caught:
            remote.complete(questions, GREEDY)
        assert (caught.value.status, caught.value.final) == (400, False) and "too long" in caught.value.problem
        for number, question in enumerate(questions):
            if number == 2:
                with pytest.raises(ServerError):
                    remote.complete([question], GREEDY)
            else:
                assert texts(remote.complete([question], GREEDY)) == [f"q{number}"]
        assert len(served.bodies) == 5
        assert texts(remote.complete([questions[0]], GREEDY)) == ["q0"]
        assert len(served.bodies) == 6  # a cached result is used once


def test_unreadable_image_is_named(tmp_path):
    with chat_server(lambda body, number: "x") as served:
        remote = engine(served)
        with refused("none.png", error=MediaError):
            remote.complete([(Message.of("user", Image(tmp_path / "none.png"), "q"),)], GREEDY)
    assert not served.bodies


def test_final_error_is_not_repeated():
    with chat_server(lambda body, number: (404, {}, {"error": {"message": "no model m"}})) as served:
        remote = engine(served)
        for call in (remote.check, lambda: remote.complete([asked("q")] * 10, GREEDY)):
            with pytest.raises(ServerError) as caught:
                call()
            assert (caught.value.file, caught.value.status, caught.value.final) == (
                f"{served.url}/chat/completions", 404, True,
            )  # fmt: skip
        assert len(served.bodies) == 1
    with pytest.raises(ConfigError):
        RemoteEngine("http://localhost:1/v1", "")


def test_busy_server_is_retried():
    with chat_server(lambda body, number: (503, {}, b"") if number == 0 else "fine") as served:
        assert texts(engine(served).complete([asked("q")], GREEDY)) == ["fine"]
        assert len(served.bodies) == 2


class Shapes(Benchmark):
    name = "shapes"
    max_new_tokens = 4

    def load_items(self):
        return [Item(f"q{n}", (Message.of("user", tiny.image(n), f"\n{n}?"),), str(n), group=str(n)) for n in range(6)]

    def score(self, answers, protocol="upstream"):
        truths = {item.id: item.truth for item in self.items()}
        return BenchmarkResult(0, "%", {}, tuple(QuestionScore(a.id, float(a.text == truths[a.id])) for a in answers))


def test_runner_records_withheld_answers(tmp_path):
    def answer(body, number):
        text = body["messages"][0]["content"][1]["text"].rstrip("?")
        return (200, {}, completion("", "content_filter")) if text == "3" else text

    with chat_server(answer) as served:
        result = run_benchmark(engine(served), Shapes(), tmp_path)
    assert len(served.bodies) == 6
    assert result.predictions == {f"q{n}": str(n) for n in range(6) if n != 3}
    assert "content_filter" in result.failed["q3"]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert "text" not in rows[3]
