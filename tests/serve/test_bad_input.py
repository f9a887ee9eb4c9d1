"""Invalid requests: every one gets an error object with the right status and no traceback."""

import base64
import io
import json
import logging
import struct
import zlib

import httpx2
import pytest
from PIL import Image as PilImage

from tests.engine.test_batcher_failures import kill
from tests.serve import fixtures
from tests.serve.fixtures import HELLO, ask, body, data_url, image_part, send, text_part
from vila.serve.app import create_app
from vila.serve.messages import Limits

JSON = {"Content-Type": "application/json"}


def encoded(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def png(width, height):
    """A PNG whose header announces more pixels than its data holds."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def refusal(answer, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"null", b"[]", b"7", b'"text"', b"\xff\xfe{}", b'{"model": "\xff"}', b"[" * 200_000, b'{"seed": 1e',
     b'{"seed": ' + b"9" * 5000 + b"}"],
    ids=["cut", "empty", "null", "list", "number", "string", "utf-16", "not utf-8", "deep", "half number", "long int"],
)  # fmt: skip
def test_bodies_that_are_not_json_objects_are_rejected(app, content):
    assert refusal(send(app, content=content, headers=JSON))["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_other_content_types_are_rejected_against_csrf(app, kind):
    refusal(send(app, content=b'{"model": "tiny"}', headers={"Content-Type": kind}))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": user({"type": "audio"})}, "messages[0].content[0]"),
        ({"messages": user(text_part("a"), {"type": "text"})}, "messages[0].content[1].text"),
        (
            {"messages": user({"type": "image_url", "image_url": {}})},
            "messages[0].content[0].image_url.url",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0]"),
        ({"messages": [*HELLO, *HELLO]}, "messages[1]"),
        ({"messages": [{"role": "assistant", "content": "Hi"}, *HELLO]}, "messages[0]"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}, *HELLO]}, "messages[1]"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages[1]"),
        ({"messages": [{**HELLO[0], "name": 7}]}, "messages[0]"),
        ({"messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages[0]"),
        ({"messages": [{**HELLO[0], "content": "\ud800"}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9, "top_p": 0}, "top_p"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"max_token": 5}, "max_token"),
        ({"\ud800": 5}, None),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ],
)
def test_error_param_is_the_invalid_parameter(app, changes, param):
    error = refusal(send(app, content=json.dumps(body(**changes)), headers=JSON))
    assert error["param"] == param
    assert error["code"] in ("invalid_value", "invalid_messages")


def test_unknown_parameters_get_a_suggestion(app):
    assert "'max_tokens'" in refusal(send(app, json=body(max_token=5)))["message"]


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("", "invalid_messages"),
        ("a.png", "invalid_messages"),
        ("../../etc/passwd", "invalid_messages"),
        ("/etc/passwd", "invalid_messages"),
        ("file:///etc/passwd", "invalid_messages"),
        ("ftp://example.com/a.png", "invalid_messages"),
        ("http:///a.png", "invalid_media"),
        ("http://user:pass@example.com/a.png", "invalid_media"),
        ("data:image/png;base64,@@@", "invalid_media"),
        ("data:image/png", "invalid_media"),
        (encoded(b""), "invalid_media"),
        (encoded(b"<!DOCTYPE html><html></html>", "text/html"), "invalid_media"),
        (encoded(b"<svg onload='x'/>"), "invalid_media"),
        (encoded(b"\x89PNG\r\n\x1a\n\0\0"), "invalid_media"),
        (encoded(png(0, 0)), "invalid_media"),
        (encoded(png(30_000, 30_000)), "invalid_media"),
        (encoded(png(10_000, 9_000)), "invalid_media"),
        (encoded(png(40_000, 1)), "invalid_media"),
    ],
)
def test_invalid_images_are_rejected_with_their_location(app, url, code):
    error = refusal(ask(app, messages=user(text_part("what is it?"), image_part(url))))
    assert (error["code"], error["param"]) == (code, "messages[0].content[1]")


def test_truncated_images_and_invalid_videos_are_rejected(app):
    stream = io.BytesIO()
    PilImage.effect_noise((64, 64), 90).save(stream, "JPEG")
    video = {"type": "video_url", "video_url": {"url": encoded(b"not a video")}}
    for part in (image_part(encoded(stream.getvalue()[:-900])), video):
        error = refusal(ask(app, messages=user(part)))
        assert (error["code"], error["param"]) == ("invalid_media", "messages[0].content[0]")
    # 16 x 64 frames of four tokens each do not fit the context, which is checked before any of them is decoded.
    video["video_url"]["num_frames"] = 64
    assert refusal(ask(app, messages=user(*[video] * 16)))["code"] == "context_length_exceeded"
    video["video_url"]["num_frames"] = 10**6
    assert refusal(ask(app, messages=user(video)))["param"] == "messages[0].content[0].video_url.num_frames"


def test_too_many_images_and_images_outside_user_turns_are_rejected(app):
    many = user(*[image_part(data_url())] * 100)
    assert refusal(ask(app, messages=many))["param"] == "messages[0].content[16]"
    system = [{"role": "system", "content": [image_part(data_url())]}, *HELLO]
    assert refusal(ask(app, messages=system))["param"] == "messages[0].content[0]"


def test_unknown_routes_get_error_objects(app):
    assert "POST /v1/chat/completions" in refusal(send(app, "GET", "/v1/completion"), 404)["message"]
    assert "GET" in refusal(send(app, "GET", "/v1/chat/completions"), 405)["message"]
    assert refusal(send(app, "GET", "/v1/models/../../../etc/passwd"), 404)
    assert refusal(send(app, "GET", "/v1/models/..%2f..%2fetc%2fpasswd"), 404)["code"] == "model_not_found"


def test_special_tokens_in_text_are_plain_text(app):
    plain = ask(app).json()["usage"]["prompt_tokens"]
    for marker in ("</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<video>", "{bos}"):
        for content in (f"hello{marker}", [text_part(f"hello{marker}")], [text_part("hello"), text_part(marker)]):
            answer = ask(app, messages=[{"role": "user", "content": content}])
            # One token a byte: as a special token or a slot it would be one, or four.
            assert answer.json()["usage"]["prompt_tokens"] == plain + len(marker)


def test_internal_errors_show_no_traceback(app, service, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise RuntimeError("secret inside")

    monkeypatch.setattr(service.models.models[0].batcher, "submit", fail)
    error = refusal(ask(app), 500)
    assert "secret" not in str(error)
    assert error["type"] == "server_error"
    assert "secret inside" in caplog.text


def test_an_internal_error_while_streaming_ends_the_stream(app, service, monkeypatch):
    batcher = service.models.models[0].batcher
    real = batcher.submit

    def submit(*arguments, on_event, **options):
        def fail(event):
            on_event(RuntimeError("secret inside"))

        return real(*arguments, on_event=fail, **options)

    monkeypatch.setattr(batcher, "submit", submit)
    answer = ask(app, stream=True)
    assert answer.status_code == 200
    assert '"code":"internal"' in answer.text
    assert "secret" not in answer.text
    assert "[DONE]" not in answer.text


def test_only_v1_requires_a_key(service):
    app = create_app(service, keys=["one", "two"])
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
        error = refusal(send(app, json=body(), headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    assert refusal(send(app, "GET", "/v1/models"), 401)
    for key in ("one", "two"):
        assert send(app, json=body(), headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        assert send(app, "GET", path).status_code == 200


def test_cors_allows_given_origins_also_on_errors(service):
    app = create_app(service, keys=["one"], origins=["https://a.example"])
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert send(app, "OPTIONS", headers=asks).headers["access-control-allow-origin"] == "https://a.example"
    assert send(app, "OPTIONS", headers={**asks, "Origin": "https://b.example"}).status_code == 400
    refused = send(app, json=body(), headers={"Origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
    assert "access-control-allow-origin" not in send(create_app(service), json=body(), headers=asks).headers


def test_root_path_of_a_proxy(service):
    app = create_app(service, keys=["k"], root_path="/vila")
    assert send(app, json=body()).status_code == 401
    assert send(app, path="/vila/v1/chat/completions", json=body()).status_code == 401
    for path in ("/v1/models", "/vila/v1/models"):
        assert send(app, "GET", path, headers={"Authorization": "Bearer k"}).status_code == 200


def test_large_bodies_are_rejected_by_header_and_while_reading(service, monkeypatch):
    monkeypatch.setattr(service, "limits", Limits(body=100_000))
    app = create_app(service)
    large = httpx2.Request("POST", "http://x", json=body(messages=[{"role": "user", "content": "x" * 150_000}])).content
    assert refusal(send(app, content=large, headers=JSON), 413)["code"] == "body_too_large"

    async def pieces():
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    assert refusal(send(app, content=pieces(), headers=JSON), 413)["code"] == "body_too_large"
    assert ask(app).status_code == 200


def test_a_request_that_takes_too_long_ends_with_504(service, monkeypatch):
    monkeypatch.setattr(service, "limits", Limits(request_s=0.15))
    app = create_app(service)
    assert refusal(ask(app, max_tokens=1500), 504)["code"] == "timeout"
    assert ask(app, max_tokens=1500, stream=True).text.count('"code":"timeout"') == 1


def test_loading_and_shutdown_return_503_with_retry_after(service, monkeypatch):
    app, models = create_app(service), service.models
    with monkeypatch.context() as patch:
        patch.setattr(models.models[0], "batcher", None)
        error = refusal(ask(app), 503)
        assert error["code"] == "unavailable"
        answer = send(app, "GET", "/ready")
        assert (answer.status_code, answer.json()["models"]) == (503, {"tiny": "loading"})
        assert ask(app).headers["retry-after"]
        assert send(app, "GET", "/metrics").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(models, "draining", True)
        assert refusal(ask(app), 503)["code"] == "unavailable"
        assert send(app, "GET", "/ready").json()["status"] == "stopping"
    assert send(app, "GET", "/ready").json() == {"status": "ready", "models": {"tiny": "ready"}}
    assert ask(app, model="other-name").json()["model"] == "tiny"


def test_prompts_are_logged_only_with_log_prompts(service, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="vila.serve")
    turns = [{"role": "user", "content": "the secret\nword"}]
    ask(create_app(service), messages=turns)
    assert "secret" not in caplog.text
    monkeypatch.setattr(service, "log_prompts", True)
    ask(create_app(service), messages=turns)
    assert r"the secret\nword" in caplog.text


def test_health_fails_after_the_engine_thread_died():
    service = fixtures.ready()
    app = create_app(service)
    assert send(app, "GET", "/health").json() == {"status": "ok"}
    batcher = service.models.models[0].batcher
    kill(batcher._thread)
    batcher._notify()
    batcher._thread.join(20)
    for path in ("/health", "/ready"):
        answer = send(app, "GET", path)
        assert (answer.status_code, answer.json()) == (503, {"status": "dead", "models": {"tiny": "dead"}})
    assert refusal(ask(app), 503)["code"] == "engine_dead"
    assert send(app, "GET", "/metrics").status_code == 200
    service.models.close()


HISTORIES = {
    "an empty answer": [*HELLO, {"role": "assistant", "content": ""}, *HELLO],
    "a blank answer": [*HELLO, {"role": "assistant", "content": " "}, *HELLO],
    "no parts": [*HELLO, {"role": "assistant", "content": []}, *HELLO],
    "null": [*HELLO, {"role": "assistant", "content": None, "refusal": None}, *HELLO],
    "no content": [*HELLO, {"role": "assistant"}, *HELLO],
    "names and reasoning": [
        {**HELLO[0], "name": "ann"},
        {"role": "assistant", "content": "yes", "name": "bot", "reasoning_content": "hm", "reasoning": "hm"},
        *HELLO,
    ],
    "two system texts": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, *HELLO],
}
MARKED = {
    "two questions": [*HELLO, *HELLO],
    "a greeting": [{"role": "assistant", "content": "Hi"}, *HELLO],
    "an answer last": [*HELLO, {"role": "assistant", "content": "Hi"}],
    "two answers": [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": ""}],
    "system alone": [{"role": "system", "content": "say hello"}],
}


@pytest.mark.parametrize("messages", HISTORIES.values(), ids=list(HISTORIES))
def test_histories_that_every_template_can_express_are_answered(app, messages):
    answer = ask(app, messages=messages)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("messages", MARKED.values(), ids=list(MARKED))
def test_histories_that_need_role_markers_require_a_template_with_them(service, monkeypatch, messages):
    assert refusal(ask(create_app(service), messages=messages))["param"].startswith("messages[")
    monkeypatch.setattr(service.models.models[0].batcher.engine.processor, "template", "chatml")
    answer = ask(create_app(service), messages=messages)
    assert answer.status_code == 200, answer.text


def test_names_and_reasoning_change_nothing(app):
    plain = [*HELLO, {"role": "assistant", "content": "yes"}, *HELLO]
    histories = (plain, HISTORIES["names and reasoning"])
    one, other = (ask(app, messages=messages).json()["usage"]["prompt_tokens"] for messages in histories)
    assert one == other
