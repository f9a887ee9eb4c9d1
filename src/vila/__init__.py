"""Train, evaluate and run visual language models in VILA's three stages. Importing this imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "vila.engine.engine:Engine.load",
    "load_model": "vila.model.loading:load_model",
    "Engine": "vila.engine.engine:Engine",
    "SamplingParams": "vila.engine.sampling_params:SamplingParams",
    "Message": "vila.core.types:Message",
    "Text": "vila.core.types:Text",
    "Image": "vila.core.types:Image",
    "Video": "vila.core.types:Video",
    "Sample": "vila.core.types:Sample",
}

__all__ = [
    "Engine",
    "Image",
    "Message",
    "Sample",
    "SamplingParams",
    "Text",
    "Video",
    "__version__",
    "load",
    "load_model",
]

if TYPE_CHECKING:
    from vila.core.types import Image, Message, Sample, Text, Video
    from vila.engine.engine import Engine
    from vila.engine.sampling_params import SamplingParams
    from vila.model.loading import load_model

    load = Engine.load


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vila' has no attribute {name!r}")
    module, _, path = _PUBLIC[name].partition(":")
    value: Any = import_module(module)
    for attribute in path.split("."):
        value = getattr(value, attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
