"""Pictures by URL: several work units at once, each journaled in a spool and written whole when all is settled."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from vila.core.errors import ConfigError, DataError, MediaError
from vila.core.files import try_lock
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, parse_json
from vila.core.types import Image
from vila.media.bulk_download import DEFAULT_OPTIONS, BulkDownloader, DownloadOptions, interleave_hosts
from vila.media.image import ORIENTATION, open_image, orientation_of
from vila.media.limits import DEFAULT_LIMITS
from vila.prepare.shards import TarSample
from vila.prepare.work_units import Counts, Kind, is_finished, write_unit

# --- spool
# The journal of one work unit: finished downloads, appended and synced, so that a kill costs only those in flight.


_MAX_HEAD = 1 << 20


@dataclass(frozen=True, slots=True)
class DownloadedImage:
    """An encoded picture and the suffix that its format has (`jpg`, `png`, ...)."""

    content: bytes
    extension: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no picture: `kind` to count by, `reason` in words, `attempts` that were made."""

    kind: str
    reason: str
    attempts: int


class DownloadJournal:
    """Results by URL, on disk. Use as a context manager; a second process that opens the same file is refused.

    dropped_bytes: what was cut off the file when it was opened, from the first frame that was not whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int, str]] = {}
        self._failures: dict[str, Failure] = {}
        self.dropped_bytes = 0

    def __enter__(self) -> DownloadJournal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        if try_lock(self._stream) is False:
            self._stream.close()
            raise DataError("another process works on this unit", file=self._path, hint="give each its own shard")
        end = self._scan()
        self.dropped_bytes = self._stream.seek(0, os.SEEK_END) - end
        self._stream.truncate(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def __contains__(self, url: str) -> bool:
        return url in self._places or url in self._failures

    def append(self, results: Iterable[tuple[str, DownloadedImage | Failure]]) -> None:
        """Add results; on return they survive a kill and a loss of power."""
        end = self._stream.seek(0, os.SEEK_END)
        for url, result in results:
            head, content = _framed(url, result)
            self._stream.write(head + content)
            if isinstance(result, DownloadedImage):
                self._places[url] = (end + len(head), len(content), result.extension)
            else:
                self._failures[url] = result
            end += len(head) + len(content)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def read(self, url: str) -> DownloadedImage | Failure:
        """What came of `url`, which must be known."""
        if url in self._failures:
            return self._failures[url]
        offset, size, extension = self._places[url]
        self._stream.seek(offset)
        return DownloadedImage(self._stream.read(size), extension)

    def _scan(self) -> int:
        """Read the frames up to the first one that is not whole; returns its offset."""
        whole = self._stream.seek(0, os.SEEK_END)
        self._stream.seek(0)
        end = 0
        while line := self._stream.readline(_MAX_HEAD):
            head = _parsed(line, self._path)
            if head is None or head["size"] > whole - end - len(line):
                return end
            size = head["size"]
            if hashlib.sha256(self._stream.read(size)).hexdigest() != head["sha256"]:
                return end
            if "extension" in head:
                self._places[head["url"]] = (end + len(line), size, head["extension"])
            else:
                self._failures[head["url"]] = Failure(head["kind"], head["reason"], head["attempts"])
            end += len(line) + size
        return end


def _framed(url: str, result: DownloadedImage | Failure) -> tuple[bytes, bytes]:
    content = result.content if isinstance(result, DownloadedImage) else b""
    head: dict[str, Any] = {"url": url, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(result, DownloadedImage):
        head["extension"] = result.extension
    else:
        head |= {"kind": result.kind, "reason": result.reason, "attempts": result.attempts}
    return json.dumps(head).encode() + b"\n", content


def _parsed(line: bytes, path: Path) -> dict[str, Any] | None:
    """Return the head of a frame, None if it is cut or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = parse_json(line, file=path, surrogates=True)
        head = Fields(value if isinstance(value, dict) else {}, path)
        known = {"url": head.text("url"), "size": head.integer("size", maximum=2**62), "sha256": head.text("sha256")}
        if "extension" in head:
            return {**known, "extension": head.text("extension")}
        return {**known, "kind": head.text("kind"), "reason": head.text("reason"), "attempts": head.integer("attempts")}
    except DataError:
        return None


# --- resize
# How downloaded pictures are stored: as they came, or shrunk to the short side that the tower needs.


MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded; with one decoder per core that bounds the memory."""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """Shrink pictures whose short side is over `short_side` pixels to it, bicubic, as JPEG. `None` loses nothing.

    The original shrinks to 336 and writes JPEG at Pillow's quality of 75, whatever came. Ours writes 90, and a JPEG,
    PNG or WebP that is small enough keeps its bytes; where nothing may be lost, other formats become PNG. A tower that
    sees more than 336 pixels needs a larger short side.
    """

    short_side: int | None = 336
    quality: int = 90

    @property
    def facts(self) -> dict[str, int | None]:
        """The rule as settings that are stored."""
        return {"short_side": self.short_side, "quality": self.quality}

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ConfigError(f"resize.short_side: {self.short_side}; expected a number of pixels, or none")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"resize.quality: {self.quality}; expected 1 to 100")


SHORT_SIDE_336 = ResizeRule()
KEEP_ORIGINAL = ResizeRule(short_side=None)


def encode_image(content: bytes, rule: ResizeRule, max_pixels: int = MAX_PIXELS) -> DownloadedImage:
    """A downloaded image as it will be stored. It is decoded in any case: what does not decode is no image.

    Pixels are stored as they came. An image that is encoded anew keeps its EXIF orientation, and no other EXIF, so that
    training decides whether to turn it. Raises MediaError saying what is wrong with it.
    """
    picture = open_image(
        Image(content), exif_orientation=False, limits=replace(DEFAULT_LIMITS, image_pixels=max_pixels)
    )
    size = shrunk_size(picture.size, rule.short_side)
    extension = _extension(content)
    if size == picture.size and extension:
        return DownloadedImage(content, extension)
    if size != picture.size:
        picture = picture.resize(size, PilImage.Resampling.BICUBIC)
    stream, metadata = io.BytesIO(), {}
    if (orientation := orientation_of(content)) != 1:
        metadata["exif"] = PilImage.Exif()
        metadata["exif"][ORIENTATION] = orientation
    if rule.short_side is None:
        picture.save(stream, "PNG", **metadata)
        return DownloadedImage(stream.getvalue(), "png")
    picture.save(stream, "JPEG", quality=rule.quality, **metadata)
    return DownloadedImage(stream.getvalue(), "jpg")


def shrunk_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(width, height) in pixels after the rule; the aspect is kept to the nearest pixel.

    >>> shrunk_size((1000, 500), 336)
    (672, 336)
    """
    short = min(size)
    if short_side is None or short <= short_side:
        return size
    width, height = (max(short_side, round(side * short_side / short)) for side in size)
    return width, height


def _extension(content: bytes) -> str:
    try:
        with PilImage.open(io.BytesIO(content), formats=_FORMATS) as picture:
            return _EXTENSIONS.get(picture.format or "", "")
    except UnidentifiedImageError:
        return ""


_UNITS_AT_ONCE = 16
_LOOK_AGAIN_S = 0.5
_DECODERS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class PendingSample:
    """One record and the URLs that it needs, in the order of its pictures."""

    key: str
    record: dict[str, Any]
    urls: tuple[str, ...]


Results = Sequence[DownloadedImage | Failure]
ReadRecords = Callable[[Path], Iterator[PendingSample | str]]
"""Input file -> its pages in order, or the reason why a record is none. Called twice; must say the same both times."""
Assemble = Callable[[PendingSample, Results, Counts], TarSample | str]
"""A page and what came of its URLs -> the sample, or the reason to drop it. May add to `counts.noted`."""


@dataclass(frozen=True, slots=True)
class DownloadJob:
    """What the units of one step have in common."""

    out: Path
    kind: Kind
    read_pages: ReadRecords
    assemble: Assemble
    rules: DownloadOptions = DEFAULT_OPTIONS
    resize: ResizeRule = SHORT_SIDE_336
    max_pixels: int = MAX_PIXELS


def download_units(units: Mapping[str, Path], job: DownloadJob, events: Events = SILENT) -> None:
    """Bring every unit that is not finished to its part. Call again after any kind of death: it goes on.

    After a kill, at most the `rules.max_connections` downloads that had not been synced are repeated. What a finished
    part holds does not depend on how often it was interrupted, as long as the servers answer the same.
    """
    todo = {name: path for name, path in units.items() if not is_finished(job.out, name)}
    if todo:
        with task(events, "download", None, "images"):
            try:
                asyncio.run(_download(todo, job, events))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from group


