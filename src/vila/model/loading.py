"""Load models: open a checkpoint, fill a model with its weights, or combine an LLM and a tower into a new model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

from vila.chat.template import Template
from vila.chat.templates import find_template
from vila.chat.tokenize import check_special_tokens
from vila.core.errors import ConfigError, LayoutError, WeightMismatchError
from vila.core.progress import SILENT, Events
from vila.core.reading import Fields, file_errors
from vila.core.vision_spec import ImageMode
from vila.families import find_family
from vila.kernels.int4 import Int4Linear, Int4Weight, dequantize
from vila.model.hub import local_folder
from vila.model.int4_weights import PackedWeight, read_packed
from vila.model.layouts.base import Checkpoint, CheckpointFiles, Sources, map_names
from vila.model.layouts.build_config import build_settings
from vila.model.layouts.config_file import build_generation_config, read_config, text_config
from vila.model.layouts.detect import LAYOUTS, check_checkpoint_sizes, open_folder
from vila.model.layouts.tokenizer_files import read_tokenizer
from vila.model.layouts.tower_files import read_tower, tower_spec, tower_tensors
from vila.model.modeling import VilaForConditionalGeneration, build_on_meta
from vila.model.processor import VilaProcessor
from vila.model.projector import build_projector
from vila.model.settings import PartConfig
from vila.model.weights import TensorRef, find_weight_files, list_tensors, published_names, read_tensors

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
    """Load the weights of a checkpoint into a new model in eval mode. `dtype=None` keeps the dtype of most weights.

    int4:      keep 4-bit weights of the checkpoint as they are; False dequantizes them to `dtype`.
    projector: the projector to use, for a checkpoint without one.
    Raises WeightMismatchError listing every missing, unexpected or mismatched weight.
    """
    model = empty_model(checkpoint, int4=False, projector=projector)
    expected = dict(model.named_parameters())
    found = _tensors_by_parameter(model, checkpoint)
    dtype = dtype or checkpoint.main_dtype
    if int4:
        _insert_int4_layers(model, checkpoint.int4)
    devices = _device_map(model, dtype, device_map) if device_map else {"": torch.device(device)}
    refs = {name: ref for name, ref in found.items() if name in expected}
    targets = {name: (dtype, _device_of(name, devices)) for name in refs}
    for name, tensor in read_tensors(refs, targets):
        _set_weight(model, name, tensor)
    for name, weight in read_packed(checkpoint.int4):
        _set_int4_weight(model, name, weight.to(_device_of(name, devices)), dtype)
    model.tie_weights()
    model.config.dtype = dtype
    if checkpoint.generation:
        model.generation_config = build_generation_config(checkpoint.generation, checkpoint.folder)
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(_device_of(name, devices))
    if device_map:
        model = dispatch_model(model, devices)
    return model.eval()


def empty_model(
    checkpoint: Checkpoint, *, int4: bool = True, projector: nn.Module | None = None
) -> VilaForConditionalGeneration:
    """Build a model whose weights stay on the meta device, for checks that need only shapes.

    int4, projector: as in `build_model`.
    Raises LayoutError for a config that transformers cannot build, WeightMismatchError as `build_model`.
    """
    with file_errors(checkpoint.sources.model.file, LayoutError):
        model = build_on_meta(checkpoint.config)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not bool(buffer.isfinite().all()):
            text = checkpoint.sources.text
            key = next((key for key in ("rope_scaling", "rope_parameters") if text.get(key)), "rope_theta")
            raise text.refusal(key, f"{name} would not be finite")
    expected = dict(model.named_parameters())
    if projector is not None:
        expected = {name: weight for name, weight in expected.items() if not name.startswith("projector.")}
        model.projector = projector
    _check_weights(checkpoint, _tensors_by_parameter(model, checkpoint), expected)
    if int4:
        _insert_int4_layers(model, checkpoint.int4)
    return model


def _tensors_by_parameter(model: VilaForConditionalGeneration, checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """Return the weights of the checkpoint by parameter name."""
    stored = {*checkpoint.tensors, *(f"{name}.weight" for name in checkpoint.int4)}
    if stored == {name for name, _ in model.named_parameters()}:
        # transformers compiles the renaming rules of all its models, which takes longer than a small model loads.
        return dict(checkpoint.tensors)
    with checkpoint.sources.model.naming():
        names = published_names(model)
    return {names.get(name, name): ref for name, ref in checkpoint.tensors.items()}


def _check_weights(
    checkpoint: Checkpoint, found: Mapping[str, TensorRef], expected: Mapping[str, nn.Parameter]
) -> None:
    # A tied LM head is not a parameter of its own, but may be stored.
    tied = {"language_model.lm_head.weight"} if checkpoint.config.text_config.tie_word_embeddings else set()
    packed = {f"{name}.weight": weight for name, weight in checkpoint.int4.items()}
    missing = sorted(expected.keys() - found.keys() - packed.keys() - tied)
    surplus = (found.keys() | packed.keys()) - expected.keys() - tied
    unexpected = sorted([*checkpoint.unexpected, *surplus, *(found.keys() & packed.keys())])
    mismatched = []
    for name, parameter in expected.items():
        shape = tuple(parameter.shape)
        ref = found.get(name)
        if ref is not None and ref.shape != shape:
            mismatched.append(f"{ref.name} in {ref.file.path.name} has shape {ref.shape}, the config needs {shape}")
        if ref is not None and not ref.dtype.is_floating_point:
            mismatched.append(f"{ref.name} in {ref.file.path.name} has dtype {ref.dtype}, not a floating-point dtype")
        if name in packed and packed[name].shape != shape:
            codes = packed[name].parts["qweight"]
            mismatched.append(
                f"{codes.name} {codes.shape} in {codes.file.path.name} is a weight {packed[name].shape}, the config "
                f"needs {shape}"
            )
    if missing or unexpected or mismatched:
        raise WeightMismatchError(checkpoint.folder, missing=missing, unexpected=unexpected, mismatched=mismatched)


def _device_map(model: VilaForConditionalGeneration, dtype: torch.dtype, device_map: DeviceMap) -> dict[str, Any]:
    if not isinstance(device_map, str):
        return dict(device_map)
    if device_map != "auto":
        expected = "'auto' or a mapping of module names to devices"
        raise LayoutError("", field="device_map", value=device_map, expected=expected)
    block = find_family(model.config.text_config.model_type).decoder_block
    devices = dict(infer_auto_device_map(model, dtype=dtype, no_split_module_classes=[block]))
    if "disk" in devices.values():
        raise LayoutError("the model does not fit in the memory of all GPUs and the CPU", field="device_map")
    return devices


def _device_of(name: str, devices: Mapping[str, Any]) -> torch.device:
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        device = devices.get(".".join(parts[:length]))
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    raise LayoutError("no device for this weight", field="device_map", value=name)


def _set_weight(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Int4Linear):
        # The bias of an Int4Linear is a buffer.
        setattr(module, leaf, tensor)
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def _insert_int4_layers(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Insert Int4Linear layers on the meta device, so that sizes are known before weights are read."""
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


