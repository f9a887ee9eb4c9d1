"""Model repositories on the Hugging Face hub: download only the files that loading reads, into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vila.core.errors import DownloadError, LayoutError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = ("", "llm", "vision_tower", "mm_projector")
_TEXT_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|video_preprocessor_config|adapter_config|"
    r"quant_config|quantize_config|"
    r"tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|.*\.index)\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja"
)
_OTHER_WEIGHTS = ("mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin", "adapter_model.safetensors")
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_BIN = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
_TINYCHAT = re.compile(r".*v2\.pt")


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint given as a local path or a hub id `owner/name`, downloading it if needed.

    A training run directory resolves to its final model. Raises LayoutError for a path that does not exist and is not a
    hub id, DownloadError if the hub does not provide it.
    """
    path = Path(source).expanduser()
    if path.exists():
        is_run = (path / "recipe.yaml").is_file() and (path / "model").is_dir()
        return path / "model" if is_run else path
    name = str(source)
    if not _REPOSITORY.fullmatch(name):
        raise LayoutError("no such directory, and not a hub id", file=name, expected="a directory or owner/name")

    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    cached = _cached(name, revision)
    if is_offline_mode():
        if cached is None:
            at_revision = f" at revision {revision}" if revision else ""
            problem = f"no such directory, not in the hub cache{at_revision}, and HF_HUB_OFFLINE is set"
            raise DownloadError(problem, file=name, hint="download it once online")
        return cached
    try:
        return _download(name, revision)
    except RevisionNotFoundError as error:
        raise DownloadError("no such revision", file=name, field="revision", value=revision) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; log in if the repository is private"
        raise DownloadError("no such directory, and no such repository on the hub", file=name, hint=hint) from error
    except (HTTPError, OSError) as error:
        if cached is not None:
            return cached
        raise DownloadError(f"no such directory, and the hub cannot be reached ({error})", file=name) from error


def find_folder(source: str, checkpoint: Path) -> Path:
    """Return the directory that a checkpoint refers to: in it, next to it, below the working directory, or on the hub.

    Raises LayoutError or DownloadError as `local_folder`.
    """
    for candidate in (checkpoint / source, checkpoint.parent / source, Path(source)):
        if (candidate / "config.json").is_file():
            return candidate
    return local_folder(source)


def cached_folder(source: str) -> Path | None:
    """Return the directory of a local path or of a hub id in the local cache, else None. No network access."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    return _cached(source, None) if _REPOSITORY.fullmatch(source) else None


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # A single request without retries, so that a missing network is reported at once.
    files = HfApi().model_info(name, revision=revision, timeout=20).siblings or []
    wanted = needed_files([file.rfilename for file in files])
    if not wanted:
        raise LayoutError("the repository contains no model", file=name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def needed_files(names: Sequence[str]) -> list[str]:
    """Select the files of a repository that loading reads: configs, tokenizer, and weights in one format."""
    wanted = []
    for folder in _FOLDERS:
        paths = {name: PurePosixPath(name) for name in names}
        basenames = {name: path.name for name, path in paths.items() if path.parent == PurePosixPath(folder)}
        formats = (_SAFETENSORS, _BIN, _TINYCHAT)
        weights = next((one for one in formats if any(map(one.fullmatch, basenames.values()))), _SAFETENSORS)
        for name, base in basenames.items():
            index = base.endswith(".index.json")
            if weights.fullmatch(base) or base in _OTHER_WEIGHTS or (not index and _TEXT_FILES.fullmatch(base)):
                wanted.append(name)
    return wanted
