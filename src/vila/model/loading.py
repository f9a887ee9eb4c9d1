"""From directories and hub ids to models: a whole checkpoint, or a new model from an LLM and a vision tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from vila.chat.templates import find_template
from vila.chat.tokenize import check_special_tokens
from vila.core.errors import ConfigError, LayoutError
from vila.core.reading import Fields, file_errors
from vila.core.vision_spec import ImageMode
from vila.families import find_family
from vila.kernels.int4 import Int4Linear, Int4Weight, dequantize
from vila.model.hub import local_folder
from vila.model.int4_weights import PackedWeight, read_packed
from vila.model.layouts.base import Checkpoint, Sources, map_names
from vila.model.layouts.build_config import build_config
from vila.model.layouts.config_file import build_generation_config, read_config, text_config
from vila.model.layouts.detect import LAYOUTS, check_checkpoint_sizes, open_folder
from vila.model.layouts.tokenizer_files import read_tokenizer
from vila.model.layouts.tower_files import read_tower, tower_spec, tower_tensors
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.projector import build_projector
from vila.model.weights import TensorRef, find_weight_files, list_tensors, published_names, read_tensors

# --- build
# From a checkpoint to a model in memory: built without memory, filled weight by weight, every weight accounted for.


Device = str | torch.device
DeviceMap = str | Mapping[str, Any]


def build_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    device_map: DeviceMap | None = None,
    *,
    int4: bool = True,
    projector: nn.Module | None = None,
) -> VilaForConditionalGeneration:
    """Load a checkpoint into memory, in eval mode. `dtype=None` keeps the dtype of most of its weights.

    int4:      keep weights that the checkpoint has in 4 bits as they are; False turns them into ordinary ones of
               `dtype`.
    projector: a new one, of a checkpoint that holds none.
    Raises LayoutError listing every weight that is missing, unclaimed or of another shape.
    """
    model = empty_model(checkpoint, int4=False, projector=projector)
    expected = dict(model.named_parameters())
    found = _by_parameter(model, checkpoint)
    dtype = dtype or _main_dtype(checkpoint)
    if int4:
        _make_room(model, checkpoint.int4)
    placed = _device_map(model, dtype, device_map) if device_map else {"": torch.device(device)}
    pieces = {name: piece for name, piece in found.items() if name in expected}
    targets = {name: (dtype, _place(name, placed)) for name in pieces}
    for name, tensor in read_tensors(pieces, targets):
        _set(model, name, tensor)
    for name, weight in read_packed(checkpoint.int4):
        _set_packed(model, name, weight.to(_place(name, placed)), dtype)
    model.tie_weights()
    model.config.dtype = dtype
    if checkpoint.generation:
        model.generation_config = build_generation_config(checkpoint.generation, checkpoint.folder)
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(_place(name, placed))
    if device_map:
        model = dispatch_model(model, placed)
    return model.eval()


def empty_model(
    checkpoint: Checkpoint, *, int4: bool = True, projector: nn.Module | None = None
) -> VilaForConditionalGeneration:
    """Build the model without its weights, which stay on the meta device, for checks that need shapes alone.

    int4, projector: as of `build_model`.
    Raises LayoutError for a config that transformers cannot build, and listing every weight that is missing, unclaimed
    or of another shape in the checkpoint.
    """
    # Nothing is drawn that a file will overwrite; buffers are computed for real.
    with (
        file_errors(checkpoint.sources.model.file, LayoutError),
        init_empty_weights(include_buffers=False),
        no_init_weights(),
    ):
        model = VilaForConditionalGeneration(checkpoint.config)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not bool(buffer.isfinite().all()):
            text = checkpoint.sources.text
            key = next((key for key in ("rope_scaling", "rope_parameters") if text.get(key)), "rope_theta")
            raise text.refusal(key, f"gives values that are not finite ({name})")
    expected = dict(model.named_parameters())
    if projector is not None:
        expected = {name: weight for name, weight in expected.items() if not name.startswith("projector.")}
        model.projector = projector
    _account_for(checkpoint, _by_parameter(model, checkpoint), expected)
    if int4:
        _make_room(model, checkpoint.int4)
    return model


def _by_parameter(model: VilaForConditionalGeneration, checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """Return the weights of the checkpoint by the names of the model's parameters."""
    with checkpoint.sources.model.naming():
        here = published_names(model)
    return {here.get(name, name): piece for name, piece in checkpoint.tensors.items()}


