"""The tensors of a compressed-tensors directory, declared and then written row by row."""

from __future__ import annotations

from pathlib import Path

import torch

from vila.export.llava_folder import HubTensor, copy_tensor, hub_tensors, module_name
from vila.export.source import Source
from vila.export.stream import SafetensorsWriter
from vila.kernels.int4_layout import pack
from vila.kernels.int4_packing import WORD, as_words
from vila.kernels.int4_targets import pack_compressed

# N outputs  K inputs  G inputs of a group

Entry = tuple[tuple[int, ...], torch.dtype]


def write_compressed(source: Source, part: Path, group_size: int, symmetric: bool) -> None:
    """Linears of the decoder's blocks in 4 bits, each in three or four tensors; all others in 16 bits."""
    linears = {f"{name}.weight" for name in source.block_linears()}
    tensors = hub_tensors(source)
    declared: dict[str, Entry] = {}
    for name, one in tensors.items():
        if one.ours in linears:
            declared |= _declared(module_name(name), one, source.half, group_size, symmetric)
        else:
            declared[name] = (one.shape, source.half)
    with SafetensorsWriter(part, declared) as writer:
        for name, one in tensors.items():
            if one.ours in linears:
                _write_linear(writer, module_name(name), one, source, group_size, symmetric)
            else:
                copy_tensor(writer, name, one, source.half)


def _declared(stem: str, one: HubTensor, dtype: torch.dtype, group_size: int, symmetric: bool) -> dict[str, Entry]:
    outputs, inputs = one.shape
    entries: dict[str, Entry] = {
        f"{stem}.weight_packed": ((outputs, inputs // WORD), torch.int32),
        f"{stem}.weight_scale": ((outputs, inputs // group_size), dtype),
        f"{stem}.weight_shape": ((2,), torch.int64),
    }
    if not symmetric:
        entries[f"{stem}.weight_zero_point"] = ((outputs // WORD, inputs // group_size), torch.int32)
    return entries


def _write_linear(
    writer: SafetensorsWriter, stem: str, one: HubTensor, source: Source, group_size: int, symmetric: bool
) -> None:
    writer.append(f"{stem}.weight_shape", torch.tensor(one.shape))
    for weight in source.int4_rows(one.ours, group_size, symmetric=symmetric, scale_dtype=source.half):
        packed = pack_compressed(weight)
        writer.append(f"{stem}.weight_packed", packed["weight_packed"])
        writer.append(f"{stem}.weight_scale", packed["weight_scale"])
        if not symmetric:
            # Left out by the packer where all zeros of these rows happen to be 8; the file has them for every row.
            writer.append(f"{stem}.weight_zero_point", as_words(pack(weight.zeros.T)).T.contiguous())
