"""Recipes: YAML files, one for each run, and how one becomes a typed, checked configuration.

A configuration is a dataclass. Its values come from the defaults of the dataclass, then the recipe's ``base`` recipe,
then the recipe, then ``key=value`` arguments, each overriding the one before. A ``base`` is the name of a recipe that
comes with bocage, or the path of a YAML file, relative to the folder of the recipe that names it; or a list of these,
of which the later override the earlier. A recipe on which several of them build counts once, as the first. Everything
is checked here, before any work starts.
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

from bocage.recipes.recipe_errors import full_key, misfit, placed, refused, unread
from bocage.shards.errors import InputError

Config = TypeVar("Config")

_MAX_BASES = 8
_FILE_ENDINGS = (".yaml", ".yml")
# Folders of recipes, and what their names start with: official/ has a namesake of each row of IGN's tables.
_FOLDERS = {"pretrain": "", "finetune": "", "study": "", "official": "official/"}


def list_recipes() -> list[str]:
    """Names of the recipes that come with bocage, sorted."""
    return sorted(_packaged_recipes())


def _packaged_recipes() -> dict[str, Traversable]:
    """The file of each recipe that comes with bocage, by name."""
    return {
        prefix + file.name.removesuffix(".yaml"): file
        for folder, prefix in _FOLDERS.items()
        for file in (resources.files("bocage.recipes") / folder).iterdir()
        if file.name.endswith(".yaml")
    }


def recipes_for(schema: type) -> list[str]:
    """Names of the recipes of one command, whose configuration is ``schema``, without the official ones."""
    return [name for name in list_recipes() if "/" not in name and _fits(schema, name)]


def _listed() -> str:
    """Names for a message; what a folder holds is told by one of them."""
    every = list_recipes()
    folders = sorted({name.partition("/")[0] for name in every if "/" in name})
    shown = [name for name in every if "/" not in name]
    return ", ".join([*shown, *(f"{folder}/*" for folder in folders)])


def _read(name: str) -> DictConfig:
    """One recipe: a name that comes with bocage, or the path of a YAML file."""
    if name.endswith(_FILE_ENDINGS):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"recipe={name}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"recipe={name}: not a text in UTF-8: {error}") from error
        except OSError as error:
            raise InputError(f"recipe={name}: cannot be read: {error.strerror}") from error
    else:
        packaged = _packaged_recipes()
        if name not in packaged:
            near = difflib.get_close_matches(name, packaged, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"recipes: {_listed()}"
            raise InputError(f"recipe={name}: no such recipe; {hint}")
        text = packaged[name].read_text(encoding="utf-8")
    try:
        config = OmegaConf.create(text)
    except Exception as error:  # PyYAML's errors have no common public base that OmegaConf re-exports
        raise InputError(f"recipe={name}: not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(config, ListConfig):
        raise InputError(f"recipe={name}: a recipe is a mapping of keys to values, not a list")
    return config


def _layers(name: str) -> dict[str, DictConfig]:
    """The recipe and all its bases by name, each once and after its own bases, without the key ``base``."""
    found: dict[str, DictConfig] = {}

    def add(current: str, above: tuple[str, ...]) -> None:
        if current.endswith(_FILE_ENDINGS):
            current = os.path.normpath(current)  # one file, however it is spelt
        if current in above or len(above) == _MAX_BASES:
            raise InputError(f"recipe={name}: its `base` recipes form a circle at {current!r}")
        if current not in found:
            config = _read(current)
            for base in _bases(current, config):
                add(base, (*above, current))
            found[current] = config

    add(name, ())
    return found


def _bases(name: str, config: DictConfig) -> list[str]:
    """Takes the key ``base`` out of a recipe; a file is looked for beside the recipe that names it."""
    try:
        given = config.pop("base", None)
        bases = given
        if OmegaConf.is_list(given):
            bases = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"recipe={name}: base: {str(error).splitlines()[0]}") from error
    found = []
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        if not isinstance(base, str):
            raise InputError(f"recipe={name}: base: {base!r} is not the name of a recipe or the path of a YAML file")
        if base.endswith(_FILE_ENDINGS) and name.endswith(_FILE_ENDINGS):
            base = str(Path(name).parent / base)
        found.append(base)
    return found


def _merge(config: Any, layer: Any, source: str) -> Any:
    if wrong := misfit(config, layer):
        raise InputError(f"{source}: {wrong}")
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        raise InputError(f"{source}: {refused(config, layer, error)}") from error


def _fits(schema: type, name: str) -> bool:
    """Whether a recipe that comes with bocage is one of a schema."""
    known = OmegaConf.structured(schema)
    return all(key in known for layer in _layers(name).values() for key in layer)


def _remove(config: Any, key: str) -> None:
    """Take an entry out of a mapping; what a dataclass names cannot be absent."""
    above, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(config, above) if above else config
    except OmegaConfBaseException:
        node = None
    if not isinstance(node, DictConfig) or name not in node:
        raise InputError(f"command line: ~{key}: there is no {key} to take away")
    if OmegaConf.get_type(node) is not dict:
        raise InputError(f"command line: ~{key}: {key} has a value always: give another one, as {key}=VALUE")
    with read_write(node), open_dict(node):
        del node[name]


def resolve(schema: type[Config], arguments: list[str]) -> Config:
    """The configuration that ``recipe=NAME key=value ...`` asks for.

    Args:
        schema: the dataclass of the configuration; its field ``recipe`` receives the recipe's name.
        arguments: words of the command line. ``recipe=`` is required; ``key=`` alone is the empty text; ``~key`` takes
            an entry of a mapping, as ``~starts.imagenet``, out of what recipes give.

    Raises:
        InputError: no or unknown recipe, unknown key (named with the nearest valid one), value of the wrong type, or
            a value that a dataclass refuses.
    """
    if not is_dataclass(schema):
        raise TypeError(f"{schema} is not a dataclass")
    removed = [word[1:] for word in arguments if word.startswith("~")]
    arguments = [word for word in arguments if not word.startswith("~")]
    for word in arguments:
        if "=" not in word:
            raise InputError(f"argument {word!r} is not of the form key=value")
    chosen = [word.split("=", 1)[1] for word in arguments if word.startswith("recipe=")]
    if len(chosen) != 1:
        raise InputError(f"give one recipe as recipe=NAME; recipes: {_listed()}")
    config: Any = OmegaConf.structured(schema)
    for name, layer in _layers(chosen[0]).items():
        if not name.endswith(_FILE_ENDINGS) and (alien := [key for key in layer if key not in config]):
            others = ", ".join(recipes_for(schema))
            raise InputError(
                f"recipe={chosen[0]} is of another command: this one has no {alien[0]!s}, which {name} gives; recipes "
                f"here: {others or 'none that comes with bocage'}"
            )
        config = _merge(config, layer, f"recipe {name}")
    for key in removed:
        _remove(config, key)
    try:
        # Nothing after the sign is an empty text, as in a shell, and not null.
        overrides = OmegaConf.from_dotlist([f"{word}''" if word.endswith("=") else word for word in arguments])
    except Exception as error:  # OmegaConf's, or PyYAML's
        raise InputError(f"command line: {unread(arguments) or ' '.join(str(error).split())}") from error
    config = _merge(config, overrides, "command line")
    try:
        return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise InputError(f"recipe {chosen[0]}: {full_key(error)}: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError) as error:
        given = " and what the command line changes" if len(arguments) > 1 else ""
        raise InputError(f"recipe {chosen[0]}{given}: {placed(config, error)}") from error


def restored(schema: type[Config], values: dict[str, Any], source: str) -> Config:
    """The configuration that ``dataclasses.asdict`` gave, read back from JSON.

    Args:
        schema: its dataclass.
        values: by key.
        source: the file they are from, for messages.

    Raises:
        InputError: keys or values that do not fit, e.g. of another version.
    """
    config = _merge(OmegaConf.structured(schema), values, source)
    try:
        return cast(Config, OmegaConf.to_object(config))
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}") from error


def to_yaml(config: Any) -> str:
    """A resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