def _set_int4_weight(model: nn.Module, name: str, weight: Int4Weight, dtype: torch.dtype) -> None:
    module = model.get_submodule(name)
    if isinstance(module, Int4Linear):
        module.codes, module.scales, module.zeros = weight.codes, weight.scales, weight.zeros
    else:
        _set_weight(model, f"{name}.weight", dequantize(weight, dtype))


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Return whether bfloat16 matmuls run in hardware: AVX512-BF16 or AMX on a CPU, Ampere or newer on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        probe()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if (probe := getattr(torch.cpu, name, None))
    )


def choose_dtype(name: str, device: torch.device | str = "cpu", events: Events = SILENT) -> torch.dtype:
    """Return the dtype with a name; `auto` is bfloat16 if the hardware supports it natively, else float32.

    events: logs that `auto` is float32, which needs twice the memory of the 16-bit files.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if has_fast_bfloat16(device):
        return torch.bfloat16
    events.log("dtype: float32, because this device emulates bfloat16; vila quantize makes a faster, smaller model")
    return torch.float32


def open_checkpoint(
    path: str | Path, *, template: str | None = None, base: str | Path | None = None, revision: str | None = None
) -> Checkpoint:
    """Read configs, processor and weight locations of a checkpoint, without reading weights.

    path:     a directory in any supported layout, a TinyChat `.pt` file, or a hub id `owner/name`, which is downloaded.
    template: conversation template to use instead of the checkpoint's.
    base:     directory or hub id of the base LLM of a stage-1 or LoRA directory, or of the 16-bit model that a `.pt`
              file was quantized from.
    revision: branch, tag or commit of the hub repository.
    Raises LayoutError, DownloadError or UnknownNameError.
    """
    folder = local_folder(path, revision)
    checkpoint = open_folder(folder, None if base is None else local_folder(base)).load()
    if template:
        check_templates(checkpoint, template)
        checkpoint.config.template = checkpoint.processor.template = template
    return checkpoint


def own_template(checkpoint: Checkpoint) -> Template:
    """Return the template of a checkpoint; errors as `VilaProcessor.find_template`, with the directory as `file`."""
    with Fields({}, checkpoint.folder).naming():
        return checkpoint.processor.find_template()


def check_templates(checkpoint: Checkpoint, *names: str) -> None:
    """Raise UnknownNameError for unknown templates, TemplateError for special tokens that the tokenizer lacks."""
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
    """Load a model (in eval mode) and its processor; see `open_checkpoint` for the paths.

    dtype:      dtype of the weights; `auto` keeps the files' dtype and memory-maps them.
    device_map: `auto` or a mapping of module names to devices: distribute the model with accelerate; replaces `device`.
    int4:       keep 4-bit weights; False dequantizes them.
    Raises LayoutError for a path that is not a checkpoint, or weights that do not match the config.
    """
    checkpoint = open_checkpoint(path, template=template, base=base, revision=revision)
    model = build_model(checkpoint, parse_dtype(dtype), device, device_map, int4=int4)
    return model, checkpoint.processor


def save_model(
    model: VilaForConditionalGeneration, processor: VilaProcessor, folder: str | Path, layout: str = "native"
) -> None:
    """Write a checkpoint directory atomically in the given layout, replacing an existing one.

    Raises LayoutError if the layout cannot represent the model.
    """
    LAYOUTS[layout].write(model, processor, Path(folder))


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype with a name; None for `auto`. Raises ConfigError for other names."""
    if dtype == "auto":
        return None
    parsed = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ConfigError(field="dtype", value=dtype, expected="auto, float32, bfloat16 or float16")
    return parsed


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
    """Open an LLM and a vision tower as one checkpoint without projector weights; weights are not read.

    Raises LayoutError for directories that cannot be read or parts that are incompatible, TemplateError for a template
    whose special tokens the tokenizer lacks.
    """
    llm_folder, tower_folder = local_folder(llm), local_folder(vision)
    fields = read_config(llm_folder)
    llm_config = text_config(fields, fields.text("model_type"))
    own_tower = read_tower(tower_folder)
    tower = tower_spec(own_tower.config, None, own_tower.source, image_size)

    def load_tokenizer() -> Any:
        config = llm_config.build() if isinstance(llm_config, PartConfig) else copy.deepcopy(llm_config)
        # transformers selects some tokenizer classes by the hub id of the model.
        config._name_or_path = llm
        return read_tokenizer(llm_folder, config)

    settings, processor = build_settings(
        llm=llm_config,
        tower=tower,
        tokenizer_folder=llm_folder,
        load_tokenizer=load_tokenizer,
        projector=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_mode=image_mode,
        exif_orientation=exif_orientation,
        template=template,
    )
    refs, unexpected = map_names(list_tensors(find_weight_files(llm_folder)), (("", "language_model."),))
    weights, others = tower_tensors(tower_folder, tower)
    refs.update(weights)
    sources = Sources(fields, fields, tower.source)
    files = CheckpointFiles(llm_folder, settings, processor, refs, sources, [*unexpected, *others])
    check_checkpoint_sizes(files)
    checkpoint = files.load()
    check_templates(checkpoint, template)
    return checkpoint


def build_components(checkpoint: Checkpoint, seed: int) -> VilaForConditionalGeneration:
    """Load the checkpoint of `open_components` in float32, and initialise the projector."""
    config = checkpoint.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector(config.projector_type, config.vision_width, config.text_config.hidden_size)
    model = build_model(checkpoint, torch.float32, projector=projector)
    # Unset, so that saving records the dtype of the trained weights.
    config.dtype = None
    return model
