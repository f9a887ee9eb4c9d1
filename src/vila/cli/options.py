"""Flags shared by several commands, groups of flags, and the steps from flags to a checkpoint and an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vila.core.errors import ConfigError, ContextOverflowError, UnknownNameError
from vila.core.progress import Silent
from vila.core.types import Message

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.engine.request import SamplingParams
    from vila.model.config import VilaConfig
    from vila.model.layouts.base import Checkpoint
    from vila.model.processor import VilaProcessor


_LOADING = "Loading"
_SAMPLING = "Sampling"


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


def one_of(kind: type[StrEnum], name: str) -> Callable[[str], Any]:
    """Return a parser for the option `--NAME` with the values of an enum; it raises UnknownNameError for others."""

    def parse(text: str) -> StrEnum:
        names = [one.value for one in kind]
        if text not in names:
            raise UnknownNameError(name, text, names, field=f"--{name}")
        return kind(text)

    return parse


def names_in(kind: type[StrEnum]) -> str:
    """Return the metavar of an option that `one_of` parses."""
    return f"[{'|'.join(kind)}]"


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


# --- flags

_MODEL = "Model directory, or Hugging Face Hub id OWNER/NAME."
RequiredModel = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
Template = Annotated[
    str,
    typer.Option(
        help="Conversation template. Default: the template of the checkpoint.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
ModelBase = Annotated[
    str,
    typer.Option(
        help="Base LLM of a LoRA, projector-only or TinyChat INT4 checkpoint: directory or Hub id.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
Revision = Annotated[
    str,
    typer.Option(help="Branch, tag or commit of the Hub repository.", show_default=False, rich_help_panel=_LOADING),
]
ComputeDtype = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        parser=one_of(Dtype, "dtype"),
        metavar=names_in(Dtype),
        help="Dtype of weights and activations. auto: bfloat16 if the device computes it natively.",
        rich_help_panel=_LOADING,
    ),
]
StoredDtype = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        parser=one_of(Dtype, "dtype"),
        metavar=names_in(Dtype),
        help="Dtype of the written weights. auto: the dtype of the source checkpoint.",
        rich_help_panel=_LOADING,
    ),
]
DeviceFlag = Annotated[
    Device,
    typer.Option(
        "--device",
        parser=one_of(Device, "device"),
        metavar=names_in(Device),
        help="Device to run on. auto: CUDA if available, else CPU.",
        rich_help_panel=_LOADING,
    ),
]
BackendFlag = Annotated[
    Backend,
    typer.Option(
        "--backend",
        parser=one_of(Backend, "backend"),
        metavar=names_in(Backend),
        help="Inference backend of the LLM. auto: onnx for INT4 models on a CPU, else torch.",
        rich_help_panel=_LOADING,
    ),
]
LMHeadBits = Annotated[
    int,
    typer.Option(
        metavar="4|8|32",
        help="Weight bits of the LM head with --backend onnx. Default: 8 for INT4 models, else 32.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
ActivationBits = Annotated[
    int,
    typer.Option(
        metavar="8|16|32",
        help="Activation bits with --backend onnx and INT4 weights: 8 (int8), 16 (two int8 terms, nearly exact) or 32 "
        "(float32). Default: 8.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Number of CPU threads. Default: PyTorch's.", min=1, show_default=False, rich_help_panel=_LOADING
    ),
]

System = Annotated[str | None, typer.Option(help="System prompt; replaces the template's default.", show_default=False)]
NumVideoFrames = Annotated[
    int | None,
    typer.Option(help="Frames sampled from each video. Default: the model's setting.", min=1, show_default=False),
]


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """Flags that select a checkpoint besides MODEL. Empty strings are flags that were not given."""

    template: Template = ""
    model_base: ModelBase = ""
    revision: Revision = ""

    @property
    def overrides(self) -> dict[str, Any]:
        """Return `template` and `base` as arguments of `open_checkpoint`; None for flags that were not given."""
        return {"template": self.template or None, "base": self.model_base or None}


@dataclass(frozen=True, slots=True)
class LoadOptions(CheckpointOptions):
    """Flags of commands that run a model. 0 bits are flags that were not given."""

    dtype: ComputeDtype = Dtype.AUTO
    device: DeviceFlag = Device.AUTO
    backend: BackendFlag = Backend.AUTO
    lm_head_bits: LMHeadBits = 0
    activation_bits: ActivationBits = 0
    threads: Threads = None


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Flags of commands that generate text."""

    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of generated tokens per answer.", rich_help_panel=_SAMPLING)
    ] = 128
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 is greedy decoding.", rich_help_panel=_SAMPLING)
    ] = 0.0
    top_k: Annotated[
        int, typer.Option(help="Sample from the K most likely tokens; 0 disables it.", rich_help_panel=_SAMPLING)
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            help="Nucleus sampling: sample from the most likely tokens with this total probability; 1 disables it.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(
            help="Minimum token probability relative to the most likely token; 0 disables it.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        typer.Option(
            help="Penalty for tokens that already occur; 1 disables it, higher values reduce repetition.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop string. Repeatable.", show_default=False, rich_help_panel=_SAMPLING),
    ] = None
    seed: Annotated[int, typer.Option(help="Random seed of sampling.", rich_help_panel=_SAMPLING)] = 0
    prompt_lookup_tokens: Annotated[
        int,
        typer.Option(
            help="Prompt-lookup decoding: maximum number of draft tokens per step; 0 disables it. "
            "Does not change the output.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="Drop the oldest turns of a prompt that exceeds the context length. Default: an error.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False

    def params(self, logprobs: int = 0) -> SamplingParams:
        """Return the sampling parameters of the engine. Raises ConfigError for values out of range."""
        from vila.engine.request import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop or ()),
            logprobs=logprobs,
            seed=self.seed,
            overlong="truncate" if self.truncate else "error",
            prompt_lookup_tokens=self.prompt_lookup_tokens,
        )


