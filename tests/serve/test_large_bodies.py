"""Bodies that are expensive to parse are limited and parsed outside the event loop."""

import asyncio
import json
import threading

import httpx2
import pytest

from tests.serve.fixtures import ask, body, on_a_port, send
from tests.serve.test_bad_input import JSON, refusal
from vila.chat.tokenize import SpanTokenizer
from vila.serve import app as app_module
from vila.serve import schema
from vila.serve.app import create_app
from vila.serve.errors import ApiError
from vila.serve.schema import MAX_DEPTH, MAX_VALUES, ChatRequest, check_shape

WIDE = MAX_VALUES + 1


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 5_000_000,
        b"[" + b"[]," * WIDE,
        b'{"messages": [' + b"{}," * WIDE,
        b'{"messages": ' + b'{"a":1,' * WIDE,
        b"{" + b'"a":0,' * WIDE,
        b"[" + b'"",' * WIDE,
        b'["\\\\","' + b'",{"' * WIDE,
        b'"' * 5_000_000,
        b"[0" + b",0" * WIDE + b"]",
    ],
    ids=["deep", "lists", "objects", "nested", "members", "strings", "escapes", "quotes", "numbers"],
)
def test_too_many_values_are_rejected_before_parsing(service, monkeypatch, content):
    monkeypatch.setattr(schema, "parse_json", None)
    error = refusal(send(create_app(service), content=content, headers=JSON))
    assert (error["code"], error["param"]) == ("invalid_value", None)


def test_the_depth_is_bounded_and_text_is_not_counted():
    check_shape(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(ApiError):
        check_shape(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    text = '[{,"}]\\' * 2 * MAX_VALUES
    check_shape(json.dumps({"messages": [{"role": "user", "content": text}]}).encode())


def test_the_number_of_reported_names_is_limited(app, monkeypatch):
    looked = []
    monkeypatch.setattr(schema, "get_close_matches", lambda name, *rest, **more: looked.append(name) or [])
    names = {f"name_{number}": 1 for number in range(50_000)}
    error = refusal(send(app, content=json.dumps(body(**names)), headers=JSON))
    assert len(looked) <= 20
    assert "49,980 more" in error["message"]
    assert len(error["message"]) < 5_000


def test_long_unknown_names_are_shortened(app, monkeypatch):
    monkeypatch.setattr(schema, "get_close_matches", None)
    error = refusal(send(app, content=json.dumps(body(**{"x" * 2_000_000: 1})), headers=JSON))
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "messages",
    [
        [7] * 50_000,
        [{"role": "user", "content": [{}] * 40_000}],
        [{"role": "user", "content": [7] * 1000}] * 40,
        [{"role": "user", "content": "x", **{f"n{number}": 1 for number in range(45)}}] * 1024,
    ],
    ids=["messages", "parts", "parts of messages", "names of messages"],
)
def test_the_number_of_reported_elements_is_limited(monkeypatch, messages):
    counted = []
    refuse = schema.validation_error
    monkeypatch.setattr(schema, "validation_error", lambda problems: counted.append(len(problems)) or refuse(problems))
    with pytest.raises(ApiError) as raised:
        schema.parse_request(json.dumps(body(messages=messages)).encode(), JSON_LOWER)
    assert counted[0] <= 50
    assert len(raised.value.message) < 10_000


JSON_LOWER = {"content-type": "application/json"}


def test_parsing_a_large_body_does_not_block_others(service, monkeypatch):
    held, begun = threading.Event(), threading.Event()
    proper = schema.parse_request

    def slow(content, headers):
        if len(content) > schema.INLINE_BYTES:
            begun.set()
            assert held.wait(20)
        return proper(content, headers)

    monkeypatch.setattr(app_module, "parse_request", slow)

    async def both(port):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            large = body(user="x" * 2 * schema.INLINE_BYTES)
            waiting = asyncio.ensure_future(client.post("/v1/chat/completions", json=large))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            others = [
                (await client.get("/health")).status_code,
                (await client.post("/v1/chat/completions", json=body())).status_code,
            ]
            early = not waiting.done()
            held.set()
            return others, early, (await waiting).status_code

    with on_a_port(create_app(service)) as port:
        assert asyncio.run(both(port)) == ([200, 200], True, 200)


def test_overlong_text_is_rejected_before_tokenization(app, service, monkeypatch):
    tokenizer = service.models.models[0].batcher.engine.processor.span_tokenizer
    longest = tokenizer.longest_token
    monkeypatch.setattr(SpanTokenizer, "encode", None)
    text = "x" * (longest * 2048)
    error = refusal(ask(app, messages=[{"role": "user", "content": text}]))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("content", "headers", "code"),
    [
        (b"", JSON, "invalid_value"),
        (b"  \n", JSON, "invalid_value"),
        (b"\x1f\x8b\x08\x00", JSON, "invalid_value"),
        ('{"model": "tiny"}'.encode("utf-16"), JSON, "invalid_value"),
        (b"[{}]", JSON, "invalid_value"),
        (b"true", JSON, "invalid_value"),
        (b"{}", {"Content-Type": "text/plain"}, "invalid_content_type"),
        (b"{}", {}, "invalid_content_type"),
        (b"{}", {**JSON, "Content-Encoding": "gzip"}, "invalid_content_encoding"),
    ],
)
def test_other_json_types_are_named(app, content, headers, code):
    assert refusal(send(app, content=content, headers=headers))["code"] == code


def test_a_byte_order_mark_and_pretty_printing_are_read(app):
    content = b"\xef\xbb\xbf" + json.dumps(body(), indent=4).encode()
    assert send(app, content=content, headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_the_published_schema_has_the_request(app):
    described = send(app, "GET", "/openapi.json").json()
    path = described["paths"]["/v1/chat/completions"]["post"]
    assert path["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    parts = described["components"]["schemas"]
    assert set(parts["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    assert "ChatMessage" in parts and "$defs" not in json.dumps(described)
