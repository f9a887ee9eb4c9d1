"""Sources of media as streams: a path, bytes, bytes stored in a larger file, a `data:` URL or one of the web."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vila.core.errors import MediaError
from vila.core.types import Stored
from vila.media.fetch import data_url_bytes, fetch, shown
from vila.media.limits import DEFAULT_LIMITS, IsCancelled, never

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def open_source(
    source: Path | str | bytes | Stored,
    what: str,
    *,
    base: Path | None = None,
    allow_private: bool = False,
    allowed_domains: Sequence[str] = (),
    max_bytes: int = DEFAULT_LIMITS.image_bytes,
    timeout_s: float = DEFAULT_LIMITS.image_fetch_s,
    cancelled: IsCancelled = never,
) -> tuple[IO[bytes], str]:
    """The encoded bytes as a stream, and the source's name for messages.

    what:      what it ought to be, with its article: `an image`.
    base:      the folder that a relative path starts from.
    max_bytes, timeout_s: limits of what comes from a URL; a file may be of any size.
    allow_private, allowed_domains, cancelled: see `fetch`.
    Raises MediaError naming the source and the reason.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source), f"<{len(source)} bytes>"
    if isinstance(source, Stored):
        return io.BytesIO(source.read()), source.name
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(data_url_bytes(source, max_bytes=max_bytes)), shown(source)
    if isinstance(source, str) and _URL.match(source):
        content = fetch(
            source,
            max_bytes=max_bytes,
            timeout_s=timeout_s,
            allow_private=allow_private,
            allowed_domains=allowed_domains,
            cancelled=cancelled,
        )
        return io.BytesIO(content), shown(source)
    path = Path(source) if base is None else base / source
    return _open_path(path, what), str(path)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Encoded media that were read into memory; `name` is for messages."""

    name: str
    content: bytes

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.content


def _open_path(path: Path, what: str) -> IO[bytes]:
    name = str(path)[:200]
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except FileNotFoundError as error:
        place = "" if path.is_absolute() else f" below {Path.cwd()}"
        raise MediaError(f"no such file{place}", file=name, hint="check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"cannot be opened ({reason})", file=repr(name)) from error
    kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
    raise MediaError(f"{kind}, not {what}", file=name, hint="give the path of one file")
