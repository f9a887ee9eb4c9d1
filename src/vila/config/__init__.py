"""Recipes: a frozen, typed tree that states a whole training run."""

from vila.config.load import load_recipe, recipe_names
from vila.config.schema import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_names"]
