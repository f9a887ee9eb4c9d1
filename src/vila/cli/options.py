"""Flags that several commands share, each described once; the commands set the defaults."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vila.core.errors import UnknownNameError

_LOADING = "Loading"
_SAMPLING = "Sampling"


class Dtype(StrEnum):
    """Number types of weights in memory."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Device(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Backend(StrEnum):
    """What computes the LLM."""

    AUTO = "auto"
    TORCH = "torch"
    ONNX = "onnx"


def one_of(kind: type[StrEnum], what: str) -> Callable[[str], Any]:
    """Return the parser of an option with one of a few names; it raises UnknownNameError for others.

    what: kind of name in the error; the option is `--what`.
    """

    def parse(text: str) -> StrEnum:
        names = [one.value for one in kind]
        if text not in names:
            raise UnknownNameError(what, text, names, field=f"--{what}")
        return kind(text)

    return parse


def names_in(kind: type[StrEnum]) -> str:
    """Return the metavar of an option that `one_of` parses."""
    return f"[{'|'.join(kind)}]"


def output_directory(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Callback of options that name a directory to write: checked before anything is read, `~` expanded."""
    return _checked_output(param, value, is_file=False)


def output_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Callback of options that name a file to write: checked before anything is read, `~` expanded."""
    return _checked_output(param, value, is_file=True)


def _checked_output(param: typer.CallbackParam, value: Path | None, *, is_file: bool) -> Path | None:
    if value is None:
        return None
    from vila.core.files import check_writable

    path = value.expanduser()
    check_writable(path, field=param.opts[0], is_file=is_file)
    return path


_MODEL = "Model: a directory, or a hub id OWNER/NAME."
RequiredModel = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
Template = Annotated[
    str,
    typer.Option(
        help="Conversation template, where it is not the model's own.", show_default=False, rich_help_panel=_LOADING
    ),
]
Base = Annotated[
    str,
    typer.Option(
        help="The LLM that a LoRA or stage-1 directory belongs to.", show_default=False, rich_help_panel=_LOADING
    ),
]
Revision = Annotated[
    str,
    typer.Option(help="Branch, tag or commit of a hub repository.", show_default=False, rich_help_panel=_LOADING),
]
DtypeFlag = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        parser=one_of(Dtype, "dtype"),
        metavar=names_in(Dtype),
        help="auto: bfloat16 where the hardware computes it.",
        rich_help_panel=_LOADING,
    ),
]
DtypeKept = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        parser=one_of(Dtype, "dtype"),
        metavar=names_in(Dtype),
        help="auto: as it is in the files.",
        rich_help_panel=_LOADING,
    ),
]
DeviceFlag = Annotated[
    Device,
    typer.Option(
        "--device",
        parser=one_of(Device, "device"),
        metavar=names_in(Device),
        help="auto: the GPU if there is one.",
        rich_help_panel=_LOADING,
    ),
]
BackendFlag = Annotated[
    Backend,
    typer.Option(
        "--backend",
        parser=one_of(Backend, "backend"),
        metavar=names_in(Backend),
        help="What computes the LLM. auto: onnx for 4-bit models on a CPU, else torch.",
        rich_help_panel=_LOADING,
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        "--head-bits",
        metavar="4|8|32",
        help="Bits of the head with --backend onnx; default: 8 for 4-bit models, else 32.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
ActivationBits = Annotated[
    int | None,
    typer.Option(
        "--activation-bits",
        metavar="8|16|32",
        help="With --backend onnx and 4-bit weights: 8 is int8, 16 two of them, nearly exact; default: 8.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads of a CPU; default: as many as PyTorch takes.",
        min=1,
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]

System = Annotated[str | None, typer.Option(help="System text in place of the template's own.", show_default=False)]
NumVideoFrames = Annotated[
    int | None,
    typer.Option(help="Frames taken from each video; default: what the model says.", min=1, show_default=False),
]

MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; higher is more varied.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0 is off.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float,
    typer.Option(help="Draw from the likeliest tokens of this probability together.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(help="Draw from tokens this fraction as likely as the likeliest.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 makes tokens seen before less likely.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Text that ends an answer. May be given several times.",
        show_default=False,
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the draws above temperature 0.", rich_help_panel=_SAMPLING)]
Lookup = Annotated[
    int,
    typer.Option(
        help="Try so many tokens ahead where the text repeats itself; answers stay the same. 0 is off.",
        rich_help_panel=_SAMPLING,
    ),
]
Truncate = Annotated[
    bool,
    typer.Option("--truncate", help="Drop the oldest turns of a prompt that is too long.", rich_help_panel=_SAMPLING),
]
