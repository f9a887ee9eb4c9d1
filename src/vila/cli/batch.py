"""`vila run --batch`: rows of a file, all checked before any work starts, answered a batch at a time in their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.cli.answers import answer_facts
from vila.cli.conversation import build_conversation, with_system
from vila.cli.loading import check_fit
from vila.cli.media import check_clip
from vila.cli.question_files import Row
from vila.cli.shots import Shot
from vila.core.errors import DataError, VilaError
from vila.core.types import Image, Message, Video

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.engine.request import Sampling
    from vila.model.layouts.protocol import Checkpoint


def prepare_rows(
    rows: Sequence[Row], checkpoint: Checkpoint, sampling: Sampling, *, shots: Sequence[Shot], system: str | None
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


def answer_rows(rows: Sequence[Row], engine: Engine, sampling: Sampling, batch_size: int) -> Iterator[dict[str, Any]]:
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
