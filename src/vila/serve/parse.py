"""From the bytes of a body to a checked request, in time and memory that grow with its length alone.

The work is bounded before it begins: a body of 32 MB may hold ten million values, an hour of error messages, or a
thousand brackets inside each other. Called in a thread for large bodies.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from vila.core.errors import DataError
from vila.core.reading import parse_json
from vila.serve.errors import ApiError, as_refusal
from vila.serve.schema import ChatRequest

MAX_VALUES = 100_000
"""Values of a body: elements of lists and members of objects, at any depth."""
MAX_DEPTH = 64
"""Brackets inside each other."""
INLINE_BYTES = 16 * 1024
"""Bodies up to this size are parsed in the event loop, within a few milliseconds."""

_BODY = "the body"


def parse_request(body: bytes, headers: Mapping[str, str]) -> ChatRequest:
    """Parse and check the body of a request for a chat completion. Raises ApiError, 400, with every problem's place."""
    _check_type(headers)
    if not body.strip():
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_value")
    check_shape(body)
    try:
        value = parse_json(body, file=_BODY, surrogates=True)
    except DataError as error:
        raise ApiError(400, str(error), code="invalid_value") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ApiError(400, f"the body is a JSON {kind}; send an object with model and messages", code="invalid_value")
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise as_refusal(error.errors(include_url=False, include_input=False)) from error


def check_shape(body: bytes) -> None:
    """Count values and depth before anything is built of them. Raises ApiError, 400.

    Everything here is a search or a copy of the whole body, not a step for each of its characters.
    """
    outside = _outside_strings(body)
    values = sum(outside.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_VALUES:
        raise _too_many(values)
    depth = deepest = 0
    for mark in outside.translate(None, delete=_NO_BRACKETS):
        depth += 1 if mark in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ApiError(400, f"the body is nested {deepest} deep; at most {MAX_DEPTH} are read", code="invalid_value")


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _outside_strings(body: bytes) -> bytes:
    """The body without its strings, where brackets and commas are only text."""
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    quotes = bare.count(b'"')
    if quotes > 4 * MAX_VALUES:
        raise _too_many(quotes // 4)
    return b"".join(bare.split(b'"')[::2])


def _too_many(count: int) -> ApiError:
    return ApiError(400, f"the body holds over {count:,} values; at most {MAX_VALUES:,} are read", code="invalid_value")


def _check_type(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page of another site can send any type but this without being asked for permission first.
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        given = f"not {kind[:60]}" if kind else "which is missing"
        message = f"send the body with the header 'Content-Type: application/json', {given}"
        raise ApiError(400, message, code="invalid_content_type")
    if (coding := headers.get("content-encoding", "identity").lower()) not in ("", "identity"):
        raise ApiError(
            400, f"Content-Encoding {coding[:20]!r}: send the body as it is", code="invalid_content_encoding"
        )
