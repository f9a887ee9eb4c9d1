"""What a client may send: the request for a chat completion, strictly typed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from vila.serve.unsupported import message_problems, problems


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
