"""From a checkpoint to a model in memory: built without memory, filled weight by weight, every weight accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from vila.core.errors import LayoutError
from vila.core.reading import file_errors
from vila.families.card import find_family
from vila.kernels.int4_layout import Int4Weight, dequantize
from vila.kernels.int4_linear import Int4Linear
from vila.model.layouts.config_file import generation_config
from vila.model.layouts.protocol import Checkpoint
from vila.model.packed import PackedWeight, read_packed
from vila.model.vila import VilaForConditionalGeneration
from vila.model.weights import Piece, published_names, read_pieces

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
    for name, tensor in read_pieces(pieces, targets):
        _set(model, name, tensor)
    for name, weight in read_packed(checkpoint.int4):
        _set_packed(model, name, weight.to(_place(name, placed)), dtype)
    model.tie_weights()
    model.config.dtype = dtype
    if checkpoint.generation:
        model.generation_config = generation_config(checkpoint.generation, checkpoint.folder)
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


def _by_parameter(model: VilaForConditionalGeneration, checkpoint: Checkpoint) -> dict[str, Piece]:
    """Return the weights of the checkpoint by the names of the model's parameters."""
    with checkpoint.sources.model.naming():
        here = published_names(model)
    return {here.get(name, name): piece for name, piece in checkpoint.pieces.items()}


def _account_for(checkpoint: Checkpoint, found: Mapping[str, Piece], expected: Mapping[str, nn.Parameter]) -> None:
    problems = []
    # A tied head has one name among the parameters and may have two in the file.
    also = {"language_model.lm_head.weight"} if checkpoint.config.text_config.tie_word_embeddings else set()
    packed = {f"{name}.weight": weight for name, weight in checkpoint.int4.items()}
    missing = sorted(expected.keys() - found.keys() - packed.keys() - also)
    surplus = (found.keys() | packed.keys()) - expected.keys() - also
    unclaimed = sorted([*checkpoint.unclaimed, *surplus, *(found.keys() & packed.keys())])
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
    for piece in checkpoint.pieces.values():
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
