"""Import of optional packages; a missing one raises an error with the `pip install` command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Final

from vila.core.errors import ConfigError

EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "demo": ("fastapi", "gradio", "openai", "prometheus_client", "uvicorn"),
    "lora": ("peft",),
    "eval": ("openpyxl",),
    "onnx": ("onnxruntime",),
}
"""Modules that each extra of pyproject.toml installs for a command."""


class MissingExtraError(ConfigError, ImportError):
    """A command, option or format needs packages that cannot be imported.

    packages: module names.
    extra:    extra of `vila-vlm` that installs them; empty if none does.
    """

    def __init__(self, needed_by: str, packages: Iterable[str], *, extra: str = "", reason: str = "") -> None:
        self.packages, self.extra = tuple(packages), extra
        names = " and ".join(filter(None, [", ".join(self.packages[:-1]), self.packages[-1]]))
        state = f"cannot be imported ({reason})" if reason else f"{'is' if len(self.packages) == 1 else 'are'} missing"
        wanted = f"'vila-vlm[{extra}]'" if extra else " ".join(self.packages)
        super().__init__(f"needs {names}, which {state}", field=needed_by, hint=f"pip install {wanted}")


def require(module: str, needed_by: str, *, extra: str = "", package: str = "") -> Any:
    """Import and return an optional module.

    needed_by: the command, option or recipe field that needs it; `field` of the error.
    extra:     extra of `vila-vlm` that installs it; empty if none does.
    package:   name of the distribution to install; the top-level module name by default.
    Raises MissingExtraError.
    """
    package = package or module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        # Of a package that is installed but broken, the reason is shown too.
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "" if absent else " ".join(str(error).split())
        raise MissingExtraError(needed_by, [package], extra=extra, reason=reason) from error


def require_all(modules: Mapping[str, str], needed_by: str, *, extra: str = "") -> None:
    """Import optional modules, a mapping from package to module. Raises one MissingExtraError for all missing ones."""
    errors: list[MissingExtraError] = []
    for package, module in modules.items():
        try:
            require(module, needed_by, extra=extra, package=package)
        except MissingExtraError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise MissingExtraError(needed_by, [name for error in errors for name in error.packages], extra=extra)


def require_extra(extra: str, needed_by: str) -> None:
    """Import all modules of an extra, before any work. Raises MissingExtraError."""
    require_all({name: name for name in EXTRAS[extra]}, needed_by, extra=extra)
