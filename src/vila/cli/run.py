"""`vila run`: questions about pictures and videos, one or a file of them, and their answers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options, prompt_input
from vila.cli.options import (
    Loading,
    check_clip,
    check_fit,
    image_of,
    load_engine,
    open_model,
    open_pictures,
    opened,
    video_of,
)
from vila.cli.prompt_input import (
    Question,
    Shot,
    build_conversation,
    check_text,
    parse_shot,
    read_query,
    with_opened,
    with_system,
)
from vila.cli.question_files import Row
from vila.core.errors import ConfigError, DataError, Interrupted, MediaError, TemplateError, VilaError
from vila.core.files import check_writable
from vila.core.progress import task
from vila.core.types import Image, Message, Video
from vila.engine.request import SamplingParams

if TYPE_CHECKING:
    from vila.engine.detokenize import Decode
    from vila.engine.engine import Engine
    from vila.engine.request import Generation, SamplingParams, TokenEvent, TokenLogprob
    from vila.model.layouts.base import Checkpoint


# --- asked
# What the flags of `vila run` ask: where the question comes from, and what goes with it.


WriteConversation = Callable[[str], Sequence[Message]]
"""Gives the messages, with the template's `media_gap` after pictures that are put before a question."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags that make up a question. images, videos: paths and URLs; None stands for a flag that was not given."""

    prompt: str | None = None
    query: str | None = None
    messages: Path | None = None
    batch: Path | None = None
    images: Sequence[str] = ()
    videos: Sequence[str] = ()
    shots: Sequence[Shot] = ()
    system: str | None = None
    num_frames: int | None = None

    def check(self) -> None:
        """Raises ConfigError when there are two questions, or flags that do not go with where it comes from."""
        sources = {
            "--prompt": self.prompt,
            "--query": self.query,
            "--messages": self.messages,
            "--batch-file": self.batch,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were given, and each is the question; give one of them")
        aside = {"--image": self.images, "--video": self.videos, "--shot": self.shots}
        if self.batch is not None:
            del aside["--shot"]
        for name, value in aside.items():
            if value and given in (["--messages"], ["--batch-file"]):
                raise ConfigError(f"{name} does not go with {given[0]}; write it into the file")

    def conversation(self) -> WriteConversation:
        """The one conversation that is asked for, its pictures decoded and its text read from wherever it comes."""
        if self.messages is not None:
            messages = _messages(self.messages, self.num_frames, self.system)
            return lambda gap: messages
        clips = [video_of(name, self.num_frames) for name in self.videos]
        for clip in clips:
            check_clip(clip)
        images = [opened(image_of(name)) for name in self.images]
        shots = with_opened(self.shots)
        if self.query is not None:
            question = read_query(check_text(self.query, "--query"), images, clips)
        else:
            question = Question(self._text(), images, clips)
        # An image without a word is a question only where the empty text was written down: captions, few-shot prompts.
        if not question.text.strip() and (self._is_piped or not (images or clips)):
            raise ConfigError(
                "the question is empty",
                field="standard input" if self._is_piped else "--prompt" if self.query is None else "--query",
                hint="give --prompt TEXT, or pipe the question in; --prompt '' asks about an image without a word",
            )
        return partial(build_conversation, question, shots=shots, system=self.system)

    @property
    def _is_piped(self) -> bool:
        """Whether the question comes from standard input."""
        return self.query is None and self.prompt in (None, "-")

    def _text(self) -> str:
        if self.prompt is not None and self.prompt != "-":
            return check_text(self.prompt, "--prompt")
        if self.prompt is None and sys.stdin.isatty():
            raise ConfigError("no question", field="--prompt", hint="give --prompt TEXT, or pipe the question in")
        from vila.cli.question_files import read_question

        return read_question(typer.get_binary_stream("stdin"))


def _messages(path: Path, num_frames: int | None, system: str | None) -> tuple[Message, ...]:
    from vila.cli.question_files import read_messages

    messages = with_system(read_messages(path, num_frames), system)
    try:
        return open_pictures(messages)
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error


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
        Path | None,
        typer.Option("--batch-file", help="JSON lines: a question or a conversation each.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of --batch-file that are answered together.", min=1)] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where the answers to --batch-file go; default: standard output.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    template: options.Template = "",
    model_base: options.ModelBase = "",
    revision: options.Revision = "",
    dtype: options.DtypeFlag = options.Dtype.AUTO,
    device: options.DeviceFlag = options.Device.AUTO,
    backend: options.BackendFlag = options.Backend.AUTO,
    lm_head_bits: options.LMHeadBits = None,
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
    prompt_lookup_tokens: options.PromptLookupTokens = 0,
    truncate: options.Truncate = False,
    model_path: prompt_input.ModelPath = "",
    conv_mode: prompt_input.ConvMode = "",
    query: prompt_input.Query = None,
    image_file: prompt_input.ImageFile = None,
    sep: prompt_input.Sep = ",",
    video_file: prompt_input.VideoFile = None,
    num_beams: prompt_input.NumBeams = 1,
    load_4bit: prompt_input.Load4bit = False,
    load_8bit: prompt_input.Load8bit = False,
) -> None:
    """Ask [bold]MODEL[/bold] about pictures: vila run runs/starter/model -i a.png -p "what shape is in the image?" """
    from vila.engine.request import SamplingParams

    prompt_input.refuse_unsupported(num_beams, load_4bit, load_8bit)
    loading = Loading(
        model=prompt_input.one_of("MODEL", model, "--model-path", model_path),
        template=prompt_input.one_of("--template", template, "--conv-mode", conv_mode),
        base=model_base,
        revision=revision,
        dtype=dtype.value,
        device=device.value,
        backend=backend.value,
        head_bits=lm_head_bits or 0,
        activation_bits=activation_bits or 0,
        threads=threads or 0,
    )
    if not loading.model:
        raise ConfigError("no model; give its directory or hub id: vila run MODEL --prompt TEXT")
    sampling = SamplingParams(
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
        prompt_lookup_tokens=prompt_lookup_tokens,
    )
    asked = Asked(
        prompt=prompt,
        query=query,
        messages=messages,
        batch=batch,
        images=[*(image or ()), *prompt_input.split_files(image_file, sep)],
        videos=[*(video or ()), *([video_file] if video_file else [])],
        shots=[parse_shot(example) for example in shot or ()],
        system=system,
        num_frames=num_video_frames,
    )
    asked.check()
    if out is not None and batch is None:
        raise ConfigError("--output goes with --batch-file; leave it out, or send standard output to a file")
    if logprobs and not as_json and batch is None:
        raise ConfigError("--logprobs goes with --json or --batch-file; add one of them")

    try:
        if batch is None:
            answer_one(asked, loading, sampling, as_json=as_json)
        else:
            answer_file(asked, batch, loading, sampling, batch_size=batch_size, out=out)
    except KeyboardInterrupt as error:
        raise Interrupted("stopped" if out is None else f"stopped; {out} was not written") from error


