"""INT4 weights of a model: replace the Linears of its decoder blocks, and read packed INT4 tensors of a checkpoint.

The model keeps its class; only the Linears of the decoder blocks are replaced by `Int4Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.kernels.group_size import check_group_size, num_zero_words
from vila.model.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT16, INT32, DType
from vila.model.weights import ReadTensor, Shape, TensorRef, WeightFile

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vila.kernels.int4 import Int4Linear, Int4Weight

_MAX_LISTED = 5


def use_int4(model: Any, weights: Mapping[str, Int4Weight]) -> None:
    """Replace Linears of the decoder blocks by 4-bit layers, in place.

    weights: by name of the Linear; moved to its device. Tensors that are there already are shared, not copied. If the
             Linear's own weight is on the meta device, the 4-bit weight stays where it is.
    Biases are kept. The layers use the torch backend until `use_backend` selects another.
    Raises LayoutError, before any change, listing names that are not Linears of a block, or shapes that differ.
    """
    from vila.kernels.int4 import Int4Linear

    modules = dict(model.named_modules())
    layers = model.get_decoder().layers
    blocks = next(f"{name}." for name, module in modules.items() if module is layers)
    problems = [why for name, weight in weights.items() if (why := _misfit(name, weight, modules.get(name), blocks))]
    if problems:
        more = f" (and {len(problems) - _MAX_LISTED} more)" if len(problems) > _MAX_LISTED else ""
        raise LayoutError(f"4-bit weights do not match the model: {'; '.join(problems[:_MAX_LISTED])}{more}")
    for name, weight in weights.items():
        linear: nn.Linear = modules[name]
        placed = weight if linear.weight.is_meta else weight.to(linear.weight.device)
        layer = Int4Linear.from_weight(placed, linear.bias)
        model.set_submodule(name, layer.train(linear.training))


def int4_weights(model: nn.Module) -> dict[str, Int4Weight]:
    """Return the 4-bit weights of a model by Linear name, sharing memory; {} for full precision."""
    return {name: layer.weight for name, layer in int4_layers(model)}


def int4_layers(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """Yield the 4-bit layers of a model with their names, in model order."""
    from vila.kernels.int4 import Int4Linear

    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module


def group_size_of(model: nn.Module) -> int | None:
    """Return the group size of all 4-bit layers; None for full precision. Raises LayoutError if they differ."""
    sizes = {layer.group_size for _, layer in int4_layers(model)}
    if len(sizes) > 1:
        raise LayoutError(
            "layers with different group sizes", value=sorted(sizes), hint="quantize the model with one group size"
        )
    return sizes.pop() if sizes else None


def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replace every 4-bit layer by a Linear with the dequantized weight, in place; the inverse of `use_int4`.

    dtype: of the new weights; None is the dtype of the embeddings.
    """
    dtype = dtype or model.get_input_embeddings().weight.dtype
    for name, layer in list(int4_layers(model)):
        model.set_submodule(name, layer.to_linear(dtype).train(layer.training))


def _misfit(name: str, weight: Int4Weight, module: nn.Module | None, blocks: str) -> str:
    """Return why a weight cannot replace a module; empty if it can."""
    from torch import nn

    from vila.kernels.int4 import Int4Linear

    if not name.startswith(blocks):
        return f"{name} is not in a decoder block ({blocks}...)"
    if isinstance(module, Int4Linear):
        return f"{name} is in 4 bits already"
    if not isinstance(module, nn.Linear):
        return f"{name} is {'missing' if module is None else f'a {type(module).__name__}'}, not a Linear"
    found, wanted = [weight.num_outputs, weight.num_inputs], [module.out_features, module.in_features]
    return "" if found == wanted else f"{name} is {wanted}, its 4-bit weight {found}"


# O outputs  I inputs

