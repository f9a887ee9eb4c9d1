"""Lanes: rows packed from whole samples, independent of the number of ranks.

Stream g of G packs the samples whose global position is g modulo G, from its own bounded look-ahead buffer. Its whole
state is the next position and the positions in the buffer, so it resumes anywhere and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np

from vila.chat.tokenize import IGNORE, TokenizedSample
from vila.core.errors import ConfigError, DataError, VilaError
from vila.core.types import Image, Video
from vila.data.bad_samples import BadSample, BadSampleLog, RecordLocation, location_of_position

# --- fill
# Which waiting samples fill a row: a subset sum over lengths, by bit sets in Python integers.


def fill_sequence(lengths: Sequence[int], room: int) -> list[int]:
    """Indices of the items whose lengths add up to the most that is at most `room`; each item once.

    Among the sets that fill equally, longer items win, and of equal lengths the earlier item: short ones are kept to
    fill later rows. Bit s of a set says that the sum s can be reached; one shift and one `or` an item.
    """
    order = sorted((i for i, length in enumerate(lengths) if length <= room), key=lambda i: (lengths[i], -i))
    window = (1 << (room + 1)) - 1
    reachable = [1]
    for item in order:
        last = reachable[-1]
        reachable.append((last | last << lengths[item]) & window)
    target = reachable[-1].bit_length() - 1
    chosen = []
    for place in range(len(order) - 1, -1, -1):
        rest = target - lengths[order[place]]
        if rest >= 0 and reachable[place] >> rest & 1:
            chosen.append(order[place])
            target = rest
    return chosen


def fill_longest_first(lengths: Sequence[int], images: Sequence[int], room: int, max_images: int) -> list[int]:
    """Indices of items taken greedily, longest first, while both their tokens and their images fit."""
    chosen = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] <= room and images[item] <= max_images:
            chosen.append(item)
            room -= lengths[item]
            max_images -= images[item]
    return chosen


# --- deal
# Sharing the lanes of the global batch among ranks and micro-batches.


def streams_of_rank(rank: int, world: int, lanes: int) -> range:
    """The lanes that `rank` of `world` reads: a contiguous share, so that all ranks in order give all lanes in order.

    Raises ConfigError with the nearest numbers that would do unless `lanes` is a multiple of `world`.
    """
    if lanes % world:
        below, above = lanes // world * world, -(-lanes // world) * world
        raise ConfigError(
            f"the global batch is not a multiple of the {world} ranks",
            field="batch",
            value=lanes,
            expected=" or ".join(str(number) for number in (below, above) if number),
        )
    share = lanes // world
    return range(rank * share, (rank + 1) * share)


def fit_micro_batch(world: int, lanes: int, micro: int) -> int:
    """The largest micro-batch up to `micro` that the lanes of a rank are a multiple of. Raises as `streams_of_rank`."""
    share = len(streams_of_rank(0, world, lanes))
    return max(number for number in range(1, min(share, micro) + 1) if share % number == 0)


def micro_batch_note(world: int, lanes: int, micro: int) -> str:
    """The line that says so when `fit_micro_batch` is not the one that was asked for; else empty."""
    fitting = fit_micro_batch(world, lanes, micro)
    if fitting == micro:
        return ""
    return (
        f"note: batch.micro={micro} is reduced to {fitting}: each of {world} ranks has {lanes // world} of the global "
        f"batch of {lanes}; results do not depend on it"
    )


# --- compact
# A tokenised sample in little memory: look-ahead buffers and pipes hold thousands of them.


@dataclass(frozen=True, slots=True)
class CompactSample:
    """What `expanded` needs to rebuild a TokenizedSample exactly. Media are references, never pixels.

    pieces: for each part its number, length, first position and parent.
    """

    id: str
    length: int
    text_ids: np.ndarray[Any, np.dtype[np.int32]]
    slot_id: int
    is_placeholder: bytes
    supervised: bytes
    pieces: tuple[tuple[int, int, int, int], ...]
    media: tuple[Image | Video, ...]

    def __len__(self) -> int:
        return self.length

    def expanded(self) -> TokenizedSample:
        """The sample as it was before `compact`."""
        is_placeholder, supervised = _bools(self.is_placeholder, self.length), _bools(self.supervised, self.length)
        ids = np.full(self.length, self.slot_id, dtype=np.int64)
        ids[~is_placeholder] = self.text_ids
        number, lengths, starts, parents = (
            np.array(column, dtype=np.int64) for column in zip(*self.pieces, strict=True)
        )
        offsets = np.cumsum(lengths) - lengths
        return TokenizedSample(
            id=self.id,
            ids=ids,
            labels=np.where(supervised, ids, IGNORE),
            positions=np.arange(self.length) + np.repeat(starts - offsets, lengths),
            segments=np.repeat(number, lengths),
            parents=np.repeat(parents, lengths),
            is_placeholder=is_placeholder.astype(np.int64),
            media=self.media,
        )


def compact(sample: TokenizedSample) -> CompactSample:
    """The sample in little memory. Every label is the token's own id or is ignored."""
    is_placeholder = sample.is_placeholder.astype(bool)
    seams = np.flatnonzero(np.diff(sample.segments)) + 1
    firsts = np.concatenate([[0], seams])
    lengths = np.diff(np.concatenate([firsts, [len(sample)]]))
    pieces = zip(
        sample.segments[firsts].tolist(),
        lengths.tolist(),
        sample.positions[firsts].tolist(),
        sample.parents[firsts].tolist(),
        strict=True,
    )
    return CompactSample(
        id=sample.id,
        length=len(sample),
        text_ids=sample.ids[~is_placeholder].astype(np.int32),
        slot_id=int(sample.ids[is_placeholder][0]) if is_placeholder.any() else 0,
        is_placeholder=np.packbits(is_placeholder).tobytes(),
        supervised=np.packbits(sample.labels != IGNORE).tobytes(),
        pieces=tuple(pieces),
        media=sample.media,
    )


