"""`vila run`: questions about pictures and videos, one or a file of them, and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila.cli import options, original
from vila.cli.asked import Asked
from vila.cli.loading import Loading
from vila.cli.shots import parse_shot
from vila.core.errors import ConfigError, Interrupted


def run(
    model: options.Model = "",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The question; '-', or none with a pipe: standard input. '' asks about an image without a word.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="FILE|URL",
            help="Picture. May be given several times.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|URL", help="Video. May be given several times.", show_default=False),
    ] = None,
    num_video_frames: options.NumVideoFrames = None,
    shot: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE...",
            help='An example before the question: image=FILE text="ANSWER", and question="..." if it is another one. '
            "May be given several times.",
            show_default=False,
        ),
    ] = None,
    system: options.System = None,
    messages: Annotated[
        Path | None, typer.Option(help="JSON file with a whole conversation of content parts.", show_default=False)
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="JSON lines: a question or a conversation each.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of --batch that are answered together.", min=1)] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Where the answers to --batch go; default: standard output.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    template: options.Template = "",
    base: options.Base = "",
    revision: options.Revision = "",
    dtype: options.DtypeFlag = options.Dtype.AUTO,
    device: options.DeviceFlag = options.Device.AUTO,
    backend: options.BackendFlag = options.Backend.AUTO,
    head_bits: options.HeadBits = None,
    activation_bits: options.ActivationBits = None,
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    logprobs: Annotated[
        int,
        typer.Option(help="With --json: likeliest tokens to report beside each.", rich_help_panel="Sampling"),
    ] = 0,
    lookup: options.Lookup = 0,
    truncate: options.Truncate = False,
    model_path: original.ModelPath = "",
    model_base: original.ModelBase = "",
    conv_mode: original.ConvMode = "",
    query: original.Query = None,
    image_file: original.ImageFile = None,
    sep: original.Sep = ",",
    video_file: original.VideoFile = None,
    num_beams: original.NumBeams = 1,
    load_4bit: original.Load4bit = False,
    load_8bit: original.Load8bit = False,
) -> None:
    """Ask [bold]MODEL[/bold] about pictures: vila run runs/starter/model -i a.png -p "what shape is in the image?" """
    from vila.engine.request import Sampling

    original.refuse_unsupported(num_beams, load_4bit, load_8bit)
    loading = Loading(
        model=original.one_of("MODEL", model, "--model-path", model_path),
        template=original.one_of("--template", template, "--conv-mode", conv_mode),
        base=original.one_of("--base", base, "--model-base", model_base),
        revision=revision,
        dtype=dtype.value,
        device=device.value,
        backend=backend.value,
        head_bits=head_bits or 0,
        activation_bits=activation_bits or 0,
        threads=threads or 0,
    )
    if not loading.model:
        raise ConfigError("no model; give its directory or hub id: vila run MODEL --prompt TEXT")
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        seed=seed,
        overlong="truncate" if truncate else "error",
        lookup=lookup,
    )
    asked = Asked(
        prompt=prompt,
        query=query,
        messages=messages,
        batch=batch,
        images=[*(image or ()), *original.split_files(image_file, sep)],
        videos=[*(video or ()), *([video_file] if video_file else [])],
        shots=[parse_shot(example) for example in shot or ()],
        system=system,
        num_frames=num_video_frames,
    )
    asked.check()
    if out is not None and batch is None:
        raise ConfigError("--out goes with --batch; leave it out, or send standard output to a file")
    if logprobs and not as_json and batch is None:
        raise ConfigError("--logprobs goes with --json or --batch; add one of them")
    from vila.cli.asking import answer_file, answer_one

    try:
        if batch is None:
            answer_one(asked, loading, sampling, as_json=as_json)
        else:
            answer_file(asked, batch, loading, sampling, batch_size=batch_size, out=out)
    except KeyboardInterrupt as error:
        raise Interrupted("stopped" if out is None else f"stopped; {out} was not written") from error