TensorSpec = tuple[Shape, DType | None]
_SCALE_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_MAX_MAPPED_BYTES = 256 << 20
_CODES = "qweight"
_SUFFIXES = ("qweight", "qzeros", "scales", "scaled_zeros")
_GROUP_SIZES = (128, 64, 32, 16, 256)
_DOWNLOAD_AGAIN = "download the checkpoint again"
_PACKINGS = ("gemm", "gemv", "tinychat")
# AutoAWQ names TinyChat's `scaled_zeros` as in its other packings.
_OTHER_NAME = {"scaled_zeros": "qzeros"}


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] stored as the tensors of one of the packings in `kernels.packings`.

    parts:   tensors by name suffix: qweight, qzeros, scales.
    packing: gemm, gemv or tinychat.
    """

    parts: Mapping[str, TensorRef]
    packing: str
    group_size: int
    shape: Shape

    @property
    def bytes(self) -> int:
        """Size of the tensors in the file."""
        return sum(ref.bytes for ref in self.parts.values())

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scales."""
        return self.parts["scales"].dtype.torch


def read_packed(packed: Mapping[str, PackedWeight]) -> Iterator[tuple[str, Int4Weight]]:
    """Yield each weight as `Int4Weight`, in order.

    Pages that were copied from count as memory until the files are closed, so the files are reopened regularly.
    Raises LayoutError with file and tensor for invalid values.
    """
    waiting = list(packed)[::-1]
    while waiting:
        copied = 0
        with ExitStack() as stack:
            opened: dict[WeightFile, ReadTensor] = {}
            while waiting and copied < _MAX_MAPPED_BYTES:
                name = waiting.pop()
                for ref in packed[name].parts.values():
                    if ref.file not in opened:
                        opened[ref.file] = stack.enter_context(ref.file.open())
                yield name, _unpacked(packed[name], opened)
                copied += packed[name].bytes


def _unpacked(weight: PackedWeight, opened: Mapping[WeightFile, ReadTensor]) -> Int4Weight:
    from vila.kernels.packings import UNPACKERS

    tensors = {ending: opened[ref.file](ref.name) for ending, ref in weight.parts.items()}
    try:
        unpacked = UNPACKERS[weight.packing](tensors, weight.group_size)
    except LayoutError as error:
        codes = weight.parts[_CODES]
        raise LayoutError(str(error), file=codes.file.path, field=codes.name) from error
    if not bool(unpacked.scales.isfinite().all()):
        scales = weight.parts["scales"]
        raise LayoutError("values not finite", file=scales.file.path, field=scales.name, hint=_DOWNLOAD_AGAIN)
    return unpacked


def collect_packed_weights(
    refs: Mapping[str, TensorRef], packing: str, group_size: int, source: str
) -> tuple[dict[str, TensorRef], dict[str, PackedWeight]]:
    """Separate the other tensors from the 4-bit weights; returns both, the latter by Linear name.

    source: file and declaration of packing and group size, for error messages.
    Raises LayoutError naming tensors that are missing, or whose shape or dtype does not match the packing.
    """
    plain, groups = split_packed_tensors(refs)
    packed = {}
    for name, parts in groups.items():
        check_complete(name, parts)
        shape = unpacked_shape(parts[_CODES], packing)
        problem = _packed_misfit(parts, packing, group_size, shape)
        if problem:
            ref, reason = problem
            raise LayoutError(
                f"{reason}, but {source}", file=ref.file.path, field=ref.name, value=ref.describe(), hint=_hint(parts)
            )
        packed[name] = PackedWeight(parts, packing, group_size, shape)
    return plain, packed


def split_packed_tensors(refs: Mapping[str, TensorRef]) -> tuple[dict[str, TensorRef], dict[str, dict[str, TensorRef]]]:
    """Separate the other tensors from those of 4-bit weights; returns both, the latter by Linear name and suffix."""
    linears = {name.rpartition(".")[0] for name in refs if name.rpartition(".")[2] in _SUFFIXES}
    plain: dict[str, TensorRef] = {}
    groups: dict[str, dict[str, TensorRef]] = {}
    for name, ref in refs.items():
        linear, _, suffix = name.rpartition(".")
        if linear in linears and suffix in _SUFFIXES:
            groups.setdefault(linear, {})[suffix] = ref
        else:
            plain[name] = ref
    return plain, groups


