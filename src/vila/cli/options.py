"""Flags shared by several commands, groups of flags, and the steps from flags to a checkpoint and an engine."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache, wraps
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer

from vila.core.errors import ConfigError, ContextOverflowError, UnknownNameError
from vila.core.progress import SILENT, Silent
from vila.core.types import Message

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.engine.sampling_params import SamplingParams
    from vila.model.config import VilaConfig
    from vila.model.layouts.base import Checkpoint
    from vila.model.processor import VilaProcessor


class Dtype(StrEnum):
    """Dtypes of weights in memory."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Device(StrEnum):
    """Devices that a model runs on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Backend(StrEnum):
    """Inference backends of the LLM."""

    AUTO = "auto"
    TORCH = "torch"
    ONNX = "onnx"


def choice(kind: type[StrEnum], name: str, **settings: Any) -> Any:
    """Return the option `--NAME` with the values of an enum; it raises UnknownNameError for others."""

    def parse(text: str) -> StrEnum:
        names = [one.value for one in kind]
        if text not in names:
            raise UnknownNameError(name, text, names, field=f"--{name}")
        return kind(text)

    return typer.Option(f"--{name}", parser=parse, metavar=f"[{'|'.join(kind)}]", **settings)


def output_directory(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Typer callback: expand `~` and check that a directory can be written, before any work starts."""
    return _checked_output(param, value, is_file=False)


def output_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Typer callback: expand `~` and check that a file can be written, before any work starts."""
    return _checked_output(param, value, is_file=True)


def _checked_output(param: typer.CallbackParam, value: Path | None, *, is_file: bool) -> Path | None:
    if value is None:
        return None
    from vila.core.files import check_writable

    path = value.expanduser()
    check_writable(path, field=param.opts[0], is_file=is_file)
    return path


# --- groups of flags


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Expand each parameter of `command` that is a dataclass of flags into one flag per field.

    The flags' defaults are the fields of the parameter's default; a parameter without one needs no defaults for its
    fields. Other parameters stay as they are.
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += _flags(groups[name], parameter.default)
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def wrapper(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{one.name: values.pop(one.name) for one in fields(kind)})
        command(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return wrapper


def _flags(group: Any, default: Any) -> list[inspect.Parameter]:
    """Return a flag for each field of a dataclass.

    Its help is the docstring below the field, its panel the attribute `panel` of the class; `typer.Option` in the
    annotation has precedence. A bool that is False by default has no `--no-NAME`.
    """
    hints = get_type_hints(group, include_extras=True)
    docs = {name: text for kind in reversed(group.__mro__) for name, text in _field_docs(kind).items()}
    flags = []
    for one in fields(group):
        value = inspect.Parameter.empty if default is inspect.Parameter.empty else getattr(default, one.name)
        kind, *infos = get_args(hints[one.name]) if get_origin(hints[one.name]) is Annotated else (hints[one.name],)
        flag = f"--{one.name.replace('_', '-')}"
        info = copy(infos[0]) if infos else typer.Option(flag) if value is False else typer.Option()
        info.help = info.help or docs[one.name]
        info.rich_help_panel = info.rich_help_panel or getattr(group, "panel", None)
        annotation = Annotated[kind, info]  # type: ignore[valid-type]
        flags.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation))
    return flags


def _field_docs(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields that a class itself defines."""
    if kind is object:
        return {}
    classes = [node for node in _module_tree(kind.__module__).body if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == kind.__name__)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


@cache
def _module_tree(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))


# --- flags

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, or Hugging Face Hub id OWNER/NAME.")]
ComputeDtype = Annotated[
    Dtype,
    choice(Dtype, "dtype", help="Dtype of weights and activations. auto: bfloat16 if the device computes it natively.",
           rich_help_panel="Loading"),
]  # fmt: skip
StoredDtype = Annotated[
    Dtype,
    choice(Dtype, "dtype", help="Dtype of the written weights. auto: the dtype of the source checkpoint.",
           rich_help_panel="Loading"),
]  # fmt: skip
DeviceFlag = Annotated[
    Device,
    choice(Device, "device", help="Device to run on. auto: CUDA if available, else CPU.", rich_help_panel="Loading"),
]
System = Annotated[str | None, typer.Option(help="System prompt; replaces the template's default.")]
NumVideoFrames = Annotated[
    int | None, typer.Option(help="Frames sampled from each video. Default: the model's setting.", min=1)
]


@dataclass(frozen=True)
class CheckpointOptions:
    """Flags that select a checkpoint besides MODEL. Empty strings are flags that were not given."""

    panel: ClassVar = "Loading"

    template: str = ""
    """Conversation template. Default: the template of the checkpoint."""
    model_base: str = ""
    """Base LLM of a LoRA, projector-only or TinyChat INT4 checkpoint: directory or Hub id."""
    revision: str = ""
    """Branch, tag or commit of the Hub repository."""

    @property
    def overrides(self) -> dict[str, Any]:
        """Return `template` and `base` as arguments of `open_checkpoint`; None for flags that were not given."""
        return {"template": self.template or None, "base": self.model_base or None}


