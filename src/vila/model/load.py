"""From directories and hub ids to models: a whole checkpoint, or a new model from an LLM and a vision tower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vila.chat.templates import find_template
from vila.chat.tokenize import check_special_tokens
from vila.core.errors import ConfigError
from vila.core.fields import Fields
from vila.core.vision_spec import ImageMode
from vila.model.build import Device, DeviceMap, build_model
from vila.model.hub import local_folder
from vila.model.layouts.config_file import read_config, text_config
from vila.model.layouts.names import claim
from vila.model.layouts.protocol import LAYOUTS, Checkpoint, Sources, check_checkpoint_sizes, open_folder
from vila.model.layouts.published import compose
from vila.model.layouts.tokenizer_files import read_tokenizer
from vila.model.layouts.towers import read_tower, tower_facts, tower_pieces
from vila.model.processor import VilaProcessor
from vila.model.projector import build_projector
from vila.model.vila import VilaForConditionalGeneration
from vila.model.weights import find_files, pieces_of


def open_checkpoint(
    path: str | Path, *, template: str | None = None, base: str | Path | None = None, revision: str | None = None
) -> Checkpoint:
    """Understand a checkpoint without reading its weights.

    path:     a directory in any layout known here, TinyChat's `.pt` file, or a hub id `owner/name`, of which the needed
              files are fetched.
    template: conversation template, where the checkpoint does not say which or should use another.
    base:     directory or hub id of the LLM that a stage-1 or LoRA directory belongs to, or of the 16-bit model that a
              `.pt` file was made from.
    revision: branch, tag or commit of the hub repository.
    Raises LayoutError, DownloadError or UnknownNameError.
    """
    folder = local_folder(path, revision)
    checkpoint = open_folder(folder, None if base is None else local_folder(base))
    if template:
        check_template(checkpoint, template)
        checkpoint.config.template = checkpoint.processor.template = template
    return checkpoint


def check_template(checkpoint: Checkpoint, *names: str) -> None:
    """Raise UnknownNameError or TemplateError for templates that do not exist, or that the tokenizer cannot write."""
    for name in names:
        tokenizer, rows = checkpoint.processor.tokenizer, checkpoint.config.text_config.vocab_size
        with Fields({}, checkpoint.folder).naming():
            check_special_tokens(find_template(name), tokenizer, rows)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: Device = "cpu",
    *,
    template: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    int4: bool = True,
) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """Model (eval mode) and processor of a checkpoint; see `open_checkpoint` for where it may lie.

    dtype:      of the weights in memory; `auto` keeps that of the files, whose pages are then mapped, not copied.
    device_map: `auto` or a mapping of module names to devices spreads the model with accelerate instead of `device`.
    int4:       keep weights that the checkpoint has in 4 bits so; False gives an ordinary model with the same values.
    Raises LayoutError when the path is not a checkpoint or its weights do not match its config.
    """
    checkpoint = open_checkpoint(path, template=template, base=base, revision=revision)
    model = build_model(checkpoint, named_dtype(dtype), device, device_map, int4=int4)
    return model, checkpoint.processor


def save_model(
    model: VilaForConditionalGeneration, processor: VilaProcessor, folder: str | Path, layout: str = "native"
) -> None:
    """Write a checkpoint directory atomically in the layout called `layout`; an existing one is replaced.

    Raises LayoutError saying why, when the layout cannot express the model.
    """
    LAYOUTS[layout].write(model, processor, Path(folder))


def named_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype with a name; None for `auto`. Raises ConfigError for what is no floating-point dtype."""
    if dtype == "auto":
        return None
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: it is auto, float32, bfloat16 or float16")
    return kind


def assemble(
    *,
    llm: str,
    vision: str,
    projector: str,
    select_layer: int,
    select_feature: str,
    image_size: int,
    image_mode: ImageMode,
    template: str,
    seed: int,
    exif_orientation: bool = True,
) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """Make a new float32 model from the directories or hub ids of an LLM and a tower; `seed` draws the projector.

    Raises LayoutError and TemplateError as `open_parts` does.
    """
    checkpoint = open_parts(
        llm=llm,
        vision=vision,
        projector=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_size=image_size,
        image_mode=image_mode,
        exif_orientation=exif_orientation,
        template=template,
    )
    return build_parts(checkpoint, seed), checkpoint.processor


def open_parts(
    *,
    llm: str,
    vision: str,
    projector: str,
    select_layer: int,
    select_feature: str,
    image_size: int,
    image_mode: ImageMode,
    template: str,
    exif_orientation: bool = True,
) -> Checkpoint:
    """Open an LLM and a vision tower as one model whose projector is yet to be drawn, without reading weights.

    Raises LayoutError for directories that cannot be read, or parts that do not go together, and TemplateError for a
    template whose special tokens the tokenizer lacks.
    """
    llm_folder, tower_folder = local_folder(llm), local_folder(vision)
    facts = read_config(llm_folder)
    llm_config = text_config(facts, facts.text("model_type"))
    # transformers chooses some tokenizers by the hub id of their model.
    llm_config._name_or_path = llm
    tokenizer = read_tokenizer(llm_folder, llm_config)
    llm_config._name_or_path = ""
    found = read_tower(tower_folder)
    tower = tower_facts(found.config, None, found.source, image_size)
    config, processor = compose(
        llm=llm_config,
        tower=tower,
        tokenizer=tokenizer,
        projector=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_mode=image_mode,
        exif_orientation=exif_orientation,
        template=template,
    )
    pieces, unclaimed = claim(pieces_of(find_files(llm_folder)), (("", "language_model."),))
    weights, others = tower_pieces(tower_folder, tower)
    pieces.update({f"vision_tower.{name}": piece for name, piece in weights.items()})
    sources = Sources(facts, facts, tower.source)
    checkpoint = Checkpoint(llm_folder, config, processor, pieces, sources, [*unclaimed, *others])
    check_checkpoint_sizes(checkpoint)
    check_template(checkpoint, template)
    return checkpoint


def build_parts(checkpoint: Checkpoint, seed: int) -> VilaForConditionalGeneration:
    """Load what `open_parts` opened in float32, and draw the projector."""
    config = checkpoint.config
    drawn = _seeded_projector(config.projector_type, config.vision_width, config.text_config.hidden_size, seed)
    model = build_model(checkpoint, torch.float32, projector=drawn)
    # The dtype of a checkpoint is the one that it is written in.
    config.dtype = None
    return model


def _seeded_projector(kind: str, width_in: int, width_out: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_projector(kind, width_in, width_out)
