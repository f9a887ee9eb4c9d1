"""Download the images of work units: concurrent, resumable, resized as they arrive.

Each unit has a journal on disk of its finished downloads. When all its URLs have succeeded or failed, its samples are
written and the journal is deleted.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from vila.media.bulk_download import BulkDownloader, interleave_hosts
from vila.media.http_options import DEFAULT_OPTIONS, DownloadOptions
from vila.media.image import ORIENTATION, open_image, orientation_of
from vila.media.limits import DEFAULT_LIMITS
from vila.prepare.shards import TarSample
from vila.prepare.work_units import Counts, Kind, is_finished, write_unit

_MAX_HEAD = 1 << 20


@dataclass(frozen=True, slots=True)
class DownloadedImage:
    """An encoded image and its file suffix (`jpg`, `png`, ...)."""

    content: bytes
    extension: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed download: `kind` to count by (see `FetchError.kind`, and `not_an_image`), reason, number of attempts."""

    kind: str
    reason: str
    attempts: int


class DownloadJournal:
    """Append-only file of the finished downloads of one unit, by URL.

    After a kill, only downloads that were in flight are repeated. Use as a context manager; a second process that opens
    the same file gets DataError. Format: a JSON line (url, size, sha256, and extension or kind, reason, attempts), then
    the content.
    dropped_bytes: bytes removed at the end of the file when it was opened, from the first incomplete entry on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._locations: dict[str, tuple[int, int, str]] = {}  # offset, size, extension
        self._failures: dict[str, Failure] = {}
        self.dropped_bytes = 0

    def __enter__(self) -> DownloadJournal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        if try_lock(self._stream) is False:
            self._stream.close()
            raise DataError(
                "another process is working on the same files", file=self._path, hint="give each its own --shard"
            )
        end = self._scan()
        self.dropped_bytes = self._stream.seek(0, os.SEEK_END) - end
        self._stream.truncate(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def __contains__(self, url: str) -> bool:
        return url in self._locations or url in self._failures

    def append(self, results: Iterable[tuple[str, DownloadedImage | Failure]]) -> None:
        """Append results and fsync them."""
        end = self._stream.seek(0, os.SEEK_END)
        for url, result in results:
            head, content = _entry(url, result)
            self._stream.write(head + content)
            if isinstance(result, DownloadedImage):
                self._locations[url] = (end + len(head), len(content), result.extension)
            else:
                self._failures[url] = result
            end += len(head) + len(content)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def read(self, url: str) -> DownloadedImage | Failure:
        """Return the result of `url`, which must be in the journal."""
        if url in self._failures:
            return self._failures[url]
        offset, size, extension = self._locations[url]
        self._stream.seek(offset)
        return DownloadedImage(self._stream.read(size), extension)

    def _scan(self) -> int:
        """Read the entries up to the first incomplete one. Returns its offset."""
        file_size = self._stream.seek(0, os.SEEK_END)
        self._stream.seek(0)
        end = 0
        while line := self._stream.readline(_MAX_HEAD):
            head = _parse_head(line, self._path)
            if head is None or head["size"] > file_size - end - len(line):
                return end
            size = head["size"]
            if hashlib.sha256(self._stream.read(size)).hexdigest() != head["sha256"]:
                return end
            if "extension" in head:
                self._locations[head["url"]] = (end + len(line), size, head["extension"])
            else:
                self._failures[head["url"]] = Failure(head["kind"], head["reason"], head["attempts"])
            end += len(line) + size
        return end


def _entry(url: str, result: DownloadedImage | Failure) -> tuple[bytes, bytes]:
    content = result.content if isinstance(result, DownloadedImage) else b""
    head: dict[str, Any] = {"url": url, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(result, DownloadedImage):
        head["extension"] = result.extension
    else:
        head |= {"kind": result.kind, "reason": result.reason, "attempts": result.attempts}
    return json.dumps(head).encode() + b"\n", content


def _parse_head(line: bytes, path: Path) -> dict[str, Any] | None:
    """Parse the JSON line of an entry; None if it is truncated or damaged."""
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


MAX_PIXELS = 64_000_000
"""Maximum pixels of a downloaded image, checked before decoding; with one decoder per core it bounds the memory."""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """Resize images whose short side exceeds `short_side` pixels (bicubic, stored as JPEG); None keeps the full size.

    A JPEG, PNG or WebP image that is not resized keeps its bytes; other formats become JPEG, or PNG if `short_side` is
    None. The released code always resizes to 336 and writes JPEG with quality 75. A tower with a resolution above 336
    needs a larger short side.
    """

    short_side: int | None = 336
    quality: int = 90

    @property
    def settings(self) -> dict[str, int | None]:
        """Return the settings that are stored with the output."""
        return {"short_side": self.short_side, "quality": self.quality}

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ConfigError(field="resize.short_side", value=self.short_side, expected="pixels from 1, or None")
        if not 1 <= self.quality <= 100:
            raise ConfigError(field="resize.quality", value=self.quality, expected="1 to 100")


SHORT_SIDE_336 = ResizeRule()
KEEP_ORIGINAL = ResizeRule(short_side=None)


def encode_image(content: bytes, rule: ResizeRule, max_pixels: int = MAX_PIXELS) -> DownloadedImage:
    """Encode a downloaded image for storage. It is always decoded, to check that it is an image.

    The orientation is not applied: a re-encoded image keeps its EXIF orientation, but no other EXIF, and training
    decides whether to apply it. Raises MediaError.
    """
    image = open_image(Image(content), exif_orientation=False, limits=replace(DEFAULT_LIMITS, image_pixels=max_pixels))
    size = shrunk_size(image.size, rule.short_side)
    extension = _extension(content)
    if size == image.size and extension:
        return DownloadedImage(content, extension)
    if size != image.size:
        image = image.resize(size, PilImage.Resampling.BICUBIC)
    stream, metadata = io.BytesIO(), {}
    if (orientation := orientation_of(content)) != 1:
        metadata["exif"] = PilImage.Exif()
        metadata["exif"][ORIENTATION] = orientation
    if rule.short_side is None:
        image.save(stream, "PNG", **metadata)
        return DownloadedImage(stream.getvalue(), "png")
    image.save(stream, "JPEG", quality=rule.quality, **metadata)
    return DownloadedImage(stream.getvalue(), "jpg")


def shrunk_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Return (width, height) in pixels after resizing; the aspect ratio is kept to the nearest pixel.

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
        with PilImage.open(io.BytesIO(content), formats=_FORMATS) as image:
            return _EXTENSIONS.get(image.format or "", "")
    except UnidentifiedImageError:
        return ""


_CONCURRENT_UNITS = 16
_POLL_S = 0.5
_DECODERS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class PendingSample:
    """A record and the URLs of its images, in their order."""

    key: str
    record: dict[str, Any]
    urls: tuple[str, ...]


Results = Sequence[DownloadedImage | Failure]
ReadRecords = Callable[[Path], Iterator[PendingSample | str]]
"""Input file -> its samples in order, or the reason to drop a record. Called twice; must yield the same both times."""
Assemble = Callable[[PendingSample, Results, Counts], TarSample | str]
"""A pending sample and the results of its URLs -> the sample, or the reason to drop it. May add to `counts.noted`."""


@dataclass(frozen=True, slots=True)
class DownloadJob:
    """Parameters that all units of a step share."""

    out: Path
    kind: Kind
    read_records: ReadRecords
    assemble: Assemble
    options: DownloadOptions = DEFAULT_OPTIONS
    resize: ResizeRule = SHORT_SIDE_336
    max_pixels: int = MAX_PIXELS


def download_units(job: DownloadJob, units: Mapping[str, Path], events: Events = SILENT) -> None:
    """Download all units that are not finished. After an interruption, call it again to resume.

    At most `options.max_connections` downloads, those not yet synced, are repeated after a kill. The content of a
    finished unit does not depend on interruptions, provided that the servers respond equally.
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
    slots = asyncio.Semaphore(job.options.max_connections)
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="vila-decode") as decoders:
        async with BulkDownloader(job.options) as downloader:
            worker = _Worker(job, downloader, slots, decoders, events)

            async def work() -> None:
                for name, path in queue:
                    await worker.run_unit(name, path)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(_CONCURRENT_UNITS, len(units))):
                    group.create_task(work())


