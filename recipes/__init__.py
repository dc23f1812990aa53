"""Load recipes (YAML files) and ``key=value`` overrides as checked configurations."""

from bocage.recipes.loader import config_from_dict, list_recipes, recipes_for, resolve, to_yaml

__all__ = ["config_from_dict", "list_recipes", "recipes_for", "resolve", "to_yaml"]
