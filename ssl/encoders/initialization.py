"""Initialise encoders from the source that ``encoders.MODALITY=SOURCE`` names.

- ``FOLDER``: encoder saved by ``save_encoder``.
- ``hf:org/name`` or ``hf:org/name@revision``: the same in a Hugging Face repository.
- ``imagenet``: timm's pretrained weights of the configured Swin (see ``imagenet.py``).
- ``imagenet:FILE``: the same from a local file or folder.
- ``scratch``: random initialisation, which overrides the source of a recipe.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.files import sha256
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.export import WEIGHTS_FILE, load_encoder
from bocage.ssl.encoders.timm_format import strip_tag
from bocage.ssl.engine.parallel.distributed import launcher_rank_and_world

logger = logging.getLogger(__name__)

IMAGENET, SCRATCH = "imagenet", "scratch"

_TRAINING_OPTIONS = frozenset({"drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "img_size"})
"""Options that change neither the weights of an encoder nor its features in evaluation mode."""


def initialize_encoder(scratch: Encoder, source: str, *, keep_architecture: bool) -> Encoder:
    """Initialise an encoder from ``source``.

    Args:
        scratch: randomly initialised encoder, built from the recipe and the shards. ImageNet weights are loaded into
            it.
        source: folder, ``hf:...``, ``imagenet``, ``imagenet:FILE`` or ``scratch``; see the module docstring.
        keep_architecture: whether a saved encoder must have the architecture and channels of ``scratch``. If True, its
            weights are loaded into ``scratch``, which keeps its mask token. If False, the saved encoder replaces
            ``scratch``, and must only have the bands of the shards.

    Returns:
        ``scratch`` or the saved encoder. Its ``spec`` has the channel statistics of the saved encoder, with which the
        weights were trained. ImageNet and random weights keep the statistics of the shards: ImageNet weights expect
        standardised input, too.

    Raises:
        InputError: the source is missing, damaged or does not fit; the message begins with the key.
    """
    key = f"encoders.{scratch.spec.modality}={source}"
    if not isinstance(source, str) or not source:  # YAML reads a trailing colon as a mapping
        raise InputError(
            f"encoders.{scratch.spec.modality}: give a folder, hf:org/name, imagenet or imagenet:FILE, not {source!r}"
        )
    if source == SCRATCH:
        return scratch
    try:
        if source == IMAGENET or source.startswith(f"{IMAGENET}:"):
            return _load_imagenet(scratch, source)
        saved = load_encoder(source)
        if saved.spec.modality != scratch.spec.modality:
            raise InputError(f"this is an encoder of {saved.spec.modality}, not of {scratch.spec.modality}")
        _check_input(saved.spec, scratch.spec, ("bands",))
        if not keep_architecture:
            _log_once(f"{key}: loaded {len(saved.state_dict())} tensors")
            return saved
        _check_input(saved.spec, scratch.spec, ("channels", "representation", "gsd"))
        _check_architecture(saved.config, scratch.config)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    mask_token = {name: tensor for name, tensor in scratch.state_dict().items() if name == "mask_token"}
    scratch.load_state_dict({**saved.state_dict(), **mask_token})
    _log_once(f"{key}: loaded {len(saved.state_dict())} tensors{'; new mask token' if mask_token else ''}")
    scratch.spec = saved.spec
    return scratch


def load_teacher(key: str, source: str, spec: InputSpec) -> Encoder:
    """Load a saved encoder that reads the standardised input of another one.

    Args:
        key: key of the configuration that names the source, for messages.
        source: folder or ``hf:...``.
        spec: input of the encoder that learns from the teacher.

    Raises:
        InputError: the source is missing or damaged, or its encoder reads another input; the message begins with the
            key.
    """
    try:
        saved = load_encoder(source)
        _check_input(saved.spec, spec, ("modality", "bands", "channels", "representation", "gsd"))
        if (saved.spec.mean, saved.spec.std) != (spec.mean, spec.std):
            raise InputError("the encoder standardises its input otherwise: pretrain it on these shards")
    except InputError as error:
        raise InputError(f"{key}={source}: {error}") from error
    _log_once(f"{key}={source}: loaded {len(saved.state_dict())} tensors")
    return saved


def weights_digest(source: str) -> str:
    """Return the SHA-256 of the weights in a folder; for other sources, the source itself."""
    path = Path(source) / WEIGHTS_FILE
    return sha256(path) if path.is_file() else source


def _log_once(message: str) -> None:
    """Log on the main rank."""
    if launcher_rank_and_world()[0] == 0:
        logger.info(message)


def _load_imagenet(scratch: Encoder, source: str) -> Encoder:
    if scratch.config.architecture != "swin":
        raise InputError("ImageNet weights exist for images, not for series")
    # Imported here, because timm takes seconds to import.
    from bocage.ssl.encoders.imagenet import load_imagenet
    from bocage.ssl.encoders.swin import SwinEncoder

    assert isinstance(scratch, SwinEncoder)
    _, colon, file = source.partition(":")
    if colon and not file:
        raise InputError(f"give a file after {source!r}, or {IMAGENET!r} alone for timm's published weights")
    report = load_imagenet(scratch, Path(file) if colon else None)
    _log_once(f"encoders.{scratch.spec.modality}={source}: {report}")
    return scratch


def _check_input(saved: InputSpec, expected: InputSpec, fields: tuple[str, ...]) -> None:
    """Raise ``InputError`` if the input of a saved encoder differs from the shards in one of the fields."""
    for field in fields:
        theirs, ours = getattr(saved, field), getattr(expected, field)
        if theirs != ours:
            raise InputError(f"the encoder reads {field} {_format(theirs)}, but the shards have {_format(ours)}")


def _check_architecture(saved: EncoderConfig, expected: EncoderConfig) -> None:
    """Raise ``InputError`` that lists the differences between two architectures, if any."""
    theirs, ours = architecture_settings(saved), architecture_settings(expected)
    differences = [
        f"{key} = {theirs.get(key, 'the default')}, here {ours.get(key, 'the default')}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise InputError(f"the encoder has another architecture than this recipe: {'; '.join(differences)}")


def architecture_settings(config: EncoderConfig) -> dict[str, Any]:
    """Return the settings that determine the features, as JSON types, so that lists and tuples compare equal."""
    options = {key: value for key, value in config.options.items() if key not in _TRAINING_OPTIONS}
    name = {"name": strip_tag(config.name)} if config.architecture == "swin" else {}
    settings: dict[str, Any] = json.loads(
        json.dumps({"architecture": config.architecture, "fixed_size": config.fixed_size, **name, **options})
    )
    return settings


def _format(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