# --- answers
# Answers on their way out: streamed text, and the facts of one as JSON.


def trimmed(events: Iterable[TokenEvent], ends: list[str] | None = None) -> Iterator[str]:
    """The pieces of a streamed answer without white space around the whole: joined they are what `generate` gives.

    ends: takes the reason why the answer ended.
    """
    held, begun = "", False
    for event in events:
        if event.finish is not None and ends is not None:
            ends.append(event.finish)
        text = held + event.text
        text = text if begun else text.lstrip()
        piece = text.rstrip()
        held = text[len(piece) :]
        if piece:
            begun = True
            yield piece


def answer_facts(answer: Generation, sampling: SamplingParams, tokenizer: Any) -> dict[str, Any]:
    """An answer as plain data: text, finish, prompt_tokens, tokens, and what the sampling asked for besides."""
    facts: dict[str, Any] = {
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.ids),
    }
    if sampling.overlong == "truncate":
        facts["dropped_messages"] = answer.dropped_messages
    if sampling.prompt_lookup_tokens:
        facts["draft_tokens"], facts["accepted_tokens"] = answer.draft_tokens, answer.accepted_tokens
    if sampling.logprobs:
        from vila.engine.detokenize import decoder_of

        decode = decoder_of(tokenizer, skip_special_tokens=False)
        facts["logprobs"] = [_logprob(report, decode) for report in answer.logprobs]
    return facts


