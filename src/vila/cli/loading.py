"""From the loading flags to a checkpoint, and from that to an engine: everything is checked before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from vila.core.errors import ConfigError, ContextOverflowError
from vila.core.events import Silent
from vila.core.optional import MissingExtraError
from vila.core.types import Message

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.engine.request import Sampling
    from vila.model.config import VilaConfig
    from vila.model.layouts.protocol import Checkpoint
    from vila.model.processor import VilaProcessor


@dataclass(frozen=True, slots=True)
class Loading:
    """Which model, and how. Empty strings and zeros stand for flags that were not given."""

    model: str
    template: str = ""
    base: str = ""
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    head_bits: int = 0
    activation_bits: int = 0
    threads: int = 0


def open_model(loading: Loading) -> Checkpoint:
    """The checkpoint, no weights read.

    Raises TemplateError when nothing says which template it has, ConfigError when a GPU is asked for that is not there.
    """
    from vila.model.load import open_checkpoint

    check_backend_flags(loading, choose_device(loading.device))
    checkpoint = open_checkpoint(
        loading.model,
        template=loading.template or None,
        base=loading.base or None,
        revision=loading.revision or None,
    )
    checkpoint.processor.find_template()
    return checkpoint


def load_engine(checkpoint: Checkpoint, loading: Loading) -> Engine:
    """The engine of an open checkpoint, its weights read now. Which backend was chosen is said on standard error."""
    from vila.engine.engine import Engine
    from vila.model.build import build_model
    from vila.model.precision import choose_dtype

    device = choose_device(loading.device)
    take_threads(loading.threads)
    model = build_model(checkpoint, choose_dtype(loading.dtype, device), device)
    bits = {"head_bits": loading.head_bits, "activation_bits": loading.activation_bits}
    return Engine.on_backend(model, checkpoint.processor, loading.backend, **bits, events=Aloud())


def check_backend_flags(loading: Loading, device: str) -> None:
    """Raises ConfigError for a backend that is unknown, missing, or cannot run on the device or with these flags."""
    from vila.engine.backend import check_backend

    try:
        check_backend(loading.backend, loading.head_bits, 0, device, loading.activation_bits)
    except MissingExtraError:
        raise
    except ConfigError as error:
        raise ConfigError(_as_backend_flags(str(error))) from error


def take_threads(count: int) -> None:
    """Let PyTorch, and with it every backend, use so many threads; 0 leaves them as they are."""
    import torch

    if count:
        torch.set_num_threads(count)


class Aloud(Silent):
    """Says lines on standard error."""

    def said(self, text: str) -> None:
        """A line for the reader."""
        typer.echo(text, err=True)


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


def _as_backend_flags(text: str) -> str:
    flags = {
        "backend='onnx'": "--backend onnx",
        "head_bits=": "--head-bits ",
        "activation_bits=": "--activation-bits ",
        "device='cpu'": "--device cpu",
    }
    for argument, flag in flags.items():
        text = text.replace(argument, flag)
    return text


def _as_flags(text: str) -> str:
    """The engine speaks of its arguments; here they are flags."""
    return text.replace('overlong="truncate"', "--truncate").replace("max_new_tokens", "--max-new-tokens")
