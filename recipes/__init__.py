"""Resolve a recipe, a YAML file, and ``key=value`` overrides into a checked configuration."""

from bocage.recipes.loader import list_recipes, recipes_for, resolve, restored, to_yaml

__all__ = ["list_recipes", "recipes_for", "resolve", "restored", "to_yaml"]
