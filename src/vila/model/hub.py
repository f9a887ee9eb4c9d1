"""Model repositories on the Hugging Face hub: download only the files that loading reads, into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from vila.core.errors import DownloadError, LayoutError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = ("", "llm", "vision_tower", "mm_projector")
_TEXTS = re.compile(
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
    """The directory of a checkpoint given as a local path or a hub id `owner/name`, fetched if it is not there yet.

    The directory of a training run stands for the model that it left.
    Raises LayoutError when it is neither, DownloadError when the hub does not give it.
    """
    path = Path(source).expanduser()
    if path.exists():
        of_a_run = (path / "recipe.yaml").is_file() and (path / "model").is_dir()
        return path / "model" if of_a_run else path
    name = str(source)
    if not _REPOSITORY.fullmatch(name):
        raise LayoutError(f"{name}: no such directory, and not a hub id of the form owner/name")
    cached = _cached(name, revision)
    if is_offline_mode():
        if cached is None:
            where = f" at revision {revision}" if revision else ""
            raise DownloadError(
                f"{name}: no such directory, and HF_HUB_OFFLINE is set while the hub's cache does not hold it{where}; "
                "fetch it once online"
            )
        return cached
    try:
        return _fetched(name, revision)
    except RevisionNotFoundError as error:
        raise DownloadError(f"{name}: the repository has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{name}: no such directory, and the hub has no repository of this name that it would show you; "
            "check the spelling, or log in if it is private"
        ) from error
    except (HTTPError, OSError) as error:
        if cached is not None:
            return cached
        raise DownloadError(f"{name}: no such directory, and the hub cannot be reached ({error})") from error


def cached_folder(source: str) -> Path | None:
    """The directory of a local path, or of a hub id that was fetched before; None if there is none. No network."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    return _cached(source, None) if _REPOSITORY.fullmatch(source) else None


def _cached(name: str, revision: str | None) -> Path | None:
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _fetched(name: str, revision: str | None) -> Path:
    # One request that does not repeat itself: without a network this says so at once.
    files = HfApi().model_info(name, revision=revision, timeout=20).siblings or []
    wanted = needed_files([file.rfilename for file in files])
    if not wanted:
        raise LayoutError(f"{name}: the repository holds no model")
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def needed_files(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that loading reads: configs, tokenizer, and one storage form of the weights."""
    wanted = []
    for folder in _FOLDERS:
        inside = [name for name in names if _parent(name) == folder]
        bases = {name: PurePosixPath(name).name for name in inside}
        forms = (_SAFETENSORS, _BIN, _TINYCHAT)
        weights = next((form for form in forms if any(map(form.fullmatch, bases.values()))), _SAFETENSORS)
        for name, base in bases.items():
            index = base.endswith(".index.json")
            if weights.fullmatch(base) or base in _OTHER_WEIGHTS or (not index and _TEXTS.fullmatch(base)):
                wanted.append(name)
    return wanted


def _parent(name: str) -> str:
    folder = str(PurePosixPath(name).parent)
    return "" if folder == "." else folder
