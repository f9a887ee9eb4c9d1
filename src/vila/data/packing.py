"""Packing of whole samples into sequences of at most `max_length` tokens, in deterministic streams.

A run has G packing streams, G being the number of sequences of a global batch. Stream g packs the samples whose global
position is g modulo G, chosen from its own look-ahead buffer. Streams are sharded to ranks, so its sequences do
not depend on the number of ranks. The state of a stream is its next position and the positions in its buffer: training
resumes exactly, also on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import ConfigError, DataError, VilaError
from vila.data.bad_samples import BadSample, BadSampleLog, RecordLocation, location_of_position

Packing = Literal["rows", "none", "grouped"]
Overlong = Literal["error", "drop", "truncate"]
Fetch = Callable[[int], TokenizedSample]
Shorten = Callable[[int, int], TokenizedSample | None]
Pixels = np.ndarray[Any, np.dtype[np.float32]]
Decode = Callable[[int, TokenizedSample], Sequence[Pixels]]

_MAX_REFUSED = 10_000
T = TypeVar("T")


def fill_sequence(lengths: Sequence[int], max_length: int) -> list[int]:
    """Return the indices of the items whose lengths have the largest sum that is at most `max_length`.

    Of equal sums the one with longer items wins, of equal lengths the earlier item: short items fill later sequences
    better. Subset sum over the bits of Python integers: bit s says that the sum s can be reached.
    """
    order = sorted((i for i, length in enumerate(lengths) if length <= max_length), key=lambda i: (lengths[i], -i))
    window = (1 << (max_length + 1)) - 1
    reachable = [1]
    for item in order:
        last = reachable[-1]
        reachable.append((last | last << lengths[item]) & window)
    target = reachable[-1].bit_length() - 1
    chosen = []
    for index in range(len(order) - 1, -1, -1):
        rest = target - lengths[order[index]]
        if rest >= 0 and reachable[index] >> rest & 1:
            chosen.append(order[index])
            target = rest
    return chosen


def fill_longest_first(lengths: Sequence[int], images: Sequence[int], max_length: int, max_images: int) -> list[int]:
    """Return the indices of items taken greedily, longest first, while their tokens and their images fit."""
    chosen = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] <= max_length and images[item] <= max_images:
            chosen.append(item)
            max_length -= lengths[item]
            max_images -= images[item]
    return chosen


def streams_of_rank(rank: int, world: int, count: int) -> range:
    """Return the numbers of the streams of `rank`: contiguous, so that the ranks in order have all streams in order.

    Raises ConfigError with the nearest valid numbers unless `count` is a multiple of `world`.
    """
    if count % world:
        below, above = count // world * world, -(-count // world) * world
        raise ConfigError(
            f"the global batch is not a multiple of the {world} ranks",
            field="batch",
            value=count,
            expected=" or ".join(str(number) for number in (below, above) if number),
        )
    per_rank = count // world
    return range(rank * per_rank, (rank + 1) * per_rank)


def fit_micro_batch(world: int, count: int, micro: int) -> int:
    """Return the largest micro-batch size up to `micro` that divides the sequences of a rank.

    Raises ConfigError as `streams_of_rank` does.
    """
    per_rank = len(streams_of_rank(0, world, count))
    return max(number for number in range(1, min(per_rank, micro) + 1) if per_rank % number == 0)


def micro_batch_note(world: int, count: int, micro: int) -> str:
    """Return a line for the log if `fit_micro_batch` reduces `micro`, else an empty string."""
    fitting = fit_micro_batch(world, count, micro)
    if fitting == micro:
        return ""
    return (
        f"note: batch.micro={micro} is reduced to {fitting}: each of {world} ranks has {count // world} of the global "
        f"batch of {count}; results do not depend on it"
    )


@dataclass(frozen=True, slots=True)
class PackingStreamState:
    """State to resume from: the next global position to read, and the positions of the samples in the buffer."""

    next_position: int
    waiting: tuple[int, ...]


@dataclass(frozen=True)
class PackedSequence(Sequence[TokenizedSample]):
    """The samples of one sequence, and the state of its stream.

    positions:          global position of each sample.
    state:              of the stream after this sequence; a run that resumes from it continues with the next one.
    dropped, truncated: overlong samples that were left out, or cut, since the previous sequence.
    bad_samples:        samples that could not be read since the previous sequence.
    pixels:             float32 [3, H, W] of every image in reading order; None if images are not decoded here.
    """

    samples: tuple[TokenizedSample, ...]
    positions: tuple[int, ...]
    state: PackingStreamState
    dropped: int = 0
    truncated: int = 0
    bad_samples: tuple[BadSample, ...] = ()
    pixels: Sequence[Pixels] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]


@dataclass(frozen=True, kw_only=True)
class PackingPolicy:
    """How samples are packed; the same for all streams.

    max_length: tokens of a sequence.
    look_ahead: size of the buffer that the samples of a sequence are chosen from.
    packing:    `rows` packs whole samples into sequences; `none` makes each sample a sequence, in order; `grouped` does
                too, and chooses samples of similar length for the sequences of a step.
    max_images: images of a sequence, 0 for no limit.
    overlong:   for samples longer than `max_length`: `error`, `drop`, or `truncate` after an answer; counted.
    max_faults: number of different samples that may be unreadable; 0 raises the first error at once.
    """

    max_length: int
    look_ahead: int
    packing: Packing = "rows"
    max_images: int = 0
    overlong: Overlong = "error"
    max_faults: int = 0


@dataclass
class _Counts:
    """Events since the previous sequence."""

    dropped: int = 0
    truncated: int = 0
    bad_samples: list[BadSample] = field(default_factory=list)


class PackingStream:
    """One deterministic stream of packed sequences.

    The oldest sample in the buffer opens each sequence, so no sample waits for ever.
    """

    def __init__(
        self,
        number: int,
        count: int,
        fetch: Fetch,
        policy: PackingPolicy,
        *,
        shorten: Shorten | None = None,
        decode: Decode | None = None,
        state: PackingStreamState | None = None,
        location: Callable[[int], RecordLocation] = location_of_position,
        end: int | None = None,
    ) -> None:
        """Read nothing before the first sequence.

        number, count: of this stream, from 0; of all streams.
        fetch:    returns the tokenised sample at a global position.
        shorten:  returns that sample cut to a length, None if it cannot be cut; needed for `truncate`.
        decode:   returns the pixels of a sample's images; without it `PackedSequence.pixels` is None.
        location: returns the file and record of the sample at a position.
        end:      global position at which the data end; None for endless data.
        """
        self.count, self.policy = count, policy
        self._fetch, self._shorten, self._decode, self._location = fetch, shorten, decode, location
        self._next = state.next_position if state else number
        self._resumed = state.waiting if state else ()
        self._buffer: list[tuple[int, TokenizedSample]] = []
        self._since = _Counts()
        self._bad_locations: set[RecordLocation] = set()
        self._last_reason = ""
        self._end = end

    @property
    def state(self) -> PackingStreamState:
        """State from which a stream over the same data resumes."""
        return PackingStreamState(self._next, self._resumed or tuple(position for position, _ in self._buffer))

    def next_sequence(self) -> PackedSequence:
        """Return the next sequence, an empty one at the end of the data.

        Raises DataError for a sample that is too long or unreadable, as `policy` says.
        """
        while True:
            chosen = self._choose()
            is_at_end = not chosen
            pixels = [self._attempt(self._decode, *item) for item in chosen] if self._decode else None
            if pixels is not None:
                # A sample with an unreadable image is removed; the rest of the sequence stays.
                chosen = [item for item, found in zip(chosen, pixels, strict=True) if found is not None]
            if not chosen and not is_at_end:
                self._check_refused(len(self._since.bad_samples))
                continue
            counts, self._since = self._since, _Counts()
            return PackedSequence(
                samples=tuple(sample for _, sample in chosen),
                positions=tuple(position for position, _ in chosen),
                state=self.state,
                dropped=counts.dropped,
                truncated=counts.truncated,
                bad_samples=tuple(counts.bad_samples),
                pixels=None if pixels is None else [one for found in pixels if found is not None for one in found],
            )

    def _choose(self) -> list[tuple[int, TokenizedSample]]:
        """Take the samples of the next sequence out of the buffer; none at the end of the data."""
        policy = self.policy
        self._restore()
        if policy.packing != "grouped" or not self._buffer:
            self._fill(1 if policy.packing == "none" else policy.look_ahead)
        if not self._buffer:
            return []
        if policy.packing == "grouped":
            return [self._take_grouped()]
        first = self._buffer.pop(0)
        if policy.packing == "none":
            return [first]
        self._fill(policy.look_ahead)
        lengths = [len(sample) for _, sample in self._buffer]
        free = policy.max_length - len(first[1])
        picked = fill_sequence(lengths, free)
        if policy.max_images:
            images = [len(sample.media) for _, sample in self._buffer]
            free_images = policy.max_images - len(first[1].media)
            if sum(images[i] for i in picked) > free_images:
                picked = fill_longest_first(lengths, images, free, free_images)
        chosen = [first, *(self._buffer[i] for i in picked)]
        taken = set(picked)
        self._buffer = [item for i, item in enumerate(self._buffer) if i not in taken]
        return chosen

    def _take_grouped(self) -> tuple[int, TokenizedSample]:
        """Take one sample of the current window.

        The windows of all streams have the same number of samples left, and each takes the same rank by length.
        """
        left = len(self._buffer)
        order = sorted(self._buffer, key=lambda item: (len(item[1]), item[0]))
        # A stride through the ranks that favours no length; any fixed function of `left` would do.
        chosen = order[left * 2654435761 % 2**32 * left >> 32]
        self._buffer.remove(chosen)
        return chosen

    def _restore(self) -> None:
        """Read the samples again that were in the buffer of the state."""
        waiting, self._resumed = self._resumed, ()
        for position in waiting:
            self._read(position)
        if waiting:
            self._since.truncated = 0  # counted when they were first read

    def _fill(self, size: int) -> None:
        refused = 0
        while len(self._buffer) < size and (self._end is None or self._next < self._end):
            position = self._next
            self._next += self.count
            refused = 0 if self._read(position) else refused + 1
            self._check_refused(refused)

    def _read(self, position: int) -> bool:
        """Read the sample at `position` into the buffer; return False if it was left out and counted."""
        sample = self._attempt(self._fetch, position)
        if sample is None:
            return False
        if len(sample) > self.policy.max_length or self._has_too_many_images(sample):
            fitting = self._cut(position, sample)
            if fitting is None:
                return False
            sample = fitting
        self._buffer.append((position, sample))
        return True

    def _cut(self, position: int, sample: TokenizedSample) -> TokenizedSample | None:
        """Return the sample cut to fit, None if it is dropped. Raises DataError if `policy.overlong` is `error`."""
        policy = self.policy
        if policy.overlong == "error":
            raise self._overlong_error(position, sample)
        shorter = (
            self._shorten(position, policy.max_length) if policy.overlong == "truncate" and self._shorten else None
        )
        if shorter is None or self._has_too_many_images(shorter):
            self._since.dropped += 1
            return None
        self._since.truncated += 1
        return shorter

    def _has_too_many_images(self, sample: TokenizedSample) -> bool:
        return 0 < self.policy.max_images < len(sample.media)

    def _overlong_error(self, position: int, sample: TokenizedSample) -> DataError:
        images = self._has_too_many_images(sample)
        name = "data.max_images" if images else "data.max_length"
        file, record = self._location(position)
        return DataError(
            f"sample {sample.id!r} has too many {'images' if images else 'tokens'}",
            file=file or None,
            record=record if file else None,
            field=name,
            value=len(sample.media) if images else len(sample),
            expected=f"at most {self.policy.max_images if images else self.policy.max_length}",
            hint=f"raise {name} or set data.overlong=drop",
        )

    def _attempt(self, read: Callable[..., T], position: int, *arguments: Any) -> T | None:
        """Return `read(position, *arguments)`; count the sample and return None if it fails."""
        try:
            return read(position, *arguments)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - counted, or raised again
            self._count_bad(position, error)
            return None

    def _count_bad(self, position: int, error: Exception) -> None:
        """Count an unreadable sample. Raises `error` itself if none is allowed, DataError if there are too many."""
        if not self.policy.max_faults:
            raise error
        known = isinstance(error, VilaError)
        reason = str(error) if known else f"position {position}: {type(error).__name__}: {error}"
        location = self._location(position)
        self._since.bad_samples.append(BadSample(position, reason, location))
        self._last_reason = reason
        self._bad_locations.add(location)
        if len(self._bad_locations) > self.policy.max_faults:
            problem = f"too many unreadable samples; last error: {error}"
            expected = f"at most {self.policy.max_faults}"
            raise DataError(problem, field="data.max_faults", value=len(self._bad_locations), expected=expected)

    def _check_refused(self, refused: int) -> None:
        """Raise DataError if very many samples in succession were left out: no sequence would ever be filled."""
        if refused > _MAX_REFUSED:
            last = f"; the last unreadable one: {self._last_reason}" if self._last_reason else ""
            raise DataError(
                f"{_MAX_REFUSED:,} samples in succession are longer than {self.policy.max_length} tokens or unreadable"
                f"{last}",
                field="data.max_length",
            )


class RankStreams:
    """The packing streams of one rank. A step takes one sequence from each.

    dropped, truncated: overlong samples that were left out, or cut, so far.
    """

    def __init__(self, numbers: range, log: BadSampleLog | None) -> None:
        """numbers: of the streams of this rank."""
        self.numbers, self._log = numbers, log
        self.dropped = self.truncated = 0

    def step(self) -> list[PackedSequence]:
        """Return one sequence of each stream; an empty one of a stream whose data have ended.

        Raises DataError for a sample that is too long or unreadable, as the policy and the log say.
        """
        sequences = self._next_sequences()
        self.dropped += sum(sequence.dropped for sequence in sequences)
        self.truncated += sum(sequence.truncated for sequence in sequences)
        if self._log:
            self._log.add([sample for sequence in sequences for sample in sequence.bad_samples])
        return sequences

    def _next_sequences(self) -> list[PackedSequence]:
        raise NotImplementedError

    @property
    def states(self) -> list[PackingStreamState]:
        """State of every stream of this rank after the last step, without what has been read ahead."""
        raise NotImplementedError

    def close(self) -> None:
        """End the worker processes, if there are any. They hold no state; the next step starts new ones."""


class PackingStreams(RankStreams):
    """Packing streams that are read in this process."""

    def __init__(
        self,
        fetch: Fetch,
        count: int,
        *,
        policy: PackingPolicy,
        rank: int = 0,
        world: int = 1,
        states: Sequence[PackingStreamState] | None = None,
        log: BadSampleLog | None = None,
        **options: Any,
    ) -> None:
        """count: streams of all ranks. states: of all streams, by number. options: as for `PackingStream`."""
        super().__init__(streams_of_rank(rank, world, count), log)
        self._streams = [
            PackingStream(number, count, fetch, policy, state=states[number] if states else None, **options)
            for number in self.numbers
        ]

    def _next_sequences(self) -> list[PackedSequence]:
        return [stream.next_sequence() for stream in self._streams]

    @property
    def states(self) -> list[PackingStreamState]:
        """State of every stream of this rank after the last step."""
        return [stream.state for stream in self._streams]
