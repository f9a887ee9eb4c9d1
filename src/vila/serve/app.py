"""The application: its addresses, and its errors in the protocol's form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from vila import __version__
from vila.core.errors import VilaError
from vila.serve.admission import AllowedHosts
from vila.serve.chat import Service
from vila.serve.errors import ApiError, internal_error, to_api_error
from vila.serve.middleware import RequestMiddleware, respond
from vila.serve.schema import INLINE_BYTES, ChatRequest, parse_request

_PROBLEM = {"description": "An error object", "content": {"application/json": {"schema": {"type": "object"}}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: _PROBLEM for status in (400, 401, 403, 404, 405, 408, 413, 429, 431, 499, 500, 503, 504)
}

_SCHEMAS = "#/components/schemas/{model}"
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=ChatRequest.__name__)}}},
    }
}


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    hosts: AllowedHosts | None = None,
    root_path: str = "",
    **timings: float,
) -> FastAPI:
    """The application of one server.

    keys:      that open `/v1`; none leaves it open.
    origins:   web pages that may ask from a browser; `*` for all.
    hosts:     names under which it answers; None for all.
    root_path: under which a proxy shows it.
    timings:   `body_s` and `stall_s` of `RequestMiddleware`.
    """
    # The pages of documentation would be fetched from elsewhere.
    app = FastAPI(title="vila", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(RequestMiddleware, service=service, keys=keys, hosts=hosts, root_path=root_path, **timings)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.openapi = partial(_describe, app, app.openapi)  # type: ignore[method-assign]
    _add_errors(app)
    _add_chat(app, service)
    _add_state(app, service)
    return app


def _describe(app: FastAPI, describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI description, with the schema of the request, which the application parses itself."""
    if app.openapi_schema is None:
        described = describe()
        schema = ChatRequest.model_json_schema(ref_template=_SCHEMAS)
        parts = {**schema.pop("$defs", {}), ChatRequest.__name__: schema}
        described.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        app.openapi_schema = described
    return app.openapi_schema


def _add_chat(app: FastAPI, service: Service) -> None:
    models = service.models

    @app.post("/v1/chat/completions", responses=_PROBLEMS, response_model=None, openapi_extra=_REQUEST_BODY)
    async def complete(request: Request) -> Response:
        """Answer a conversation."""
        body = await request.body()
        if len(body) <= INLINE_BYTES:
            return await service.answer(parse_request(body, request.headers), request)
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(service.threads.parsing, parse_request, body, request.headers)
        return await service.answer(asked, request)

    @app.get("/v1/models", responses=_PROBLEMS)
    async def list_models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [model.card for model in models.models]}

    @app.get("/v1/models/{name:path}", responses=_PROBLEMS)
    async def show_model(name: str) -> dict[str, Any]:
        """One of them, under any of its names."""
        return models.find(name).card


def _add_state(app: FastAPI, service: Service) -> None:
    models = service.models

    @app.get("/health", responses=_PROBLEMS)
    async def health() -> JSONResponse:
        """Whether the process can answer: 503 once the thread of a model's engine has ended by an error."""
        if models.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "dead", "models": {model.name: model.state for model in models.models}}, 503)

    @app.get("/ready", responses=_PROBLEMS)
    async def ready() -> JSONResponse:
        """Whether every model is loaded and requests are taken."""
        states = {model.name: model.state for model in models.models}
        if models.is_ready:
            return JSONResponse({"status": "ready", "models": states})
        status = "stopping" if models.draining else "loading" if models.is_alive else "dead"
        return JSONResponse({"status": status, "models": states}, 503, {"Retry-After": "2"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refuse_address(request: Request, error: HTTPException) -> JSONResponse:
        words = {
            404: "no such address; the server has POST /v1/chat/completions, GET /v1/models, /health, /ready, /metrics",
            405: f"{request.method} is not possible here",
        }
        message = words.get(error.status_code, str(error.detail))
        return respond(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    async def tell(request: Request, error: Exception) -> JSONResponse:
        return respond(to_api_error(error) or internal_error(request.state.request_id))

    app.add_exception_handler(ApiError, tell)
    app.add_exception_handler(VilaError, tell)
