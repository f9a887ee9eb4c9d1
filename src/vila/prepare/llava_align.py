"""LLaVA-CC3M-Pretrain-595K (arXiv 2304.08485): image captions for aligning the projector in stage 1."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from vila.core.errors import DataError
from vila.core.files import atomic_path
from vila.core.progress import SILENT, Events, task
from vila.core.reading import file_errors
from vila.prepare.records import conversation_problem, image_check, image_paths, open_zip, rewrite_json

MAX_MEMBER_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 64 * 2**30


def prepare_llava_align(
    source: Path, images: Path, out: Path, *, decode: bool = False, events: Events = SILENT
) -> dict[str, Any]:
    """Write `OUT/LLaVA-CC3M-Pretrain-595K.json` with the complete records of `chat.json`.

    images: directory of the images, or the published `images.zip`, which is extracted to `OUT/images`.
    decode: also decode every image: about an hour for all 595,375 on one core.
    Returns the index; dropped records and reasons are in `OUT/log/failures.jsonl`.
    """
    folder = unpack_images(images, out / "images", events) if images.suffix.lower() == ".zip" else images
    if not folder.is_dir():
        raise DataError("no such directory", file=folder, hint="give the directory of the images, or images.zip")
    checks = (_has_image, conversation_problem, image_check(folder, decode=decode))
    settings = {"step": "llava_align", "decode": decode, "images": folder.name}
    return rewrite_json(source, out, "LLaVA-CC3M-Pretrain-595K", checks, settings, events)


def unpack_images(archive: Path, folder: Path, events: Events = SILENT) -> Path:
    """Extract a zip archive of images to `folder` atomically. Returns `folder`.

    Raises DataError for damage, for members that point outside the archive, and above MAX_MEMBER_BYTES and
    MAX_TOTAL_BYTES.
    """
    if folder.is_dir():
        return folder
    with open_zip(archive) as opened, atomic_path(folder) as part:
        members = [one for one in opened.infolist() if not one.is_dir()]
        _check_members(archive, members)
        part.mkdir()
        with task(events, f"unpacking {archive.name}", len(members), "files"):
            for member in members:
                with file_errors(archive, record=f"member {member.filename!r}", kind="zip", hint="download it again"):
                    content = opened.read(member)
                target = part / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                events.advanced(f"unpacking {archive.name}")
    return folder


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    # zipfile never reads more of a member than its entry announces, so the announced sizes are checked.
    total = 0
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for member in members:
        path, record = PurePosixPath(member.filename), f"member {member.filename!r}"
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in member.filename:
            raise DataError("points outside the archive", file=archive, record=record)
        total += member.file_size
        if member.file_size > MAX_MEMBER_BYTES or total > MAX_TOTAL_BYTES:
            raise DataError(
                "archive too large when extracted",
                file=archive,
                record=record,
                value=total,
                expected=f"at most {MAX_MEMBER_BYTES:,} bytes per file and {MAX_TOTAL_BYTES:,} in all",
            )
        if path in files or path in folders or not files.isdisjoint(path.parents):
            raise DataError("occurs twice, or is a file and a folder", file=archive, record=record)
        files.add(path)
        folders.update(path.parents)


def _has_image(record: dict[str, Any]) -> str:
    return "" if len(image_paths(record)) == 1 else "not exactly one image"
