"""Tiny wheels for the tests of the starter's parts."""

from __future__ import annotations

import zipfile
from pathlib import Path

from vila.core.files import sha256_file
from vila.starter.components import Wheel


def make_wheel(folder: Path, members: dict[str, str | bytes], name: str = "tiny-part", version: str = "1.0") -> Wheel:
    """A wheel in `folder` that pip accepts, with a licence and `members` (path to content), and its pin."""
    stem = f"{name.replace('-', '_')}-{version}"
    filename = f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    papers: dict[str, str | bytes] = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": "Do as you like.\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / filename, "w") as archive:
        for path, content in {**members, **papers}.items():
            archive.writestr(path, content)
    return Wheel(name, version, filename, sha256_file(folder / filename), "none")


class Listener:
    """Events that record log lines and tasks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tasks: list[str] = []

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        self.tasks.append(task)

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        pass

    def log(self, text: str) -> None:
        self.lines.append(text)

    def finished(self, task: str, summary: str = "") -> None:
        pass
