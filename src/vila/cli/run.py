"""`vila run`: generate the answer to one prompt, or to every prompt of a file, about images and videos."""

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

from vila.cli import options
from vila.cli.options import LoadOptions, SamplingOptions, check_fit, load_engine, open_model, with_option_groups
from vila.cli.prompt_input import (
    PromptRecord,
    Question,
    Shot,
    ShotCommand,
    build_conversation,
    check_text,
    check_video_file,
    image_of,
    load_image,
    load_images,
    parse_shot,
    read_messages,
    read_prompt_records,
    read_query,
    read_question,
    video_of,
    with_images_loaded,
    with_system,
)
from vila.cli.upstream_flags import UpstreamOptions, same_value
from vila.core.errors import ConfigError, DataError, Interrupted, MediaError, TemplateError, VilaError
from vila.core.files import check_writable
from vila.core.progress import task
from vila.core.types import Image, Message, Video

if TYPE_CHECKING:
    from vila.chat.detokenize import Decode
    from vila.engine.engine import Engine
    from vila.engine.sampling_params import Generation, SamplingParams, TokenEvent, TokenLogprob
    from vila.model.layouts.base import Checkpoint


app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@dataclass(frozen=True)
class PromptOptions:
    """Flags that make up a prompt. None is a flag that was not given."""

    prompt: Annotated[str | None, typer.Option("--prompt", "-p")] = None
    """Question. '-' reads standard input, which is the default if it is a pipe. '' asks about an image without text."""
    image: Annotated[list[str] | None, typer.Option("--image", "-i", metavar="FILE|URL")] = None
    """Image. Repeatable."""
    video: Annotated[list[str] | None, typer.Option(metavar="FILE|URL")] = None
    """Video. Repeatable."""
    num_video_frames: options.NumVideoFrames = None
    shot: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE...")] = None
    """Few-shot example before the question: image=FILE text="ANSWER", and question="..." (default: the final question).
    Repeatable."""
    system: options.System = None
    messages: Path | None = None
    """JSON file with a conversation (OpenAI-style messages)."""
    batch_file: Path | None = None
    """JSON Lines file with a prompt or a conversation per line."""

    def check(self, query: str | None) -> None:
        """Raise ConfigError for two prompts, and for flags that do not combine with the source of the prompt."""
        sources = {
            "--prompt": self.prompt,
            "--query": query,
            "--messages": self.messages,
            "--batch-file": self.batch_file,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are alternatives", field=given[1], hint="give one of them")
        media = {"--image": self.image, "--video": self.video, "--shot": self.shot}
        if self.batch_file is not None:
            del media["--shot"]
        for name, value in media.items():
            if value and given in (["--messages"], ["--batch-file"]):
                raise ConfigError(f"cannot be combined with {given[0]}", field=name, hint="write it into the file")

    def conversation(self, shots: Sequence[Shot], query: str | None) -> Callable[[str], Sequence[Message]]:
        """Read and check text and media; return a function from the template's `media_gap` to the messages."""
        if self.messages is not None:
            messages = self._read_messages(self.messages)
            return lambda gap: messages
        videos = [video_of(name, self.num_video_frames) for name in self.video or ()]
        for video in videos:
            check_video_file(video)
        images = [load_image(image_of(name))[0] for name in self.image or ()]
        shots = with_images_loaded(shots)
        if query is not None:
            question = read_query(check_text(query, "--query"), images, videos)
        else:
            question = Question(self._text(), images, videos)
        # An empty prompt must be given explicitly: captioning and few-shot prompts use it.
        is_piped = query is None and self.prompt in (None, "-")
        if not question.text.strip() and (is_piped or not (images or videos)):
            raise ConfigError(
                "the question is empty",
                field="standard input" if is_piped else "--prompt" if query is None else "--query",
                hint="give --prompt TEXT, or pipe the question in; --prompt '' asks about an image without text",
            )
        return partial(build_conversation, question, shots=shots, system=self.system)

    def _text(self) -> str:
        if self.prompt is not None and self.prompt != "-":
            return check_text(self.prompt, "--prompt")
        if self.prompt is None and sys.stdin.isatty():
            raise ConfigError("no question", field="--prompt", hint="give --prompt TEXT, or pipe the question in")
        return read_question(typer.get_binary_stream("stdin"))

    def _read_messages(self, path: Path) -> tuple[Message, ...]:
        messages = with_system(read_messages(path, self.num_video_frames), self.system)
        try:
            return load_images(messages)
        except MediaError as error:
            error.within(path)
            raise


PROMPT, UPSTREAM = PromptOptions(), UpstreamOptions()


# The original writes --num_video_frames and --top_p.
@app.command("run", cls=ShotCommand, context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@with_option_groups
def run(
    model: options.Model = "",
    prompts: PromptOptions = PROMPT,
    batch_size: Annotated[int, typer.Option(help="Number of prompts of --batch-file per batch.", min=1)] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON Lines file for the answers to --batch-file. Default: standard output."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    loading: LoadOptions = options.LOAD,
    sampling: SamplingOptions = options.SAMPLING,
    logprobs: Annotated[
        int,
        typer.Option(
            help="With --json or --batch-file: number of most likely tokens to report per generated token.",
            rich_help_panel=SamplingOptions.panel,
        ),
    ] = 0,
    upstream: UpstreamOptions = UPSTREAM,
) -> None:
    """Answer questions about images and videos: vila run [bold]MODEL[/bold] -i a.png -p "what is in the image?" """
    upstream.check()
    model = same_value("MODEL", model, "--model-path", upstream.model_path)
    template = same_value("--template", loading.template, "--conv-mode", upstream.conv_mode)
    loading = replace(loading, template=template)
    if not model:
        raise ConfigError("missing", field="MODEL", hint="give its directory or Hub id: vila run MODEL --prompt TEXT")
    params = sampling.params(logprobs)
    prompts = replace(
        prompts,
        image=[*(prompts.image or ()), *upstream.images()],
        video=[*(prompts.video or ()), *([upstream.video_file] if upstream.video_file else [])],
    )
    shots = [parse_shot(example) for example in prompts.shot or ()]
    prompts.check(upstream.query)
    if out is not None and prompts.batch_file is None:
        hint = "leave it out, or redirect standard output to a file"
        raise ConfigError("requires --batch-file", field="--output", hint=hint)
    if logprobs and not as_json and prompts.batch_file is None:
        raise ConfigError("requires --json or --batch-file", field="--logprobs")

    try:
        if prompts.batch_file is None:
            write = prompts.conversation(shots, upstream.query)
            generate_one(write, model, loading, params, as_json=as_json, file=prompts.messages)
        else:
            generate_file(prompts, shots, model, loading, params, batch_size=batch_size, out=out)
    except KeyboardInterrupt as error:
        raise Interrupted("stopped" if out is None else "stopped; not written", file=out) from error


# --- output


def stripped(events: Iterable[TokenEvent], finish_reasons: list[str] | None = None) -> Iterator[str]:
    """Yield a streamed answer without surrounding white space; joined, the pieces equal `Engine.generate`.

    finish_reasons: list that receives the finish reason.
    """
    held, has_begun = "", False
    for event in events:
        if event.finish is not None and finish_reasons is not None:
            finish_reasons.append(event.finish)
        text = held + event.text
        text = text if has_begun else text.lstrip()
        piece = text.rstrip()
        held = text[len(piece) :]
        if piece:
            has_begun = True
            yield piece


def answer_json(answer: Generation, sampling: SamplingParams, tokenizer: Any) -> dict[str, Any]:
    """Return an answer as plain data: text, finish, prompt_tokens, tokens, and the extras that `sampling` asks for."""
    content: dict[str, Any] = {
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.ids),
    }
    if sampling.overlong == "truncate":
        content["dropped_messages"] = answer.dropped_messages
    if sampling.prompt_lookup_tokens:
        content["draft_tokens"], content["accepted_tokens"] = answer.draft_tokens, answer.accepted_tokens
    if sampling.logprobs:
        from vila.chat.detokenize import decoder_of

        decode = decoder_of(tokenizer, skip_special_tokens=False)
        content["logprobs"] = [_logprob_json(report, decode) for report in answer.logprobs]
    return content


def _logprob_json(report: TokenLogprob, decode: Decode) -> dict[str, Any]:
    def token_json(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": decode([token]), "logprob": round(logprob, 6)}

    return {**token_json(report.id, report.logprob), "top": [token_json(*one) for one in report.top]}


# --- one prompt


def generate_one(
    write: Callable[[str], Sequence[Message]],
    model: str,
    loading: LoadOptions,
    sampling: SamplingParams,
    *,
    as_json: bool,
    file: Path | None,
) -> None:
    """Stream the answer to standard output, or print it as one JSON object.

    write: result of `PromptOptions.conversation`. file: file of --messages, for errors.
    """
    write("")  # raises for markers and media that differ in number, before the model is opened
    checkpoint = open_model(model, loading)
    processor = checkpoint.processor
    gap = processor.find_template().media_gap
    messages = processor.expand_videos(write(gap), gap, shrink=processor.spec)
    try:
        dropped = check_fit(checkpoint.config, processor, messages, sampling)
    except TemplateError as error:
        if file:
            error.within(file)
        raise
    engine = load_engine(checkpoint, loading)
    if as_json:
        answer = engine.complete([messages], sampling)[0]
        typer.echo(json.dumps(answer_json(answer, sampling, processor.tokenizer), ensure_ascii=False))
        return
    if dropped:
        typer.echo(f"note: the {dropped} oldest messages are dropped to fit the context length", err=True)
    try:
        for piece in stripped(engine.stream(messages, sampling)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")


# --- --batch-file


def generate_file(
    prompts: PromptOptions,
    shots: Sequence[Shot],
    model: str,
    loading: LoadOptions,
    sampling: SamplingParams,
    *,
    batch_size: int,
    out: Path | None,
) -> None:
    """Answer every line of a JSON Lines file, one JSON object per line; `out` is written atomically."""
    from vila.cli.progress import Screen
    from vila.core.files import write_jsonl

    assert prompts.batch_file is not None
    if out is not None:
        _check_output(out, prompts.batch_file)
    shots = with_images_loaded(shots)
    records = read_prompt_records(prompts.batch_file, prompts.num_video_frames)
    checkpoint = open_model(model, loading)
    records = prepare_records(records, checkpoint, sampling, shots=shots, system=prompts.system)
    engine = load_engine(checkpoint, loading)
    answers = generate_records(records, engine, sampling, batch_size)
    # A progress bar and JSON lines would overwrite each other on one terminal.
    with nullcontext() if out is None and sys.stdout.isatty() else Screen() as screen:
        if screen is not None:
            answers = _with_progress(answers, screen, len(records))
        if out is not None:
            write_jsonl(out, answers)
            return
        for answer in answers:
            sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _with_progress(answers: Iterator[dict[str, Any]], screen: Any, total: int) -> Iterator[dict[str, Any]]:
    with task(screen, "answers", total, "prompts"):
        for answer in answers:
            yield answer
            screen.advanced("answers")


def _check_output(out: Path, source: Path) -> None:
    if os.path.isdir(out):  # noqa: PTH112 no error for a name that is too long
        raise ConfigError("a directory", field="--output", value=str(out), expected="a file name")
    check_writable(out, field="--output", is_file=True)
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError("the file of --batch-file", field="--output", value=str(out), hint="give another name")


def prepare_records(
    records: Sequence[PromptRecord],
    checkpoint: Checkpoint,
    sampling: SamplingParams,
    *,
    shots: Sequence[Shot],
    system: str | None,
) -> list[PromptRecord]:
    """Return the records with their conversations; check that every image decodes and every prompt fits the context.

    Content of URLs and videos is not checked here. Raises VilaError naming file, line and reason.
    """
    gap = checkpoint.processor.find_template().media_gap
    checked: set[str] = set()
    out = []
    for record in records:
        try:
            messages = _conversation(record, gap, shots, system)
            parts = [part for message in messages for part in message.parts]
            for part in parts:
                _check_media(part, checked)
            if not any(isinstance(part, Video) for part in parts):
                check_fit(checkpoint.config, checkpoint.processor, messages, sampling)
        except VilaError as error:
            error.within(record.file, record.record)
            raise
        out.append(replace(record, messages=messages))
    return out


def _conversation(record: PromptRecord, gap: str, shots: Sequence[Shot], system: str | None) -> tuple[Message, ...]:
    if record.question is not None:
        return build_conversation(record.question, gap, shots=shots, system=system)
    if shots:
        raise DataError("--shot applies to 'prompt', not to 'messages'", field="messages", hint="leave out --shot")
    return with_system(record.messages, system)


def _check_media(part: object, checked: set[str]) -> None:
    from vila.media.image import open_image

    if isinstance(part, Video):
        check_video_file(part)
    if not isinstance(part, Image) or not isinstance(part.source, (Path, bytes)):
        return
    content = part.source
    key = str(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    if key not in checked:
        open_image(part)
        checked.add(key)


def generate_records(
    records: Sequence[PromptRecord], engine: Engine, sampling: SamplingParams, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield one object per record, in order: its id and its answer. Raises VilaError naming the lines of the batch."""
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        try:
            answers = engine.complete([record.messages for record in batch], sampling)
        except VilaError as error:
            last = batch[-1].record.rpartition(" ")[2]
            lines = batch[0].record if len(batch) == 1 else f"{batch[0].record} to {last}"
            error.within(batch[0].file, lines)
            raise
        for record, answer in zip(batch, answers, strict=True):
            yield {"id": record.id, **answer_json(answer, sampling, engine.processor.tokenizer)}
