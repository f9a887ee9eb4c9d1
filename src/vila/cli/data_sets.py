"""The data sets of a `vila data` command: the mixture of a recipe or one file, and the reader of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import ConfigError
from vila.core.progress import SILENT, Events

if TYPE_CHECKING:
    from vila.chat.tokenize import TokenizedSample
    from vila.config.schema import Recipe
    from vila.core.types import Sample
    from vila.core.vision_spec import ImageMode
    from vila.data.dataset import SampleReader
    from vila.data.mixture import Mixture, MixtureDataset
    from vila.data.preview import ImagePreview, LengthPreview

TEMPLATE = "vicuna_v1"
"""Template where nothing names one."""


@dataclass(frozen=True)
class DataSets:
    """The data sets and how their samples are read.

    paths:     file or directory of each of them.
    reader:    None without a model: samples are then measured in characters.
    tokenizer: the model's, of transformers; None without a model.
    recipe:    None for a file.
    length_origin: recipe that `data.max_length` is from; empty if it is the default.
    """

    mixture: Mixture
    paths: tuple[Path, ...]
    template: str
    reader: SampleReader | None
    tokenizer: Any = None
    recipe: Recipe | None = None
    length_origin: str = ""

    @property
    def unit(self) -> str:
        """Unit of the lengths."""
        return "tokens" if self.reader else "characters"

    @property
    def slots_per_image(self) -> int:
        """Image placeholders of an image. Raises ConfigError without a model."""
        return self._reader_or_raise().spec.tokens_per_image

    def image_preview(self, part: MixtureDataset) -> ImagePreview | None:
        """Return an empty preview of the images of a data set; None if the size of the tower's images is unknown."""
        from vila.data.preview import ImagePreview

        if self.reader:
            return ImagePreview.of(self.reader.spec, part.image_mode)
        if self.recipe and not self.recipe.model.path:
            return ImagePreview(self.recipe.model.image_size, part.image_mode or self.recipe.model.image_mode or "pad")
        return None

    def length_preview(self) -> LengthPreview | None:
        """Return an empty preview of the lengths; None without a recipe or a model that counts tokens."""
        from vila.data.preview import LengthPreview

        if not (self.recipe and self.reader):
            return None
        return LengthPreview(self.recipe.data.max_length, self.recipe.data.overlong, self.length_origin)

    def shortened(self, part: MixtureDataset, sample: Sample, max_length: int) -> int:
        """Return the tokens that are left of a sample that is cut to `max_length`, 0 if it cannot be cut."""
        from vila.data.dataset import shorten_sample

        kept = shorten_sample(sample, lambda shorter: self.tokenize(part, shorter), max_length)
        return 0 if kept is None else len(kept)

    def save_views(self, folder: Path, count: int) -> list[Path]:
        """Write up to `count` images of each data set as the tower sees them. Raises ConfigError without a model."""
        from vila.data.preview import dataset_spec, first_images, save_views

        spec = self._reader_or_raise().spec
        paths: list[Path] = []
        for part in self.mixture.datasets:
            paths += save_views(first_images(part, count), dataset_spec(spec, part), folder, start=len(paths))
        return paths

    def require_images(self) -> None:
        """Raise ConfigError if the recipe's stage trains on images alone and the data has none."""
        if self.recipe and self.recipe.needs_images:
            from vila.data.stats import require_images

            require_images(self.mixture, self.recipe.needs_images)

    def measure(self, part: MixtureDataset, sample: Sample) -> tuple[int, int]:
        """Return the length of a sample and that of its supervised part, in `unit`.

        Raises VilaError if the sample does not fit its template, or supervises nothing.
        """
        if self.reader:
            from vila.chat.tokenize import IGNORE

            tokens = self.reader.tokenize(part, sample)
            return len(tokens), int((tokens.labels != IGNORE).sum())
        return _characters(sample, sample.template or part.template or self.template)

    @property
    def tokenize(self) -> Callable[[MixtureDataset, Sample], TokenizedSample]:
        """Function that tokenises a sample. Raises ConfigError without a model."""
        return self._reader_or_raise().tokenize

    def _reader_or_raise(self) -> SampleReader:
        if self.reader is None:
            raise ConfigError("no model to take tokenizer and image size from", hint="name one with --model")
        return self.reader


def open_data(
    what: str,
    *,
    form: str = "",
    image_root: str = "",
    options: Sequence[str] = (),
    template: str = "",
    model: str = "",
    events: Events = SILENT,
) -> DataSets:
    """Open the data sets of a recipe, or of one file, directory or pattern.

    options: of the format, as `parse_options` reads them.
    model:   "" takes the recipe's where it lies on this machine.
    events:  told how files are indexed.
    """
    from vila.config.load import load_recipe, recipe_names
    from vila.data.dataset import DatasetEntry, open_mixture
    from vila.train.data_stream import build_mixture

    recipe: Recipe | None = None
    origins: dict[str, str] = {}
    if what.endswith((".yaml", ".yml")) or (what in recipe_names() and not Path(what).exists()):
        if form or image_root or options:
            raise ConfigError(
                f"{what} is a recipe, which names its formats; leave out --format, --image-root and --format-option"
            )
        recipe = load_recipe(what, origins=origins)
        mixture = build_mixture(recipe, events)
        here = recipe.model.path
        model = model or (here if here and Path(here).is_dir() else "")
        template = template or recipe.data.template or recipe.model.template
    else:
        chosen = form or "messages"
        entry = DatasetEntry(format=chosen, path=what, image_root=image_root, options=parse_options(options))
        mixture = open_mixture([entry], 0, events)
    if model:
        reader, tokenizer = _reader(mixture, template, model, recipe.model.image_mode if recipe else None)
        template = reader.template
    else:
        reader, tokenizer = None, None
    paths = tuple(Path(entry.path) for entry in recipe.data.mixture) if recipe else (Path(what),)
    return DataSets(mixture, paths, template or TEMPLATE, reader, tokenizer, recipe, origins.get("data.max_length", ""))


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Parse words such as `max_images=4`, values as YAML reads them. Raises ConfigError for a word without a name."""
    import yaml

    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"--format-option {word!r}: expected NAME=VALUE, such as max_images=4")
        try:
            options[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{value[:80]!r} is no value ({error})", field="--format-option", value=word) from error
    return options


def _reader(mixture: Mixture, template: str, model: str, image_mode: ImageMode | None) -> tuple[SampleReader, Any]:
    """Return a reader of samples for a model, and its tokenizer. image_mode: the recipe's, in place of the model's."""
    from vila.data.dataset import SampleReader
    from vila.model.loading import open_checkpoint

    processor = open_checkpoint(model, template=template or None).processor
    chosen = template or processor.find_template().name
    spec = replace(processor.spec, image_mode=image_mode) if image_mode else processor.spec
    return SampleReader(mixture, chosen, processor.span_tokenizer, spec), processor.tokenizer


def _characters(sample: Sample, template: str) -> tuple[int, int]:
    from vila.chat.render import render_sample
    from vila.chat.templates import find_template
    from vila.core.errors import DataError

    parts = render_sample(sample, find_template(template))
    if not all(any(segment.train and segment.text for segment in part) for part in parts):
        raise DataError(f"nothing is supervised under template {template!r}", record=f"sample {sample.id!r}")
    segments = [segment for part in parts for segment in part]
    return sum(len(one.text) for one in segments), sum(len(one.text) for one in segments if one.train)