async def _download(units: Mapping[str, Path], job: DownloadJob, events: Events) -> None:
    queue = iter(units.items())
    slots = asyncio.Semaphore(job.rules.max_connections)
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="vila-decode") as decoders:
        async with BulkDownloader(job.rules) as fetcher:
            worker = _Worker(job, fetcher, slots, decoders, events)

            async def work() -> None:
                for name, path in queue:
                    await worker.settle(name, path)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(_UNITS_AT_ONCE, len(units))):
                    group.create_task(work())


@dataclass(frozen=True, slots=True)
class _Worker:
    job: DownloadJob
    fetcher: BulkDownloader
    slots: asyncio.Semaphore
    decoders: ThreadPoolExecutor
    events: Events

    async def settle(self, name: str, path: Path) -> None:
        """Fetch what the unit still lacks, then write its part."""
        # Small units wait for their slowest host, so the units beside it keep the line busy.
        with DownloadJournal(self.job.out / "parts" / f"{name}.spool") as spool:
            if spool.dropped_bytes:
                lost = f"the last {spool.dropped_bytes:,} bytes of the journal are damaged"
                self.events.log(f"{name}: {lost}; their downloads are repeated")
            urls = await asyncio.to_thread(_urls, path, self.job.read_pages)
            await self._fetch_all([url for url in interleave_hosts(urls) if url not in spool], spool)
            counts = await asyncio.to_thread(_write, name, path, self.job, spool)
        (self.job.out / "parts" / f"{name}.spool").unlink()
        self.events.log(f"{name}: {counts}")

    async def _fetch_all(self, urls: Sequence[str], spool: DownloadJournal) -> None:
        waiting = deque(urls)
        flying: set[asyncio.Task[tuple[str, DownloadedImage | Failure]]] = set()
        try:
            while True:
                # Whoever holds slots never waits for one: all units could wait for each other.
                while waiting and not (flying and self.slots.locked()):
                    await self.slots.acquire()
                    flying.add(asyncio.create_task(self._fetch(waiting.popleft())))
                if not flying:
                    return
                timeout = _LOOK_AGAIN_S if waiting else None
                done, flying = await asyncio.wait(flying, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    continue
                results = [one.result() for one in done]
                # One sync for all that have come meanwhile; their slots are free when they are safe.
                await asyncio.to_thread(spool.append, results)
                for _ in results:
                    self.slots.release()
                self.events.advanced("download", len(results))
        finally:
            for one in flying:
                one.cancel()
            await asyncio.gather(*flying, return_exceptions=True)

    async def _fetch(self, url: str) -> tuple[str, DownloadedImage | Failure]:
        fetched = await self.fetcher.download(url)
        if fetched.content is None:
            return url, Failure(fetched.kind, fetched.reason, fetched.attempts)
        store = partial(encode_image, fetched.content, self.job.resize, self.job.max_pixels)
        try:
            return url, await asyncio.get_running_loop().run_in_executor(self.decoders, store)
        except MediaError as error:
            return url, Failure("not_an_image", str(error), fetched.attempts)


def _urls(path: Path, read_pages: ReadRecords) -> list[str]:
    pages = (page for page in read_pages(path) if isinstance(page, PendingSample))
    return list(dict.fromkeys(url for page in pages for url in page.urls))


def _write(name: str, path: Path, job: DownloadJob, spool: DownloadJournal) -> Counts:
    counts = Counts()
    failures: list[dict[str, Any]] = []

    def samples() -> Iterator[TarSample]:
        failed: dict[str, None] = {}
        for row, page in enumerate(job.read_pages(path), start=1):
            counts.read += 1
            if isinstance(page, str):
                counts.dropped[page] += 1
                failures.append({"row": row, "reason": page})
                continue
            results = [spool.read(url) for url in page.urls]
            for url, result in zip(page.urls, results, strict=True):
                if isinstance(result, Failure):
                    counts.noted[result.kind] += 1
                    if url not in failed:
                        failed[url] = None
                        failures.append(_listed(url, result))
            sample = job.assemble(page, results, counts)
            if isinstance(sample, str):
                counts.dropped[sample] += 1
                continue
            counts.written += 1
            yield sample

    write_unit(job.out, name, job.kind, samples(), counts, failures)
    return counts


def _listed(url: str, failure: Failure) -> dict[str, Any]:
    return {"url": url, "kind": failure.kind, "reason": failure.reason, "attempts": failure.attempts}
