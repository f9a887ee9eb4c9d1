"""Facts from a file's own headers, read before a decoder opens it: kind, promised size, announced packets, scans."""

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
    """The error for a file that FFmpeg cannot open, by its first bytes."""
    if missing := missing_bytes(stream):
        return MediaError(f"cut short ({missing})", file=name, hint=COPY_AGAIN)
    stream.seek(0)
    head = stream.read(64)
    if known := foreign_content(head.lstrip(b"\xef\xbb\xbf \t\r\n")):
        return MediaError(known[0], file=name, hint=known[1])
    return MediaError("damaged or not a video", file=name, value=head[:12], expected=_EXPECTED)


def missing_bytes(stream: Readable) -> str:
    """Text that says how many bytes are there, if the file's own headers promise more; else the empty string."""
    size = stream.seek(0, os.SEEK_END)
    promised = _promised_bytes(stream, size)
    return f"{size:,} of {promised:,} bytes are there" if promised > size else ""


def announced_packets(stream: Readable) -> int:
    """Packets that the sample tables of an MP4 or MOV file announce without listing them; 0 for any other file.

    A table whose samples all have one size, or a fragment with default sizes, is a few bytes long whatever its count;
    FFmpeg allocates and fills an index entry of 24 bytes for each. A file of 2 KB can ask for 4 GB in that way.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if stream.read(4) in (b"RIFF", _EBML):
        return 0
    return sum(_announced(stream, box) for box in _boxes(stream, size) if box.kind != b"mdat")


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOS, _EOI = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers; the others are tables
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


def jpeg_scans(stream: Readable, most: int) -> int:
    """Number of scans of a JPEG image, counted up to `most` + 1; 1 for one that is decoded in a single pass.

    A decoder goes over all pixels once for each scan, and a scan that changes nothing is 75 bytes long: a file of
    200 KB can take 9 seconds. What stands behind the image's end does not count.
    """
    stream.seek(0)
    content = stream.read()
    place, scans, components, progressive = 2, 0, 0, False
    while (found := _MARKER.search(content, place)) and scans <= most:
        kind = content[found.start() + 1]
        body = found.start() + 4
        if kind == _EOI:
            break
        if kind in _FRAMES:
            components, progressive = int.from_bytes(content[body + 5 : body + 6], "big"), kind in _PROGRESSIVE
        if kind == _SOS:
            scans += 1
            if not progressive and scans == 1 and content[body : body + 1] >= bytes([components]):
                return 1  # all components in one scan: the decoder looks for no other
        place = body + max(0, int.from_bytes(content[body - 2 : body], "big") - 2)
    return scans


class _Box(NamedTuple):
    kind: bytes
    start: int
    length: int


def _boxes(stream: Readable, size: int) -> Iterator[_Box]:
    """Top-level boxes of an ISO media file; none for any other file. The last may reach beyond the file's end."""
    place = 0
    while place < size:
        stream.seek(place)
        head = stream.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        elif length == 0 and place:
            length = size - place  # reaches to the end of the file
        if length < 8 or not head[4:8].isalnum():
            return
        yield _Box(head[4:8], place, length)
        place += length


def _announced(stream: Readable, box: _Box) -> int:
    stream.seek(box.start)
    content = stream.read(min(box.length, _MAX_BOX))
    total = 0
    for place in _places(content, b"stsz"):
        if int.from_bytes(content[place + 8 : place + 12], "big") and not _is_sound(content, place):
            total += int.from_bytes(content[place + 12 : place + 16], "big")
    for place in _places(content, b"trun"):
        total += int.from_bytes(content[place + 8 : place + 12], "big")
    return total


def _places(content: bytes, kind: bytes) -> Iterator[int]:
    """Where boxes of a kind have their name; the search ignores nesting, for FFmpeg accepts many kinds of it."""
    place = content.find(kind)
    while place >= 0:
        length = int.from_bytes(content[max(0, place - 4) : place], "big")
        if 16 <= length <= len(content) - place + 4:
            yield place
        place = content.find(kind, place + 4)


def _is_sound(content: bytes, place: int) -> bool:
    """Whether the sample table at `place` is that of uncompressed sound, which FFmpeg indexes by the chunk.

    An hour has 170 million samples there. FFmpeg's condition: an audio track, and one time entry of duration 1.
    """
    begin = content.rfind(b"trak", 0, place)
    end = content.find(b"trak", place)
    track = content[max(begin, 0) : end if end >= 0 else len(content)]
    times = track.find(b"stts")
    only = track.count(b"stts") == 1 and b"vide" not in track and b"soun" in track
    return only and track[times + 8 : times + 12] == b"\0\0\0\1" and track[times + 16 : times + 20] == b"\0\0\0\1"


def _promised_bytes(stream: Readable, size: int) -> int:
    """Length of a file of `size` bytes by its own headers, 0 if they do not say: RIFF, Matroska, or boxes."""
    stream.seek(0)
    head = stream.read(8)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:], "little")
    if head[:4] != _EBML:
        # The last of the boxes that an MP4 or MOV file needs; a box behind it may be cut without loss.
        ends = [box.start + box.length for box in _boxes(stream, size) if box.kind in (b"moov", b"mdat", b"moof")]
        return ends[-1] if ends else 0
    stream.seek(4)
    stream.seek(min(_ebml_size(stream), size), os.SEEK_CUR)
    segment = _ebml_size(stream) if stream.read(4) == b"\x18\x53\x80\x67" else 0
    return stream.tell() + segment if segment else 0


def _ebml_size(stream: Readable) -> int:
    """A length of 1 to 8 bytes, as many as the first has leading zero bits and one more. All ones, unknown, give 0."""
    first = stream.read(1)
    extra = 8 - first[0].bit_length() if first else 0
    ones = (1 << 7 * (extra + 1)) - 1
    value = int.from_bytes(first + stream.read(extra), "big") & ones
    return 0 if value == ones else value
