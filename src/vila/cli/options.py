"""Flags that several commands share, each described once; the commands set the defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.core.errors import ConfigError, ContextOverflowError, MediaError, UnknownNameError
from vila.core.optional import MissingExtraError
from vila.core.progress import Silent
from vila.core.types import Image, Message, Part, Video

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.engine.request import SamplingParams
    from vila.model.config import VilaConfig
    from vila.model.layouts.base import Checkpoint
    from vila.model.processor import VilaProcessor


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
ModelBase = Annotated[
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
LMHeadBits = Annotated[
    int | None,
    typer.Option(
        "--lm-head-bits",
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
PromptLookupTokens = Annotated[
    int,
    typer.Option(
        help="Prompt-lookup decoding: maximum number of draft tokens per step; 0 disables it. "
        "Does not change the output.",
        rich_help_panel=_SAMPLING,
    ),
]
Truncate = Annotated[
    bool,
    typer.Option("--truncate", help="Drop the oldest turns of a prompt that is too long.", rich_help_panel=_SAMPLING),
]


# --- loading
# From the loading flags to a checkpoint, and from that to an engine: everything is checked before weights are read.


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
    from vila.model.loading import open_checkpoint

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
    from vila.model.loading import build_model, choose_dtype

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

    def log(self, text: str) -> None:
        """A line for the reader."""
        typer.echo(text, err=True)


def choose_device(name: str) -> str:
    """`auto` is the GPU if there is one. Raises ConfigError when a GPU is asked for that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here; leave it out, or see vila doctor")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_fit(
    config: VilaConfig, processor: VilaProcessor, messages: Sequence[Message], sampling: SamplingParams
) -> int:
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
        "head_bits=": "--lm-head-bits ",
        "activation_bits=": "--activation-bits ",
        "device='cpu'": "--device cpu",
    }
    for argument, flag in flags.items():
        text = text.replace(argument, flag)
    return text


def _as_flags(text: str) -> str:
    """The engine speaks of its arguments; here they are flags."""
    return text.replace('overlong="truncate"', "--truncate").replace("max_new_tokens", "--max-new-tokens")


# --- media
# Images and videos as the command line names them, checked before a model is loaded.


def media_path(name: str) -> Path | str:
    """A URL as it is, anything else as a path."""
    return name if "://" in name or name.startswith("data:") else Path(name).expanduser()


def image_of(name: str) -> Image:
    """An image by its path or URL."""
    return Image(media_path(name))


def video_of(name: str, num_frames: int | None) -> Video:
    """A video by its path or URL."""
    return Video(media_path(name), num_frames)


def open_pictures(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with every image read: a bad one shows before weights are read, and a URL is fetched once.

    Raises MediaError for an image that cannot be decoded and for a video whose file is missing.
    """
    return tuple(replace(message, parts=tuple(map(_opened, message.parts))) for message in messages)


def opened(image: Image) -> Image:
    """The image with its encoded bytes in memory, checked: whether its EXIF turns it is for the model's settings."""
    return read_image(image)[0]


def read_image(image: Image) -> tuple[Image, tuple[int, int]]:
    """The image with its encoded bytes in memory, and its (width, height). Raises MediaError if decoding fails."""
    from PIL import Image as PilImage

    from vila.media.image import LoadedMedia, open_image, open_source

    if not isinstance(image.source, PilImage.Image):
        stream, name = open_source(image.source, "an image")
        with stream:
            image = Image(LoadedMedia(name, stream.read()))
    return image, open_image(image).size


def _opened(part: Part) -> Part:
    if isinstance(part, Video):
        check_clip(part)
    return opened(part) if isinstance(part, Image) else part


def check_clip(video: Video) -> None:
    """Raises MediaError when the video is a file that is not there; its content is checked when it is decoded."""
    if isinstance(video.source, Path) and not video.source.is_file():
        problem = "a directory, not a video" if video.source.is_dir() else "no such file"
        raise MediaError(problem, file=video.source, hint="give the path of one file")
