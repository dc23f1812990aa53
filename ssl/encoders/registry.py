"""Builds the encoder that a configuration asks for."""

from __future__ import annotations

import difflib
import inspect
import reprlib

from bocage.shards.errors import InputError
from bocage.shards.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.utae import UTAE


def _utae(spec: InputSpec, config: EncoderConfig) -> UTAE:
    valid = [key for key in inspect.signature(UTAE).parameters if key != "input_dim"]
    for key in config.options:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid ones: {', '.join(valid)}"
            raise InputError(f"encoder option {key!r} is unknown to U-TAE; {hint}")
    try:
        return UTAE(len(spec.channels), **config.options)
    except InputError:
        raise
    except Exception as error:  # the keys are known by now: what is left are values of another type or sign
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"U-TAE cannot be built with options {reprlib.repr(config.options)}: {reason}") from error


def build_encoder(spec: InputSpec, config: EncoderConfig, mask_token: bool = False) -> Encoder:
    """A randomly initialised encoder of the input ``spec``.

    Args:
        spec: the sensor, its channels and statistics.
        config: the architecture and its options.
        mask_token: whether an image encoder gets the learned token that its ``mask`` argument needs. It is not part
            of a saved encoder. Series need none: their masked dates are left out.

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
        raise InputError(f"{spec.modality}: fixed_size={config.fixed_size} is for images; U-TAE takes every size")
    encoder: Encoder
    if spec.series:
        encoder = _utae(spec, config)
    else:
        from bocage.ssl.encoders.swin import SwinEncoder  # imports timm, which takes seconds and series do not need

        size = config.fixed_size
        encoder = SwinEncoder(len(spec.channels), config.name, config.options, mask_token, fixed_size=size)
    encoder.spec = spec
    encoder.config = config
    return encoder