def _bools(bits: bytes, length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=length).astype(bool)


Packing = Literal["rows", "none", "grouped"]
Overlong = Literal["error", "drop", "truncate"]
Fetch = Callable[[int], TokenizedSample]
Shorten = Callable[[int, int], TokenizedSample | None]
Pixels = np.ndarray[Any, np.dtype[np.float32]]
Decode = Callable[[int, CompactSample], Sequence[Pixels]]

_MAX_REFUSED = 10_000


@dataclass(frozen=True, slots=True)
class PackingStreamState:
    """Where a lane stands: the next global position it will fetch, and the positions waiting in its buffer."""

    next_position: int
    waiting: tuple[int, ...]


@dataclass(frozen=True)
class PackedSequence(Sequence[TokenizedSample]):
    """The samples of one row, and what became of its lane.

    positions:          global position of each sample.
    state:              of the lane after this row; a checkpoint taken now resumes with the row after it.
    dropped, truncated: over-long samples left out, and cut, since the row before.
    bad_samples:        samples that could not be read since the row before.
    pixels:             float32 [3, H, W] of every picture in reading order; None when pictures are not decoded here.
    """

    packed: tuple[CompactSample, ...]
    positions: tuple[int, ...]
    state: PackingStreamState
    dropped: int = 0
    truncated: int = 0
    bad_samples: tuple[BadSample, ...] = ()
    pixels: Sequence[Pixels] | None = None

    @cached_property
    def samples(self) -> tuple[TokenizedSample, ...]:
        """The samples as arrays."""
        return tuple(sample.expanded() for sample in self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, index: int) -> TokenizedSample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenizedSample]: ...

    def __getitem__(self, index: int | slice) -> TokenizedSample | Sequence[TokenizedSample]:
        return self.samples[index]

    def __iter__(self) -> Iterator[TokenizedSample]:
        return iter(self.samples)


@dataclass(frozen=True, kw_only=True)
class PackingPolicy:
    """How rows are made; the same for all lanes.

    look_ahead: samples that a lane chooses from.
    packing:    `rows` fills rows with whole samples; `none` puts one sample in each row, in order; `grouped` one sample
                in each row, so chosen that the rows of a step are of similar length.
    max_images: pictures that a row may hold, 0 for no limit.
    overlong:   of samples longer than a row: `error`, `drop`, or `truncate` at the end of an exchange; counted.
    max_faults: different samples that may fail to be read; with 0 the failure itself is raised, at once.
    """

    max_length: int
    look_ahead: int
    packing: Packing = "rows"
    max_images: int = 0
    overlong: Overlong = "error"
    max_faults: int = 0


@dataclass
class _Count:
    dropped: int = 0
    truncated: int = 0
    bad_samples: list[BadSample] = field(default_factory=list)


