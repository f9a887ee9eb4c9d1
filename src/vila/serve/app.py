"""The FastAPI application: routes of the OpenAI chat API, health checks, metrics, and error responses."""

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
from vila.serve.errors import ApiError, internal_error, to_api_error, too_many_requests, unavailable
from vila.serve.middleware import BodyReader, RequestMiddleware
from vila.serve.schema import INLINE_BYTES, ChatRequest, parse_request

_ERROR = {"description": "An error object", "content": {"application/json": {"schema": {"type": "object"}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: _ERROR for status in (400, 401, 403, 404, 405, 408, 413, 429, 431, 499, 500, 503, 504)
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
    body_s: float = 60.0,
    stall_s: float = 15.0,
) -> FastAPI:
    """Return the application of one server.

    keys:      API keys for `/v1`; empty: no authentication.
    origins:   origins that CORS allows; `*` allows all.
    hosts:     allowed host names; None allows all.
    root_path: path prefix under which a reverse proxy exposes the server.
    body_s, stall_s: timeouts of a request body and between its chunks, in seconds.
    """
    # FastAPI's documentation pages load scripts from other hosts.
    app = FastAPI(title="vila", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(RequestMiddleware, metrics=service.metrics, keys=keys, hosts=hosts, root_path=root_path)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    _add_error_handlers(app)
    app.state.bodies = BodyReader(service.limits.body, 8 * service.limits.body, body_s, stall_s)
    _add_routes(app, service, app.state.bodies)
    return app


def _openapi(app: FastAPI, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document with the schema of the request body, which `parse_request` validates."""
    if app.openapi_schema is None:
        document = build()
        schema = ChatRequest.model_json_schema(ref_template=_SCHEMAS)
        schemas = {**schema.pop("$defs", {}), ChatRequest.__name__: schema}
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        app.openapi_schema = document
    return app.openapi_schema


def _add_routes(app: FastAPI, service: Service, bodies: BodyReader) -> None:
    models = service.models

    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=None, openapi_extra=_REQUEST_BODY)
    async def complete(request: Request) -> Response:
        """Create a chat completion."""
        if models.draining:
            raise unavailable()
        if models.is_full:
            raise too_many_requests("too many requests in progress; retry later", 1)
        body = await bodies.read(request.headers, request.receive, request.state.client)
        request.state.exits.callback(bodies.release, request.state.client, len(body))
        if len(body) <= INLINE_BYTES:
            return await service.answer(parse_request(body, request.headers), request)
        loop = asyncio.get_running_loop()
        parsed = await loop.run_in_executor(service.threads.parsing, parse_request, body, request.headers)
        return await service.answer(parsed, request)

    @app.get("/v1/models", responses=_ERRORS)
    async def list_models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [model.card for model in models.models]}

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def show_model(name: str) -> dict[str, Any]:
        """Describe a model by its name or an alias."""
        return models.find(name).card

    @app.get("/health", responses=_ERRORS)
    async def health() -> JSONResponse:
        """Liveness check: 503 once the thread of a model's engine has ended by an error."""
        if models.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "dead", "models": {model.name: model.state for model in models.models}}, 503)

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> JSONResponse:
        """Readiness check: 503 until every model is loaded, and during shutdown."""
        states = {model.name: model.state for model in models.models}
        if models.is_ready:
            return JSONResponse({"status": "ready", "models": states})
        status = "stopping" if models.draining else "loading" if models.is_alive else "dead"
        return JSONResponse({"status": status, "models": states}, 503, {"Retry-After": "2"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: "not found; routes: POST /v1/chat/completions, GET /v1/models, /health, /ready, /metrics",
            405: f"method {request.method} is not allowed here",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers or {}).response

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return (to_api_error(error) or internal_error(request.state.request_id)).response

    app.add_exception_handler(ApiError, handle)
    app.add_exception_handler(VilaError, handle)
