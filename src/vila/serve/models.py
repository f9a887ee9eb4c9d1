"""The models of a server: names and aliases, loading in the background, and the batcher of each."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import ConfigError
from vila.core.reading import lone_surrogate
from vila.serve.admission import ConcurrencyLimit
from vila.serve.errors import ApiError, unavailable

if TYPE_CHECKING:
    from vila.engine.batcher import Batcher
    from vila.engine.engine import Engine

_log = logging.getLogger("vila.serve")


@dataclass(frozen=True, slots=True)
class Batching:
    """Batcher settings of each model; see `vila.engine.batcher.Batcher`."""

    max_num_seqs: int = 8
    kv_tokens: int = 0
    max_queue: int = 64
    prefill_chunk: int = 256

    @property
    def capacity(self) -> int:
        """Requests of a model that may run or wait."""
        return self.max_num_seqs + self.max_queue


@dataclass
class ServedModel:
    """A model with its name and aliases. `load` builds its engine and is called in a background thread."""

    name: str
    load: Callable[[], Engine]
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    batcher: Batcher | None = None
    failure: Exception | None = None
    concurrency: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(1))

    @property
    def card(self) -> dict[str, Any]:
        """The model object of the OpenAI API."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vila"}

    @property
    def state(self) -> str:
        """`ready`, `loading`, `failed`, or `dead` once the engine's thread has ended by an error."""
        if self.batcher is not None:
            return "ready" if self.batcher.is_alive else "dead"
        return "failed" if self.failure is not None else "loading"


class Models:
    """All models of a server. `start` loads them one after the other.

    Raises ConfigError if two models have the same name or a name is not valid UTF-8.
    """

    def __init__(self, models: Sequence[ServedModel], batching: Batching) -> None:
        self.models, self.batching = tuple(models), batching
        self.draining = False
        self._by_name: dict[str, ServedModel] = {}
        for model in self.models:
            if lone_surrogate(model.name) is not None:
                raise ConfigError("not valid UTF-8", field="--served-model-name", value=model.name)
            if model.name in self._by_name:
                hint = "give each its own name"
                raise ConfigError("two models have this name", field="--served-model-name", value=model.name, hint=hint)
            self._by_name[model.name] = model
        for model in self.models:
            model.concurrency = ConcurrencyLimit(batching.capacity)
            for alias in model.aliases:
                self._by_name.setdefault(alias, model)

    @property
    def names(self) -> list[str]:
        """Names of all models, without aliases."""
        return [model.name for model in self.models]

    @property
    def is_full(self) -> bool:
        """Whether every model rejects further requests."""
        return all(model.concurrency.is_full for model in self.models)

    @property
    def is_alive(self) -> bool:
        """False once the engine thread of a model has ended by an error."""
        return all(model.state != "dead" for model in self.models)

    @property
    def is_ready(self) -> bool:
        """Whether every model is loaded and requests are accepted."""
        return not self.draining and all(model.state == "ready" for model in self.models)

    def find(self, name: str) -> ServedModel:
        """Return the model with a name or alias. Raises ApiError (404), which lists the names."""
        model = self._by_name.get(name)
        if model is None:
            shown = name if len(name) <= 100 else f"{name[:97]}..."
            message = f"unknown model {shown!r}; this server has {', '.join(map(repr, self.names))}"
            raise ApiError(404, message, "model", "model_not_found")
        return model

    def batcher(self, model: ServedModel) -> Batcher:
        """Return the batcher of a model. Raises ApiError (503) while it is loading or the server is shutting down."""
        if self.draining:
            raise unavailable()
        if model.batcher is None:
            raise unavailable(f"the model {model.name!r} is still loading; retry later")
        return model.batcher

    def start(self, failed: Callable[[ServedModel], None]) -> None:
        """Load all models in a background thread; `failed` is called with a model that cannot be loaded."""
        threading.Thread(target=self._load, args=(failed,), name="vila-load", daemon=True).start()

    def drain(self, seconds: float) -> bool:
        """Stop accepting requests and wait for the running ones; return whether all ended in time."""
        self.draining = True
        until = time.monotonic() + seconds
        batchers = [model.batcher for model in self.models if model.batcher is not None]
        return all([batcher.drain(max(0.0, until - time.monotonic())) for batcher in batchers])

    def close(self) -> None:
        """Stop all batchers; requests that are still running end with an error."""
        self.draining = True
        for model in self.models:
            if model.batcher is not None:
                model.batcher.close()

    def _load(self, failed: Callable[[ServedModel], None]) -> None:
        for model in self.models:
            begun = time.monotonic()
            try:
                model.batcher = self._start_batcher(model)
            except Exception as error:  # noqa: BLE001 - the server reports any error and exits
                model.failure = error
                failed(model)
                return
            _log.info("model %s loaded in %.1f s", model.name, time.monotonic() - begun)

    def _start_batcher(self, model: ServedModel) -> Batcher:
        from vila.engine.batcher import Batcher

        settings = self.batching
        batcher = Batcher(
            model.load(),
            max_num_seqs=settings.max_num_seqs,
            kv_tokens=settings.kv_tokens,
            max_queue=settings.max_queue + model.concurrency.reserve,
            prefill_chunk=settings.prefill_chunk,
        )
        batcher.start()
        return batcher


def default_name(model: str) -> str:
    """Return a model's default name: the directory's name (its parent's if that is `model`), or the hub id."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    # File names may hold bytes that are not UTF-8, which JSON cannot carry.
    return name.encode("utf-8", "replace").decode()
