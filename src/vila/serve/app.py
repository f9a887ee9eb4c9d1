"""The application: its addresses, and its errors in the protocol's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from vila import __version__
from vila.core.errors import VilaError
from vila.serve.chat import Service
from vila.serve.errors import ApiError, as_api_error, as_refusal, internal
from vila.serve.guard import Guard, respond
from vila.serve.schema import ChatRequest

_PROBLEM = {"description": "An error object", "content": {"application/json": {"schema": {"type": "object"}}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: _PROBLEM for status in (400, 401, 404, 405, 408, 413, 429, 499, 500, 503, 504)
}


def create_app(
    service: Service, *, keys: Sequence[str] = (), origins: Sequence[str] = (), root_path: str = "", body_s: float = 60
) -> FastAPI:
    """The application of one server.

    keys:      that open `/v1`; none leaves it open.
    origins:   web pages that may ask from a browser; `*` for all.
    root_path: under which a proxy shows it.
    body_s:    seconds that the body of a request may take.
    """
    # The pages of documentation would be fetched from elsewhere.
    app = FastAPI(title="vila", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, service=service, keys=keys, root_path=root_path, body_s=body_s)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _add_errors(app)
    _add_chat(app, service)
    _add_state(app, service)
    return app


def _add_chat(app: FastAPI, service: Service) -> None:
    models = service.models

    @app.post("/v1/chat/completions", responses=_PROBLEMS, response_model=None)
    async def complete(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await service.answer(body, request)

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

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses=_PROBLEMS)
    async def ready() -> JSONResponse:
        """Whether every model is loaded and requests are taken."""
        states = {model.name: model.state for model in models.models}
        if models.is_ready:
            return JSONResponse({"status": "ready", "models": states})
        status = "stopping" if models.draining else "loading"
        return JSONResponse({"status": status, "models": states}, 503, {"Retry-After": "2"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(as_refusal(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_address(request: Request, error: HTTPException) -> JSONResponse:
        words = {
            400: "the body cannot be read: it is not JSON in UTF-8",
            404: "no such address; the server has POST /v1/chat/completions, GET /v1/models, /health, /ready, /metrics",
            405: f"{request.method} is not possible here",
        }
        message = words.get(error.status_code, str(error.detail))
        return respond(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    async def tell(request: Request, error: Exception) -> JSONResponse:
        return respond(as_api_error(error) or internal(request.state.request_id))

    app.add_exception_handler(ApiError, tell)
    app.add_exception_handler(VilaError, tell)
