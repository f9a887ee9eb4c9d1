"""On-disk cache of the features of a frozen vision tower, so that each image is encoded once.

The directory is named by a hash of everything that the features depend on (tower weights, layer, image transform). It
contains chunks of safetensors, by content hash of the images, each with a SHA-256 of its tensors. Chunks are written
atomically, so an interrupted run keeps finished chunks; a damaged chunk is deleted and its images are encoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vila.core.errors import DataError
from vila.core.files import atomic_path, remove_partials
from vila.core.progress import SILENT, Events, task
from vila.core.reading import file_errors
from vila.core.types import Image
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

_BATCH = 64
_CHUNK = 512
_HASH = "sha256"


class FeatureCache:
    """Features [P, C] of images, by content."""

    def __init__(
        self, folder: Path, model: VilaForConditionalGeneration, processor: VilaProcessor, events: Events = SILENT
    ):
        self._model, self._processor, self._events = model, processor, events
        self.folder = folder / _fingerprint(model, processor)
        self._keys: dict[Image, str] = {}
        self._features: dict[str, Tensor] = {}
        if self.folder.is_dir():
            remove_partials(self.folder)
            for chunk in sorted(self.folder.glob("*.safetensors")):
                self._read(chunk)

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Return the features [N, P, C] of the images, in order; missing ones are computed and stored."""
        self.ensure(images)
        return torch.stack([self._features[self._key(image)] for image in images])

    def ensure(self, images: Sequence[Image]) -> None:
        """Compute and store the features of the images that are not cached yet."""
        missing = {self._key(image): image for image in images if self._key(image) not in self._features}
        if not missing:
            return
        keys = list(missing)
        with task(self._events, "vision features", len(keys), "images"):
            for start in range(0, len(keys), _CHUNK):
                chunk: dict[str, Tensor] = {}
                for first in range(start, min(start + _CHUNK, len(keys)), _BATCH):
                    batch = keys[first : min(first + _BATCH, start + _CHUNK)]
                    pixels = self._processor.pixels([missing[key] for key in batch])
                    with torch.inference_mode():
                        features = self._model.vision_features(pixels.to(self._model.device)).cpu()
                    chunk.update(zip(batch, features.clone().unbind(), strict=True))
                    self._events.advanced("vision features", len(batch))
                self._write(chunk)

    def _key(self, image: Image) -> str:
        if image not in self._keys:
            self._keys[image] = image.key()
        return self._keys[image]

    def _write(self, chunk: dict[str, Tensor]) -> None:
        name = hashlib.sha256("".join(sorted(chunk)).encode()).hexdigest()[:16]
        with atomic_path(self.folder / f"{name}.safetensors") as part:
            tensors = {key: value.contiguous() for key, value in chunk.items()}
            save_file(tensors, part, metadata={_HASH: _hash_of(tensors)})
        self._features.update(chunk)

    def _read(self, path: Path) -> None:
        try:
            with file_errors(path), safe_open(path, framework="pt") as chunk:
                tensors = {key: chunk.get_tensor(key) for key in chunk.keys()}  # noqa: SIM118
                expected = (chunk.metadata() or {}).get(_HASH)
            if expected != _hash_of(tensors):
                raise DataError("checksum mismatch", file=path)
        except DataError as error:
            path.unlink(missing_ok=True)
            self._events.log(f"{error}; deleted, the features are computed again")
        else:
            self._features.update(tensors)


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    _update(digest, tensors)
    return digest.hexdigest()


def _fingerprint(model: VilaForConditionalGeneration, processor: VilaProcessor) -> str:
    digest = hashlib.sha256()
    settings = [processor.vision_spec, model.config.select_layer, model.config.select_feature]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    _update(digest, model.vision_tower.state_dict())
    return digest.hexdigest()[:20]


def _update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
