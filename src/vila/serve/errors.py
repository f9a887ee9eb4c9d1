"""OpenAI error objects (message, type, param, code) with their HTTP status, and the mapping from vila's errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

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
    VilaError,
)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_REPORTED = 10
"""Schema violations that one error message lists."""


@dataclass
class ApiError(Exception):
    """An error response."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The error object as JSON."""
        error_type = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": error_type, "param": self.param, "code": self.code}
        # Text from the request may hold half of a surrogate pair, which cannot be encoded as UTF-8.
        return {"error": {key: value and value.encode("utf-8", "replace").decode() for key, value in error.items()}}

    @property
    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, dict(self.headers))


def unavailable(message: str = "the server is shutting down and accepts no new requests") -> ApiError:
    """Return the 503 error: a model is loading, or the server is shutting down."""
    return ApiError(503, message, code="unavailable", headers=_retry_after(5))


def too_many_requests(message: str, retry_after_s: float) -> ApiError:
    """Return the 429 error: a queue or memory limit is reached."""
    return ApiError(429, message, code="queue_full", headers=_retry_after(retry_after_s))


def internal_error(request_id: str) -> ApiError:
    """Return the 500 error, without details of the failure."""
    return ApiError(500, f"internal server error; see the server's log for request {request_id}", code="internal")


def to_api_error(error: BaseException) -> ApiError | None:
    """Return the response for an error; None for an unexpected error, which is not shown to clients."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return too_many_requests(str(error), error.retry_after)
        case EngineDeadError():
            return ApiError(503, "the engine of this model has stopped; restart the server", code="engine_dead")
        case ClosedError():
            return unavailable()
        case DeadlineError():
            return ApiError(504, f"{error}; request fewer tokens or retry later", code="timeout")
        case CancelledError():
            return ApiError(499, "the client closed the connection before the answer was complete", code="cancelled")
        case ContextOverflowError():
            message = f"{error.problem}; shorten the messages or lower max_tokens"
            return ApiError(400, message, "messages", "context_length_exceeded")
        case MediaError():
            return ApiError(400, str(error), _message_field(error), "invalid_media")
        case DataError() | TemplateError():
            return ApiError(400, str(error), _message_field(error) or "messages", "invalid_messages")
        case ConfigError():
            return ApiError(400, str(error), code="invalid_value")
    return None


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the 400 response for pydantic's errors: the first `MAX_REPORTED`, with the parameter of the first one."""
    located = [(_json_path(problem["loc"]), _problem_text(problem)) for problem in problems[:MAX_REPORTED]]
    lines = [f"{path}: {text}" if path else text for path, text in located]
    more = f"; and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
    # Errors of the request as a whole have no location; their text begins with the parameter's name.
    path, colon, _ = lines[0].partition(": ")
    return ApiError(400, "; ".join(lines) + more, path if colon and " " not in path else None, "invalid_value")


def _problem_text(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "list_type" and "content" in problem["loc"]:
        return "expected a string, or a list of parts"
    return str(problem["msg"]).removeprefix("Value error, ")


def _json_path(location: Iterable[str | int]) -> str:
    """Format a pydantic location as `messages[0].content[1].image_url.url`, without the tags of union members."""
    out: list[str] = []
    is_tag = False
    for key in location:
        if isinstance(key, int):
            out.append(f"[{key}]")
            is_tag = "content" in out
        elif is_tag or key.startswith("<"):
            is_tag = False
        else:
            out.append(key)
    return ".".join(out).replace(".[", "[")[:200]


def _message_field(error: VilaError) -> str | None:
    """Return the part of `messages` that an error is about. Decoders report it as the file, followed by its address."""
    names = (name.partition(" ")[0] for name in (error.field, error.file) if name)
    return next((name for name in names if name.startswith("messages")), None)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
