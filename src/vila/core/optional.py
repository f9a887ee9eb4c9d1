"""Optional packages: imported where they are used; an absent one is an error that names the command to install it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Final

from vila.core.errors import ConfigError

EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "serve": ("fastapi", "httpx", "prometheus_client", "uvicorn"),
    "demo": ("fastapi", "gradio", "httpx", "openai", "prometheus_client", "uvicorn"),
    "lora": ("peft",),
    "eval": ("openpyxl",),
    "onnx": ("onnxruntime",),
}
"""Modules of each extra of pyproject.toml that a command imports."""


class MissingExtraError(ConfigError, ImportError):
    """A command, option or format needs packages that cannot be imported.

    packages: names of the modules.
    extra:    extra of `vila-vlm` that installs them; empty for packages that are in none.
    """

    def __init__(self, needed_by: str, packages: Iterable[str], *, extra: str = "", reason: str = "") -> None:
        self.packages, self.extra = tuple(packages), extra
        names = " and ".join(filter(None, [", ".join(self.packages[:-1]), self.packages[-1]]))
        state = f"cannot be imported ({reason})" if reason else f"{'is' if len(self.packages) == 1 else 'are'} missing"
        wanted = f"'vila-vlm[{extra}]'" if extra else " ".join(self.packages)
        super().__init__(f"needs {names}, which {state}", field=needed_by, hint=f"pip install {wanted}")


def require(module: str, needed_by: str, *, extra: str = "", package: str = "") -> Any:
    """Import and return an optional module.

    needed_by: the command, option or recipe field that needs it, for the message.
    extra:     extra that installs it; empty for a package that pip installs by its own name.
    package:   that has to be installed; by default the top-level name of the module.
    Raises MissingExtraError.
    """
    package = package or module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        # An absent package needs no further reason; one that is broken does.
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "" if absent else " ".join(str(error).split())
        raise MissingExtraError(needed_by, [package], extra=extra, reason=reason) from error


def require_all(modules: Mapping[str, str], needed_by: str, *, extra: str = "") -> None:
    """Import optional modules, given by package. Raises one MissingExtraError that names every absent package."""
    faults: list[MissingExtraError] = []
    for package, module in modules.items():
        try:
            require(module, needed_by, extra=extra, package=package)
        except MissingExtraError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise MissingExtraError(needed_by, [name for fault in faults for name in fault.packages], extra=extra)


def require_extra(extra: str, needed_by: str) -> None:
    """Import all modules of an extra. Raises MissingExtraError; call it before any work."""
    require_all({name: name for name in EXTRAS[extra]}, needed_by, extra=extra)
