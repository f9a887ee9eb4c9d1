"""Request schema of the chat completions API (pydantic, strict), and parsing of request bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from vila.core.reading import lone_surrogate, parse_json
from vila.serve.errors import ApiError, validation_error

MAX_VALUES = 100_000
"""Values of a body: list elements and object members, at any depth."""
MAX_DEPTH = 64
"""Nesting depth of a body."""
INLINE_BYTES = 16 * 1024
"""Bodies up to this size are parsed in the event loop, which takes a few milliseconds."""

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
"""Parameters of the OpenAI API that do not change the answer and are ignored."""

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
"""Unsupported parameters, with the values (in addition to null) that have no effect and are accepted."""

IGNORED_IN_MESSAGES = frozenset({"name", "reasoning_content", "reasoning"})
"""Message fields that no chat template uses: the speaker's name, and the reasoning of an earlier answer."""
MAX_NAMES = 20
"""Unknown names that are reported per object; further ones are counted."""
_MAX_NAME_LENGTH = 60


def _parameter_problems(extra: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return the problems of parameters that the schema does not have; `known` are the ones it has."""
    wrong = [
        name
        for name, value in extra.items()
        if name not in IGNORED and not (name in NEUTRAL and (value is None or value in NEUTRAL[name]))
    ]

    def describe(name: str) -> str:
        if name in NEUTRAL:
            return "is not supported and would change the answer; remove it"
        near = get_close_matches(name, known, n=1) if len(name) <= _MAX_NAME_LENGTH else []
        return "unknown parameter" + (f"; did you mean {near[0]!r}?" if near else "")

    return _name_problems(wrong, describe)


def _message_problems(extra: Mapping[str, Any]) -> list[str]:
    """Return the problems of further message fields. The empty fields of an earlier answer are accepted."""
    wrong = [
        name
        for name, value in extra.items()
        if not (name in IGNORED_IN_MESSAGES and isinstance(value, str)) and value not in (None, [], "", {})
    ]
    return _name_problems(wrong, lambda name: "is not supported in a message; remove it")


def _name_problems(names: list[str], describe: Callable[[str], str]) -> list[str]:
    def shortened(name: str) -> str:
        return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 3]}..."

    problems = [f"{shortened(name)}: {describe(name)}" for name in names[:MAX_NAMES]]
    return [*problems, f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else problems


def _check_encodable(text: str) -> str:
    if lone_surrogate(text) is not None:
        raise ValueError("contains half of a surrogate pair, which is not a character")
    return text


def _as_url_object(value: Any) -> Any:
    """Accept a plain URL in place of the URL object, as some clients send it."""
    return {"url": value} if isinstance(value, str) else value


EncodableText = Annotated[str, AfterValidator(_check_encodable)]
_StopText = Annotated[EncodableText, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    # Python's JSON parser accepts NaN and Infinity.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """Text. Image placeholders and special tokens in it have no special meaning."""

    type: Literal["text"]
    text: EncodableText


class ImageUrl(_Strict):
    """URL of an image. `detail` is accepted and ignored: the model defines the resolution."""

    url: EncodableText
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Strict):
    """An image: an http(s) or data URL."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url_object)]

    @property
    def url(self) -> str:
        """The URL."""
        return self.image_url.url


class VideoUrl(_Strict):
    """URL of a video, and the number of frames to sample; default: the model's."""

    url: EncodableText
    num_frames: int | None = Field(None, ge=1, le=64)


class VideoPart(_Strict):
    """A video: an http(s) or data URL."""

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_url_object)]

    @property
    def url(self) -> str:
        """The URL."""
        return self.video_url.url


Part = TextPart | ImagePart | VideoPart
# fail_fast: only the first invalid element of a list is reported.
_Parts = Annotated[list[Annotated[Part, Field(discriminator="type")]], Field(max_length=1024, fail_fast=True)]


def _content_tag(content: Any) -> str:
    return "<text>" if isinstance(content, str) else "<parts>"


