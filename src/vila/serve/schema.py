"""What a client may send: the request for a chat completion, strictly typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from vila.core.errors import DataError
from vila.core.reading import parse_json
from vila.serve.errors import ApiError, validation_error

# --- unsupported
# Parameters of the chat protocol that this server does not have: which may be ignored, and which are refused.


IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "service_tier",
        "prediction",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""They are for the bookkeeping of whoever serves, or make an answer faster at most."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "add_generation_prompt": (True,),
}
"""Values, besides null, with which a parameter says what is done anyway."""


IGNORED_IN_MESSAGES = frozenset({"name", "reasoning_content", "reasoning"})
"""No template has a place for them: the speaker's name, and what a model thought before an earlier answer."""
MAX_NAMES = 20
"""Names that are examined for a message; any more are counted."""
_LONGEST_NAME = 60


def problems(extra: Mapping[str, Any], known: list[str]) -> Iterator[str]:
    """What is wrong with the parameters of a request that its schema does not have; `known` are those it has."""
    wrong = [
        name
        for name, value in extra.items()
        if name not in IGNORED and not (name in NEUTRAL and (value is None or value in NEUTRAL[name]))
    ]
    for name in wrong[:MAX_NAMES]:
        if name in NEUTRAL:
            yield f"{name}: is not supported here, and would change the answer; leave it out"
            continue
        near = get_close_matches(name, known, n=1) if len(name) <= _LONGEST_NAME else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield f"{_short(name)}: unknown parameter{hint}"
    yield from _rest(wrong)


def message_problems(extra: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the further fields of a message. Those of an earlier answer, sent back, are empty."""
    wrong = [
        name
        for name, value in extra.items()
        if not (name in IGNORED_IN_MESSAGES and isinstance(value, str)) and value not in (None, [], "", {})
    ]
    for name in wrong[:MAX_NAMES]:
        yield f"{_short(name)}: is not supported in a message; leave it out"
    yield from _rest(wrong)


def _rest(wrong: list[str]) -> Iterator[str]:
    if len(wrong) > MAX_NAMES:
        yield f"and {len(wrong) - MAX_NAMES:,} more"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error
    return text


def _as_object(value: Any) -> Any:
    """Some clients give the address alone where the protocol has an object."""
    return {"url": value} if isinstance(value, str) else value


Words = Annotated[str, AfterValidator(_encodable)]
_StopText = Annotated[Words, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    # The numbers of JSON may be NaN and infinite in Python; nothing here has a use for them.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """A run of text. Nothing in it is read as a marker or a special token."""

    type: Literal["text"]
    text: Words


class ImageUrl(_Strict):
    """Where a picture is. Its detail is that of the model, whatever is asked for."""

    url: Words
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Strict):
    """A picture: an http(s) address or a data URL."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_object)]


class VideoUrl(_Strict):
    """Where a clip is, and how many frames are taken from it; by default as many as the model says."""

    url: Words
    num_frames: int | None = Field(None, ge=1, le=64)


class VideoPart(_Strict):
    """A clip: an http(s) address or a data URL."""

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_object)]


Part = TextPart | ImagePart | VideoPart
# The first wrong element of a list is reported, not each of thousands.
_Parts = Annotated[list[Annotated[Part, Field(discriminator="type")]], Field(max_length=1024, fail_fast=True)]


def _branch(content: Any) -> str:
    return "<text>" if isinstance(content, str) else "<parts>"


Content = Annotated[Annotated[Words, Tag("<text>")] | Annotated[_Parts, Tag("<parts>")], Discriminator(_branch)]
Stop = Annotated[
    Annotated[_StopText, Tag("<text>")]
    | Annotated[list[_StopText], Field(max_length=16, fail_fast=True), Tag("<parts>")],
    Discriminator(_branch),
]


class ChatMessage(_Strict):
    """One turn. `developer` is another name of `system`."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _empty_answer(cls, value: Any) -> Any:
        # Clients send an earlier answer back as it came, and one without text may come as null.
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @model_validator(mode="after")
    def _check_extra(self) -> ChatMessage:
        _refuse(list(message_problems(self.model_extra or {})))
        return self

    @property
    def parts(self) -> list[Part]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """Its text, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


class StreamOptions(_Strict):
    """Of a streamed answer. There is no obfuscation."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """A request for a chat completion. Further parameters of the protocol are refused where they would matter."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=1000)
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="By default 0: the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="An extension; 0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1, description="An extension.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="An extension.")
    stop: Stop | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=16)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_whole(self) -> ChatRequest:
        found = list(problems(self.model_extra or {}, list(type(self).model_fields)))
        if self.top_logprobs and not self.logprobs:
            found.append("top_logprobs: needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            found.append("stream_options: needs stream to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            found.append("max_tokens: differs from max_completion_tokens; give one of them")
        _refuse(found)
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, where the client says."""
        return self.max_completion_tokens or self.max_tokens


def _refuse(found: list[str]) -> None:
    if found:
        raise ValueError("; ".join(found))


# --- parse
# From the bytes of a body to a checked request, in time and memory that grow with its length alone.


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
        raise validation_error(error.errors(include_url=False, include_input=False)) from error


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
