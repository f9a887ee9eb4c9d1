"""`vila data stats`: how much each data set brings to an epoch, and under which licence it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.cli.data_licences import licences_of
from vila.cli.data_sets import DataSets

if TYPE_CHECKING:
    from vila.chat.tokenize import TokenizedSample
    from vila.core.types import Sample
    from vila.data.mixture import Part
    from vila.data.survey import Share
    from vila.prepare.licences import DataLicence


@dataclass(frozen=True, slots=True)
class Stats:
    """One data set in one epoch.

    exact:      whether tokens and images were counted in all of it, not estimated from `share.surveyed` samples.
    has_tokens: whether a tokenizer counted; else `share.tokens` and `share.token_share` mean nothing, and a clip counts
                as one image, as only a model says how many frames it takes.
    licences:   what is known of where it is from; nothing for data of your own.
    """

    share: Share
    path: Path
    exact: bool
    has_tokens: bool
    licences: tuple[DataLicence, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, null for what was not counted."""
        return {
            "name": self.share.name,
            "path": str(self.path),
            "samples": self.share.samples,
            "images": self.share.images,
            "tokens": self.share.tokens if self.has_tokens else None,
            "token_share": round(self.share.token_share, 4) if self.has_tokens else None,
            "exact": self.exact,
            "surveyed": self.share.surveyed,
            "licences": [
                {"name": one.name, "licence": one.licence, "forbids": one.forbids, "source": one.source}
                | {"checked": one.checked}
                for one in self.licences
            ],
        }


def stats_of(data: DataSets, sample: int) -> list[Stats]:
    """The statistics of each data set, from at most `sample` samples of it (0: all).

    The numbers are those that training tells before its first step. No picture is opened.
    """
    from vila.data.survey import survey

    largest = max(len(part.source) for part in data.mixture.parts)
    shares = survey(data.mixture, data.tokenise if data.reader else _untokenised, sample or largest)
    return [
        Stats(
            share,
            path,
            # A share of a data set is another one in every epoch, so its pictures are not the same number.
            exact=share.surveyed == len(part.source) and share.samples % (len(part.source) or 1) == 0,
            has_tokens=data.reader is not None,
            licences=licences_of(path),
        )
        for share, part, path in zip(shares, data.mixture.parts, data.paths, strict=True)
    ]


def _untokenised(part: Part, sample: Sample) -> TokenizedSample:
    """A sample without a token, which still has its media."""
    import numpy as np

    from vila.chat.tokenize import TokenizedSample

    none = np.zeros(0, dtype=np.int64)
    return TokenizedSample(sample.id, none, none, none, none, none, none, sample.media)
