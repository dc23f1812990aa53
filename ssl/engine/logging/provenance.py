"""What a run was: its configuration without secrets, the versions and the commit it ran on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

CHANGEABLE_KEYS = (
    "output",
    "workers",
    "*.workers",
    "engine.steps",
    "engine.resume",
    "engine.resume_allow",
    "engine.activation_checkpointing",
    "engine.parallel",
    "engine.checkpoint",
    "engine.save_every",
    "engine.save_minutes",
    "engine.keep",
    "engine.milestone_every",
    "engine.log_every",
    "engine.evaluate_every",
    "engine.max_bad_steps",
    "engine.dump_bad_steps",
    "engine.least_feature_std",
    "engine.least_rankme",
    "engine.profile_steps",
    "engine.rank_timeout",
    "engine.tracker",
    "engine.project",
)
"""Keys of the resolved configuration that a resumed run may change; any other change is refused.

A new ``engine.steps`` stretches or shortens the cosine from the resumed step on.
"""

_CODE = (".py", ".yaml", ".jinja", ".toml")
_LIBRARIES = ("bocage", "torch", "accelerate", "timm", "numpy", "safetensors")
_REDACTED = "<redacted>"
_WORDS = r"(?:(?<!mask_)(?<!cls_)token|secret|password|passwd|credentials?|signature|api[-_]?key|access[-_]?key)"
_SECRET_NAME = re.compile(rf"(?:^|[_.-]){_WORDS}(?:$|_)", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(rf"((?:^|[\s_.-]){_WORDS}\w*=)\S+", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY_OF_URL = re.compile(r"(://[^\s?#]*\?)\S+")  # signed addresses hold the right to read there
_SHORTEST_SECRET = 8


def library_versions() -> dict[str, str]:
    """Versions of bocage and of the libraries that decide a run's numbers."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def git_revision() -> str | None:
    """Commit of the working tree this file is tracked in; None outside one.

    With ``-dirty`` where code or recipes have changed since. What a run writes there, as reports, changes neither.
    """
    here = Path(__file__).resolve()

    def told(*words: str) -> str:
        line = ["git", *words]
        return subprocess.run(
            line, cwd=here.parent, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        told("ls-files", "--error-unmatch", here.name)
        revision = told("rev-parse", "HEAD")
        changed = told("diff", "--name-only", "HEAD", "--", *(f":(top)*{ending}" for ending in _CODE))
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as JSON gives it back (tuples become lists, paths strings), with secrets replaced.

    A secret is the text under a key that is named like one (token, password, api_key, ...), in an argument
    ``api_key=...``, in the user part of a URL or behind its ``?``, or equal to the value of an environment variable
    named like one.
    """
    secrets = [
        value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    ]
    cleaned: dict[str, Any] = _without(json.loads(json.dumps(dict(config), default=str)), secrets)
    return cleaned


def _without(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _REDACTED if isinstance(item, str) and item and _SECRET_NAME.search(key) else _without(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _REDACTED)
        value = _PASSWORD_IN_URL.sub(f"{_REDACTED}@", _SECRET_ARGUMENT.sub(rf"\1{_REDACTED}", value))
        return _QUERY_OF_URL.sub(rf"\1{_REDACTED}", value)
    return value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested configuration by dotted name; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """By key, ``saved -> current`` for each leaf that differs and is not among ``CHANGEABLE_KEYS``."""
    old, new = flat(saved), flat(current)
    return {
        key: f"{old.get(key, '(not set)')} -> {new.get(key, '(not set)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not matches(key, CHANGEABLE_KEYS)
    }


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key fits one of the patterns, ``*`` standing for any text."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
