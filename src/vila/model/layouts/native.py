"""Our own layout: one directory as transformers writes it, with `model_type: vila` in config.json."""

from __future__ import annotations

from pathlib import Path

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.model.config import VilaConfig
from vila.model.layouts.protocol import Checkpoint
from vila.model.layouts.published import generation_facts, read_config, write_tokenizer
from vila.model.layouts.storage import FULL, Storage
from vila.model.processor import VilaProcessor
from vila.model.vila import VilaForConditionalGeneration
from vila.model.weights import find_files, pieces_of


class NativeLayout:
    """config.json, model*.safetensors under our own names, processor_config.json and the tokenizer's files."""

    name = "native"

    def recognises(self, folder: Path) -> bool:
        """Whether config.json says `model_type: vila`."""
        return read_config(folder).get("model_type") == VilaConfig.model_type

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory. Raises LayoutError when processor and config are from different models."""
        config = VilaConfig.from_pretrained(folder, local_files_only=True)
        try:
            processor = VilaProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise LayoutError(f"{folder}: no processor that can be read ({error})") from error
        if processor.image_token_id != config.image_token_id:
            raise LayoutError(
                f"{folder}: config.json says image_token_id={config.image_token_id}, but the processor's is "
                f"{processor.image_token_id}; one of them is from another model"
            )
        return Checkpoint(folder, config, processor, pieces_of(find_files(folder)), (), generation_facts(folder))

    def check(self, model: VilaForConditionalGeneration, processor: VilaProcessor) -> None:
        """Raise LayoutError for a model in 4 bits."""
        FULL.check(model)

    def write(self, model: VilaForConditionalGeneration, processor: VilaProcessor, folder: Path) -> None:
        """Write model and processor; an existing directory is replaced. Raises LayoutError for a model in 4 bits."""
        write_native(model, processor, folder, FULL)


def write_native(model: VilaForConditionalGeneration, processor: VilaProcessor, folder: Path, storage: Storage) -> None:
    """Write model and processor, the weights in `storage`."""
    weights = storage.stored(storage.state(model))
    config = storage.config(model)
    config.architectures = [type(model).__name__]
    if storage.facts:
        config.quantization_config = dict(storage.facts)
    with atomic_path(folder) as part:
        part.mkdir()
        storage.save(weights, part)
        config.save_pretrained(part)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(part)
        processor.save_pretrained(part)
        write_tokenizer(processor.tokenizer, part, processor.template)


LAYOUT = NativeLayout()
