"""The journal of one work unit: finished downloads, appended and synced, so that a kill costs only those in flight.

The file is a run of frames, each a line of JSON and then as many bytes as it announces. A frame that a kill cut short
is dropped when the file is opened again; all before it were synced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vila.core.errors import DataError
from vila.core.locks import try_lock


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture and the suffix that its format has (`jpg`, `png`, ...)."""

    content: bytes
    extension: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no picture: `kind` to count by, `reason` in words, `attempts` that were made."""

    kind: str
    reason: str
    attempts: int


class Spool:
    """Results by URL, on disk. Use as a context manager; a second process that opens the same file is refused."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int, str]] = {}
        self._failures: dict[str, Failure] = {}

    def __enter__(self) -> Spool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        if try_lock(self._stream) is False:
            self._stream.close()
            raise DataError("another process works on this unit", file=self._path, hint="give each its own shard")
        end = self._scan()
        self._stream.truncate(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def __contains__(self, url: str) -> bool:
        return url in self._places or url in self._failures

    def append(self, results: Iterable[tuple[str, Picture | Failure]]) -> None:
        """Add results; on return they survive a kill and a loss of power."""
        end = self._stream.seek(0, os.SEEK_END)
        for url, result in results:
            head, content = _framed(url, result)
            self._stream.write(head + content)
            if isinstance(result, Picture):
                self._places[url] = (end + len(head), len(content), result.extension)
            else:
                self._failures[url] = result
            end += len(head) + len(content)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def read(self, url: str) -> Picture | Failure:
        """What came of `url`, which must be known."""
        if url in self._failures:
            return self._failures[url]
        offset, size, extension = self._places[url]
        self._stream.seek(offset)
        return Picture(self._stream.read(size), extension)

    def _scan(self) -> int:
        """Learn the frames that are whole; returns where the last one ends."""
        self._stream.seek(0)
        end = 0
        while line := self._stream.readline():
            head = _parsed(line)
            if head is None:
                return end
            size = head["size"]
            content = self._stream.read(size)
            if len(content) != size or hashlib.sha256(content).hexdigest() != head["sha256"]:
                return end
            if "extension" in head:
                self._places[head["url"]] = (end + len(line), size, head["extension"])
            else:
                self._failures[head["url"]] = Failure(head["kind"], head["reason"], head["attempts"])
            end += len(line) + size
        return end


def _framed(url: str, result: Picture | Failure) -> tuple[bytes, bytes]:
    content = result.content if isinstance(result, Picture) else b""
    head: dict[str, Any] = {"url": url, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(result, Picture):
        head["extension"] = result.extension
    else:
        head |= {"kind": result.kind, "reason": result.reason, "attempts": result.attempts}
    return json.dumps(head).encode() + b"\n", content


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        head = json.loads(line)
    except ValueError:
        return None
    return head if isinstance(head, dict) and head.keys() >= {"url", "size", "sha256"} else None
