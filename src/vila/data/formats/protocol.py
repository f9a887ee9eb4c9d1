"""What a dataset format does, and the table of those that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vila.core.events import SILENT, Events
from vila.core.registry import Registry
from vila.data.mixture import Source


class DatasetFormat(Protocol):
    """Opens files of one kind."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: Any) -> Source:
        """Random access to samples of a file, a directory of shards or a pattern (`shards/*.tar`).

        events: told how files are indexed, which is done once for each.
        options: what the recipe's entry says; one that the format does not know is a ConfigError listing those it does.
        Raises DataError naming file, row and reason for what cannot become a sample.
        """


FORMATS: Registry[DatasetFormat] = Registry(
    "dataset format",
    {
        name: f"vila.data.formats.{name}:FORMAT"
        for name in (
            "messages",
            "llava_json",
            "llava_json_v15",
            "mmc4",
            "coyo",
            "webdataset",
            "vflan",
            "flan",
            "interleaved",
            "cauldron",
            "video_json",
        )
    },
)
