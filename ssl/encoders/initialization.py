"""Where the weights of an encoder come from when it is not drawn at random: what ``encoders.MODALITY=...`` says.

- ``FOLDER``: an encoder that ``save_encoder`` wrote.
- ``hf:org/name`` or ``hf:org/name@revision``: the same in a Hugging Face repository.
- ``imagenet``: timm's published weights of the configured Swin (see ``imagenet.py``).
- ``imagenet:FILE``: the same from a local file or folder.
- ``scratch``: nowhere, against a recipe that names a source.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.files import sha256
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.export import WEIGHTS_FILE, load_encoder
from bocage.ssl.encoders.timm_format import architecture_of
from bocage.ssl.engine.parallel.distributed import launcher_rank_and_world

IMAGENET, SCRATCH = "imagenet", "scratch"

_TRAINING_ONLY = frozenset({"drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "img_size"})
"""Options that change neither the weights an encoder has nor the features it computes from them."""


def pretrained_encoder(scratch: Encoder, source: str, *, keep_architecture: bool) -> Encoder:
    """An encoder with the weights of ``source``, for the sensor that ``scratch`` reads.

    Args:
        scratch: a fresh encoder, as the recipe and the shards have it. ImageNet weights go into it.
        source: see the module.
        keep_architecture: a saved encoder must be built as ``scratch`` is and read the same channels; its weights go
            into ``scratch``, which keeps its mask token. Otherwise the saved encoder comes as it is, as long as it
            reads the bands that the shards hold.

    Returns:
        ``scratch``, or the saved encoder. Either reads the statistics that its weights were trained with: those of a
        saved encoder, or those of the shards after ImageNet, whose images were standardised too.

    Raises:
        InputError: a source that cannot be had, is damaged, or does not fit; the sentence begins with the key.
    """
    key = f"encoders.{scratch.spec.modality}={source}"
    if not isinstance(source, str) or not source:  # a colon at the end makes YAML see a mapping
        raise InputError(
            f"encoders.{scratch.spec.modality}: give a folder, hf:org/name, imagenet or imagenet:FILE, not {source!r}"
        )
    if source == SCRATCH:
        return scratch
    try:
        if source == IMAGENET or source.startswith(f"{IMAGENET}:"):
            return _from_imagenet(scratch, source)
        saved = load_encoder(source)
        if saved.spec.modality != scratch.spec.modality:
            raise InputError(f"is an encoder of {saved.spec.modality}, not of {scratch.spec.modality}")
        _check_input(saved.spec, scratch.spec, ("bands",))
        if not keep_architecture:
            _tell(f"{key}: {len(saved.state_dict())} tensors, as they were saved")
            return saved
        _check_input(saved.spec, scratch.spec, ("channels", "representation", "gsd"))
        _check_architecture(saved.config, scratch.config)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    tokens = {name: tensor for name, tensor in scratch.state_dict().items() if name == "mask_token"}
    scratch.load_state_dict({**saved.state_dict(), **tokens})
    _tell(f"{key}: {len(saved.state_dict())} tensors{', the mask token starts anew' if tokens else ''}")
    scratch.spec = saved.spec
    return scratch


def weights_digest(source: str) -> str:
    """SHA-256 of the weights in a folder; of other sources their name."""
    path = Path(source) / WEIGHTS_FILE
    return sha256(path) if path.is_file() else source


def _tell(text: str) -> None:
    """What was loaded, on stderr and once for all ranks."""
    if launcher_rank_and_world()[0] == 0:
        print(f"bocage: {text}", file=sys.stderr)


def _from_imagenet(scratch: Encoder, source: str) -> Encoder:
    if scratch.config.architecture != "swin":
        raise InputError("ImageNet weights exist for images, not for series")
    # Imported here because they import timm, which takes seconds.
    from bocage.ssl.encoders.imagenet import load_imagenet
    from bocage.ssl.encoders.swin import SwinEncoder

    assert isinstance(scratch, SwinEncoder)
    _, named, file = source.partition(":")
    if named and not file:
        raise InputError(f"give a file after {source!r}, or {IMAGENET!r} alone for timm's published weights")
    report = load_imagenet(scratch, Path(file) if named else None)
    _tell(f"encoders.{scratch.spec.modality}={source}: {report}")
    return scratch


def _check_input(saved: InputSpec, wanted: InputSpec, facts: tuple[str, ...]) -> None:
    """Raises ``InputError`` unless a saved encoder reads what the shards hold, in these respects."""
    for fact in facts:
        theirs, ours = getattr(saved, fact), getattr(wanted, fact)
        if theirs != ours:
            raise InputError(f"the encoder reads {fact} {_shown(theirs)}, the shards give {_shown(ours)}")


def _check_architecture(saved: EncoderConfig, wanted: EncoderConfig) -> None:
    """Raises ``InputError`` that lists what a saved encoder was built with otherwise."""
    theirs, ours = built_with(saved), built_with(wanted)
    differing = [
        f"{key} = {theirs.get(key, 'the default')}, here {ours.get(key, 'the default')}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise InputError(f"the encoder was built otherwise than this recipe does: {'; '.join(differing)}")


def built_with(config: EncoderConfig) -> dict[str, Any]:
    """What decides how an encoder computes, in JSON's types: a list from a file equals a tuple from code."""
    options = {key: value for key, value in config.options.items() if key not in _TRAINING_ONLY}
    name = {"name": architecture_of(config.name)} if config.architecture == "swin" else {}
    built: dict[str, Any] = json.loads(
        json.dumps({"architecture": config.architecture, "fixed_size": config.fixed_size, **name, **options})
    )
    return built


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
