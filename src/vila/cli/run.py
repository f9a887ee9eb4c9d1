"""`vila run`: one question about pictures, one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads it from standard input.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="Picture: a file or URL. May be given several times.")
    ] = None,
    shot: Annotated[
        list[str] | None,
        typer.Option("--shot", help="An example before the question: IMAGE::QUESTION::ANSWER (IMAGE may be empty)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random draws when temperature is above 0.")] = 0,
    template: Annotated[str, typer.Option(help="Conversation template, where it is not the model's own.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
) -> None:
    """Ask [bold]MODEL[/bold] about pictures: vila run runs/starter/model -i a.png -p "what shape is in the image?" """
    from vila.core.types import Message
    from vila.engine.engine import Engine
    from vila.engine.request import Sampling

    text = sys.stdin.read().strip() if prompt == "-" else prompt
    messages = [*_shots(shot or []), Message.of("user", *map(_picture, image or []), text)]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    engine = Engine.load(model, dtype=dtype)
    if as_json:
        answer = engine.generate([messages], sampling, template=template)[0]
        facts = {
            "text": answer.text,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": len(answer.ids),
        }
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    written = ""
    for event in engine.stream(messages, sampling, template=template):
        # The space that a template gives the answer is not shown.
        piece = event.text if written else event.text.lstrip()
        written += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _picture(source: str):
    from vila.core.types import Image

    return Image(source if "://" in source or source.startswith("data:") else Path(source))


def _shots(examples: list[str]):
    from vila.core.errors import ConfigError
    from vila.core.types import Message

    for example in examples:
        fields = example.split("::")
        if len(fields) != 3:
            raise ConfigError(f"--shot {example!r}: expected IMAGE::QUESTION::ANSWER")
        source, question, answer = fields
        yield Message.of("user", *([_picture(source)] if source else []), question)
        yield Message.of("assistant", answer)
