"""Record the configuration of a run without secrets, its library versions and its git commit."""

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
    "engine.keep_last",
    "engine.milestone_every",
    "engine.log_every",
    "engine.evaluate_every",
    "engine.max_bad_steps",
    "engine.dump_bad_steps",
    "engine.min_feature_std",
    "engine.min_rankme",
    "engine.min_explained",
    "engine.profile_steps",
    "engine.rank_timeout",
    "engine.tracker",
    "engine.project",
)
"""Keys of the resolved configuration that a resumed run may change; changes of other keys are refused.

A new ``engine.steps`` stretches or shortens the cosine from the resumed step on.
"""

_CODE_SUFFIXES = (".py", ".yaml", ".jinja", ".toml")
_LIBRARIES = ("bocage", "torch", "accelerate", "timm", "numpy", "safetensors")
_REDACTED = "<redacted>"
_SECRET_WORDS = r"(?:(?<!mask_)(?<!cls_)token|secret|password|passwd|credentials?|signature|api[-_]?key|access[-_]?key)"
_SECRET_NAME = re.compile(rf"(?:^|[_.-]){_SECRET_WORDS}(?:$|_)", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(rf"((?:^|[\s_.-]){_SECRET_WORDS}\w*=)\S+", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY_OF_URL = re.compile(r"(://[^\s?#]*\?)\S+")  # signed URLs carry credentials
_MIN_SECRET_LENGTH = 8


def library_versions() -> dict[str, str]:
    """Versions of bocage and of the libraries that affect the numbers of a run."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def git_revision() -> str | None:
    """Commit of the git working tree that tracks this file; None without one.

    The commit ends in ``-dirty`` if code or recipes have changed since. Other files, such as reports, do not count.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=here.parent, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        revision = git("rev-parse", "HEAD")
        changed = git("diff", "--name-only", "HEAD", "--", *(f":(top)*{suffix}" for suffix in _CODE_SUFFIXES))
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert ``config`` to JSON types (tuples become lists, paths strings) and replace secrets.

    A secret is a text under a key with a secret's name (token, password, api_key, ...), in an argument ``api_key=...``,
    in the user part or the query of a URL, or equal to an environment variable with a secret's name.
    """
    secrets = [
        value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET_LENGTH
    ]
    cleaned: dict[str, Any] = _redacted(json.loads(json.dumps(dict(config), default=str)), secrets)
    return cleaned


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _REDACTED if isinstance(item, str) and item and _SECRET_NAME.search(key) else _redacted(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redacted(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _REDACTED)
        value = _PASSWORD_IN_URL.sub(f"{_REDACTED}@", _SECRET_ARGUMENT.sub(rf"\1{_REDACTED}", value))
        return _QUERY_OF_URL.sub(rf"\1{_REDACTED}", value)
    return value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to leaves by dotted name; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Compare two configurations: ``saved -> current`` by key, without ``CHANGEABLE_KEYS``."""
    old, new = flat(saved), flat(current)
    return {
        key: f"{old.get(key, '(not set)')} -> {new.get(key, '(not set)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not matches(key, CHANGEABLE_KEYS)
    }


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key matches one of the patterns; ``*`` stands for any text."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
