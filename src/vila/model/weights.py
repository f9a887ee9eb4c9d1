"""Weight files: find them, list their tensors without reading them, and load tensors memory-mapped or one by one.

A tensor that keeps its dtype and stays on the CPU is a view of the mapped file, so loading makes no copy. When tensors
are converted or moved, the pages of the file are released as they are read: peak memory is the result plus one tensor.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.core.reading import file_errors, read_json_object
from vila.model.dtypes import SAFETENSORS_DTYPES, DType
from vila.model.pytorch_bin import StoredTensor, TorchContent, read_torch_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
ReadTensor = Callable[[str], "Tensor"]
Transform = Callable[["Tensor"], "Tensor"]


_MAX_HEADER_BYTES = 100_000_000  # as in the library


def _read_header(path: Path) -> dict[str, tuple[Shape, DType]] | None:
    """Return shape and dtype of every tensor of a .safetensors file, by name; None unless the file is valid.

    Reads it without the library, which imports torch or numpy. In a valid file the tensors cover the content without
    gaps or overlaps.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            content = path.stat().st_size - 8 - length
            if content < 0 or length > _MAX_HEADER_BYTES:
                return None
            raw = stream.read(length).decode()
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        if not raw.startswith("{") or any(type(text) is not str for text in metadata.values()):
            return None
        end, out = 0, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, dtype = tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]]
            if any(type(size) is not int or size < 0 for size in shape):
                return None
            if len(entry) != 3 or entry["data_offsets"] != [end, end + prod(shape) * dtype.itemsize]:
                return None
            end = entry["data_offsets"][1]
            out[name] = shape, dtype
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None
    return {name: out[name] for name in header} if end == content else None


@dataclass(frozen=True)
class SafetensorsFile:
    """A .safetensors file.

    is_mapped: whether all tensors are guaranteed to be views of the mapped file, so that its pages can be released.
    """

    path: Path
    # safetensors does not guarantee views of the file; reopening it is cheap.
    is_mapped = False

    @cached_property
    def tensor_specs(self) -> Mapping[str, tuple[Shape, DType]]:
        """Shape and dtype of every tensor. Raises LayoutError for a truncated or invalid file."""
        header = _read_header(self.path)
        if header is not None:
            return header
        # Invalid, or with a dtype that is not supported: the library names the problem.
        out = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in SAFETENSORS_DTYPES:
                    raise LayoutError(
                        "", file=self.path, field=name, value=dtype, expected=", ".join(SAFETENSORS_DTYPES)
                    )
                out[name] = (tuple(part.get_shape()), SAFETENSORS_DTYPES[dtype])
        return out

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Return a context manager that yields a function from a name to its tensor.

        The file stays mapped as long as a tensor uses it.
        """
        with self._open() as file:
            yield file.get_tensor

    def _open(self) -> Any:
        from safetensors import safe_open

        with file_errors(self.path, LayoutError, hint="it may be truncated or damaged; copy or download it again"):
            return safe_open(self.path, framework="pt")


@dataclass(frozen=True)
class TorchFile:
    """A file written by torch.save that contains a dict of tensors and nothing else; its pickle is never executed."""

    path: Path

    @property
    def is_mapped(self) -> bool:
        """Whether all tensors are views of the file; PyTorch before 1.6 did not align them, so they are copied."""
        return self._content.is_mapped

    @cached_property
    def tensor_specs(self) -> Mapping[str, tuple[Shape, DType]]:
        """Shape and dtype of every tensor. Raises LayoutError as `read_torch_file`, and for values of other types."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._content.value.items()}

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Return a context manager as that of `SafetensorsFile`."""
        content = self._content
        mapping = content.map()
        yield lambda name: content.value[name].read(mapping)

    @cached_property
    def _content(self) -> TorchContent:
        content = read_torch_file(self.path)
        values = content.value
        if not isinstance(values, dict):
            raise LayoutError(
                "contains no weights", file=self.path, value=type(values).__name__, expected="a dict of tensors"
            )
        if values and values.keys() <= {"scale", "clip"}:
            hint = "give it to vila quantize --load-awq, with the 16-bit model"
            raise LayoutError("contains AWQ search results, not weights", file=self.path, hint=hint)
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise LayoutError(
                    "", file=self.path, field=str(name), value=type(value).__name__, expected="a named tensor"
                )
        return content


WeightFile = SafetensorsFile | TorchFile


@dataclass(frozen=True)
class TensorRef:
    """A model weight as a tensor in a file.

    transform: maps the file's tensor to the weight, as a view where possible.
    """

    file: WeightFile
    name: str
    shape: Shape
    dtype: DType
    transform: Transform | None = None

    def then(self, transform: Transform, shape: Shape | None = None) -> TensorRef:
        """Return a reference with another transform applied last. shape: of the result, if it changes."""
        first = self.transform
        combined = transform if first is None else lambda tensor: transform(first(tensor))
        return replace(self, transform=combined, shape=self.shape if shape is None else shape)

    def describe(self) -> str:
        """Return dtype and shape for error messages."""
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def bytes(self) -> int:
        """Size of the tensor in the file."""
        return prod(self.file.tensor_specs[self.name][0]) * self.dtype.itemsize


def list_tensors(files: Sequence[WeightFile]) -> dict[str, TensorRef]:
    """Return all tensors of the files by name. Raises LayoutError if two files contain the same name."""
    out: dict[str, TensorRef] = {}
    for file in files:
        for name, (shape, dtype) in file.tensor_specs.items():
            if name in out:
                raise LayoutError(
                    f"also in {out[name].file.path}", file=file.path, field=name, hint="remove one of the two files"
                )
            out[name] = TensorRef(file, name, shape, dtype)
    return out


def read_tensors(
    refs: Mapping[str, TensorRef], targets: Mapping[str, tuple[torch.dtype, torch.device]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in its target dtype and on its target device, file by file."""
    by_file: dict[WeightFile, list[str]] = {}
    for name, ref in refs.items():
        by_file.setdefault(ref.file, []).append(name)
    budget = max((ref.bytes for ref in refs.values()), default=0)
    for file, names in by_file.items():
        waiting = list(reversed(names))
        while waiting:
            # Pages that were copied from count as memory until the file is closed, so it is reopened regularly.
            copied = 0
            with file.open() as get:
                while waiting and (not copied or copied + refs[waiting[-1]].bytes <= budget):
                    name = waiting.pop()
                    tensor, source = _load(refs[name], get, *targets[name])
                    if source is not None and not (file.is_mapped and _release_pages(source)):
                        copied += refs[name].bytes
                    del source
                    yield name, tensor
                    del tensor