Content = Annotated[
    Annotated[EncodableText, Tag("<text>")] | Annotated[_Parts, Tag("<parts>")], Discriminator(_content_tag)
]
Stop = Annotated[
    Annotated[_StopText, Tag("<text>")]
    | Annotated[list[_StopText], Field(max_length=16, fail_fast=True), Tag("<parts>")],
    Discriminator(_content_tag),
]


class ChatMessage(_Strict):
    """One message. The role `developer` is equivalent to `system`."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _accept_null_answer(cls, value: Any) -> Any:
        # Clients send an earlier answer back unchanged, and an empty one may have null content.
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @model_validator(mode="after")
    def _check_extra(self) -> ChatMessage:
        _raise_problems(_message_problems(self.model_extra or {}))
        return self

    @property
    def parts(self) -> list[Part]:
        """The content as a list of parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The text of all parts, without media."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


class StreamOptions(_Strict):
    """Options of a streamed answer. `include_obfuscation` is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """A chat completion request. Unsupported OpenAI parameters are rejected if they would change the answer."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=1000)
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="Default 0: greedy decoding.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="Extension; 0 and -1 disable it.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Extension.")
    stop: Stop | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=16)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_request(self) -> ChatRequest:
        found = _parameter_problems(self.model_extra or {}, list(type(self).model_fields))
        if self.top_logprobs and not self.logprobs:
            found.append("top_logprobs: requires logprobs=true")
        if self.stream_options is not None and not self.stream:
            found.append("stream_options: requires stream=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            found.append("max_tokens: differs from max_completion_tokens; send one of them")
        _raise_problems(found)
        return self

    @property
    def limit(self) -> int | None:
        """Maximum number of new tokens, None if the client sets none."""
        return self.max_completion_tokens or self.max_tokens


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def parse_request(body: bytes, headers: Mapping[str, str]) -> ChatRequest:
    """Parse and validate a request body. Raises ApiError (400) with the location of every problem.

    Time and memory grow linearly with the length of the body, whatever it holds.
    """
    _check_content_type(headers)
    if not body.strip():
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_value")
    check_shape(body)
    try:
        value = parse_json(body, file="the body", surrogates=True)
    except DataError as error:
        raise ApiError(400, str(error), code="invalid_value") from error
    if not isinstance(value, dict):
        problem = f"the body is a JSON {type(value).__name__}; send an object with model and messages"
        raise ApiError(400, problem, code="invalid_value")
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from error


def check_shape(body: bytes) -> None:
    """Check the number of values and the depth of a JSON body before it is parsed. Raises ApiError (400).

    Uses only searches and copies of the whole body, no Python loop over its characters.
    """
    outside = _outside_strings(body)
    values = sum(outside.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_VALUES:
        raise _too_many_values(values)
    depth = deepest = 0
    for mark in outside.translate(None, delete=_NO_BRACKETS):
        depth += 1 if mark in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ApiError(400, f"the body has {deepest} nested levels; the limit is {MAX_DEPTH}", code="invalid_value")


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _outside_strings(body: bytes) -> bytes:
    """Return the body without its strings, in which brackets and commas are text."""
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    quotes = bare.count(b'"')
    if quotes > 4 * MAX_VALUES:
        raise _too_many_values(quotes // 4)
    return b"".join(bare.split(b'"')[::2])


def _too_many_values(count: int) -> ApiError:
    return ApiError(400, f"the body has over {count:,} values; the limit is {MAX_VALUES:,}", code="invalid_value")


def _check_content_type(headers: Mapping[str, str]) -> None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Web pages of other origins can send other types without a CORS preflight request.
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        got = f"got {media_type[:60]}" if media_type else "it is missing"
        message = f"send the body with the header 'Content-Type: application/json'; {got}"
        raise ApiError(400, message, code="invalid_content_type")
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {encoding[:20]!r} is not supported; send the body unencoded"
        raise ApiError(400, message, code="invalid_content_encoding")
