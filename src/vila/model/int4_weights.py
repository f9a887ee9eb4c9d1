"""A model whose decoder blocks are stored in 4 bits: made from a model and its rounded weights, asked, and undone.

It is the same class and the same network; only the Linears of the blocks are others. Nothing of them is held in 16 bits
beside their 4, unless the backend that is chosen (`kernels.backends.use_backend`) prepares something for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vila.core.errors import LayoutError
from vila.kernels.int4 import SCALE_DTYPES, Int4Linear, Int4Weight, check_group_size
from vila.kernels.packings import find_format, num_zero_words
from vila.model.weights import ReadTensor, Shape, TensorRef, WeightFile

_SHOWN = 5


def use_int4(model: nn.Module, weights: Mapping[str, Int4Weight]) -> None:
    """Let the named Linears of the decoder's blocks multiply by 4-bit weights from now on, in place.

    weights: by the Linears' names in the model, as `quant.quantize_model` gives them; they move to where the Linear is.
             Their tensors are shared, not copied, when they are there already; where the Linear's own weight was
             released (the meta device) they stay where they are.
    Biases stay as they are. The reference product is used until `use_backend` chooses another.
    Raises LayoutError, before anything is changed, listing names that are no Linear of a block, or of another shape.
    """
    blocks = _block_prefix(model)
    modules = dict(model.named_modules())
    problems = [why for name, weight in weights.items() if (why := _misfit(name, weight, modules.get(name), blocks))]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise LayoutError(f"4-bit weights do not fit this model: {'; '.join(problems[:_SHOWN])}{more}")
    for name, weight in weights.items():
        linear: nn.Linear = modules[name]
        placed = weight if linear.weight.is_meta else weight.to(linear.weight.device)
        layer = Int4Linear.from_weight(placed, linear.bias)
        model.set_submodule(name, layer.train(linear.training))


def int4_weights(model: nn.Module) -> dict[str, Int4Weight]:
    """The 4-bit weights of a model by the names of its Linears, sharing their tensors; {} for full precision."""
    return {name: layer.weight for name, layer in int4_layers(model)}


def int4_layers(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """The 4-bit layers of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module


def group_size_of(model: nn.Module) -> int | None:
    """The group size that all 4-bit layers share; None for full precision. Raises LayoutError when they differ."""
    sizes = {layer.group_size for _, layer in int4_layers(model)}
    if len(sizes) > 1:
        raise LayoutError(
            f"the model has groups of {' and '.join(map(str, sorted(sizes)))}; quantize it with one group size"
        )
    return sizes.pop() if sizes else None


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every 4-bit layer into an ordinary Linear with the rounded values, in place; the opposite of `use_int4`.

    dtype: of the new weights; None takes that of the embeddings.
    """
    kind = dtype or _embeddings(model).dtype
    for name, layer in list(int4_layers(model)):
        model.set_submodule(name, layer.to_linear(kind).train(layer.training))


def _misfit(name: str, weight: Int4Weight, module: nn.Module | None, blocks: str) -> str:
    """Why a weight cannot be used there; empty when it can."""
    if not name.startswith(blocks):
        return f"{name} is not in the decoder's blocks ({blocks}...)"
    if isinstance(module, Int4Linear):
        return f"{name} is in 4 bits already"
    if not isinstance(module, nn.Linear):
        return f"{name} is {'missing' if module is None else f'a {type(module).__name__}'}, not a Linear"
    found, wanted = [weight.num_outputs, weight.num_inputs], [module.out_features, module.in_features]
    return "" if found == wanted else f"{name} is {wanted}, its 4-bit weight {found}"


def _block_prefix(model: Any) -> str:
    """`language_model.model.layers.`, or what it is called in this model."""
    layers = model.get_decoder().layers
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


def _embeddings(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight


# --- packed
# 4-bit weights in files: found among the pieces of a checkpoint, checked by shapes and dtypes, unpacked.


# O outputs  I inputs  G inputs of a group

Facts = tuple[Shape, torch.dtype | None]
_RUN_BYTES = 256 << 20
_CODES = "qweight"
_ENDINGS = ("qweight", "qzeros", "scales", "scaled_zeros")
_GROUP_SIZES = (128, 64, 32, 16, 256)
_REFETCH = "fetch the checkpoint again"
_PACKINGS = ("gemm", "gemv", "tinychat")
# AutoAWQ calls what TinyChat calls `scaled_zeros` by the name of its other packings.
_OTHER_NAME = {"scaled_zeros": "qzeros"}


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] of ours, stored as the tensors of one of `kernels.int4_formats`.

    parts:      the tensors by the endings of their names: qweight, qzeros, scales.
    packing:    gemm, gemv or tinychat.
    """

    parts: Mapping[str, TensorRef]
    packing: str
    group_size: int
    shape: Shape

    @property
    def bytes(self) -> int:
        """Size of its tensors in the file."""
        return sum(piece.bytes for piece in self.parts.values())

    @property
    def scale_dtype(self) -> torch.dtype:
        """Type of the scales."""
        return self.parts["scales"].dtype


