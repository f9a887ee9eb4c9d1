"""WebDataset shards: tar files of samples, written deterministically and read one sample at a time."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.data.readers.index import read_span
from vila.data.readers.tar import tar_members

_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class TarSample:
    """One sample. `members`: pairs of suffix (`json`, `0.jpg`) and content; the tar member is named `KEY.SUFFIX`."""

    key: str
    members: tuple[tuple[str, bytes], ...]


def json_member(value: Any) -> tuple[str, bytes]:
    """Return the member `json` of a sample."""
    return "json", json.dumps(value, ensure_ascii=False).encode()


def safe_key(text: str) -> str:
    """Replace everything but letters, digits, `_` and `-`: a dot would end the key, a slash would make a directory."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text) or "_"


def write_tar(path: Path, samples: Iterable[TarSample]) -> int:
    """Write samples in order. Returns their number. Equal samples give equal bytes."""
    written = 0
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if not _KEY.fullmatch(sample.key):
                raise DataError(file=path, field="key", value=sample.key, expected="letters, digits, '_' and '-'")
            for suffix, content in sample.members:
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            written += 1
    return written


def read_tar(path: Path) -> Iterator[TarSample]:
    """Yield samples in order. Raises DataError for files that `tar_members` rejects."""
    key = ""
    members: list[tuple[str, bytes]] = []
    try:
        for member in tar_members(path):
            name, _, suffix = member.name.partition(".")
            if name != key and members:
                yield TarSample(key, tuple(members))
                members = []
            key = name
            members.append((suffix, read_span(path, member.offset, member.size)))
    except DataError as error:
        error.hint = "delete it and run the command again"
        raise
    if members:
        yield TarSample(key, tuple(members))


def even_ranges(total: int, per_shard: int) -> list[tuple[int, int]]:
    """Split `total` samples into consecutive ranges [begin, end) of at most `per_shard`, even to within one sample.

    >>> even_ranges(10, 4)
    [(0, 3), (3, 6), (6, 10)]
    """
    if per_shard < 1:
        raise DataError(field="per_shard", value=per_shard, expected="at least 1")
    count = -(-total // per_shard)
    return [(total * index // count, total * (index + 1) // count) for index in range(count)]
