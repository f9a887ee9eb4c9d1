"""Conversations of content parts, one JSON object a line.

    {"id": "7", "messages": [{"role": "user", "content": [{"type": "image", "path": "7.png"},
     {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}

`content` is a string or a list of parts. Optional: `branches`, a list of message lists that each continue `messages`
and do not see each other; `template`, the name of this sample's own template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.core.types import ROLES, Image, Message, Part, Sample, Text
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
        messages = self._messages(record["messages"], where)
        branches = tuple(self._messages(branch, where) for branch in record.get("branches", ()))
        return Sample(str(record.get("id", index)), messages, branches, record.get("template") or None)

    def _messages(self, rows: Any, where: str) -> tuple[Message, ...]:
        out = []
        for number, row in enumerate(rows, start=1):
            here = f"{where} message {number}"
            if not isinstance(row, dict) or row.get("role") not in ROLES:
                role = row.get("role") if isinstance(row, dict) else row
                raise DataError(f"{here}: role {role!r} is not one of {', '.join(ROLES)}")
            content = row.get("content", "")
            parts = [content] if isinstance(content, str) else content
            if not isinstance(parts, list):
                raise DataError(f"{here}: content is neither text nor a list of parts")
            out.append(Message(row["role"], tuple(self._part(part, here) for part in parts)))
        return tuple(out)

    def _part(self, part: Any, where: str) -> Part:
        if isinstance(part, str):
            return Text(part)
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return Text(part["text"])
        if kind == "image" and "path" in part:
            return Image(safe_path(self.image_root, part["path"], where))
        raise DataError(f"{where}: content part {part!r} is neither a text nor an image with a path")


class MessagesFormat:
    """Content-part conversations as JSON lines."""

    def open(self, path: Path, image_root: Path) -> MessagesSource:
        """Random access to the samples of a file."""
        return MessagesSource(path, image_root)


FORMAT = MessagesFormat()
