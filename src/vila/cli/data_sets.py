"""What a `vila data` command was pointed at: the mixture of a recipe or one file, and what reads its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import ConfigError
from vila.core.events import SILENT, Events

if TYPE_CHECKING:
    from vila.chat.tokenize import TokenizedSample
    from vila.config.schema import Recipe
    from vila.core.types import Sample
    from vila.data.loader import SampleReader
    from vila.data.mixture import Mixture, Part

TEMPLATE = "vicuna_v1"
"""Template where nothing names one."""


@dataclass(frozen=True)
class DataSets:
    """The data sets and how their samples are read.

    paths:      where each of them lies.
    reader:     None without a model: samples are then measured in characters.
    max_length: tokens that a row of the recipe holds; 0 where nothing says, or where longer samples are allowed.
    tokenizer:  the model's, of transformers; None without a model.
    """

    mixture: Mixture
    paths: tuple[Path, ...]
    template: str
    reader: SampleReader | None
    max_length: int
    tokenizer: Any = None

    @property
    def unit(self) -> str:
        """What lengths are counted in."""
        return "tokens" if self.reader else "characters"

    @property
    def slots_per_image(self) -> int:
        """Tokens that a picture takes. Raises ConfigError without a model."""
        return self._reader_or_raise().spec.tokens_per_image

    def measure(self, part: Part, sample: Sample) -> tuple[int, int]:
        """Length of a sample and how much of it is supervised, in `unit`.

        Raises VilaError when the sample does not fit its template, or supervises nothing.
        """
        if self.reader:
            from vila.chat.tokenize import IGNORE

            tokens = self.reader.tokenise(part, sample)
            return len(tokens), int((tokens.labels != IGNORE).sum())
        return _characters(sample, sample.template or part.template or self.template)

    @property
    def tokenise(self) -> Callable[[Part, Sample], TokenizedSample]:
        """Samples as tokens. Raises ConfigError without a model."""
        return self._reader_or_raise().tokenise

    def _reader_or_raise(self) -> SampleReader:
        if self.reader is None:
            raise ConfigError("no model to take the tokenizer from; name one with --model")
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
    """The data sets of a recipe, or of one file, directory or pattern.

    options: of the format, as `parse_options` reads them.
    model:   "" takes the recipe's where it lies on this machine.
    events:  told how files are indexed.
    """
    from vila.config.load import load_recipe, recipe_names
    from vila.data.loader import Entry, open_mixture
    from vila.train.rows import build_mixture

    recipe: Recipe | None = None
    if what.endswith((".yaml", ".yml")) or (what in recipe_names() and not Path(what).exists()):
        if form or image_root or options:
            raise ConfigError(
                f"{what} is a recipe, which says its formats itself; leave out --format, --image-root and --option"
            )
        recipe = load_recipe(what)
        mixture = build_mixture(recipe, events)
        here = recipe.model.path
        model = model or (here if here and Path(here).is_dir() else "")
        template = template or recipe.data.template or recipe.model.template
    else:
        chosen = form or "messages"
        entry = Entry(format=chosen, path=what, image_root=image_root, options=parse_options(options))
        mixture = open_mixture([entry], 0, events)
    if model:
        reader, tokenizer = _reader(mixture, template, model)
        template = reader.template
    else:
        reader, tokenizer = None, None
    limit = recipe.data.max_length if recipe and recipe.data.overlong == "error" else 0
    paths = tuple(Path(entry.path) for entry in recipe.data.mixture) if recipe else (Path(what),)
    return DataSets(mixture, paths, template or TEMPLATE, reader, limit, tokenizer)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`max_images=4` and the like, values as YAML reads them. Raises ConfigError for a word without a name."""
    import yaml

    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"--option {word!r}: expected NAME=VALUE, such as max_images=4")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--option {word!r}: {value!r} is no value ({error})") from error
    return options


def _reader(mixture: Mixture, template: str, model: str) -> tuple[SampleReader, Any]:
    from vila.data.loader import SampleReader
    from vila.model.load import open_checkpoint

    processor = open_checkpoint(model, template=template or None).processor
    chosen = template or processor.find_template().name
    return SampleReader(mixture, chosen, processor.span_tokenizer, processor.spec), processor.tokenizer


def _characters(sample: Sample, template: str) -> tuple[int, int]:
    from vila.chat.render import render_sample
    from vila.chat.templates import find_template
    from vila.core.errors import DataError

    parts = render_sample(sample, find_template(template))
    if not all(any(segment.train and segment.text for segment in part) for part in parts):
        raise DataError(f"nothing is supervised under template {template!r}", record=f"sample {sample.id!r}")
    segments = [segment for part in parts for segment in part]
    return sum(len(one.text) for one in segments), sum(len(one.text) for one in segments if one.train)
