"""Recipes: frozen, typed settings of a training run, read from YAML."""

from vila.config.load import load_recipe, recipe_names
from vila.config.schema import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_names"]
