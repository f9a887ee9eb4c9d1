"""Views of a source: the training or validation share, and a fixed subset. O(1) access, nothing held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import floor

from vila.core.types import Sample
from vila.data.mixture import Source
from vila.data.order import Permutation

_BLOCK = 1000


@dataclass(frozen=True)
class Split:
    """The validation share of a source, or the rest of it.

    Which share an index belongs to is a function of the index and the fraction alone: in every 1000 consecutive
    samples a keyed permutation chooses the validation ones. So samples that are appended later move none of the
    others, and both shares are found without a table.
    """

    source: Source
    val_fraction: float
    val: bool

    def __len__(self) -> int:
        block, _ = divmod(len(self.source), _BLOCK)
        return self._before(block) + len(self._last())

    @property
    def unread(self) -> Mapping[str, int]:
        """Return the media that the whole source did not read."""
        return self.source.unread

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index` of the share."""
        return self.source[self.locate(index)]

    def place(self, index: int) -> tuple[str, int]:
        """Return file and record of sample number `index`."""
        return self.source.place(self.locate(index))

    def locate(self, index: int) -> int:
        """Index in the source. Raises IndexError outside the share."""
        whole = len(self.source) // _BLOCK
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a share of {len(self)}")
        if index >= self._before(whole):
            return whole * _BLOCK + self._last()[index - self._before(whole)]
        low, high = 0, whole - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._before(middle) <= index else (low, middle - 1)
        place = index - self._before(low)
        return low * _BLOCK + _block_order(low)[place if self.val else self._val_in(low) + place]

    def _val_before(self, block: int) -> int:
        return floor(block * _BLOCK * self.val_fraction)

    def _val_in(self, block: int) -> int:
        return self._val_before(block + 1) - self._val_before(block)

    def _before(self, block: int) -> int:
        """Samples of the share in all blocks before `block`."""
        return self._val_before(block) if self.val else block * _BLOCK - self._val_before(block)

    def _last(self) -> list[int]:
        """Places inside the unfinished last block that belong to the share."""
        block, size = divmod(len(self.source), _BLOCK)
        order, val = _block_order(block), self._val_in(block)
        places = range(val) if self.val else range(val, _BLOCK)
        return sorted(order[place] for place in places if order[place] < size)


@lru_cache(maxsize=64)
def _block_order(block: int) -> list[int]:
    order = Permutation(_BLOCK, 0, block)
    return [order[place] for place in range(_BLOCK)]


class Subset:
    """`size` pseudo-random samples of a source, the same ones whatever the seed of the run."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, min(size, len(source))
        self._order = Permutation(len(source), 0, 0)

    def __len__(self) -> int:
        return self.size

    @property
    def unread(self) -> Mapping[str, int]:
        """Return the media that the whole source did not read."""
        return self.source.unread

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index` of the subset."""
        return self.source[self.locate(index)]

    def place(self, index: int) -> tuple[str, int]:
        """Return file and record of sample number `index`."""
        return self.source.place(self.locate(index))

    def locate(self, index: int) -> int:
        """Index in the source. Raises IndexError outside the subset."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a subset of {self.size}")
        return self._order[index]
