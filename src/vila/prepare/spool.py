"""The journal of one work unit: finished downloads, appended and synced, so that a kill costs only those in flight.

The file is a run of frames, each a line of JSON and then as many bytes as it announces. A frame that a kill cut short
is dropped when the file is opened again, with all behind it; all before it were synced.
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
from vila.core.fields import Fields
from vila.core.locks import try_lock
from vila.core.reading import parse_json

_MAX_HEAD = 1 << 20


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
    """Results by URL, on disk. Use as a context manager; a second process that opens the same file is refused.

    dropped_bytes: what was cut off the file when it was opened, from the first frame that was not whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int, str]] = {}
        self._failures: dict[str, Failure] = {}
        self.dropped_bytes = 0

    def __enter__(self) -> Spool:
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


def _framed(url: str, result: Picture | Failure) -> tuple[bytes, bytes]:
    content = result.content if isinstance(result, Picture) else b""
    head: dict[str, Any] = {"url": url, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(result, Picture):
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