def _account_for(checkpoint: Checkpoint, found: Mapping[str, TensorRef], expected: Mapping[str, nn.Parameter]) -> None:
    problems = []
    # A tied head has one name among the parameters and may have two in the file.
    also = {"language_model.lm_head.weight"} if checkpoint.config.text_config.tie_word_embeddings else set()
    packed = {f"{name}.weight": weight for name, weight in checkpoint.int4.items()}
    missing = sorted(expected.keys() - found.keys() - packed.keys() - also)
    surplus = (found.keys() | packed.keys()) - expected.keys() - also
    unclaimed = sorted([*checkpoint.unexpected, *surplus, *(found.keys() & packed.keys())])
    for names, what in ((missing, "missing"), (unclaimed, "unclaimed")):
        if names:
            problems.append(f"{len(names)} weights {what} ({', '.join(names)})")
    for name, parameter in expected.items():
        piece = found.get(name)
        if piece is not None and piece.shape != tuple(parameter.shape):
            problems.append(
                f"{piece.name} has shape {piece.shape} in {piece.file.path.name}, "
                f"the config asks for {tuple(parameter.shape)}"
            )
        if piece is not None and not piece.dtype.is_floating_point:
            problems.append(f"{piece.name} holds {piece.dtype} in {piece.file.path.name}, weights are floating point")
        if piece is not None and not piece.dtype.is_floating_point:
            problems.append(f"{piece.name} in {piece.file.path.name} holds {piece.dtype}, a weight has floats")
        if name in packed and packed[name].shape != tuple(parameter.shape):
            codes = packed[name].parts["qweight"]
            problems.append(
                f"{codes.name} {codes.shape} holds a weight {packed[name].shape} in {codes.file.path.name}, "
                f"the config asks for {tuple(parameter.shape)}"
            )
    if problems:
        raise LayoutError("; ".join(problems), file=checkpoint.folder, hint="refusing a partial load")


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for piece in checkpoint.tensors.values():
        if piece.dtype.is_floating_point:
            sizes[piece.dtype] += piece.bytes
    return sizes.most_common(1)[0][0]


def _device_map(model: VilaForConditionalGeneration, dtype: torch.dtype, device_map: DeviceMap) -> dict[str, Any]:
    if not isinstance(device_map, str):
        return dict(device_map)
    if device_map != "auto":
        raise LayoutError(f"device_map={device_map!r}: it is 'auto' or a mapping of module names to devices")
    block = find_family(model.config.text_config.model_type).decoder_block
    placed = dict(infer_auto_device_map(model, dtype=dtype, no_split_module_classes=[block]))
    if "disk" in placed.values():
        raise LayoutError("device_map='auto': the model does not fit the memory of all devices and the CPU together")
    return placed


def _place(name: str, placed: Mapping[str, Any]) -> torch.device:
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        where = placed.get(".".join(parts[:length]))
        if where is not None:
            return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
    raise LayoutError(f"the device map says nothing of {name}")


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Int4Linear):
        # Its bias is no parameter: it is not trained either.
        setattr(module, leaf, tensor)
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def _make_room(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Put empty 4-bit layers where weights are in 4 bits, so that sizes are known before any is read."""
    for name, weight in packed.items():
        linear: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        layer = Int4Linear(
            linear.in_features,
            linear.out_features,
            group_size=weight.group_size,
            bias=linear.bias is not None,
            scale_dtype=weight.scale_dtype,
            device="meta",
        )
        model.set_submodule(name, layer)


def _set_packed(model: nn.Module, name: str, weight: Int4Weight, dtype: torch.dtype) -> None:
    module = model.get_submodule(name)
    if isinstance(module, Int4Linear):
        module.codes, module.scales, module.zeros = weight.codes, weight.scales, weight.zeros
    else:
        _set(model, f"{name}.weight", dequantize(weight, dtype))


# --- precision
# Which number type a forward pass uses on this machine.


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 products are computed by hardware: AVX512-BF16 or AMX on a CPU, Ampere or newer on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        probe()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if (probe := getattr(torch.cpu, name, None))
    )


def choose_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes it, else float32; other names stand for themselves."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


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
        check_templates(checkpoint, template)
        checkpoint.config.template = checkpoint.processor.template = template
    return checkpoint


def check_templates(checkpoint: Checkpoint, *names: str) -> None:
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
    model = build_model(checkpoint, parse_dtype(dtype), device, device_map, int4=int4)
    return model, checkpoint.processor


def save_model(
    model: VilaForConditionalGeneration, processor: VilaProcessor, folder: str | Path, layout: str = "native"
) -> None:
    """Write a checkpoint directory atomically in the layout called `layout`; an existing one is replaced.

    Raises LayoutError saying why, when the layout cannot express the model.
    """
    LAYOUTS[layout].write(model, processor, Path(folder))


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
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

    Raises LayoutError and TemplateError as `open_components` does.
    """
    checkpoint = open_components(
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
    return build_components(checkpoint, seed), checkpoint.processor


def open_components(
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
    tower = tower_spec(found.config, None, found.source, image_size)
    config, processor = build_config(
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
    pieces, unclaimed = map_names(list_tensors(find_weight_files(llm_folder)), (("", "language_model."),))
    weights, others = tower_tensors(tower_folder, tower)
    pieces.update({f"vision_tower.{name}": piece for name, piece in weights.items()})
    sources = Sources(facts, facts, tower.source)
    checkpoint = Checkpoint(llm_folder, config, processor, pieces, sources, [*unclaimed, *others])
    check_checkpoint_sizes(checkpoint)
    check_templates(checkpoint, template)
    return checkpoint


def build_components(checkpoint: Checkpoint, seed: int) -> VilaForConditionalGeneration:
    """Load what `open_components` opened in float32, and draw the projector."""
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