def _logprob(report: TokenLogprob, decode: Decode) -> dict[str, Any]:
    top = [_token(token, logprob, decode) for token, logprob in report.top]
    return {**_token(report.id, report.logprob, decode), "top": top}


def _token(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    return {"id": token, "token": decode([token]), "logprob": round(logprob, 6)}


# --- asking
# What `vila run` does once its flags are understood: answer one conversation, or a file of them.


def answer_one(asked: Asked, loading: Loading, sampling: SamplingParams, *, as_json: bool) -> None:
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
    asked: Asked, path: Path, loading: Loading, sampling: SamplingParams, *, batch_size: int, out: Path | None
) -> None:
    """Answer every row of a JSON-lines file, one JSON object a line; `out` is written whole or not at all."""
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
        raise ConfigError(f"--output {out}: a directory; give the name of a file")
    check_writable(out, field="--output", is_file=True)
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"--output {out}: that is the file of --batch-file; give another name")


# --- batch
# `vila run --batch-file`: rows of a file, all checked before any work starts, answered batch by batch.


def prepare_rows(
    rows: Sequence[Row], checkpoint: Checkpoint, sampling: SamplingParams, *, shots: Sequence[Shot], system: str | None
) -> list[Row]:
    """Return the rows with their conversations, after opening each image once.

    Not checked here: the content of URLs and videos. Raises VilaError naming file, line and reason.
    """
    gap = checkpoint.processor.find_template().media_gap
    seen: set[str] = set()
    out = []
    for row in rows:
        try:
            messages = _conversation(row, gap, shots, system)
            for message in messages:
                for part in message.parts:
                    _check_medium(part, seen)
            if not any(isinstance(part, Video) for message in messages for part in message.parts):
                check_fit(checkpoint.config, checkpoint.processor, messages, sampling)
        except VilaError as error:
            error.within(row.file, row.record)
            raise
        out.append(replace(row, messages=messages))
    return out


def _conversation(row: Row, gap: str, shots: Sequence[Shot], system: str | None) -> tuple[Message, ...]:
    if row.question is not None:
        return build_conversation(row.question, gap, shots=shots, system=system)
    if shots:
        raise DataError("a row with 'messages' brings its own examples; leave out --shot, or write 'prompt'")
    return with_system(row.messages, system)


def _check_medium(part: object, seen: set[str]) -> None:
    from vila.media.image import open_image

    if isinstance(part, Video):
        check_clip(part)
    if not isinstance(part, Image) or not isinstance(part.source, (Path, bytes)):
        return
    content = part.source
    key = str(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    if key not in seen:
        open_image(part)
        seen.add(key)


def answer_rows(
    rows: Sequence[Row], engine: Engine, sampling: SamplingParams, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield one object per row, in order: its id and the facts of its answer.

    Raises VilaError naming the lines of a batch that failed.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        try:
            answers = engine.complete([row.messages for row in batch], sampling)
        except VilaError as error:
            last = batch[-1].record.rpartition(" ")[2]
            lines = batch[0].record if len(batch) == 1 else f"{batch[0].record} to {last}"
            error.within(batch[0].file, lines)
            raise
        for row, answer in zip(batch, answers, strict=True):
            yield {"id": row.id, **answer_facts(answer, sampling, engine.processor.tokenizer)}