def read_packed(packed: Mapping[str, PackedWeight]) -> Iterator[tuple[str, Int4Weight]]:
    """Each weight in our storage, in order.

    Pages of files that were copied from count as memory until they are closed, so they are opened anew now and then.
    Raises LayoutError naming file and tensor for one that cannot be.
    """
    waiting = list(packed)[::-1]
    while waiting:
        copied = 0
        with ExitStack() as stack:
            opened: dict[WeightFile, ReadTensor] = {}
            while waiting and copied < _RUN_BYTES:
                name = waiting.pop()
                for piece in packed[name].parts.values():
                    if piece.file not in opened:
                        opened[piece.file] = stack.enter_context(piece.file.open())
                yield name, _unpacked(packed[name], opened)
                copied += packed[name].bytes


def _unpacked(weight: PackedWeight, opened: Mapping[WeightFile, ReadTensor]) -> Int4Weight:
    tensors = {ending: opened[piece.file](piece.name) for ending, piece in weight.parts.items()}
    try:
        unpacked = find_format(weight.packing).unpack(tensors, weight.group_size)
    except LayoutError as error:
        codes = weight.parts[_CODES]
        raise LayoutError(str(error), file=codes.file.path, field=codes.name) from error
    if not bool(unpacked.scales.isfinite().all()):
        scales = weight.parts["scales"]
        raise LayoutError("holds values that are not finite", file=scales.file.path, field=scales.name, hint=_REFETCH)
    return unpacked


def collect_packed_weights(
    pieces: Mapping[str, TensorRef], packing: str, group_size: int, source: str
) -> tuple[dict[str, TensorRef], dict[str, PackedWeight]]:
    """The pieces that are no part of a 4-bit weight, and those weights by the names of their Linears.

    source: file and statement that the packing and the group size are these, for messages.
    Raises LayoutError naming tensors that are missing, or whose shapes or types are not those of the packing.
    """
    plain, groups = split_packed_tensors(pieces)
    packed = {}
    for name, parts in groups.items():
        check_complete(name, parts)
        shape = _shape(parts[_CODES], packing)
        problem = _packed_misfit(parts, packing, group_size, shape)
        if problem:
            piece, reason = problem
            raise LayoutError(
                f"{reason}, but {source}",
                file=piece.file.path,
                field=piece.name,
                value=_form(piece),
                hint=_remedy(parts),
            )
        packed[name] = PackedWeight(parts, packing, group_size, shape)
    return plain, packed


def split_packed_tensors(
    pieces: Mapping[str, TensorRef],
) -> tuple[dict[str, TensorRef], dict[str, dict[str, TensorRef]]]:
    """Pieces that are no part of a 4-bit weight, and those that are, by the names of their Linears and the endings."""
    heads = {name.rpartition(".")[0] for name in pieces if name.rpartition(".")[2] in _ENDINGS}
    plain: dict[str, TensorRef] = {}
    groups: dict[str, dict[str, TensorRef]] = {}
    for name, piece in pieces.items():
        head, _, ending = name.rpartition(".")
        if head in heads and ending in _ENDINGS:
            groups.setdefault(head, {})[ending] = piece
        else:
            plain[name] = piece
    return plain, groups


