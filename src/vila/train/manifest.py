"""Size and SHA-256 of every file of a checkpoint: written last, checked before a run resumes from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from vila.core.errors import CheckpointError
from vila.core.fields import Fields
from vila.core.files import sha256_file, write_text
from vila.core.reading import file_errors
from vila.train.parallel import World

MANIFEST = "manifest.json"


class FileDigest(TypedDict):
    """Size and hexadecimal SHA-256 of a file."""

    bytes: int
    sha256: str


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Return the digests of files of a directory by name."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}


def write_manifest(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Write `manifest.json` into a directory."""
    write_text(folder / MANIFEST, _encoded(files))


def check_files(folder: Path, world: World) -> None:
    """Compare the files of a checkpoint with its manifest, each process a share of them. Every process calls it.

    Files that the manifest does not name are ignored. Every process raises the same CheckpointError, naming the first
    file that is missing or differs.
    """
    files: dict[str, FileDigest] = {}
    problem: CheckpointError | None = None
    if world.main:
        try:
            files = read_manifest(folder)
        except CheckpointError as error:
            problem = error
    files, problem = world.gather((files, problem))[0]
    if problem is None:
        names = sorted(files)[world.place.rank :: world.place.world]
        problems = world.gather(_first_difference(folder, {name: files[name] for name in names}))
        problem = next(filter(None, problems), None)
    if problem is not None:
        raise problem


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Read `manifest.json`. Raises CheckpointError if it is missing or not as `write_manifest` wrote it."""
    path = folder / MANIFEST
    entries = Fields.of_file(path, CheckpointError).section("files")
    files: dict[str, FileDigest] = {}
    for name in entries:
        entry = entries.section(name)
        if Path(name).name != name:
            raise entries.refusal(name, "not a name of a file in this directory")
        files[name] = {"bytes": entry.integer("bytes", maximum=2**62), "sha256": entry.text("sha256")}
    if path.read_bytes() != _encoded(files).encode():
        raise CheckpointError("not as it was written", file=path)
    return files


def _first_difference(folder: Path, files: Mapping[str, FileDigest]) -> CheckpointError | None:
    for name, wanted in files.items():
        try:
            with file_errors(folder / name, CheckpointError):
                found = digest_files(folder, [name])[name]
        except CheckpointError as error:
            return error
        for field in ("bytes", "sha256"):
            if found[field] != wanted[field]:
                return CheckpointError(
                    "the file is not the one that was written",
                    file=folder / name, field=field, value=found[field], expected=str(wanted[field]),
                )  # fmt: skip
    return None


def _encoded(files: Mapping[str, FileDigest]) -> str:
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"
