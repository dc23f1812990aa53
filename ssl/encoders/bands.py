"""Adapt encoders to other bands: a subset, another order, or additional bands."""

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

__all__ = ["NewBand", "adapt_bands"]

_PER_BAND_REPRESENTATIONS = ("linear", "decibel")


@dataclass(frozen=True)
class NewBand:
    """Description of a band that an encoder was not trained with.

    Attributes:
        mean: mean of its values, in decibels for an encoder of decibels.
        std: standard deviation of its values, in the same unit.
        quantity: physical quantity that it measures.
        wavelength: centre wavelength of an optical band, in nm.

    Raises:
        ValueError: mean or std is not finite, or std is not positive.
    """

    mean: float
    std: float
    quantity: Quantity = "reflectance"
    wavelength: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"mean={self.mean}, std={self.std}: both must be finite, std positive")


def adapt_bands(encoder: Encoder, bands: Sequence[str], new_bands: Mapping[str, NewBand] | None = None) -> Encoder:
    """Adapt an encoder to images or series with other bands; the weights are kept.

    The first convolution is linear in the bands, and standardised bands have mean 0. A known band therefore keeps its
    weights and statistics at any position. A removed band counts as constant at its mean: the feature maps equal those
    of the original encoder with that band at its mean. A new band starts with zero weights and has no effect before
    training.

    Args:
        encoder: encoder that reads stored values (``linear``) or decibels; it is not modified.
        bands: names of the bands in the order of the arrays; the encoder must know at least one.
        new_bands: descriptions of the bands that the encoder does not know, by name.

    Returns:
        A new encoder in evaluation mode, which ``save_encoder`` can save.

    Raises:
        InputError: a band is repeated or not described, no band is known, or the encoder reads elevation.
    """
    spec, new = encoder.spec, dict(new_bands or {})
    known = ", ".join(spec.channels)
    if spec.representation not in _PER_BAND_REPRESENTATIONS:
        raise InputError(
            f"{spec.modality} is read as {known}, from all bands together: bands cannot be added or removed"
        )
    if len(set(bands)) < len(bands):
        raise InputError(f"bands {', '.join(bands)}: each band can be given once")
    if invalid := [name for name in new if name in spec.channels or name not in bands]:
        raise InputError(f"new band {invalid[0]}: not in bands ({', '.join(bands)}), or the encoder knows it already")
    if unknown := [name for name in bands if name not in spec.channels and name not in new]:
        raise InputError(
            f"band {unknown[0]}: the encoder knows {known}; describe other bands in new_bands, with mean and std"
        )
    if not set(bands) & set(spec.channels):
        raise InputError(f"bands {', '.join(bands)}: the encoder knows none of them, only {known}")
    statistics = {name: (spec.mean[i], spec.std[i]) for i, name in enumerate(spec.channels)}
    statistics |= {name: (band.mean, band.std) for name, band in new.items()}
    physics = {name: (spec.quantities[i], spec.wavelengths[i]) for i, name in enumerate(spec.bands)}
    physics |= {name: (band.quantity, band.wavelength) for name, band in new.items()}
    adapted_spec = replace(
        spec,
        bands=tuple(bands),
        channels=tuple(bands),
        quantities=tuple(physics[name][0] for name in bands),
        wavelengths=tuple(physics[name][1] for name in bands),
        mean=tuple(statistics[name][0] for name in bands),
        std=tuple(statistics[name][1] for name in bands),
    )
    with torch.random.fork_rng(devices=[]):
        adapted = build_encoder(adapted_spec, encoder.config)
    stem = _first_convolution(encoder)
    weights = {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}
    old = weights[stem]
    weights[stem] = torch.stack(
        [old[:, spec.channels.index(name)] if name in spec.channels else torch.zeros_like(old[:, 0]) for name in bands],
        dim=1,
    )
    adapted.load_state_dict(weights)
    return adapted.eval()


def _first_convolution(encoder: Encoder) -> str:
    """Return the name of the weights that read the bands."""
    return next(f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))
