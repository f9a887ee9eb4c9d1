"""Conversations of content parts, one JSON object a line.

    {"id": "7", "messages": [{"role": "user", "content": [{"type": "image", "path": "7.png"},
     {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}

`content` is a string or a list of parts. Optional: `branches`, a list of message lists that each continue `messages`
and do not see each other; `template`, the name of this sample's own template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vila.chat.content import messages_of
from vila.core.errors import DataError
from vila.core.types import Image, Sample
from vila.data.formats.protocol import safe_path


class MessagesSource:
    """Samples of one JSON-lines file, read by byte offset."""

    def __init__(self, path: Path, image_root: Path) -> None:
        """Raises DataError when the file is missing."""
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        self.path, self.image_root = path, image_root
        offsets = []
        with path.open("rb") as stream:
            start = 0
            for line in stream:
                if line.strip():
                    offsets.append(start)
                start += len(line)
        self._offsets = np.asarray(offsets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`. Raises DataError naming file, row and reason."""
        where = f"{self.path} row {index + 1}"
        with self.path.open("rb") as stream:
            stream.seek(int(self._offsets[index]))
            line = stream.readline()
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
            raise DataError(f"{where}: expected an object with a list 'messages'")
        messages = messages_of(record["messages"], where=where, read=self._image)
        branches = tuple(messages_of(branch, where=where, read=self._image) for branch in record.get("branches", ()))
        return Sample(str(record.get("id", index)), messages, branches, record.get("template") or None)

    def _image(self, part: Mapping[str, Any], where: str) -> Image:
        """A data file names pictures below its image root and nothing else."""
        if part["type"] == "image" and "path" in part:
            return Image(safe_path(self.image_root, part["path"], where))
        raise DataError(f"{where}: content part {part!r} is neither a text nor an image with a path")


class MessagesFormat:
    """Content-part conversations as JSON lines."""

    def open(self, path: Path, image_root: Path) -> MessagesSource:
        """Random access to the samples of a file."""
        return MessagesSource(path, image_root)


FORMAT = MessagesFormat()
