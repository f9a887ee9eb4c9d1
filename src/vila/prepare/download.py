"""Pictures by URL: several work units at once, each journaled in a spool and written whole when all is settled."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.errors import MediaError
from vila.core.events import SILENT, Events, task
from vila.media.fetch_many import DEFAULT_RULES, Fetcher, FetchRules
from vila.media.politeness import spread_by_host
from vila.prepare.counts import Counts
from vila.prepare.parts import Kind, is_finished, write_part
from vila.prepare.resize import MAX_PIXELS, SHORT_SIDE_336, ResizeRule, stored_picture
from vila.prepare.shards import TarSample
from vila.prepare.spool import Failure, Picture, Spool

_UNITS_AT_ONCE = 16
_LOOK_AGAIN_S = 0.5
_DECODERS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Page:
    """One record and the URLs that it needs, in the order of its pictures."""

    key: str
    record: dict[str, Any]
    urls: tuple[str, ...]


Results = Sequence[Picture | Failure]
ReadPages = Callable[[Path], Iterator[Page | str]]
"""Input file -> its pages in order, or the reason why a record is none. Called twice; must say the same both times."""
Assemble = Callable[[Page, Results, Counts], TarSample | str]
"""A page and what came of its URLs -> the sample, or the reason to drop it. May add to `counts.noted`."""


@dataclass(frozen=True, slots=True)
class Download:
    """What the units of one step have in common."""

    out: Path
    kind: Kind
    read_pages: ReadPages
    assemble: Assemble
    rules: FetchRules = DEFAULT_RULES
    resize: ResizeRule = SHORT_SIDE_336
    max_pixels: int = MAX_PIXELS


def download_units(units: Mapping[str, Path], job: Download, events: Events = SILENT) -> None:
    """Bring every unit that is not finished to its part. Call again after any kind of death: it goes on.

    After a kill, at most the `rules.in_flight` downloads that had not been synced are repeated. What a finished part
    holds does not depend on how often it was interrupted, as long as the servers answer the same.
    """
    todo = {name: path for name, path in units.items() if not is_finished(job.out, name)}
    if todo:
        with task(events, "download", None, "images"):
            try:
                asyncio.run(_download(todo, job, events))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from group


async def _download(units: Mapping[str, Path], job: Download, events: Events) -> None:
    queue = iter(units.items())
    slots = asyncio.Semaphore(job.rules.in_flight)
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="vila-decode") as decoders:
        async with Fetcher(job.rules) as fetcher:
            worker = _Worker(job, fetcher, slots, decoders, events)

            async def work() -> None:
                for name, path in queue:
                    await worker.settle(name, path)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(_UNITS_AT_ONCE, len(units))):
                    group.create_task(work())


@dataclass(frozen=True, slots=True)
class _Worker:
    job: Download
    fetcher: Fetcher
    slots: asyncio.Semaphore
    decoders: ThreadPoolExecutor
    events: Events

    async def settle(self, name: str, path: Path) -> None:
        """Fetch what the unit still lacks, then write its part."""
        # Small units wait for their slowest host, so the units beside it keep the line busy.
        with Spool(self.job.out / "parts" / f"{name}.spool") as spool:
            if spool.dropped_bytes:
                lost = f"the last {spool.dropped_bytes:,} bytes of the journal are damaged"
                self.events.said(f"{name}: {lost}; their downloads are repeated")
            urls = await asyncio.to_thread(_urls, path, self.job.read_pages)
            await self._fetch_all([url for url in spread_by_host(urls) if url not in spool], spool)
            counts = await asyncio.to_thread(_write, name, path, self.job, spool)
        (self.job.out / "parts" / f"{name}.spool").unlink()
        self.events.said(f"{name}: {counts}")

    async def _fetch_all(self, urls: Sequence[str], spool: Spool) -> None:
        waiting = deque(urls)
        flying: set[asyncio.Task[tuple[str, Picture | Failure]]] = set()
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

    async def _fetch(self, url: str) -> tuple[str, Picture | Failure]:
        fetched = await self.fetcher.fetch(url)
        if fetched.content is None:
            return url, Failure(fetched.kind, fetched.reason, fetched.attempts)
        store = partial(stored_picture, fetched.content, self.job.resize, self.job.max_pixels)
        try:
            return url, await asyncio.get_running_loop().run_in_executor(self.decoders, store)
        except MediaError as error:
            return url, Failure("not_an_image", str(error), fetched.attempts)


def _urls(path: Path, read_pages: ReadPages) -> list[str]:
    pages = (page for page in read_pages(path) if isinstance(page, Page))
    return list(dict.fromkeys(url for page in pages for url in page.urls))


def _write(name: str, path: Path, job: Download, spool: Spool) -> Counts:
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

    write_part(job.out, name, job.kind, samples(), counts, failures)
    return counts


def _listed(url: str, failure: Failure) -> dict[str, Any]:
    return {"url": url, "kind": failure.kind, "reason": failure.reason, "attempts": failure.attempts}
