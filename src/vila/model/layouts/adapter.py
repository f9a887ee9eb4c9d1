"""Adapter directories: what PEFT reads, and beside it config, processor and tokenizer of the whole model.

The weights of the base stay where they are; adapters are merged into them while they load.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from vila.core.errors import DownloadError, LayoutError
from vila.core.files import atomic_path
from vila.core.reading import file_errors
from vila.model.config import VilaConfig
from vila.model.hub import local_folder
from vila.model.layouts.adapter_config import CONFIG_FILE, read_adapter_config
from vila.model.layouts.config_file import read_config
from vila.model.layouts.lora import TiedHead, read_adapter
from vila.model.layouts.native import read_native_config, read_processor
from vila.model.layouts.protocol import Checkpoint, open_folder
from vila.model.layouts.published import write_tokenizer
from vila.model.processor import VilaProcessor
from vila.model.vila import VilaForConditionalGeneration
from vila.model.weights import Piece, published_names

_WEIGHTS = "adapter_model.safetensors"
_TIED = TiedHead("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_PREFIX = "base_model.model."
_BASE = "base_model_name_or_path"
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


class AdapterLayout:
    """adapter_config.json and adapter_model.safetensors, with or without config, processor and tokenizer.

    Without them, as PEFT's own `save_pretrained` leaves it, they are the base's.
    """

    name = "adapter"

    def recognises(self, folder: Path) -> bool:
        """Whether there is an adapter and no config.json of another layout."""
        if not (folder / CONFIG_FILE).is_file():
            return False
        return not (folder / "config.json").exists() or read_config(folder).get("model_type") == VilaConfig.model_type

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory and its base: `base`, or the one that adapter_config.json names.

        Raises LayoutError when the base is not there, or is another model than the adapter was trained on.
        """
        home = base or find_base(folder)
        _refuse_circle(folder, home)
        under = open_folder(home)
        if under.int4:
            raise LayoutError(
                f"{home}: its weights are in 4 bits, which no adapter can be merged into; give the 16-bit model that "
                "they were made from as base= or --base, and quantize what comes out"
            )
        config, processor, sources = under.config, under.processor, under.sources
        if (folder / "config.json").is_file():
            config, sources = read_native_config(folder)
            _refuse_another_base(folder, home, config, under.config)
        if (folder / "processor_config.json").is_file():
            processor = read_processor(folder, config)
        tied = _TIED if under.config.text_config.tie_word_embeddings else None
        pieces, still_tied = read_adapter(folder, _by_module(under), tied)
        if tied and not still_tied:
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        return Checkpoint(folder, config, processor, pieces, sources, under.unclaimed, under.generation)


def find_base(folder: Path) -> Path:
    """The directory of the base that an adapter names, which may be a path or a hub id.

    A relative path starts from here, or from any directory above the adapter.
    Raises LayoutError saying where it was looked for.
    """
    adapter = read_adapter_config(folder)
    if not adapter.base:
        raise LayoutError("names no base", file=adapter.file, field=_BASE, hint="give it as base= or --base")
    with file_errors(adapter.file, LayoutError):  # a text that no path can be
        path = Path(adapter.base).expanduser()
        for place in (path, *(above / path for above in folder.resolve().parents)):
            if place.is_dir() and place.resolve() != folder.resolve():
                return place
    try:
        return local_folder(adapter.base, adapter.revision)
    except (LayoutError, DownloadError) as error:
        raise LayoutError(
            f"no directory from {Path.cwd()} or from above the adapter, and not to be had from the hub ({error})",
            file=adapter.file,
            field=_BASE,
            value=adapter.base,
            hint="give the directory where it is now as base= or --base",
        ) from error


def _refuse_circle(folder: Path, home: Path) -> None:
    """Raise LayoutError if the base of an adapter, the base of that one, and so on, lead back to an adapter of them."""
    visited = {folder.resolve()}
    while LAYOUT.recognises(home):
        if home.resolve() in visited:
            raise LayoutError(
                "adapters that are each other's base", file=folder / CONFIG_FILE, field=_BASE, value=str(home)
            )
        visited.add(home.resolve())
        home = find_base(home)


def write_adapter(
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    base: str,
    parts: list[str],
) -> None:
    """Write an adapter directory atomically; an existing one is replaced.

    model:   has adapters that PEFT injected; its config and theirs are written.
    tensors: adapters and whole parts, by the names of the model's parameters.
    base:    path or hub id of the model that the adapters belong to, empty where it lies nowhere.
    parts:   modules whose tensors are whole, PEFT's `modules_to_save`.
    """
    facts = copy.copy(model.peft_config["default"])
    facts.base_model_name_or_path = base or None
    facts.modules_to_save = parts
    facts.inference_mode = True
    # What AutoPeftModel builds the base with.
    facts.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    named = {_PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(folder) as part:
        part.mkdir()
        save_file(named, part / _WEIGHTS, metadata={"format": "pt"})
        facts.save_pretrained(part)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(part)
        processor.save_pretrained(part)
        write_tokenizer(processor.tokenizer, part, processor.template)


def _by_module(base: Checkpoint) -> dict[str, Piece]:
    """The base's pieces by the names of modules and their parameters, which adapters go by."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        here = published_names(VilaForConditionalGeneration(base.config))
    return {here.get(name, name): piece for name, piece in base.pieces.items()}


def _refuse_another_base(folder: Path, home: Path, adapted: VilaConfig, base: VilaConfig) -> None:
    pairs: dict[str, tuple[Any, Any]] = {}
    for part in ("text_config", "vision_config"):
        mine, its = getattr(adapted, part), getattr(base, part)
        pairs |= {f"{part}.{key}": (getattr(mine, key, None), getattr(its, key, None)) for key in _SIZES}
    for key in ("projector_type", "select_layer", "select_feature"):
        pairs[key] = (getattr(adapted, key), getattr(base, key))
    problems = [f"{key} is {its!r}, the adapter's {mine!r}" for key, (mine, its) in pairs.items() if mine != its]
    if problems:
        raise LayoutError(
            f"{home}: not the base of {folder}: {'; '.join(problems)}; give the right one as base= or --base"
        )


LAYOUT = AdapterLayout()