class PackingStream:
    """Fills rows of at most `max_length` tokens. The oldest waiting sample opens each row, so none waits for ever."""

    def __init__(
        self,
        number: int,
        lanes: int,
        fetch: Fetch,
        policy: PackingPolicy,
        *,
        shorten: Shorten | None = None,
        decode: Decode | None = None,
        state: PackingStreamState | None = None,
        location: Callable[[int], RecordLocation] = location_of_position,
        end: int | None = None,
    ) -> None:
        """Reads nothing before the first row.

        end:     global position at which the data end; None: they never do.
        fetch:   gives the tokenised sample at a global position; `location` the file and record of that sample.
        shorten: gives it cut to a length, None when that cannot be done; needed for `truncate`.
        decode:  gives the pixels of a sample's pictures; without it rows carry none.
        """
        self.lanes, self.policy = lanes, policy
        self._fetch, self._shorten, self._decode = fetch, shorten, decode
        self._next = state.next_position if state else number
        self._resumed = state.waiting if state else ()
        self._buffer: list[tuple[int, CompactSample]] = []
        self._since = _Count()
        self._location, self._bad_locations = location, set[RecordLocation]()
        self._last_fault = ""
        self._end = end

    @property
    def state(self) -> PackingStreamState:
        """What a lane of the same data needs to go on from here."""
        return PackingStreamState(self._next, self._resumed or tuple(position for position, _ in self._buffer))

    def row(self) -> PackedSequence:
        """The next row; an empty one at the end of the data. Raises DataError for a sample that may not be skipped."""
        while True:
            chosen = self._choose()
            is_at_end = not chosen
            pixels = [self._pixels(*item) for item in chosen] if self._decode else None
            if pixels is not None:
                # A picture that cannot be read takes its sample out of the row; the rest of the row stays as it was.
                chosen = [item for item, found in zip(chosen, pixels, strict=True) if found is not None]
            if not chosen and not is_at_end:
                self._check_refused(len(self._since.bad_samples))
                continue
            count, self._since = self._since, _Count()
            return PackedSequence(
                packed=tuple(sample for _, sample in chosen),
                positions=tuple(position for position, _ in chosen),
                state=self.state,
                dropped=count.dropped,
                truncated=count.truncated,
                bad_samples=tuple(count.bad_samples),
                pixels=None if pixels is None else [one for found in pixels if found is not None for one in found],
            )

    def _choose(self) -> list[tuple[int, CompactSample]]:
        """Take the samples of the next row out of the buffer; none at the end of the data."""
        policy = self.policy
        self._restore()
        if policy.packing != "grouped" or not self._buffer:
            self._fill(1 if policy.packing == "none" else policy.look_ahead)
        if not self._buffer:
            return []
        if policy.packing == "grouped":
            return [self._take_grouped()]
        if policy.packing == "none":
            return [self._buffer.pop(0)]
        first = self._buffer.pop(0)
        self._fill(policy.look_ahead)
        lengths = [len(sample) for _, sample in self._buffer]
        room = policy.max_length - len(first[1])
        picked = fill_sequence(lengths, room)
        if policy.max_images:
            images = [len(sample.media) for _, sample in self._buffer]
            left = policy.max_images - len(first[1].media)
            if sum(images[i] for i in picked) > left:
                picked = fill_longest_first(lengths, images, room, left)
        chosen = [first, *(self._buffer[i] for i in picked)]
        gone = set(picked)
        self._buffer = [item for i, item in enumerate(self._buffer) if i not in gone]
        return chosen

    def _take_grouped(self) -> tuple[int, CompactSample]:
        """One sample of the current window. All lanes have as many left, and take the same rank by length."""
        left = len(self._buffer)
        order = sorted(self._buffer, key=lambda item: (len(item[1]), item[0]))
        # A stride through the ranks that no length is favoured by; any fixed function of `left` would do.
        chosen = order[left * 2654435761 % 2**32 * left >> 32]
        self._buffer.remove(chosen)
        return chosen

    def _restore(self) -> None:
        """Read the samples again that waited when the state was taken."""
        waiting, self._resumed = self._resumed, ()
        for position in waiting:
            self._read(position)
        if waiting:
            self._since.truncated = 0  # they were counted when they were first read

    def _fill(self, size: int) -> None:
        refused = 0
        while len(self._buffer) < size and (self._end is None or self._next < self._end):
            position = self._next
            self._next += self.lanes
            refused = 0 if self._read(position) else refused + 1
            self._check_refused(refused)

    def _read(self, position: int) -> bool:
        """Put the sample at `position` into the buffer; False when it was refused and counted."""
        try:
            sample = self._fetch(position)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - counted, or raised again
            self._fault(position, error)
            return False
        if len(sample) > self.policy.max_length or self._shows_too_much(sample):
            fitting = self._fitted(position, sample)
            if fitting is None:
                return False
            sample = fitting
        self._buffer.append((position, compact(sample)))
        return True

    def _fitted(self, position: int, sample: TokenizedSample) -> TokenizedSample | None:
        policy = self.policy
        if policy.overlong == "error":
            raise self._too_long(position, sample)
        shorter = (
            self._shorten(position, policy.max_length) if policy.overlong == "truncate" and self._shorten else None
        )
        if shorter is None or self._shows_too_much(shorter):
            self._since.dropped += 1
            return None
        self._since.truncated += 1
        return shorter

    def _shows_too_much(self, sample: TokenizedSample) -> bool:
        return 0 < self.policy.max_images < len(sample.media)

    def _too_long(self, position: int, sample: TokenizedSample) -> DataError:
        policy = self.policy
        if self._shows_too_much(sample):
            found, limit, field = f"{len(sample.media)} images", policy.max_images, "data.max_images"
        else:
            found, limit, field = f"{len(sample):,} tokens", policy.max_length, "data.max_length"
        file, record = self._location(position)
        return DataError(
            f"sample {sample.id!r} has {found}, rows hold {limit:,}",
            file=file or None,
            record=record if file else None,
            field=field,
            hint=f"raise {field} or set data.overlong=drop",
        )

    def _pixels(self, position: int, sample: CompactSample) -> Sequence[Pixels] | None:
        assert self._decode
        try:
            return self._decode(position, sample)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - counted, or raised again
            self._fault(position, error)
            return None

    def _fault(self, position: int, error: Exception) -> None:
        """Count a sample that cannot be read, or raise `error` again if there may be none or too many."""
        if not self.policy.max_faults:
            raise error
        known = isinstance(error, VilaError)
        reason = str(error) if known else f"position {position}: {type(error).__name__}: {error}"
        location = self._location(position)
        self._since.bad_samples.append(BadSample(position, reason, location))
        self._last_fault = reason
        self._bad_locations.add(location)
        if len(self._bad_locations) > self.policy.max_faults:
            raise DataError(
                f"more than data.max_faults={self.policy.max_faults} samples could not be read; the last: {error}",
                field="data.max_faults",
            )

    def _check_refused(self, refused: int) -> None:
        if refused > _MAX_REFUSED:
            last = f"; the last that cannot be read: {self._last_fault}" if self._last_fault else ""
            raise DataError(
                f"{_MAX_REFUSED:,} samples in a row are longer than data.max_length={self.policy.max_length} "
                f"or cannot be read{last}"
            )


