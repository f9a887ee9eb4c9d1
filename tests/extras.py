"""Simulate an installation without extras: imports of packages outside of the base dependencies fail."""

from __future__ import annotations

import io
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vila.core.optional import EXTRAS

ROOT = Path(__file__).parents[1]


def closure(requirements: Iterable[str]) -> set[str]:
    """Distributions that an installation of these brings, by canonical name."""
    waiting = [(Requirement(text), "") for text in requirements]
    found: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, wanted) in found:
                continue
            found.add((name, wanted))
            try:
                below = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            waiting += [(Requirement(text), wanted) for text in below]
    return {name for name, _ in found}


def base_distributions() -> set[str]:
    """Distributions that the dependencies of pyproject.toml bring, without any extra."""
    return closure(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def absent_modules() -> set[str]:
    """Top-level modules that an installation without extras lacks; pytest and its plugins stay, they run the test."""
    plugins = {entry.dist.name for entry in metadata.entry_points(group="pytest11") if entry.dist}
    kept = base_distributions() | closure({"pytest", *plugins}) | {"vila-vlm"}
    absent = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & kept
    }
    extras = {module for modules in EXTRAS.values() for module in modules}
    return absent | extras | {"starlette", "wandb", "trackio", "tensorboard", "bitsandbytes"}


class WithoutExtras:
    """Meta path finder that refuses the packages of extras, for a test in this process."""

    def __init__(self) -> None:
        self.absent = absent_modules()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for an absent package, as the import system does."""
        top = name.partition(".")[0]
        if top in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)

    def loaded(self) -> Iterator[str]:
        """Names of modules that are loaded already: absent packages, and those of ours that import them."""
        for name in list(sys.modules):
            if name.partition(".")[0] in self.absent or name.startswith(("vila.serve.", "vila.bench.")):
                yield name


def hide_extras(monkeypatch: Any) -> None:
    """Hide the packages of all extras from the import system, for the rest of a test."""
    hidden = WithoutExtras()
    names = list(hidden.loaded())
    for name in names:
        # A package holds its modules as attributes too; both have to be the same ones again afterwards.
        package, _, module = name.rpartition(".")
        if package in sys.modules:
            monkeypatch.delattr(sys.modules[package], module, raising=False)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [hidden, *sys.meta_path])


def call_command(words: Sequence[str], monkeypatch: Any) -> None:
    """Run a command of `vila` in this process, a question on its standard input; its errors are raised."""
    from vila.cli.main import app

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"), encoding="utf-8"))
    try:
        app(list(words), prog_name="vila", standalone_mode=False)
    except typer.Exit as ended:
        assert ended.exit_code == 0, words