def check_complete(name: str, parts: Mapping[str, TensorRef]) -> None:
    """Raise LayoutError naming the missing tensors of a 4-bit weight."""
    zeros = parts.keys() & {"qzeros", "scaled_zeros"}
    missing = [ending for ending in ("qweight", "scales") if ending not in parts] + ([] if zeros else ["qzeros"])
    if missing:
        there = next(iter(parts.values()))
        raise LayoutError(
            f"missing, although {there.name} exists",
            file=there.file.path,
            field=", ".join(f"{name}.{ending}" for ending in missing),
            expected="qweight, qzeros and scales of each 4-bit weight, also for symmetric quantization",
            hint="download the checkpoint again, or quantize the 16-bit model with vila quantize",
        )


def matching_packings(parts: Mapping[str, TensorRef]) -> Iterator[tuple[str, int]]:
    """Yield packings and group sizes that match the shapes and dtypes of a weight's tensors, the most common first."""
    for packing in _PACKINGS:
        for size in _GROUP_SIZES:
            if not _packed_misfit(parts, packing, size, unpacked_shape(parts[_CODES], packing)):
                yield packing, size


def packed_tensor_specs(packing: str, shape: Shape, group_size: int) -> dict[str, TensorSpec]:
    """Return shape and dtype of the tensors of a packed weight [O, I]; dtype None is any floating-point dtype.

    Raises LayoutError for a group size that does not divide I, or that the packing does not support.
    """
    num_outputs, num_inputs = shape
    check_group_size(num_inputs, group_size)
    groups = num_inputs // group_size
    if packing == "gemm":
        return {
            "qweight": ((num_inputs, num_outputs // 8), INT32),
            "qzeros": ((groups, num_outputs // 8), INT32),
            "scales": ((groups, num_outputs), None),
        }
    words = num_zero_words(num_inputs, group_size)
    if packing == "gemv":
        return {
            "qweight": ((num_outputs, num_inputs // 8), INT32),
            "qzeros": ((num_outputs, words), INT32),
            "scales": ((num_outputs, words * 8), None),
        }
    return {
        "qweight": ((num_outputs // 4, num_inputs), INT16),
        "scales": ((words * 8, num_outputs), None),
        "scaled_zeros": ((words * 8, num_outputs), None),
    }


def unpacked_shape(codes: TensorRef, packing: str) -> Shape:
    """Return [O, I] of packed codes; zeros if they do not have two dimensions."""
    if len(codes.shape) != 2:
        return (0, 0)
    first, second = codes.shape
    return {"gemm": (second * 8, first), "gemv": (first, second * 8)}.get(packing, (first * 4, second))


def _packed_misfit(
    parts: Mapping[str, TensorRef], packing: str, group_size: int, shape: Shape
) -> tuple[TensorRef, str] | None:
    """Return the tensor that does not match a packing and group size, and why; None if all match."""
    try:
        wanted = packed_tensor_specs(packing, shape, group_size)
    except LayoutError as error:
        return parts[_CODES], error.problem
    for ending, (size, dtype) in wanted.items():
        ref = parts.get(ending) or parts.get(_OTHER_NAME.get(ending, ending))
        if ref is None:
            return parts[_CODES], f"{packing} needs {ending}"
        if ref.shape != size or (ref.dtype != dtype if dtype else ref.dtype not in _SCALE_DTYPES):
            expected = f"{str(dtype or 'floating').removeprefix('torch.')} {list(size)}"
            return ref, f"{packing} with group size {group_size} needs {expected}"
    return None


def _hint(parts: Mapping[str, TensorRef]) -> str:
    found = next(matching_packings(parts), None)
    if found is None:
        return _DOWNLOAD_AGAIN
    return f"the tensors are {found[0]} with group size {found[1]}: correct the declaration"
