"""Seeded mutations of files: bytes of any file, and values of JSON files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
WRONG_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1e30, 10**25, float("nan"), "", "x", "../x", "\ud83d", [], {}, [[]], [None], {"x": None},
)  # fmt: skip


def mutate(file: Path, draw: random.Random) -> str:
    """Change a file in one random way and return the name of the change."""
    raw = file.read_bytes()
    json_like = file.suffix in {".json", ".jsonl", ".yaml"} or raw[:1] in (b"{", b"[")
    chosen = draw.choice(VALUE_MUTATIONS) if json_like and draw.random() < 0.7 else draw.choice(BYTE_MUTATIONS)
    changed = chosen(raw, draw)
    if changed is None or changed == raw:
        chosen = flip_bit
        changed = flip_bit(raw, draw)
    file.write_bytes(changed)
    return chosen.__name__


def flip_bit(raw: bytes, draw: random.Random) -> bytes:
    """Flip one bit, more often near the start, where headers are."""
    if not raw:
        return b"\0"
    at = draw.randrange(min(len(raw), 512)) if draw.random() < 0.5 else draw.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]


def random_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Replace up to 16 bytes."""
    at = draw.randrange(len(raw) or 1)
    size = draw.randint(1, 16)
    return raw[:at] + draw.randbytes(size) + raw[at + size :]


def cut(raw: bytes, draw: random.Random) -> bytes:
    """Remove the end."""
    return raw[: draw.randrange(len(raw) or 1)]


def cut_in_front(raw: bytes, draw: random.Random) -> bytes:
    """Remove the start."""
    return raw[draw.randrange(len(raw) or 1) :]


def repeat_block(raw: bytes, draw: random.Random) -> bytes:
    """Duplicate a block."""
    start = draw.randrange(len(raw) or 1)
    stop = min(len(raw), start + draw.randint(1, 600))
    return raw[:stop] + raw[start:stop] + raw[stop:]


def append(raw: bytes, draw: random.Random) -> bytes:
    """Append bytes."""
    return raw + draw.choice([b"\0", b"\n{}", b"x" * 600, raw[:512], draw.randbytes(40)])


def zeros(raw: bytes, draw: random.Random) -> bytes:
    """Zero a block, as a file system may after a crash."""
    at = draw.randrange(len(raw) or 1)
    size = draw.choice([4, 64, 4096])
    return raw[:at] + b"\0" * min(size, len(raw) - at) + raw[at + size :]


def all_ones(raw: bytes, draw: random.Random) -> bytes:
    """Set eight aligned bytes to 0xff: a size or an offset out of range."""
    at = draw.randrange(len(raw) // 8 + 1) * 8
    return raw[:at] + b"\xff" * 8 + raw[at + 8 :]


def other_content(raw: bytes, draw: random.Random) -> bytes:
    """Replace the file by one of another type."""
    import gzip

    return draw.choice([b"", LFS_POINTER, gzip.compress(raw[:4096], mtime=0), b"<!DOCTYPE html><p>404", b"\0" * 64])


def other_encoding(raw: bytes, draw: random.Random) -> bytes:
    """Encode as UTF-16, or prepend a byte order mark."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return flip_bit(raw, draw)
    return text.encode("utf-16") if draw.random() < 0.5 else b"\xef\xbb\xbf" + raw


BYTE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes | None], ...] = (
    flip_bit, flip_bit, flip_bit, random_bytes, cut, cut_in_front, repeat_block, append, zeros, all_ones, other_content,
    other_encoding,
)  # fmt: skip


def _documents(raw: bytes) -> tuple[list[Any], bool] | None:
    """The JSON values of a file and whether it holds one per line; None for anything else."""
    try:
        return [json.loads(raw)], False
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in raw.splitlines() if line.strip()], True
    except ValueError:
        return None


def _positions(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        item = stack.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            stack.append(item[key])
    return found


def _edit(raw: bytes, draw: random.Random, change: Callable[[Any, Any], None]) -> bytes | None:
    read = _documents(raw)
    if read is None:
        return None
    documents, lines = read
    positions = _positions(documents)
    if not positions:
        return None
    # Shallow values are as likely as the many deep ones of a tokenizer or an index.
    container, key = draw.choice(positions[: draw.choice([8, 64, len(positions)])])
    change(container, key)
    written = [json.dumps(document) for document in documents]
    return ("\n".join(written) + ("\n" if lines else "")).encode()


def wrong_value(raw: bytes, draw: random.Random) -> bytes | None:
    """Replace a value by one of another type or out of range."""

    def change(container: Any, key: Any) -> None:
        container[key] = draw.choice(WRONG_VALUES)

    return _edit(raw, draw, change)


def missing_key(raw: bytes, draw: random.Random) -> bytes | None:
    """Remove a key or list element."""

    def change(container: Any, key: Any) -> None:
        del container[key]

    return _edit(raw, draw, change)


def deep_value(raw: bytes, draw: random.Random) -> bytes | None:
    """Nest a value beyond the recursion limit."""
    marked = _edit(raw, draw, lambda container, key: container.__setitem__(key, "@deep@"))
    return None if marked is None else marked.replace(b'"@deep@"', b"[" * 100_000 + b"]" * 100_000)


def huge_integer(raw: bytes, draw: random.Random) -> bytes | None:
    """Replace a value by an integer of 5,000 digits."""
    marked = _edit(raw, draw, lambda container, key: container.__setitem__(key, "@huge@"))
    return None if marked is None else marked.replace(b'"@huge@"', b"9" * 5000)


VALUE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes | None], ...] = (
    wrong_value, wrong_value, wrong_value, wrong_value, missing_key, missing_key, deep_value, huge_integer,
)  # fmt: skip