@dataclass(frozen=True)
class BackendOptions:
    """Flags of the inference backend. 0 bits are flags that were not given."""

    panel: ClassVar = "Loading"

    backend: Annotated[Backend, choice(Backend, "backend")] = Backend.AUTO
    """Inference backend of the LLM. auto: onnx for INT4 models on a CPU, else torch."""
    lm_head_bits: Annotated[int, typer.Option(metavar="4|8|32", show_default=False)] = 0
    """Weight bits of the LM head with --backend onnx. Default: 8 for INT4 models, else 32."""
    activation_bits: Annotated[int, typer.Option(metavar="8|16|32", show_default=False)] = 0
    """Activation bits with --backend onnx and INT4 weights: 8 (int8), 16 (two int8 terms, nearly exact) or 32
    (float32). Default: 8."""
    threads: Annotated[int | None, typer.Option(min=1)] = None
    """Number of CPU threads. Default: PyTorch's."""

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Return backend and bits as arguments of `Engine.load` and `Engine.on_backend`."""
        return {"backend": self.backend, "head_bits": self.lm_head_bits, "activation_bits": self.activation_bits}


@dataclass(frozen=True)
class LoadOptions(BackendOptions, CheckpointOptions):
    """Flags of commands that run a model."""

    dtype: ComputeDtype = Dtype.AUTO
    device: DeviceFlag = Device.AUTO


@dataclass(frozen=True)
class SamplingOptions:
    """Flags of commands that generate text."""

    panel: ClassVar = "Sampling"

    max_new_tokens: int = 128
    """Maximum number of generated tokens per answer."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_k: int = 0
    """Sample from the K most likely tokens; 0 disables it."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most likely tokens with this total probability; 1 disables it."""
    min_p: float = 0.0
    """Minimum token probability relative to the most likely token; 0 disables it."""
    repetition_penalty: float = 1.0
    """Penalty for tokens that already occur; 1 disables it, higher values reduce repetition."""
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT")] = None
    """Stop string. Repeatable."""
    seed: int = 0
    """Random seed of sampling."""
    prompt_lookup_tokens: int = 0
    """Prompt-lookup decoding: maximum number of draft tokens per step; 0 disables it. Does not change the output."""
    truncate: bool = False
    """Drop the oldest turns of a prompt that exceeds the context length. Default: an error."""

    def params(self, logprobs: int = 0) -> SamplingParams:
        """Return the sampling parameters of the engine. Raises ConfigError for values out of range."""
        from vila.engine.sampling_params import SamplingParams

        same = {name: value for name, value in vars(self).items() if name not in ("stop", "truncate")}
        return SamplingParams(
            **same,
            stop=tuple(self.stop or ()),
            overlong="truncate" if self.truncate else "error",
            logprobs=logprobs,
        )


CHECKPOINT = CheckpointOptions()
BACKEND = BackendOptions()
LOAD = LoadOptions()
SAMPLING = SamplingOptions()


# --- from flags to an engine


def open_model(model: str, options: LoadOptions = LOAD) -> Checkpoint:
    """Open a checkpoint without reading weights.

    Raises TemplateError if neither the checkpoint nor the flags name a template, ConfigError for a device or backend
    that is not available.
    """
    from vila.model.loading import open_checkpoint, own_template

    check_backend_flags(options, choose_device(options.device))
    checkpoint = open_checkpoint(model, revision=options.revision or None, **options.overrides)
    own_template(checkpoint)
    return checkpoint


def load_engine(checkpoint: Checkpoint, options: LoadOptions) -> Engine:
    """Read the weights of an open checkpoint and return its engine. Logs the chosen backend to standard error."""
    from vila.engine.engine import Engine
    from vila.model.loading import build_model, choose_dtype

    device = choose_device(options.device)
    set_num_threads(options.threads)
    dtype = choose_dtype(options.dtype, device, SILENT if checkpoint.int4 else StderrLog())
    model = build_model(checkpoint, dtype, device)
    arguments = {**options.engine_arguments, "release_weights": True}
    return Engine.on_backend(model, checkpoint.processor, **arguments, events=StderrLog())


_FLAG_OF_ARGUMENT = {"head_bits": "--lm-head-bits"}


def check_backend_flags(options: BackendOptions, device: str) -> None:
    """Raise ConfigError for a backend that is unknown, missing, or does not support the device or these flags."""
    from vila.engine.backend import check_backend

    try:
        check_backend(options.backend, options.lm_head_bits, 0, device, options.activation_bits)
    except ConfigError as error:
        if error.field:
            error.field = _FLAG_OF_ARGUMENT.get(error.field, f"--{error.field.replace('_', '-')}")
        raise


def set_num_threads(count: int | None) -> None:
    """Set the number of CPU threads of PyTorch and of the other backends; None leaves it unchanged."""
    import torch

    if count:
        torch.set_num_threads(count)


class StderrLog(Silent):
    """Events listener that prints log lines to standard error and ignores progress."""

    def log(self, text: str) -> None:
        """Print a line."""
        typer.echo(text, err=True)


def choose_device(name: str) -> str:
    """Return `cpu` or `cuda`; `auto` is `cuda` if available. Raises ConfigError for `cuda` without a CUDA device."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("PyTorch finds no CUDA device", field="--device", value=str(name), hint="see vila doctor")
    return ("cuda" if available else "cpu") if name == "auto" else name


def check_fit(
    config: VilaConfig, processor: VilaProcessor, messages: Sequence[Message], sampling: SamplingParams
) -> int:
    """Return the number of oldest messages to drop so that prompt and answer fit the context length.

    Raises ContextOverflowError if they do not fit, TemplateError for roles out of order.
    """
    from vila.chat.fit import fit_prompt

    try:
        _, dropped = fit_prompt(
            messages,
            processor.prompt,
            context=config.context_length,
            answer=sampling.max_new_tokens,
            overlong=sampling.overlong,
        )
    except ContextOverflowError as error:
        drop = "" if sampling.overlong == "truncate" else " drop its oldest turns with --truncate,"
        error.hint = f"shorten it,{drop} or lower --max-new-tokens"
        raise
    return dropped