def check_complete(name: str, parts: Mapping[str, TensorRef]) -> None:
    """Raises LayoutError naming what a 4-bit weight lacks."""
    zeros = parts.keys() & {"qzeros", "scaled_zeros"}
    missing = [ending for ending in ("qweight", "scales") if ending not in parts] + ([] if zeros else ["qzeros"])
    if missing:
        there = next(iter(parts.values()))
        raise LayoutError(
            f"is missing, {there.name} is there",
            file=there.file.path,
            field=", ".join(f"{name}.{ending}" for ending in missing),
            expected="qweight, qzeros and scales of each weight in 4 bits, also where all zeros are 8",
            hint="fetch the checkpoint again, or quantize the 16-bit model with vila quantize",
        )


def matching_packings(parts: Mapping[str, TensorRef]) -> Iterator[tuple[str, int]]:
    """Packings and group sizes that the tensors of a weight could be, the likeliest first."""
    for packing in _PACKINGS:
        for size in _GROUP_SIZES:
            if not _packed_misfit(parts, packing, size, _shape(parts[_CODES], packing)):
                yield packing, size


def packed_tensor_specs(packing: str, shape: Shape, group_size: int) -> dict[str, Facts]:
    """Shape and type of the tensors that a weight [O, I] is stored as; None stands for any floating type.

    Raises LayoutError for a group size that does not divide I, or that the packing does not know.
    """
    num_outputs, num_inputs = shape
    check_group_size(num_inputs, group_size)
    groups = num_inputs // group_size
    if packing == "gemm":
        return {
            "qweight": ((num_inputs, num_outputs // 8), torch.int32),
            "qzeros": ((groups, num_outputs // 8), torch.int32),
            "scales": ((groups, num_outputs), None),
        }
    words = num_zero_words(num_inputs, group_size)
    if packing == "gemv":
        return {
            "qweight": ((num_outputs, num_inputs // 8), torch.int32),
            "qzeros": ((num_outputs, words), torch.int32),
            "scales": ((num_outputs, words * 8), None),
        }
    return {
        "qweight": ((num_outputs // 4, num_inputs), torch.int16),
        "scales": ((words * 8, num_outputs), None),
        "scaled_zeros": ((words * 8, num_outputs), None),
    }


def _shape(codes: TensorRef, packing: str) -> Shape:
    """[O, I] of the codes of a packing."""
    if len(codes.shape) != 2:
        return (0, 0)
    first, second = codes.shape
    return {"gemm": (second * 8, first), "gemv": (first, second * 8)}.get(packing, (first * 4, second))


def _packed_misfit(
    parts: Mapping[str, TensorRef], packing: str, group_size: int, shape: Shape
) -> tuple[TensorRef, str] | None:
    """Return the tensor that does not belong to that packing with such groups, and why; None if all do."""
    try:
        wanted = packed_tensor_specs(packing, shape, group_size)
    except LayoutError as error:
        return parts[_CODES], str(error)
    for ending, (size, kind) in wanted.items():
        piece = parts.get(ending) or parts.get(_OTHER_NAME.get(ending, ending))
        if piece is None:
            return parts[_CODES], f"there is no {ending}, which {packing} has"
        if piece.shape != size or (piece.dtype != kind if kind else piece.dtype not in SCALE_DTYPES):
            expected = f"{str(kind or 'floating').removeprefix('torch.')} {list(size)}"
            return piece, f"{packing} with groups of {group_size} has {expected}"
    return None


def _form(piece: TensorRef) -> str:
    return f"{str(piece.dtype).removeprefix('torch.')} {list(piece.shape)}"


def _remedy(parts: Mapping[str, TensorRef]) -> str:
    found = next(matching_packings(parts), None)
    if found is None:
        return _REFETCH
    return f"its tensors are {found[0]} with groups of {found[1]}: correct it there"
