"""Errors as the chat protocol writes them: one object with a message, a type, a parameter and a code, and a status."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vila.core.errors import (
    CancelledError,
    ClosedError,
    ConfigError,
    ContextOverflowError,
    DataError,
    DeadlineError,
    EngineDeadError,
    MediaError,
    QueueFullError,
    TemplateError,
)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class ApiError(Exception):
    """What a client is told instead of an answer."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {key: value and _encodable(value) for key, value in told.items()}}


def unavailable(message: str, retry_after_s: float = 5) -> ApiError:
    """Loading, or draining: ask again later."""
    return ApiError(503, message, code="unavailable", headers=_retry(retry_after_s))


def busy(message: str, retry_after_s: float) -> ApiError:
    """Too much at once."""
    return ApiError(429, message, code="queue_full", headers=_retry(retry_after_s))


def to_api_error(error: BaseException) -> ApiError | None:
    """What a client is told of an error of ours; None for a fault that only the log may describe."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return busy(str(error), error.retry_after)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine of this model has stopped; the server has to be restarted", code="engine_dead")
    if isinstance(error, ClosedError):
        return unavailable("the server is stopping and takes no new requests")
    if isinstance(error, DeadlineError):
        return ApiError(504, f"{error}; ask for fewer tokens, or later", code="timeout")
    if isinstance(error, CancelledError):
        return ApiError(499, "the client closed the connection before the answer was complete", code="cancelled")
    if isinstance(error, ContextOverflowError):
        return ApiError(400, _as_parameters(str(error)), "messages", "context_length_exceeded")
    if isinstance(error, MediaError):
        return ApiError(400, str(error), _place(str(error)), "invalid_media")
    if isinstance(error, (DataError, TemplateError)):
        return ApiError(400, str(error), _place(str(error)) or "messages", "invalid_messages")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), code="invalid_value")
    return None


def internal_error(request_id: str) -> ApiError:
    """A fault of ours, without a word of what it was."""
    return ApiError(500, f"the server failed on this request; its log says more under {request_id}", code="internal")


MAX_SHOWN = 10
"""Problems of a body that its refusal names."""


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The refusal of a body by its schema: the first problems, and the first one's parameter."""
    if not problems:
        return ApiError(400, "the body is not a request", code="invalid_value")
    told = [(_path(problem["loc"]), _words(problem)) for problem in problems[:MAX_SHOWN]]
    lines = [f"{path}: {words}" if path else words for path, words in told]
    more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
    # What concerns the request as a whole begins with the parameter's name.
    path, colon, _ = lines[0].partition(": ")
    return ApiError(400, "; ".join(lines) + more, path if colon and " " not in path else None, "invalid_value")


def _words(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "list_type" and "content" in problem["loc"]:
        return "expected a string, or a list of parts"
    return str(problem["msg"]).removeprefix("Value error, ")


def _path(places: Iterable[str | int]) -> str:
    """Where in the body, as a person writes it: `messages[0].content[1].image_url.url`.

    The schema's names for branches of a union stand in between and are left out.
    """
    out: list[str] = []
    branch = False
    for place in places:
        if isinstance(place, int):
            out.append(f"[{place}]")
            branch = "content" in out
        elif branch or place.startswith("<"):
            branch = False
        else:
            out.append(place)
    return ".".join(out).replace(".[", "[")[:200]


def _place(message: str) -> str | None:
    place = message.split(" ", 1)[0].rstrip(":")
    return place if place.startswith("messages[") else None


def _as_parameters(text: str) -> str:
    """The engine speaks of its arguments; here they are parameters of the request."""
    turns = ', let overlong="truncate" drop its oldest turns,'
    return text.replace(turns, "").replace("max_new_tokens", "max_tokens").replace(", or raise kv_tokens", "")


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _encodable(text: str) -> str:
    # Half of a surrogate pair from the request may stand in its refusal, and no answer can carry it.
    return text.encode("utf-8", "replace").decode()
