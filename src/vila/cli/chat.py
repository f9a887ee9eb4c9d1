"""`vila chat`: a conversation with a model in the terminal."""

from __future__ import annotations

from vila.cli import options


def chat(
    model: options.RequiredModel,
    system: options.System = None,
    num_video_frames: options.NumVideoFrames = None,
    template: options.Template = "",
    base: options.Base = "",
    revision: options.Revision = "",
    dtype: options.DtypeFlag = options.Dtype.AUTO,
    device: options.DeviceFlag = options.Device.AUTO,
    backend: options.BackendFlag = options.Backend.AUTO,
    head_bits: options.HeadBits = None,
    activation_bits: options.ActivationBits = None,
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    lookup: options.Lookup = 0,
    truncate: options.Truncate = False,
) -> None:
    """Talk to [bold]MODEL[/bold]; /image PATH adds a picture to the next question, /help lists the rest."""
    from rich.console import Console

    from vila.cli.line_editor import LineEditor
    from vila.cli.loading import Loading, load_engine, open_model
    from vila.cli.session import COMMANDS, Session
    from vila.cli.talk import Talk
    from vila.core.files import cache_dir
    from vila.engine.request import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
        overlong="truncate" if truncate else "error",
        lookup=lookup,
    )
    loading = Loading(
        model,
        template,
        base,
        revision,
        dtype.value,
        device.value,
        backend.value,
        head_bits or 0,
        activation_bits or 0,
        threads or 0,
    )
    console = Console(highlight=False)
    with console.status(f"loading {model}"):
        checkpoint = open_model(loading)
        engine = load_engine(checkpoint, loading)
    talk = Talk(checkpoint.processor, system, num_video_frames)
    console.print(f"{model}: /help lists the commands, Ctrl-C stops an answer.", style="dim", markup=False)
    with LineEditor("you> ", cache_dir() / "chat_history", list(COMMANDS)) as editor:
        Session(console, engine, sampling, talk).run(editor.read)
