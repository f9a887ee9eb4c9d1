"""LLaVA's JSON: a list of records with `conversations` of `from` human|gpt, and an optional `image`.

Placeholders are normalised as VILA 1.0 does it: in every turn that holds `<image>`, all occurrences are removed, the
text is stripped, and one `<image>` and a newline are put in front (spec of the original, model_data_training 4.2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.files import read_json
from vila.core.types import Image, Message, Part, Sample, Text
from vila.data.formats.protocol import safe_path

_ROLES = {"human": "user", "gpt": "assistant"}
_MARKER = "<image>"


class LlavaSource:
    """Samples of one LLaVA JSON file, held as parsed records."""

    def __init__(self, path: Path, image_root: Path) -> None:
        """Raises DataError when the file is missing or is not a JSON list."""
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        self.path, self.image_root = path, image_root
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(f"{path}: expected a JSON list of records")
        self._records: list[Any] = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`. Raises DataError naming file, record and reason."""
        where = f"{self.path} record {index + 1}"
        record = self._records[index]
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: expected an object with a list 'conversations'")
        # The original drops a first turn that is not the human's.
        turns = turns[1:] if turns[0].get("from") == "gpt" else turns
        image = Image(safe_path(self.image_root, record["image"], where)) if record.get("image") else None
        messages = tuple(self._message(turn, image, f"{where} turn {number}") for number, turn in enumerate(turns, 1))
        held = sum(isinstance(part, Image) for message in messages for part in message.parts)
        if image is not None and held != 1:
            raise DataError(f"{where}: one image but {held} turns with {_MARKER}")
        return Sample(str(record.get("id", index)), messages)

    def _message(self, turn: Any, image: Image | None, where: str) -> Message:
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in _ROLES or not isinstance(value, str):
            raise DataError(f"{where}: from={speaker!r} with a {type(value).__name__}; expected human or gpt with text")
        role = _ROLES[speaker]
        if _MARKER not in value:
            return Message.of(role, value)  # type: ignore[arg-type]
        if image is None:
            raise DataError(f"{where}: {_MARKER} in the text, but the record has no image")
        if role == "assistant":
            raise DataError(f"{where}: {_MARKER} inside an answer")
        parts: tuple[Part, ...] = (image, Text("\n" + value.replace(_MARKER, "").strip()))
        return Message("user", parts)


class LlavaFormat:
    """LLaVA JSON, version 1.0 placeholders."""

    def open(self, path: Path, image_root: Path) -> LlavaSource:
        """Random access to the samples of a file."""
        return LlavaSource(path, image_root)


FORMAT = LlavaFormat()
