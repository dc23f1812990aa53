"""Build an encoder from its input spec and configuration."""

from __future__ import annotations

import reprlib

from bocage.shards.errors import InputError
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig, check_options
from bocage.ssl.encoders.utae import UTAE

__all__ = ["build_encoder"]


def _build_utae(spec: InputSpec, config: EncoderConfig) -> UTAE:
    check_options(config.options, UTAE, reserved=("input_dim",), model="U-TAE")
    try:
        return UTAE(len(spec.channels), **config.options)
    except (MemoryError, RuntimeError) as error:  # torch cannot allocate it, or it exceeds ``limited_memory``
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"U-TAE cannot be built with options {reprlib.repr(config.options)}: {reason}") from error


def build_encoder(spec: InputSpec, config: EncoderConfig, mask_token: bool = False) -> Encoder:
    """Build a randomly initialised encoder.

    Args:
        spec: sensor, channels and statistics of the input.
        config: architecture and its options.
        mask_token: whether an image encoder gets the learned token that the ``mask`` argument of ``features`` needs.
            Saved encoders do not contain it. Series need none, because masked dates are left out.

    Raises:
        InputError: an unknown architecture, name or option, or an architecture that cannot read this input.
    """
    if config.architecture not in ("swin", "utae"):
        raise InputError(f"encoder architecture {config.architecture!r} is unknown; choose swin or utae")
    expected = "utae" if spec.series else "swin"
    if config.architecture != expected:
        kind = "a time series" if spec.series else "an image"
        raise InputError(
            f"{spec.modality} is {kind}: its encoder architecture is {expected}, not {config.architecture}"
        )
    if config.fixed_size is not None and spec.series:
        raise InputError(f"{spec.modality}: fixed_size={config.fixed_size} is for images; U-TAE accepts any size")
    encoder: Encoder
    if spec.series:
        encoder = _build_utae(spec, config)
    else:
        from bocage.ssl.encoders.swin import SwinEncoder  # imports timm, which takes seconds and series do not need

        size = config.fixed_size
        encoder = SwinEncoder(len(spec.channels), config.name, config.options, mask_token, fixed_size=size)
    encoder.spec = spec
    encoder.config = config
    return encoder
