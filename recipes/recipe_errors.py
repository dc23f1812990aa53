"""Explain errors in a recipe or on the command line by key and value.

OmegaConf and PyYAML name their own classes and the last part of a key; users need the whole key and a suggestion.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException


def explain_container_mismatch(config: Any, layer: Any, prefix: str = "") -> str:
    """Explain a mapping where ``config`` has a list, or the reverse, as OmegaConf does not; empty if there is none."""
    for name in layer if isinstance(layer, DictConfig) and isinstance(config, DictConfig) else ():
        value, current = layer._get_node(name), _expected_node(config, name)
        if isinstance(current, ListConfig) and isinstance(value, DictConfig):
            return f"{prefix}{name!s} is a list: set all its items at once, as {prefix}{name!s}=[...]"
        if isinstance(current, DictConfig) and isinstance(value, ListConfig):
            return f"{prefix}{name!s} is a mapping, not a list: write it as {{KEY: VALUE, ...}}"
        if message := explain_container_mismatch(current, value, f"{prefix}{name!s}."):
            return message
    return ""


def explain_merge_error(config: Any, layer: Any, error: OmegaConfBaseException) -> str:
    """Explain why ``layer`` could not be merged into ``config``."""
    if key := _key_without_space(layer):
        return f"{key!r}: in braces, write a space after each colon, as in {{key: value}}"
    if isinstance(error, ConfigKeyError):
        return f"unknown key {full_key(error)!r}; {_suggest_keys(config, error)}"
    for key, value in _leaves(layer):
        parent, current = None, config
        for name in key.split("."):
            parent, current = current, _expected_node(current, name)
        if isinstance(current, ListConfig) and not OmegaConf.is_list(value):
            return f"{key} is a list: write {key}=[{value}]"
        if isinstance(current, DictConfig) and not OmegaConf.is_dict(value):
            subkeys = f"one of {', '.join(f'{key}.{name!s}' for name in current)}" if len(current) else f"{key}.NAME"
            return f"{key} is a mapping, not a single value: set {subkeys}"
        if current is None and isinstance(parent, DictConfig) and get_origin(parent._metadata.element_type) is dict:
            return f"{key} is a mapping, not a single value: set {key}.NAME"
    return f"{full_key(error)}: {str(error).splitlines()[0]}"


def explain_parse_error(arguments: list[str]) -> str:
    """Name the first argument that YAML cannot parse, and why; empty if all can be parsed."""
    for argument in arguments:
        try:
            OmegaConf.from_dotlist([f"{argument}''" if argument.endswith("=") else argument])
        except OmegaConfBaseException:
            continue
        except Exception as error:  # PyYAML's errors have no common public base that OmegaConf re-exports
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            return (
                f"{argument!r} cannot be parsed: {problem}; close brackets and quotes, and write a space after each "
                "colon"
            )
    return ""


def explain_value_error(config: Any, error: Exception) -> str:
    """Prefix the message of a dataclass with the whole key: ``masked.decoder.width`` instead of ``decoder.width``."""
    message = " ".join(str(error).split())
    *parents, name = _invalid_key_path(config) or [""]
    if not name:
        return message
    names_key = message.startswith(f"{name}.") or message.startswith(f"{name}:")
    return ".".join([*parents, message]) if names_key else f"{'.'.join([*parents, name])}: {message}"


def _expected_node(config: Any, name: Any) -> Any:
    """Value of a key, or for a new item of a mapping the structure that it must have; None if there is neither."""
    if not isinstance(config, DictConfig):
        return None
    if name in config:
        return config._get_node(name)
    item = config._metadata.element_type
    return OmegaConf.structured(item) if is_dataclass(item) else None


def _invalid_key_path(config: Any) -> list[str]:
    """Key, in parts, of the innermost configuration that its dataclass rejects; empty if none."""
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            try:
                OmegaConf.to_object(node)
            except (ValueError, TypeError):
                return [str(name), *_invalid_key_path(node)]
    return []


def full_key(error: OmegaConfBaseException) -> str:
    """Dotted key that an error is about."""
    return str(getattr(error, "full_key", "") or getattr(error, "key", ""))


def _suggest_keys(config: Any, error: OmegaConfBaseException) -> str:
    """Suggest the nearest valid key for an unknown one, or list the valid keys."""
    *parents, key = full_key(error).split(".")
    if not parents and is_dataclass(error.object_type) and error.object_type is not OmegaConf.get_type(config):
        # The unknown key is in an item of a list.
        return f"valid keys there: {', '.join(item.name for item in fields(error.object_type))}"
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    valid = [str(name) for name in node] if isinstance(node, DictConfig) else []
    if not valid and is_dataclass(error.object_type):  # the unknown key is in a new item of a mapping
        valid = [item.name for item in fields(error.object_type)]
    elsewhere = [path for path, _ in _leaves(config) if path.rpartition(".")[2] == key]
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if elsewhere and (not near or difflib.SequenceMatcher(None, key, near[0]).ratio() < 0.8):
        return f"did you mean {min(elsewhere, key=len)!r}?"
    if near:
        return f"did you mean {'.'.join([*parents, near[0]])!r}?"
    return f"valid keys here: {', '.join(valid)}"


def _leaves(layer: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of all entries that are not mappings themselves."""
    if not isinstance(layer, DictConfig):
        return []
    leaves: list[tuple[str, Any]] = []
    for name in layer:
        key, value = f"{prefix}{name!s}", layer._get_node(name)
        if isinstance(value, DictConfig):
            leaves += _leaves(value, f"{key}.")
        else:
            leaves.append((key, value if isinstance(value, ListConfig) else layer[name]))
    return leaves


def _key_without_space(layer: Any) -> str:
    """Find a key such as ``masked:0.1``, the result of a missing space after the colon; empty if there is none."""
    for key, value in _leaves(layer):
        before, colon, _ = key.partition(":")
        if colon and value is None:
            return key[before.rfind(".") + 1 :]
    return ""