@dataclass(frozen=True, slots=True)
class _Worker:
    job: DownloadJob
    downloader: BulkDownloader
    slots: asyncio.Semaphore
    decoders: ThreadPoolExecutor
    events: Events

    async def run_unit(self, name: str, path: Path) -> None:
        """Download the URLs that the unit's journal lacks, then write its samples."""
        # A unit ends with its slowest host; the concurrent units keep the connections in use meanwhile.
        journal_path = self.job.out / "parts" / f"{name}.spool"
        with DownloadJournal(journal_path) as journal:
            if journal.dropped_bytes:
                self.events.log(f"{name}: {journal.dropped_bytes:,} damaged bytes removed from the journal; "
                                "repeating these downloads")  # fmt: skip
            urls = await asyncio.to_thread(_urls, path, self.job.read_records)
            await self._download_all([url for url in interleave_hosts(urls) if url not in journal], journal)
            counts = await asyncio.to_thread(_write, name, path, self.job, journal)
        journal_path.unlink()
        self.events.log(f"{name}: {counts}")

    async def _download_all(self, urls: Sequence[str], journal: DownloadJournal) -> None:
        waiting = deque(urls)
        running: set[asyncio.Task[tuple[str, DownloadedImage | Failure]]] = set()
        try:
            while True:
                # A unit that holds slots never waits for another one, otherwise units could deadlock.
                while waiting and not (running and self.slots.locked()):
                    await self.slots.acquire()
                    running.add(asyncio.create_task(self._download(waiting.popleft())))
                if not running:
                    return
                timeout = _POLL_S if waiting else None
                done, running = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    continue
                results = [one.result() for one in done]
                # One fsync for all finished downloads; their slots are released after it.
                await asyncio.to_thread(journal.append, results)
                for _ in results:
                    self.slots.release()
                self.events.advanced("download", len(results))
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _download(self, url: str) -> tuple[str, DownloadedImage | Failure]:
        result = await self.downloader.download(url)
        if result.content is None:
            return url, Failure(result.kind, result.reason, result.attempts)
        encode = partial(encode_image, result.content, self.job.resize, self.job.max_pixels)
        try:
            return url, await asyncio.get_running_loop().run_in_executor(self.decoders, encode)
        except MediaError as error:
            return url, Failure("not_an_image", str(error), result.attempts)


def _urls(path: Path, read_records: ReadRecords) -> list[str]:
    pending = (one for one in read_records(path) if isinstance(one, PendingSample))
    return list(dict.fromkeys(url for one in pending for url in one.urls))


def _write(name: str, path: Path, job: DownloadJob, journal: DownloadJournal) -> Counts:
    counts = Counts()
    failures: list[dict[str, Any]] = []

    def samples() -> Iterator[TarSample]:
        failed: set[str] = set()
        for row, pending in enumerate(job.read_records(path), start=1):
            counts.read += 1
            if isinstance(pending, str):
                counts.dropped[pending] += 1
                failures.append({"row": row, "reason": pending})
                continue
            results = [journal.read(url) for url in pending.urls]
            for url, result in zip(pending.urls, results, strict=True):
                if isinstance(result, Failure):
                    counts.noted[result.kind] += 1
                    if url not in failed:
                        failed.add(url)
                        failures.append({"url": url, **asdict(result)})
            sample = job.assemble(pending, results, counts)
            if isinstance(sample, str):
                counts.dropped[sample] += 1
                continue
            counts.written += 1
            yield sample

    write_unit(job.out, name, job.kind, samples(), counts, failures)
    return counts
