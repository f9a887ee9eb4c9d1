"""Our own layout: one directory as transformers writes it, with `model_type: vila` in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.model.config import VilaConfig
from vila.model.processor import VilaProcessor
from vila.model.vila import VilaForConditionalGeneration


class NativeLayout:
    """config.json, model*.safetensors, processor_config.json and the tokenizer's files."""

    def recognises(self, folder: Path) -> bool:
        """Whether config.json says `model_type: vila`."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and config.get("model_type") == VilaConfig.model_type

    def read(self, folder: Path, dtype: Any) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
        """Model in eval mode, and processor. Raises LayoutError naming missing, unclaimed and misshapen weights."""
        try:
            model, info = VilaForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
            )
        except (OSError, SafetensorError) as error:
            raise LayoutError(f"{folder}: cannot read the weights ({error})") from error
        _all_accounted_for(folder, info)
        processor = VilaProcessor.from_pretrained(folder, local_files_only=True)
        if processor.image_token_id != model.config.image_token_id:
            raise LayoutError(
                f"{folder}: config.json says image_token_id={model.config.image_token_id}, "
                f"but the tokenizer has {processor.image_token_id} entries; one of them is from another model"
            )
        return model.eval(), processor

    def write(self, model: VilaForConditionalGeneration, processor: VilaProcessor, folder: Path) -> None:
        """Write model and processor; an existing directory is replaced."""
        with atomic_path(folder) as part:
            part.mkdir()
            model.save_pretrained(part)
            processor.save_pretrained(part)


def _all_accounted_for(folder: Path, info: dict[str, Any]) -> None:
    problems = []
    for key, what in (("missing_keys", "missing"), ("unexpected_keys", "unclaimed")):
        if info.get(key):
            problems.append(f"{len(info[key])} weights {what} ({', '.join(sorted(info[key]))})")
    for name, found, expected in info.get("mismatched_keys") or ():
        problems.append(f"{name} has shape {tuple(found)}, the config asks for {tuple(expected)}")
    if problems:
        raise LayoutError(f"{folder}: {'; '.join(problems)}; refusing a partial load")


LAYOUT = NativeLayout()
