"""Checks of file headers before a decoder opens the file: format, expected size, announced packets, JPEG scans."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from vila.core.errors import MediaError
from vila.core.reading import foreign_content
from vila.media.limits import Readable

COPY_AGAIN = "download or copy it again"
_EXPECTED = "MP4, MOV, WebM, MKV, AVI, MPEG, FLV, GIF, APNG or animated WebP"
_EBML = b"\x1a\x45\xdf\xa3"
_MAX_BOX = 1 << 28  # bytes of one box that are searched for sample tables


def unreadable(stream: Readable, name: str) -> MediaError:
    """Return the error for a file that FFmpeg cannot open, by its first bytes."""
    if missing := missing_bytes(stream):
        return MediaError(f"truncated ({missing})", file=name, hint=COPY_AGAIN)
    stream.seek(0)
    head = stream.read(64)
    if known := foreign_content(head.lstrip(b"\xef\xbb\xbf \t\r\n")):
        return MediaError(known[0], file=name, hint=known[1])
    return MediaError("damaged, or not a video", file=name, value=head[:12], expected=_EXPECTED)


def missing_bytes(stream: Readable) -> str:
    """Return how many bytes are present, as text, if the file's headers announce more; else the empty string."""
    size = stream.seek(0, os.SEEK_END)
    announced = _announced_bytes(stream, size)
    return f"{size:,} of {announced:,} bytes" if announced > size else ""


def announced_packets(stream: Readable) -> int:
    """Count the packets that sample tables of an MP4 or MOV file announce without listing them; 0 for other files.

    A table of samples of equal size, or a fragment with default sizes, has a few bytes whatever its count, but FFmpeg
    allocates an index entry of 24 bytes for each sample: a file of 2 KB can make it allocate 4 GB.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if stream.read(4) in (b"RIFF", _EBML):
        return 0
    return sum(_announced_samples(stream, box) for box in _boxes(stream, size) if box.kind != b"mdat")


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOS, _EOI = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers; the others are tables
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


def jpeg_scans(stream: Readable, most: int) -> int:
    """Count the scans of a JPEG image, up to `most` + 1; 1 for an image that is decoded in a single pass.

    A decoder visits all pixels once per scan, and a scan that changes nothing has 75 bytes: a file of 200 KB can take
    9 seconds. Data after the end of the image is ignored.
    """
    stream.seek(0)
    content = stream.read()
    position, scans, components, progressive = 2, 0, 0, False
    while (found := _MARKER.search(content, position)) and scans <= most:
        kind = content[found.start() + 1]
        body = found.start() + 4
        if kind == _EOI:
            break
        if kind in _FRAMES:
            components, progressive = int.from_bytes(content[body + 5 : body + 6], "big"), kind in _PROGRESSIVE
        if kind == _SOS:
            scans += 1
            if not progressive and scans == 1 and content[body : body + 1] >= bytes([components]):
                return 1  # all components in one scan: the decoder reads no other
        position = body + max(0, int.from_bytes(content[body - 2 : body], "big") - 2)
    return scans


class _Box(NamedTuple):
    kind: bytes
    start: int
    length: int


def _boxes(stream: Readable, size: int) -> Iterator[_Box]:
    """Yield the top-level boxes of an ISO media file; none for other files. The last may extend past the file's end."""
    position = 0
    while position < size:
        stream.seek(position)
        head = stream.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        elif length == 0 and position:
            length = size - position  # extends to the end of the file
        if length < 8 or not head[4:8].isalnum():
            return
        yield _Box(head[4:8], position, length)
        position += length


def _announced_samples(stream: Readable, box: _Box) -> int:
    stream.seek(box.start)
    content = stream.read(min(box.length, _MAX_BOX))
    total = 0
    for offset in _box_offsets(content, b"stsz"):
        if int.from_bytes(content[offset + 8 : offset + 12], "big") and not _is_raw_audio(content, offset):
            total += int.from_bytes(content[offset + 12 : offset + 16], "big")
    for offset in _box_offsets(content, b"trun"):
        total += int.from_bytes(content[offset + 8 : offset + 12], "big")
    return total


def _box_offsets(content: bytes, kind: bytes) -> Iterator[int]:
    """Yield the offsets of the names of boxes of a kind, at any nesting: FFmpeg accepts many nestings."""
    offset = content.find(kind)
    while offset >= 0:
        length = int.from_bytes(content[max(0, offset - 4) : offset], "big")
        if 16 <= length <= len(content) - offset + 4:
            yield offset
        offset = content.find(kind, offset + 4)


def _is_raw_audio(content: bytes, offset: int) -> bool:
    """Return whether the sample table at `offset` belongs to uncompressed audio, which FFmpeg indexes by chunk.

    An hour of it has 170 million samples. FFmpeg's condition: an audio track with one time entry of duration 1.
    """
    begin = content.rfind(b"trak", 0, offset)
    end = content.find(b"trak", offset)
    track = content[max(begin, 0) : end if end >= 0 else len(content)]
    times = track.find(b"stts")
    only = track.count(b"stts") == 1 and b"vide" not in track and b"soun" in track
    return only and track[times + 8 : times + 12] == b"\0\0\0\1" and track[times + 16 : times + 20] == b"\0\0\0\1"


def _announced_bytes(stream: Readable, size: int) -> int:
    """Return the file length that the headers announce (RIFF, Matroska, ISO boxes); 0 if unknown."""
    stream.seek(0)
    head = stream.read(8)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:], "little")
    if head[:4] != _EBML:
        # The end of the last box that an MP4 or MOV file needs; truncating a later box loses nothing.
        ends = [box.start + box.length for box in _boxes(stream, size) if box.kind in (b"moov", b"mdat", b"moof")]
        return ends[-1] if ends else 0
    stream.seek(4)
    stream.seek(min(_ebml_size(stream), size), os.SEEK_CUR)
    segment = _ebml_size(stream) if stream.read(4) == b"\x18\x53\x80\x67" else 0
    return stream.tell() + segment if segment else 0


def _ebml_size(stream: Readable) -> int:
    """Read an EBML length: 1 to 8 bytes, one more than the leading zero bits of the first. Unknown (all ones) is 0."""
    first = stream.read(1)
    extra = 8 - first[0].bit_length() if first else 0
    ones = (1 << 7 * (extra + 1)) - 1
    value = int.from_bytes(first + stream.read(extra), "big") & ones
    return 0 if value == ones else value