class PackingStreams:
    """The lanes of one rank, read in this process; one step takes one row from each."""

    def __init__(
        self,
        fetch: Fetch,
        count: int,
        *,
        policy: PackingPolicy,
        rank: int = 0,
        world: int = 1,
        states: Sequence[PackingStreamState] | None = None,
        shorten: Shorten | None = None,
        decode: Decode | None = None,
        log: BadSampleLog | None = None,
        location: Callable[[int], RecordLocation] = location_of_position,
        end: int | None = None,
    ) -> None:
        """count: streams of all ranks. states: of all streams, by number. Others: see `PackingStream`."""
        self.numbers = streams_of_rank(rank, world, count)
        self._log = log
        self.dropped = self.truncated = 0
        self.lanes = [
            PackingStream(
                number,
                count,
                fetch,
                policy,
                shorten=shorten,
                decode=decode,
                state=states[number] if states else None,
                location=location,
                end=end,
            )
            for number in self.numbers
        ]

    def step(self) -> list[PackedSequence]:
        """One row from each lane; empty ones from those whose data have ended."""
        rows = [lane.row() for lane in self.lanes]
        self.dropped += sum(row.dropped for row in rows)
        self.truncated += sum(row.truncated for row in rows)
        if self._log:
            self._log.add([sample for row in rows for sample in row.bad_samples])
        return rows

    @property
    def states(self) -> list[PackingStreamState]:
        """The state of every lane of this rank, as of the last step."""
        return [lane.state for lane in self.lanes]

    def close(self) -> None:
        """Nothing to let go of; readers with workers have."""
