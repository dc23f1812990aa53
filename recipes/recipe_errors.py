"""What is wrong with a recipe or a command line, in words that name the key, where OmegaConf speaks of its classes."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException


def misfit(config: Any, layer: Any, above: str = "") -> str:
    """Where ``layer`` has keys below a list of ``config``, which merging has no words for; empty where nowhere."""
    for name in layer if isinstance(layer, DictConfig) and isinstance(config, DictConfig) else ():
        value, wanted = (item._get_node(name) if name in item else None for item in (layer, config))
        if isinstance(wanted, ListConfig) and isinstance(value, DictConfig):
            return f"{above}{name!s} is a list, whose items are given together: {above}{name!s}=[...]"
        if found := misfit(wanted, value, f"{above}{name!s}."):
            return found
    return ""


def refused(config: Any, layer: Any, error: OmegaConfBaseException) -> str:
    """Why ``layer`` could not be merged into ``config``."""
    if given := _colon_for_space(layer):
        return f"{given!r}: in braces, write a space after each colon, as in {{key: value}}"
    if isinstance(error, ConfigKeyError):
        return f"unknown key {full_key(error)!r}; {_nearest(config, error)}"
    for key, value in _leaves(layer):
        try:
            wanted = OmegaConf.select(config, key)
            node = OmegaConf.select(config, key.rpartition(".")[0])
        except OmegaConfBaseException:
            continue
        if isinstance(wanted, ListConfig) and not OmegaConf.is_list(value):
            return f"{key} is a list: write {key}=[{value}]"
        if isinstance(wanted, DictConfig) and not OmegaConf.is_dict(value):
            below = f"one of {', '.join(f'{key}.{name!s}' for name in wanted)}" if len(wanted) else f"{key}.NAME"
            return f"{key} is no single value: give {below}"
        if wanted is None and isinstance(node, DictConfig) and get_origin(node._metadata.element_type) is dict:
            return f"{key} is no single value: give {key}.NAME"
    return f"{full_key(error)}: {str(error).splitlines()[0]}"


def unread(arguments: list[str]) -> str:
    """Which word YAML does not understand, and what is wrong with it in short."""
    for word in arguments:
        try:
            OmegaConf.from_dotlist([f"{word}''" if word.endswith("=") else word])
        except OmegaConfBaseException:
            continue
        except Exception as error:  # PyYAML's, which have no public base that OmegaConf re-exports
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            return f"{word!r} cannot be read: {problem}; do brackets and quotes close, and do spaces follow colons?"
    return ""


def placed(config: Any, error: Exception) -> str:
    """What a dataclass says of its values, with the whole key: ``masked.decoder.width``, and not ``decoder.width``."""
    text = " ".join(str(error).split())
    *above, own = _place(config) or [""]
    if not own:
        return text
    inside = text.startswith(f"{own}.") or text.startswith(f"{own}:")
    return ".".join([*above, text]) if inside else f"{'.'.join([*above, own])}: {text}"


def _place(config: Any) -> list[str]:
    """The parts of the key of the innermost configuration that its dataclass refuses."""
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            try:
                OmegaConf.to_object(node)
            except (ValueError, TypeError):
                return [str(name), *_place(node)]
    return []


def full_key(error: OmegaConfBaseException) -> str:
    """The dotted key that an error is about."""
    return str(getattr(error, "full_key", "") or getattr(error, "key", ""))


def _nearest(config: Any, error: OmegaConfBaseException) -> str:
    """The valid keys beside an unknown one, the likeliest first."""
    *parents, key = full_key(error).split(".")
    if not parents and is_dataclass(error.object_type) and error.object_type is not OmegaConf.get_type(config):
        return f"valid keys there: {', '.join(item.name for item in fields(error.object_type))}"  # of an item of a list
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    valid = [str(name) for name in node] if isinstance(node, DictConfig) else []
    elsewhere = [path for path, _ in _leaves(config) if path.rpartition(".")[2] == key]
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if elsewhere and (not near or difflib.SequenceMatcher(None, key, near[0]).ratio() < 0.8):
        return f"did you mean {min(elsewhere, key=len)!r}?"
    if near:
        return f"did you mean {'.'.join([*parents, near[0]])!r}?"
    return f"valid keys here: {', '.join(valid)}"


def _leaves(layer: Any, above: str = "") -> list[tuple[str, Any]]:
    """Dotted keys of a mapping and what is not a mapping there."""
    if not isinstance(layer, DictConfig):
        return []
    found: list[tuple[str, Any]] = []
    for name in layer:
        key, value = f"{above}{name!s}", layer._get_node(name)
        if isinstance(value, DictConfig):
            found += _leaves(value, f"{key}.")
        else:
            found.append((key, value if isinstance(value, ListConfig) else layer[name]))
    return found


def _colon_for_space(layer: Any) -> str:
    """A key such as ``masked:1``, which YAML reads where a space is missing; empty where there is none."""
    for key, value in _leaves(layer):
        name = key.rpartition(".")[2]
        if ":" in name and value is None:
            return name
    return ""
