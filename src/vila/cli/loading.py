"""From the loading flags to a checkpoint, and from that to an engine: everything is checked before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vila.core.errors import ConfigError, ContextOverflowError
from vila.core.types import Message

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.engine.request import Sampling
    from vila.model.config import VilaConfig
    from vila.model.layouts.protocol import Checkpoint
    from vila.model.processor import VilaProcessor


@dataclass(frozen=True, slots=True)
class Loading:
    """Which model, and how. Empty strings stand for flags that were not given."""

    model: str
    template: str = ""
    base: str = ""
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"


def open_model(loading: Loading) -> Checkpoint:
    """The checkpoint, no weights read.

    Raises TemplateError when nothing says which template it has, ConfigError when a GPU is asked for that is not there.
    """
    from vila.model.load import open_checkpoint

    choose_device(loading.device)
    checkpoint = open_checkpoint(
        loading.model,
        template=loading.template or None,
        base=loading.base or None,
        revision=loading.revision or None,
    )
    checkpoint.processor.find_template()
    return checkpoint


def load_engine(checkpoint: Checkpoint, loading: Loading) -> Engine:
    """The engine of an open checkpoint, its weights read now."""
    from vila.engine.engine import Engine
    from vila.model.build import build_model
    from vila.model.precision import choose_dtype

    device = choose_device(loading.device)
    model = build_model(checkpoint, choose_dtype(loading.dtype, device), device)
    return Engine(model, checkpoint.processor)


def choose_device(name: str) -> str:
    """`auto` is the GPU if there is one. Raises ConfigError when a GPU is asked for that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here; leave it out, or see vila doctor")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_fit(config: VilaConfig, processor: VilaProcessor, messages: Sequence[Message], sampling: Sampling) -> int:
    """How many of the oldest messages will be left out so that the prompt and its answer fit the context.

    Raises ContextOverflowError with the numbers, and TemplateError for roles out of order.
    """
    from vila.engine.context import fit_prompt

    try:
        _, dropped = fit_prompt(
            messages,
            processor.prompt,
            context=config.context_length,
            answer=sampling.max_new_tokens,
            overlong=sampling.overlong,
        )
    except ContextOverflowError as error:
        raise ContextOverflowError(_as_flags(str(error))) from error
    return dropped


def _as_flags(text: str) -> str:
    """The engine speaks of its arguments; here they are flags."""
    return text.replace('overlong="truncate"', "--truncate").replace("max_new_tokens", "--max-new-tokens")