def _load(ref: TensorRef, get: ReadTensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the converted tensor, and the file's own tensor if the result does not share its memory."""
    source = get(ref.name)
    changed = source if ref.transform is None else ref.transform(source)
    tensor = changed.to(device=device, dtype=dtype if changed.is_floating_point() else changed.dtype)
    same = tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return tensor, None if same else source


def _release_pages(source: Tensor) -> bool:
    """Release the pages of a mapped file that a tensor was copied from; the system reads them again if needed.

    Returns False if the system has no such call; reopening the file has the same effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    end = source.data_ptr() + source.nbytes
    start = source.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    pages = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
    return bool(ctypes.CDLL(None).madvise(*pages, mmap.MADV_DONTNEED) == 0)


INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"-of-(\d{1,9})\.\w+$")
_NOT_IN_NAMES = frozenset("/\\\0")


def published_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a model under their published names, without a tied LM head.

    transformers renames modules from version to version (DINOv2's `query` became `q_proj`); names in files stay the
    same.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    return dict(revert_weight_conversion(model, state))


def published_names(model: PreTrainedModel) -> dict[str, str]:
    """Map the published names of a model's weights to its parameter names.

    Raises LayoutError for a model whose modules join or split published weights, such as DINOv2 with SwiGLU.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    names = {id(tensor): name for name, tensor in state.items()}
    published = revert_weight_conversion(model, state)
    if joined := [public for public, tensor in published.items() if id(tensor) not in names]:
        raise LayoutError("modules that join or split weights are not supported", value=joined[:3])
    return {public: names[id(tensor)] for public, tensor in published.items()}


def find_weight_files(folder: Path) -> list[WeightFile]:
    """Return the weight files of a directory; safetensors take precedence.

    Raises LayoutError for an invalid index, an index that names missing files or files outside of the directory, shards
    without an index, and a directory without weights.
    """
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (folder / index).is_file():
            return [open_weight_file(path) for path in _listed_shards(folder / index)]
        if (folder / single).is_file():
            return [open_weight_file(folder / single)]
    _check_shards_have_index(folder)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return [open_weight_file(loose[0])]
    if torch_files := torch_weight_files(folder):
        return list(map(open_weight_file, torch_files))
    raise LayoutError("no weights", file=folder, expected=f"one of {', '.join([*SINGLE_FILES, *INDEX_FILES])}")


def _listed_shards(index: Path) -> list[Path]:
    """Return the shards that an index lists."""
    named = read_json_object(index, LayoutError).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise LayoutError(
            "", file=index, field="weight_map", value=named, expected="a mapping from weight names to file names"
        )
    for weight, file in named.items():
        if not isinstance(file, str) or not file.strip(". ") or len(file) > 255 or set(file) & _NOT_IN_NAMES:
            expected = "the name of a file next to the index"
            raise LayoutError("", file=index, field=f"weight_map.{weight}", value=file, expected=expected)
    shards = [index.parent / file for file in sorted(set(named.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        problem = f"{len(missing)} of {len(shards)} shards are missing"
        raise LayoutError(problem, file=index, field="weight_map", value=missing, hint="download the checkpoint again")
    return shards


def _check_shards_have_index(folder: Path) -> None:
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        stem, _, ending = single.partition(".")
        names = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.{ending}"))
        counted = [match for name in names if (match := _SHARD.search(name)) and int(match[1]) > 1]
        if counted:
            problem = f"{len(counted)} of {int(counted[0][1])} shards without their index"
            raise LayoutError(problem, file=folder / index, value=names[:3], hint=f"download {index} too")


def torch_weight_files(folder: Path) -> list[Path]:
    """Return the .pt weight files of a directory: one per tensor, the only one, or TinyChat's current one (`...v2.pt`).

    Returns [] if there are none. Raises LayoutError if the choice is ambiguous.
    """
    paths = sorted(folder.glob("*.pt"))
    if len(paths) < 2 or any(path.name.endswith(".qweight.pt") for path in paths):
        return paths
    second = [path for path in paths if path.name.endswith("v2.pt")]
    if len(second) == 1:
        return second
    problem = f"ambiguous: {len(paths)} .pt files"
    hint = "pass the path of the file with the weights"
    raise LayoutError(problem, file=folder, value=[path.name for path in paths[:5]], hint=hint)


def open_weight_file(path: Path) -> WeightFile:
    """Return the reader for a weight file by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
