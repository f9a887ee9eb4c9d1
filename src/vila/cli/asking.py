"""What `vila run` does once its flags are understood: answer one conversation, or a file of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from vila.cli.answers import answer_facts, trimmed
from vila.cli.asked import Asked
from vila.cli.loading import Loading, check_fit, load_engine, open_model
from vila.cli.shots import with_opened
from vila.core.errors import ConfigError, TemplateError
from vila.core.events import task
from vila.core.files import check_writable
from vila.engine.request import Sampling


def answer_one(asked: Asked, loading: Loading, sampling: Sampling, *, as_json: bool) -> None:
    """Stream the answer to standard output, or print its facts as one JSON object."""
    write = asked.conversation()
    write("")  # markers and media that do not agree show before anything is loaded
    checkpoint = open_model(loading)
    processor = checkpoint.processor
    gap = processor.find_template().media_gap
    messages = processor.expand_videos(write(gap), gap, shrink=processor.spec)
    try:
        dropped = check_fit(checkpoint.config, processor, messages, sampling)
    except TemplateError as error:
        if asked.messages:
            error.within(asked.messages)
        raise
    engine = load_engine(checkpoint, loading)
    if as_json:
        answer = engine.complete([messages], sampling)[0]
        typer.echo(json.dumps(answer_facts(answer, sampling, processor.tokenizer), ensure_ascii=False))
        return
    if dropped:
        typer.echo(f"note: the {dropped} oldest messages are left out, to fit the context", err=True)
    try:
        for piece in trimmed(engine.stream(messages, sampling)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")


def answer_file(
    asked: Asked, path: Path, loading: Loading, sampling: Sampling, *, batch_size: int, out: Path | None
) -> None:
    """Answer every row of a JSON-lines file, one JSON object a line; `out` is written whole or not at all."""
    from vila.cli.batch import answer_rows, prepare_rows
    from vila.cli.progress import Screen
    from vila.cli.question_files import read_rows
    from vila.core.files import write_jsonl

    if out is not None:
        _check_target(out, path)
    shots = with_opened(asked.shots)
    rows = read_rows(path, asked.num_frames)
    checkpoint = open_model(loading)
    rows = prepare_rows(rows, checkpoint, sampling, shots=shots, system=asked.system)
    engine = load_engine(checkpoint, loading)
    answers = answer_rows(rows, engine, sampling, batch_size)
    # A bar and lines of JSON would tear each other on one terminal.
    quiet = out is None and sys.stdout.isatty()
    with nullcontext() if quiet else Screen() as screen:
        if screen is not None:
            answers = _counted(answers, screen, len(rows))
        if out is not None:
            write_jsonl(out, answers)
            return
        for row in answers:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _counted(answers: Iterator[dict[str, Any]], screen: Any, total: int) -> Iterator[dict[str, Any]]:
    with task(screen, "answers", total, "rows"):
        for answer in answers:
            yield answer
            screen.advanced("answers")


def _check_target(out: Path, source: Path) -> None:
    if os.path.isdir(out):  # noqa: PTH112 no error for a name that is too long
        raise ConfigError(f"--out {out}: a directory; give the name of a file")
    check_writable(out, field="--out", is_file=True)
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"--out {out}: that is the file of --batch; give another name")
