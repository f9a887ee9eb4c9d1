"""Calibration out of a training mixture: conversations about pictures as the model was taught on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from vila.core.errors import DataError
from vila.core.types import Video
from vila.data.mixture import Mixture
from vila.quant.calibrate import BLOCK, Calibration, Row, sample_calibration

SAMPLES = 64
_TRIES = 8


def mixture_calibration(
    mixture: Mixture, processor: Any, *, samples: int = SAMPLES, name: str = "mixture", max_tokens: int = 2048
) -> Calibration:
    """The first `samples` conversations in the mixture's own order, each under its own template, joined to rows.

    Of a sample with several questions one is taken. Conversations follow one another in a row of about 512 tokens, as
    documents do in calibration by text: most are far shorter, and padding costs as much as tokens.
    Samples with clips, and those of more than `max_tokens` tokens, are left out.
    Raises DataError when too few are left, saying how many were left out.
    """
    rows: list[Row] = []
    tried = long = clips = 0
    while len(rows) < samples and tried < samples * _TRIES:
        part, sample = mixture[tried]
        conversations = list(sample.conversations())
        chosen = conversations[tried % len(conversations)]
        tried += 1
        if any(isinstance(one, Video) for one in sample.media):
            clips += 1
            continue
        template = sample.template or part.template
        if len(processor.tokens(chosen, template, prompt=False).ids) > max_tokens:
            long += 1
            continue
        rows += sample_calibration([chosen], processor, name=name, template=template, max_tokens=max_tokens).rows
    if len(rows) < samples:
        raise DataError(
            f"calibration {name!r}: {len(rows)} of {samples} samples found in {tried}, {long} longer than {max_tokens} "
            f"tokens and {clips} with clips left out; give a mixture of shorter samples with pictures"
        )
    content = [[row.ids, [image.key() for image in row.media]] for row in rows]
    return Calibration(name, hashlib.sha256(json.dumps(content).encode()).hexdigest(), tuple(_joined(rows)))


def _joined(rows: Iterable[Row]) -> list[Row]:
    """Neighbouring rows as one, as long as that has at most a block of tokens."""
    out: list[Row] = []
    for row in rows:
        if out and len(out[-1].ids) + len(row.ids) <= BLOCK:
            out[-1] = Row(out[-1].ids + row.ids, out[-1].media + row.media)
        else:
            out.append(row)
    return out
