"""`vila chat`: a conversation with a model in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vila.core.types import Image, Message

_HELP = "/image PATH adds a picture to the next question, /reset forgets everything, /quit leaves."


def chat(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    template: Annotated[str, typer.Option(help="Conversation template, where it is not the model's own.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
) -> None:
    """Talk to [bold]MODEL[/bold]; pictures are added with /image PATH."""
    from rich.console import Console

    from vila.core.errors import VilaError
    from vila.core.types import Message
    from vila.engine.engine import Engine
    from vila.engine.request import Sampling

    console = Console(highlight=False)
    engine = Engine.load(model, dtype=dtype)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    history: list[Message] = []
    pictures: list[Image] = []
    console.print(f"[dim]{model}. {_HELP}[/dim]")
    while True:
        try:
            line = console.input("[bold cyan]you>[/bold cyan] ").strip()
        except EOFError:
            return
        if not line:
            continue
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            history, pictures = [], []
            console.print("[dim]forgotten[/dim]")
        elif line.startswith("/image"):
            _add_picture(console, line.removeprefix("/image").strip(), pictures)
        elif line.startswith("/"):
            console.print(f"[dim]unknown command {line.split()[0]}. {_HELP}[/dim]", markup=True)
        else:
            asked = [*history, Message.of("user", *pictures, line)]
            try:
                answer = _answer(console, engine, asked, sampling, template)
            except VilaError as error:
                console.print(f"error: {error}", style="red", markup=False)
                continue
            history, pictures = [*asked, Message.of("assistant", answer)], []


def _add_picture(console, name: str, pictures: list[Image]) -> None:
    from vila.core.errors import VilaError
    from vila.core.types import Image
    from vila.media.image import open_image

    image = Image(name if "://" in name else Path(name).expanduser())
    try:
        picture = open_image(image)
    except VilaError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return
    pictures.append(image)
    console.print(f"[dim]{image.name} ({picture.width}x{picture.height}) goes with the next question[/dim]")


def _answer(console, engine, messages, sampling, template: str) -> str:
    console.print("[bold green]vila>[/bold green] ", end="")
    text = ""
    for event in engine.stream(messages, sampling, template=template):
        piece = event.text if text else event.text.lstrip()
        text += piece
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print()
    return text.strip() or "."
