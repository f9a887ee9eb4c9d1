"""Tensors in files: listed without being read, mapped in place where they stay as they are, copied one by one if not.

A tensor that keeps its type and stays on the CPU is a view of the mapped file, so loading costs no second copy. When it
is converted or moved, the mapping is given back as it goes, so memory holds the result and one tensor more.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vila.core.errors import LayoutError
from vila.core.reading import file_errors, read_json_object
from vila.model.pytorch_bin import StoredTensor, TorchContent, read_torch_file

Shape = tuple[int, ...]
ReadTensor = Callable[[str], Tensor]
Transform = Callable[[Tensor], Tensor]

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of numbers as .safetensors files name them."""


class WeightFile(Protocol):
    """A file of named tensors."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def is_mapped(self) -> bool:
        """Whether its tensors are certain to be views of the file, whose pages may then be given back."""

    @property
    def tensor_specs(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and type of every tensor, without reading any."""

    def open(self) -> Any:
        """A context in which tensors can be had by name; what is mapped stays only as long as somebody holds it."""


@dataclass(frozen=True)
class SafetensorsFile:
    """A .safetensors file."""

    path: Path
    # Its reader does not promise views of the file, and opening it anew is cheap.
    is_mapped = False

    @cached_property
    def tensor_specs(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of every tensor. Raises LayoutError when the file is cut short or is something else."""
        out = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in SAFETENSORS_DTYPES:
                    raise LayoutError(
                        "", file=self.path, field=name, value=kind, expected=", ".join(SAFETENSORS_DTYPES)
                    )
                out[name] = (tuple(part.get_shape()), SAFETENSORS_DTYPES[kind])
        return out

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Tensors as views of the file."""
        with self._open() as file:
            yield file.get_tensor

    def _open(self) -> Any:
        with file_errors(self.path, LayoutError, hint="it may be cut short or damaged; copy or download it again"):
            return safe_open(self.path, framework="pt")


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save that holds tensors by name and nothing else; nothing in its pickle is run."""

    path: Path

    @property
    def is_mapped(self) -> bool:
        """Whether its tensors are views of the file. Before PyTorch 1.6 they were not aligned, and are copied."""
        return self._content.is_mapped

    @cached_property
    def tensor_specs(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of every tensor. Raises LayoutError as `read_torch_file`, and for other values."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._content.value.items()}

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Context that yields a function from a name to its tensor."""
        content = self._content
        mapping = content.map()
        yield lambda name: content.value[name].read(mapping)

    @cached_property
    def _content(self) -> TorchContent:
        content = read_torch_file(self.path)
        held = content.value
        if not isinstance(held, dict):
            raise LayoutError(
                "holds no weights",
                file=self.path,
                value=type(held).__name__,
                expected="tensors by their names",
            )
        if held and held.keys() <= {"scale", "clip"}:
            raise LayoutError(
                "holds the result of an AWQ search, not weights",
                file=self.path,
                hint="give it to vila quantize --load-awq, with the 16-bit model",
            )
        for name, value in held.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise LayoutError(
                    "", file=self.path, field=str(name), value=type(value).__name__, expected="a tensor by its name"
                )
        return content


@dataclass(frozen=True)
class TensorRef:
    """One weight of ours, as it lies in a file. `change` turns the file's tensor into it, without copying if it can."""

    file: WeightFile
    name: str
    shape: Shape
    dtype: torch.dtype
    transform: Transform | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensor in the file."""
        return int(torch.Size(self.file.tensor_specs[self.name][0]).numel()) * self.dtype.itemsize


def list_tensors(files: Sequence[WeightFile]) -> dict[str, TensorRef]:
    """Every tensor of the files under its own name. Raises LayoutError when two files hold the same one."""
    out: dict[str, TensorRef] = {}
    for file in files:
        for name, (shape, dtype) in file.tensor_specs.items():
            if name in out:
                raise LayoutError(
                    f"is also in {out[name].file.path}", file=file.path, field=name, hint="remove one of the two files"
                )
            out[name] = TensorRef(file, name, shape, dtype)
    return out


def read_tensors(
    pieces: Mapping[str, TensorRef], targets: Mapping[str, tuple[torch.dtype, torch.device]]
) -> Iterator[tuple[str, Tensor]]:
    """Each piece in its wanted type and place, file by file."""
    by_file: dict[WeightFile, list[str]] = {}
    for name, piece in pieces.items():
        by_file.setdefault(piece.file, []).append(name)
    budget = max((piece.bytes for piece in pieces.values()), default=0)
    for file, names in by_file.items():
        waiting = list(reversed(names))
        while waiting:
            # Pages of the file that were copied from count as memory until it is closed: open it anew now and then.
            copied = 0
            with file.open() as get:
                while waiting and (not copied or copied + pieces[waiting[-1]].bytes <= budget):
                    name = waiting.pop()
                    tensor, source = _one(pieces[name], get, *targets[name])
                    if source is not None and not (file.is_mapped and _give_back(source)):
                        copied += pieces[name].bytes
                    del source
                    yield name, tensor
                    del tensor


def _one(piece: TensorRef, get: ReadTensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The tensor as it is wanted, and the file's own where that is another one."""
    source = get(piece.name)
    changed = source if piece.transform is None else piece.transform(source)
    tensor = changed.to(device=device, dtype=dtype if changed.is_floating_point() else changed.dtype)
    same = tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return tensor, None if same else source


def _give_back(source: Tensor) -> bool:
    """Let go of the pages of a mapped file that a tensor was copied from; they would be read again if need be.

    False where the system has no such call: opening the file anew does the same.
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
    """The weights by the names under which transformers publishes them, a tied head left out.

    Its modules are renamed from version to version (DINOv2's `query` became `q_proj`), what is in files is not.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    return dict(revert_weight_conversion(model, state))


def published_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the published names of a model's weights, and their names in its modules.

    Raises LayoutError for a model whose modules join or split published weights, such as DINOv2 with SwiGLU.
    """
    state = dict(model.state_dict())
    names = {id(tensor): name for name, tensor in state.items()}
    published = revert_weight_conversion(model, state)
    if joined := [public for public, tensor in published.items() if id(tensor) not in names]:
        raise LayoutError(f"modules that join or split weights are not supported ({', '.join(joined[:3])})")
    return {public: names[id(tensor)] for public, tensor in published.items()}


def find_weight_files(folder: Path) -> list[WeightFile]:
    """Return the weight files of a directory, safetensors first.

    Raises LayoutError for an index that is damaged, names files outside of the directory or absent ones, for shards
    without their index, and when there are no weights.
    """
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (folder / index).is_file():
            return [open_weight_file(path) for path in _indexed(folder / index)]
        if (folder / single).is_file():
            return [open_weight_file(folder / single)]
    _refuse_shards_without_index(folder)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return [open_weight_file(loose[0])]
    if pickled := torch_weight_files(folder):
        return list(map(open_weight_file, pickled))
    raise LayoutError("no weights", file=folder, expected=f"one of {', '.join([*SINGLE_FILES, *INDEX_FILES])}")


def _indexed(index: Path) -> list[Path]:
    """Return the shards that an index names."""
    named = read_json_object(index, LayoutError).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise LayoutError(
            "", file=index, field="weight_map", value=named, expected="an object from the names of weights to files"
        )
    for weight, file in named.items():
        if not isinstance(file, str) or not file.strip(". ") or len(file) > 255 or set(file) & _NOT_IN_NAMES:
            raise LayoutError(
                "", file=index, field=f"weight_map.{weight}", value=file, expected="the name of a file beside the index"
            )
    shards = [index.parent / file for file in sorted(set(named.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise LayoutError(
            f"names {len(shards)} shards, of which {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            file=index,
            field="weight_map",
            value=missing,
            hint="fetch the checkpoint again",
        )
    return shards


def _refuse_shards_without_index(folder: Path) -> None:
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        stem, _, ending = single.partition(".")
        names = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.{ending}"))
        counted = [match for name in names if (match := _SHARD.search(name)) and int(match[1]) > 1]
        if counted:
            raise LayoutError(
                f"{len(counted)} of {int(counted[0][1])} shards without their index",
                file=folder / index,
                value=names[:3],
                hint=f"fetch {index} too",
            )


def torch_weight_files(folder: Path) -> list[Path]:
    """The files of torch.save that a directory's weights are: one for each tensor, the only one, or the newest form.

    TinyChat calls its second form `...v2.pt`. Raises LayoutError when several could be meant; [] for none.
    """
    paths = sorted(folder.glob("*.pt"))
    if len(paths) < 2 or any(path.name.endswith(".qweight.pt") for path in paths):
        return paths
    second = [path for path in paths if path.name.endswith("v2.pt")]
    if len(second) == 1:
        return second
    raise LayoutError(
        f"{folder}: {len(paths)} .pt files, and nothing says which holds the weights "
        f"({', '.join(path.name for path in paths[:5])}); give the path of that file"
    )


def open_weight_file(path: Path) -> WeightFile:
    """A file of tensors by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
