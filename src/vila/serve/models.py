"""The models of a server: their names, whether they are loaded, and the batcher that answers for each."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import ConfigError
from vila.serve.admission import ConcurrencyLimit, reserved_slots
from vila.serve.errors import ApiError, unavailable

if TYPE_CHECKING:
    from vila.engine.batcher import Batcher
    from vila.engine.engine import Engine

_log = logging.getLogger("vila.serve")


@dataclass(frozen=True, slots=True)
class Batching:
    """Arguments of the batcher of each model."""

    max_num_seqs: int = 8
    kv_tokens: int = 0
    max_queue: int = 64
    prefill_chunk: int = 256

    @property
    def capacity(self) -> int:
        """Requests of a model that run and wait."""
        return self.max_num_seqs + self.max_queue


@dataclass
class ServedModel:
    """One model under its name and other names that requests may use; `load` reads it, in a thread of its own."""

    name: str
    load: Callable[[], Engine]
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    batcher: Batcher | None = None
    failure: Exception | None = None
    concurrency: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(1))

    @property
    def card(self) -> dict[str, Any]:
        """As the protocol lists it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vila"}

    @property
    def state(self) -> str:
        """`ready`, `loading`, `failed`, or `dead` once the engine's thread has ended by an error."""
        if self.batcher is not None:
            return "ready" if self.batcher.is_alive else "dead"
        return "failed" if self.failure is not None else "loading"


class Models:
    """All models of a server. They are loaded one after the other once `start` was called.

    Raises ConfigError when two have the same name.
    """

    def __init__(self, models: Sequence[ServedModel], batching: Batching) -> None:
        self.models, self.batching = tuple(models), batching
        self.draining = False
        self._by_name: dict[str, ServedModel] = {}
        for model in self.models:
            if not _is_encodable(model.name):
                raise ConfigError(
                    "not UTF-8 text, which no answer can name", field="--served-model-name", value=model.name
                )
            if model.name in self._by_name:
                raise ConfigError(f"two models are called {model.name!r}; give each its --served-model-name")
            self._by_name[model.name] = model
        for model in self.models:
            model.concurrency = ConcurrencyLimit(batching.capacity)
            for alias in model.aliases:
                self._by_name.setdefault(alias, model)

    @property
    def names(self) -> list[str]:
        """The names that are listed; aliases work besides."""
        return [model.name for model in self.models]

    @property
    def is_full(self) -> bool:
        """Whether no model has room for another request."""
        return all(model.concurrency.is_full for model in self.models)

    @property
    def is_alive(self) -> bool:
        """False once the thread of a model's engine has ended by an error."""
        return all(model.state != "dead" for model in self.models)

    @property
    def is_ready(self) -> bool:
        """Whether every model is loaded and requests are taken."""
        return not self.draining and all(model.state == "ready" for model in self.models)

    def find(self, name: str) -> ServedModel:
        """The model of a name. Raises ApiError, 404 with the names that there are."""
        model = self._by_name.get(name)
        if model is None:
            shown = name if len(name) <= 100 else f"{name[:97]}..."
            message = f"no model {shown!r} here; this server has {', '.join(map(repr, self.names))}"
            raise ApiError(404, message, "model", "model_not_found")
        return model

    def batcher(self, model: ServedModel) -> Batcher:
        """What answers for a model. Raises ApiError, 503, while it is loading or the server is stopping."""
        if self.draining:
            raise unavailable("the server is stopping and takes no new requests")
        if model.batcher is None:
            raise unavailable(f"the model {model.name!r} is still loading; ask again in a moment")
        return model.batcher

    def start(self, failed: Callable[[ServedModel], None]) -> None:
        """Load all models in the background; `failed` hears of one that cannot be."""
        threading.Thread(target=self._load, args=(failed,), name="vila-load", daemon=True).start()

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait for those that run; whether all of them were answered in time."""
        self.draining = True
        until = time.monotonic() + seconds
        batchers = [model.batcher for model in self.models if model.batcher is not None]
        return all([batcher.drain(max(0.0, until - time.monotonic())) for batcher in batchers])

    def close(self) -> None:
        """End what still runs."""
        self.draining = True
        for model in self.models:
            if model.batcher is not None:
                model.batcher.close()

    def _load(self, failed: Callable[[ServedModel], None]) -> None:
        for model in self.models:
            begun = time.monotonic()
            try:
                model.batcher = self._ready(model.load())
            except Exception as error:  # noqa: BLE001 - whatever it is, the server is to say it and end
                model.failure = error
                failed(model)
                return
            _log.info("model %s is ready after %.1f s", model.name, time.monotonic() - begun)

    def _ready(self, engine: Engine) -> Batcher:
        from vila.engine.batcher import Batcher

        settings = self.batching
        batcher = Batcher(
            engine,
            max_num_seqs=settings.max_num_seqs,
            kv_tokens=settings.kv_tokens,
            max_queue=settings.max_queue + reserved_slots(settings.capacity),
            prefill_chunk=settings.prefill_chunk,
        )
        batcher.start()
        return batcher


def default_name(model: str) -> str:
    """What a model is called by default: a directory by its own name, or by its parent's where that is `model`."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    # Bytes of a file name that are not UTF-8 have no place in JSON.
    return name.encode("utf-8", "replace").decode()


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
