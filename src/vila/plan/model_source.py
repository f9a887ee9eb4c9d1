"""The configs that a recipe's model will have, told without a weight: from disk, or from a table of known models."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vila.config.load import load_recipe, recipe_names
from vila.config.schema import ModelSource
from vila.core.errors import ConfigError, near_names
from vila.model.config import VilaConfig
from vila.model.layouts.config_file import read_config, text_config
from vila.model.layouts.towers import read_tower
from vila.model.load import open_checkpoint


def config_of(source: ModelSource) -> VilaConfig:
    """The config of the model that a stage trains.

    A `path` that is not there yet is looked for among the outputs of the packaged recipes, whose own source then tells.
    Raises ConfigError naming what could not be found, and the remedy.
    """
    if source.path:
        folder = Path(source.path).expanduser()
        if folder.exists():
            config = open_checkpoint(folder).config
            assert isinstance(config, VilaConfig)
            return config
        return config_of(_source_of_output(source.path))
    vision = _part("vision", source.vision)
    return VilaConfig(
        vision_config=vision,
        text_config=_part("llm", source.llm),
        projector_type=source.projector,
        select_layer=source.select_layer,
        select_feature=source.select_feature,
        template=source.template,
    )


def known_models(kind: str) -> list[str]:
    """Hub ids whose configs are packaged; `kind` is `llm` or `vision`."""
    return sorted(_table()[kind])


def _source_of_output(path: str) -> ModelSource:
    if source := _packaged_outputs().get(Path(path)):
        return source
    raise ConfigError(
        f"model.path={path!r}: no such directory, and no packaged recipe writes it; to plan before it is there, say "
        "what it will be made of: model.path= model.llm=... model.vision=..."
    )


@cache
def _packaged_outputs() -> dict[Path, ModelSource]:
    """Where the packaged recipes leave their models, and what those are made from."""
    return {recipe.output.dir / "model": recipe.model for recipe in map(load_recipe, recipe_names())}


def _part(kind: str, name: str) -> PretrainedConfig:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        if kind == "vision":
            return read_tower(folder).config
        llm = read_config(folder)
        return text_config(llm, llm.text("model_type"))
    facts = _table()[kind].get(name)
    if facts is None:
        near = near_names(name, known_models(kind), 1)
        hint = f"did you mean {near[0]!r}? Else " if near else ""
        raise ConfigError(
            f"model.{kind}={name!r}: no directory with a config.json, and not one of the models whose numbers are "
            f"packaged ({', '.join(known_models(kind))})",
            hint=f"{hint}give a directory that holds at least its config.json",
        )
    plain = dict(facts)
    return AutoConfig.for_model(plain.pop("model_type"), **plain)


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    text = (resources.files("vila.plan") / "known_models.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return table
