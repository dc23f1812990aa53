"""Published encoders for images whose bands are others: a subset, another order, or more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bocage.shards.errors import InputError
from bocage.shards.modality import Quantity
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.build import build_encoder

_BY_BAND = ("linear", "decibel")


@dataclass(frozen=True)
class NewBand:
    """A band that an encoder has not seen.

    Attributes:
        mean, std: of its values, in decibels for an encoder that reads them.
        quantity: what it measures.
        wavelength: of an optical band, nm.

    Raises:
        ValueError: a mean or std that is not finite, or std that is not positive.
    """

    mean: float
    std: float
    quantity: Quantity = "reflectance"
    wavelength: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"mean={self.mean}, std={self.std}: both must be finite, std positive")


def adapt_bands(encoder: Encoder, bands: Sequence[str], new: Mapping[str, NewBand] | None = None) -> Encoder:
    """An encoder with the weights of another one, for images or series with these bands in this order.

    The first convolution is linear in the bands, and standardised bands have mean 0. So a band that the encoder knows
    keeps its weights and statistics wherever it stands; one that is left out counts as being at its mean, which is
    exact: the maps are those that the whole encoder gives with that band at its mean. A new band starts with weights of
    zero, which change nothing until they are trained.

    Args:
        encoder: one that reads its bands as they are (``linear``) or in decibels; left as it is.
        bands: names, in the order that arrays will hold them; at least one that the encoder knows.
        new: by name, what the encoder has to know of the others.

    Returns:
        A new encoder, in evaluation mode, which ``save_encoder`` writes like any other.

    Raises:
        InputError: bands that nobody describes, a band twice, none that is known, or an encoder of heights.
    """
    spec, new = encoder.spec, dict(new or {})
    known = ", ".join(spec.channels)
    if spec.representation not in _BY_BAND:
        raise InputError(f"bands of {spec.modality} are read together, as {known}: none can be left out or added")
    if len(set(bands)) < len(bands):
        raise InputError(f"bands {', '.join(bands)}: each can be given once")
    if described := [name for name in new if name in spec.channels or name not in bands]:
        raise InputError(f"new band {described[0]}: it is not among {', '.join(bands)}, or the encoder knows it")
    if unknown := [name for name in bands if name not in spec.channels and name not in new]:
        raise InputError(f"band {unknown[0]}: the encoder knows {known}; describe others as new, with mean and std")
    if not set(bands) & set(spec.channels):
        raise InputError(f"bands {', '.join(bands)}: the encoder knows none of them, only {known}")
    channel = {name: (spec.mean[at], spec.std[at]) for at, name in enumerate(spec.channels)}
    channel |= {name: (band.mean, band.std) for name, band in new.items()}
    band = {name: (spec.quantities[at], spec.wavelengths[at]) for at, name in enumerate(spec.bands)}
    band |= {name: (item.quantity, item.wavelength) for name, item in new.items()}
    chosen = replace(
        spec,
        bands=tuple(bands),
        channels=tuple(bands),
        quantities=tuple(band[name][0] for name in bands),
        wavelengths=tuple(band[name][1] for name in bands),
        mean=tuple(channel[name][0] for name in bands),
        std=tuple(channel[name][1] for name in bands),
    )
    with torch.random.fork_rng(devices=[]):
        adapted = build_encoder(chosen, encoder.config)
    stem = _stem(encoder)
    weights = {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}
    old = weights[stem]
    weights[stem] = torch.stack(
        [old[:, spec.channels.index(name)] if name in spec.channels else torch.zeros_like(old[:, 0]) for name in bands],
        dim=1,
    )
    adapted.load_state_dict(weights)
    return adapted.eval()


def _stem(encoder: Encoder) -> str:
    """The name of the weights that read the bands."""
    return next(f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))
