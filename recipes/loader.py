"""Resolve recipes (YAML files) and command-line overrides into typed, checked configurations.

A configuration is a dataclass. Its values come from four layers, each overriding the one before: the defaults of the
dataclass, the ``base`` of the recipe, the recipe, and the ``key=value`` arguments. A ``base`` is the name of a recipe
that comes with bocage, or the path of a YAML file relative to the recipe that names it. It may also be a list of these,
where later ones override earlier ones. A recipe that several bases share is applied once, before all of them. All
values are checked before any work starts.
"""

from __future__ import annotations

import difflib
import os.path
from dataclasses import is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from bocage.recipes.recipe_errors import (
    explain_container_mismatch,
    explain_merge_error,
    explain_parse_error,
    explain_value_error,
    full_key,
)
from bocage.shards.errors import InputError
from bocage.shards.source.described.description import DatasetDescription

Config = TypeVar("Config")

DATASET_KEY = "dataset="
"""Start of the argument that names the description of a dataset."""

_MAX_BASES = 8
_FILE_EXTENSIONS = (".yaml", ".yml")
# Folders of recipes and the prefixes of their names. Recipes of official/ are named after the rows of IGN's tables.
_FOLDERS = {"pretrain": "", "finetune": "", "study": "", "official": "official/"}


def list_recipes() -> list[str]:
    """Names of the recipes that come with bocage, sorted."""
    return sorted(_packaged_recipes())


def _packaged_recipes() -> dict[str, Traversable]:
    """Files of the recipes that come with bocage, by name."""
    return {
        prefix + file.name.removesuffix(".yaml"): file
        for folder, prefix in _FOLDERS.items()
        for file in (resources.files("bocage.recipes") / folder).iterdir()
        if file.name.endswith(".yaml")
    }


def recipes_for(schema: type) -> list[str]:
    """Names of the recipes whose configuration is ``schema``, without those of official/."""
    return [name for name in list_recipes() if "/" not in name and _matches_schema(schema, name)]


def _format_recipe_list() -> str:
    """Recipe names for a message; folders such as ``official/*`` are abbreviated."""
    names = list_recipes()
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    top_level = [name for name in names if "/" not in name]
    return ", ".join([*top_level, *(f"{folder}/*" for folder in folders)])


