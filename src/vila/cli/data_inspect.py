"""`vila data inspect`: text and HTML view of one tokenized sample, with supervised text marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from PIL import Image as PilImage

    from vila.chat.detokenize import Decode
    from vila.chat.tokenize import TokenizedSample
    from vila.core.types import Image
    from vila.report.html import Card

_STYLES = {"supervised": "bold green", "context": "dim", "image": "magenta"}
_HALF_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of one kind (`supervised`, `context`, or `image` for one image) of one segment, decoded."""

    segment: int
    kind: str
    text: str
    tokens: int


def token_runs(sample: TokenizedSample, tokenizer: Any, tokens_per_image: int) -> list[TokenRun]:
    """Return the runs of a sample in order; each image is a run.

    tokenizer: transformers tokenizer.
    tokens_per_image: number of image placeholders per image.
    Text is decoded together with the preceding text, so that spaces and characters of several tokens are complete. A
    character that is split between two runs belongs to the second; at a fork, to each branch.
    """
    from vila.chat.detokenize import decoder_of

    decode = decoder_of(tokenizer, skip_special_tokens=False)
    placeholders = sample.is_placeholder.cumsum().tolist()
    keys = [
        (segment, kind, (placeholders[place] - 1) // tokens_per_image if kind == "image" else -1)
        for place, (segment, kind) in enumerate(zip(sample.segment_ids.tolist(), _kinds(sample), strict=True))
    ]
    parent_of = {number: segment.parent for number, segment in enumerate(sample.segments)}
    groups = [(key, list(places)) for key, places in groupby(range(len(keys)), key=keys.__getitem__)]
    decoders: dict[int, _TextDecoder] = {}
    runs = []
    for number, ((segment, kind, _), places) in enumerate(groups):
        if segment not in decoders:
            decoders[segment] = _TextDecoder.after(decoders.get(parent_of[segment]))
        if kind == "image":
            decoders[segment] = _TextDecoder()
            runs.append(TokenRun(segment, kind, f"<image x {len(places)}>", len(places)))
            continue
        later = [key for key, _ in groups[number + 1 :]]
        continues = any(key[0] == segment or parent_of[key[0]] == segment for key in later[:1])
        whole = not continues or later[0][1] == "image"
        text = decoders[segment].add([int(sample.ids[place]) for place in places], decode, whole)
        runs.append(TokenRun(segment, kind, text, len(places)))
    return runs


def _kinds(sample: TokenizedSample) -> list[str]:
    return [
        "image" if is_placeholder else "supervised" if is_supervised else "context"
        for is_placeholder, is_supervised in zip(
            sample.is_placeholder.tolist(), sample.is_supervised.tolist(), strict=True
        )
    ]


class _TextDecoder:
    """Incremental decoder of the text since the last image. shown: number of characters already returned."""

    def __init__(self, ids: Sequence[int] = (), shown: int = 0) -> None:
        self.ids, self.shown = list(ids), shown

    @staticmethod
    def after(parent: _TextDecoder | None) -> _TextDecoder:
        """Return a decoder that continues the text of `parent`; `parent` does not change."""
        return _TextDecoder(parent.ids, parent.shown) if parent else _TextDecoder()

    def add(self, ids: Sequence[int], decode: Decode, whole: bool) -> str:
        """Return the text of further ids. An incomplete character at the end is held back unless `whole`."""
        self.ids += ids
        text = decode(self.ids)
        if not whole:
            text = text.rstrip(_HALF_CHARACTER)
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new


def as_terminal_text(runs: Sequence[TokenRun]) -> Text:
    """Return the runs as coloured text; supervised text is between double angle quotes.

    A new segment (branch) starts on a new line.
    """
    out, segment = Text(), 0
    for run in runs:
        if run.segment != segment:
            out.append(f"\n--- branch {run.segment}\n", style="cyan")
            segment = run.segment
        out.append(f"\u00ab{run.text}\u00bb" if run.kind == "supervised" else run.text, style=_STYLES[run.kind])
    return out


def as_card(sample: TokenizedSample, runs: Sequence[TokenRun]) -> Card:
    """Return a gallery card with the images in reading order and the runs below them."""
    from vila.core.types import Image
    from vila.report.html import Card

    images = [_thumbnail(item) for item in sample.media if isinstance(item, Image)]
    lines = [("", sample.id), *((run.kind, run.text) for run in runs)]
    return Card(images[0] if images else None, lines, more=images[1:])


def _thumbnail(image: Image) -> PilImage.Image:
    from vila.media.image import open_image
    from vila.report.html import MAX_SIDE

    thumbnail = open_image(image)
    # Full-size images of all cards would exhaust the memory.
    thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
    return thumbnail
