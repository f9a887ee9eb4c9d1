"""Native layout: one directory as transformers writes it, with `model_type: vila` in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.core.reading import Fields
from vila.core.vision_spec import MAX_SIDE, VisionSpec
from vila.model.layouts.base import CheckpointFiles, FullPrecisionLayout, ProcessorFiles, Sources, WeightStorage
from vila.model.layouts.build_config import check_vision_spec
from vila.model.layouts.config_file import MAX_LAYERS, read_config, read_generation_config, text_config, tower_config
from vila.model.layouts.tokenizer_files import check_placeholder, read_tokenizer, write_tokenizer
from vila.model.settings import ModelSettings
from vila.model.vision_sizes import SELECT_FEATURES
from vila.model.weights import find_weight_files, list_tensors

if TYPE_CHECKING:
    from vila.model.processor import VilaProcessor

MODEL_TYPE = "vila"
"""`model_type` in config.json."""


class NativeLayout(FullPrecisionLayout):
    """config.json, model*.safetensors with our weight names, processor_config.json and tokenizer files."""

    name = "native"

    def matches(self, folder: Path) -> bool:
        """Return whether config.json has `model_type: vila`."""
        return read_config(folder).get("model_type") == MODEL_TYPE

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Read the configs. Raises LayoutError if processor and config are of different models."""
        settings, sources = read_native_config(folder)
        processor = read_processor(folder, settings)
        refs = list_tensors(find_weight_files(folder))
        return CheckpointFiles(folder, settings, processor, refs, sources, generation=read_generation_config(folder))

    def write_files(self, model: Any, processor: VilaProcessor, part: Path, storage: WeightStorage) -> None:
        """Write model, processor and tokenizer."""
        config = storage.config(model)
        config.architectures = [type(model).__name__]
        if storage.quantization_config:
            config.quantization_config = dict(storage.quantization_config)
        storage.save(storage.cast(storage.state_dict(model)), part)
        config.save_pretrained(part)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(part)
        processor.save_pretrained(part)
        write_tokenizer(processor.tokenizer, part, processor.template)


def read_native_config(folder: Path) -> tuple[ModelSettings, Sources]:
    """Read config.json. Raises LayoutError with file, field and value for invalid values."""
    fields = read_config(folder)
    text, vision = fields.section("text_config"), fields.section("vision_config")
    llm = text_config(text, text.text("model_type", "llama"))
    tower = tower_config(vision, vision.text("model_type", "clip_vision_model"))
    spec = VisionSpec.from_fields(fields.section("vision_spec"))
    settings = ModelSettings(
        vision_config=tower,
        text_config=llm,
        projector_type=fields.text("projector_type", "mlp2x_gelu"),
        select_layer=fields.integer("select_layer", -2, minimum=-MAX_LAYERS, maximum=MAX_LAYERS),
        select_feature=fields.text("select_feature", "patch", choices=SELECT_FEATURES),
        image_token_id=fields.integer("image_token_id", 32000, minimum=1),
        vision_spec=spec.to_dict(),
        template=fields.text("template", ""),
        s2_scales=_scales(fields),
        s2_max_split=fields.integer("s2_max_split", 0, maximum=MAX_SIDE),
        vision_source=fields.text("vision_source", ""),
    )
    with fields.naming():
        check_vision_spec(settings, spec)
    return settings, Sources(fields, text, vision)


def _scales(fields: Fields) -> list[int]:
    scales = fields.get("s2_scales")
    scales = [] if scales is None else scales
    if not isinstance(scales, list) or any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in scales):
        raise fields.refusal("s2_scales", expected=f"a list of integers from 1 to {MAX_SIDE:,}")
    return scales


def read_processor(folder: Path, settings: ModelSettings) -> ProcessorFiles:
    """Read the processor's settings. Raises LayoutError if they are of another model than `settings`."""
    fields = Fields.of_file(folder / "processor_config.json", LayoutError)
    spec = VisionSpec.from_fields(fields.section("vision_spec"))
    stored = fields.integer("image_token_id", 0, minimum=1)
    expected = settings.image_token_id or 0

    def check(placeholder: int) -> None:
        if placeholder != expected:
            hint = "the files are of different models"
            raise fields.refusal("image_token_id", f"config.json has {expected}", hint=hint)

    def load_tokenizer() -> tuple[Any, int]:
        from vila.model.config import build_vila_config

        tokenizer = read_tokenizer(folder, build_vila_config(settings, expected))
        placeholder = stored or len(tokenizer)
        check(placeholder)
        check_placeholder(fields, "image_token_id", placeholder, tokenizer)
        return tokenizer, placeholder

    if stored:
        check(stored)
    with fields.section("vision_spec").naming():
        check_vision_spec(settings, spec)
    return ProcessorFiles(folder, spec.to_dict(), fields.text("template", ""), load_tokenizer)


LAYOUT = NativeLayout()