def _read_recipe(name: str) -> DictConfig:
    """Read one recipe, given by the name of a packaged recipe or by the path of a YAML file."""
    if name.endswith(_FILE_EXTENSIONS):
        text = _read_text(f"recipe={name}", Path(name))
    else:
        packaged = _packaged_recipes()
        if name not in packaged:
            near = difflib.get_close_matches(name, packaged, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"recipes: {_format_recipe_list()}"
            raise InputError(f"recipe={name}: no such recipe; {hint}")
        text = packaged[name].read_text(encoding="utf-8")
    return _parse_mapping(f"recipe={name}", text)


def _read_text(argument: str, path: Path) -> str:
    """Read the file of an argument such as ``recipe=FILE``."""
    if not path.is_file():
        raise InputError(f"{argument}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{argument}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"{argument}: cannot be read: {error.strerror}") from error


def _parse_mapping(argument: str, text: str) -> DictConfig:
    """Parse the YAML text of an argument such as ``recipe=FILE``."""
    try:
        config = OmegaConf.create(text)
    except Exception as error:  # PyYAML's errors have no common public base that OmegaConf re-exports
        raise InputError(f"{argument}: not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(config, ListConfig):
        raise InputError(f"{argument}: it is a mapping of keys to values, not a list")
    return config


def _load_with_bases(name: str) -> dict[str, DictConfig]:
    """Load a recipe and all its bases by name, without the key ``base``. Each appears once, after its own bases."""
    layers: dict[str, DictConfig] = {}

    def add(current: str, ancestors: tuple[str, ...]) -> None:
        if current.endswith(_FILE_EXTENSIONS):
            current = os.path.normpath(current)  # one name per file
        if current in ancestors or len(ancestors) == _MAX_BASES:
            raise InputError(
                f"recipe={name}: the `base` recipes form a cycle or nest over {_MAX_BASES} levels deep, at {current!r}"
            )
        if current not in layers:
            config = _read_recipe(current)
            for base in _pop_bases(current, config):
                add(base, (*ancestors, current))
            layers[current] = config

    add(name, ())
    return layers


def _pop_bases(name: str, config: DictConfig) -> list[str]:
    """Remove the key ``base`` from a recipe and return the bases. A path is relative to the recipe that names it."""
    try:
        bases = config.pop("base", None)
        if OmegaConf.is_list(bases):
            bases = OmegaConf.to_container(bases, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"recipe={name}: base: {str(error).splitlines()[0]}") from error
    names = []
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        if not isinstance(base, str):
            raise InputError(f"recipe={name}: base: {base!r} is not the name of a recipe or the path of a YAML file")
        if base.endswith(_FILE_EXTENSIONS) and name.endswith(_FILE_EXTENSIONS):
            base = str(Path(name).parent / base)
        names.append(base)
    return names


def _merge(config: Any, layer: Any, source: str) -> Any:
    if message := explain_container_mismatch(config, layer):
        raise InputError(f"{source}: {message}")
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        raise InputError(f"{source}: {explain_merge_error(config, layer, error)}") from error


def _matches_schema(schema: type, name: str) -> bool:
    """Whether all keys of a packaged recipe are fields of ``schema``."""
    known = OmegaConf.structured(schema)
    return all(key in known for layer in _load_with_bases(name).values() for key in layer)


def _remove_entry(config: Any, key: str) -> None:
    """Remove an entry of a mapping. Fields of a dataclass cannot be removed."""
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(config, parent) if parent else config
    except OmegaConfBaseException:
        node = None
    if not isinstance(node, DictConfig) or name not in node:
        raise InputError(f"command line: ~{key}: there is no entry {key} to remove")
    if OmegaConf.get_type(node) is not dict:
        raise InputError(f"command line: ~{key}: {key} cannot be removed: set another value as {key}=VALUE")
    with read_write(node), open_dict(node):
        del node[name]


def resolve(schema: type[Config], arguments: list[str]) -> Config:
    """Build the configuration of ``recipe=NAME key=value ...``.

    Args:
        schema: dataclass of the configuration; its field ``recipe`` receives the name of the recipe.
        arguments: command-line arguments. ``recipe=NAME`` is required, ``key=value`` overrides a value, ``key=`` sets
            the empty string, and ``~key`` removes an entry of a mapping of the recipe, e.g.
            ``~initializations.imagenet``.

    Raises:
        InputError: the recipe is missing or unknown, a key is unknown (the message suggests the nearest valid one), or
            a value has the wrong type or is rejected by its dataclass.
    """
    if not is_dataclass(schema):
        raise TypeError(f"{schema} is not a dataclass")
    removed = [argument[1:] for argument in arguments if argument.startswith("~")]
    arguments = [argument for argument in arguments if not argument.startswith("~")]
    for argument in arguments:
        if "=" not in argument:
            raise InputError(f"argument {argument!r} is not of the form key=value")
    names = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("recipe=")]
    if len(names) != 1:
        raise InputError(f"give one recipe as recipe=NAME; recipes of this command: {', '.join(recipes_for(schema))}")
    config: Any = OmegaConf.structured(schema)
    recipe = names[0]
    for name, layer in _load_with_bases(recipe).items():
        if not name.endswith(_FILE_EXTENSIONS) and (unknown := [key for key in layer if key not in config]):
            others = ", ".join(recipes_for(schema))
            base = f" through its base {name}" if name != recipe else ""
            raise InputError(
                f"recipe={recipe} belongs to another command: it sets {unknown[0]!s}{base}, a key that this command "
                f"lacks; recipes of this command: {others or 'none that come with bocage'}"
            )
        config = _merge(config, layer, f"recipe {name}")
    for key in removed:
        _remove_entry(config, key)
    config = _merge(config, _parse_arguments(arguments), "command line")
    return cast(Config, _to_object(config, f"recipe {recipe}", has_arguments=len(arguments) > 1))


def load_dataset(path: str, arguments: list[str]) -> DatasetDescription:
    """Read the description of a dataset that is not FLAIR-HUB.

    Args:
        path: YAML file with the keys of ``DatasetDescription``.
        arguments: command-line arguments ``key=value`` that override values, such as ``patch=51.2``.

    Raises:
        InputError: the file cannot be read, a key is unknown, or a value is wrong.
    """
    return parse_dataset(_read_text(f"dataset={path}", Path(path)), arguments, path)


def parse_dataset_argument(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Part ``dataset=FILE`` from the ``key=value`` arguments that override values of this file.

    Returns:
        file: path of the description; None without arguments.
        settings: the other arguments.

    Raises:
        InputError: ``dataset=`` is given twice, or missing although there are other arguments.
    """
    files = [argument for argument in arguments if argument.startswith(DATASET_KEY)]
    if len(files) > 1:
        raise InputError(f"{' '.join(files)}: give one description")
    if arguments and not files:
        raise InputError(f"{arguments[0]}: only a description has keys to override; name it as dataset=FILE")
    settings = [argument for argument in arguments if argument not in files]
    return (files[0].removeprefix(DATASET_KEY) if files else None), settings


def parse_dataset(text: str, arguments: list[str], source: str) -> DatasetDescription:
    """Parse the description of a dataset.

    Args:
        text: YAML text.
        arguments: command-line arguments that override values, see ``load_dataset``.
        source: file or draft that the text comes from, for messages.

    Raises:
        InputError: the text is not YAML, a key is unknown, or a value is wrong.
    """
    layer = _parse_mapping(f"dataset={source}", text)
    config = _merge(OmegaConf.structured(DatasetDescription), layer, f"dataset {source}")
    config = _merge(config, _parse_arguments(arguments), "command line")
    return cast(DatasetDescription, _to_object(config, f"dataset {source}", has_arguments=bool(arguments)))


def _parse_arguments(arguments: list[str]) -> DictConfig:
    """Parse arguments ``key=value``; ``key=`` sets the empty string, as in a shell, not null."""
    try:
        return OmegaConf.from_dotlist(
            [f"{argument}''" if argument.endswith("=") else argument for argument in arguments]
        )
    except Exception as error:  # OmegaConf's, or PyYAML's
        raise InputError(f"command line: {explain_parse_error(arguments) or ' '.join(str(error).split())}") from error


def _to_object(config: Any, source: str, *, has_arguments: bool) -> Any:
    """Build the dataclass, which checks the values; ``source`` names where they come from."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise InputError(f"{source}: {full_key(error)}: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError) as error:
        source = f"{source} and command line" if has_arguments else source
        raise InputError(f"{source}: {explain_value_error(config, error)}") from error


def config_from_dict(schema: type[Config], values: dict[str, Any], source: str) -> Config:
    """Build a configuration from the nested dict of ``dataclasses.asdict``, e.g. one stored as JSON.

    Args:
        schema: dataclass of the configuration.
        values: values by key.
        source: file that the values come from, for messages.

    Raises:
        InputError: keys or values do not match the dataclass, e.g. because another version of bocage wrote them.
    """
    config = _merge(OmegaConf.structured(schema), values, source)
    try:
        return cast(Config, OmegaConf.to_object(config))
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}") from error


def to_yaml(config: Any) -> str:
    """Format a configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