CHECKPOINT = CheckpointOptions()
LOAD = LoadOptions()
SAMPLING = SamplingOptions()


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Expand each parameter of `command` that is a dataclass of flags into one flag per field.

    The flags' defaults are the fields of the parameter's default. Other parameters stay as they are.
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    by_name = inspect.Parameter.KEYWORD_ONLY
    parameters = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=by_name))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for one in fields(groups[name]):
            default = getattr(parameter.default, one.name)
            flag = inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[one.name]
            )
            parameters.append(flag)

    @wraps(command)
    def wrapper(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{one.name: values.pop(one.name) for one in fields(kind)})
        command(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return wrapper


# --- from flags to an engine


def open_model(model: str, options: LoadOptions = LOAD) -> Checkpoint:
    """Open a checkpoint without reading weights.

    Raises TemplateError if neither the checkpoint nor the flags name a template, ConfigError for a device or backend
    that is not available.
    """
    from vila.model.loading import open_checkpoint

    check_backend_flags(options, choose_device(options.device))
    checkpoint = open_checkpoint(model, revision=options.revision or None, **options.overrides)
    checkpoint.processor.find_template()
    return checkpoint


def load_engine(checkpoint: Checkpoint, options: LoadOptions) -> Engine:
    """Read the weights of an open checkpoint and return its engine. Logs the chosen backend to standard error."""
    from vila.engine.engine import Engine
    from vila.model.loading import build_model, choose_dtype

    device = choose_device(options.device)
    set_num_threads(options.threads)
    model = build_model(checkpoint, choose_dtype(options.dtype, device), device)
    bits = {"head_bits": options.lm_head_bits, "activation_bits": options.activation_bits}
    return Engine.on_backend(model, checkpoint.processor, options.backend, **bits, events=StderrLog())


_FLAG_OF_ARGUMENT = {"head_bits": "--lm-head-bits"}


def check_backend_flags(options: LoadOptions, device: str) -> None:
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
        drop = "" if sampling.overlong == "truncate" else " drop its oldest turns with --truncate,"
        error.hint = f"shorten it,{drop} or lower --max-new-tokens"
        raise
    return dropped
