"""Convert stored values to their representation (decibels, relief, ...), and standardise them.

``represent`` uses the array API (https://data-apis.org/array-api): sharding calls it on NumPy arrays, in processes that
never import torch, and training calls it on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from array_api_compat import array_namespace

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality, Representation, representation_channels

if TYPE_CHECKING:  # sharding does not import torch, which would double a worker's memory
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

_TUPLE_FIELDS = ("bands", "quantities", "wavelengths", "channels", "mean", "std")
MIN_STD = 1e-6
"""Lower bound of standard deviations, so that a constant channel stays finite."""

_MIN_SIGMA0 = 1e-4  # -40 dB; zeros at the edge of the swath would give minus infinity


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Description of an encoder's input, stored with a published encoder.

    Attributes:
        modality: name of the sensor in the dataset.
        bands: names of the stored bands, in the order of the arrays.
        quantities: physical quantity of each band (``modality.Quantity``).
        wavelengths: centre wavelength of each band in nm; None for bands that are not optical.
        channels: channels of the representation that the encoder reads, in its order; possibly a subset.
        representation: conversion of the stored values before standardisation, see ``modality.Modality``.
        mean, std: statistics of each channel, in units of the representation.
        gsd: ground sampling distance, in metres.
        series: whether arrays have a time axis. Dates are days since 15 May of their own year.
        nodata_below: stored values below this are nodata; None if there is no such limit.
        nodata_above: stored values above this are nodata; None if there is no such limit.

    Raises:
        ValueError: fields have different lengths, or a channel is not one of the representation.
    """

    modality: str
    bands: tuple[str, ...]
    quantities: tuple[str, ...]
    wavelengths: tuple[float | None, ...]
    channels: tuple[str, ...]
    representation: Representation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gsd: float
    series: bool
    nodata_below: float | None = None
    nodata_above: float | None = None

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std):
            raise ValueError(
                f"{self.modality}: {len(self.channels)} channels, {len(self.mean)} means, {len(self.std)} stds"
            )
        known = representation_channels(self.representation, self.bands)
        if unknown := set(self.channels) - set(known):
            raise ValueError(f"{self.modality}: channels {', '.join(sorted(unknown))} are not among {', '.join(known)}")
        if not len(self.bands) == len(self.quantities) == len(self.wavelengths):
            raise ValueError(
                f"{self.modality}: {len(self.bands)} bands, {len(self.quantities)} quantities, "
                f"{len(self.wavelengths)} wavelengths"
            )

    @classmethod
    def from_modality(cls, modality: Modality, mean: tuple[float, ...], std: tuple[float, ...]) -> InputSpec:
        """Input description of an encoder of ``modality`` with these channel statistics."""
        return cls(
            modality=modality.name,
            bands=tuple(band.name for band in modality.bands),
            quantities=tuple(band.quantity for band in modality.bands),
            wavelengths=tuple(band.wavelength for band in modality.bands),
            channels=modality.channels,
            representation=modality.representation,
            mean=mean,
            std=std,
            gsd=modality.gsd,
            series=modality.role == "series",
            nodata_below=modality.nodata_below,
            nodata_above=modality.nodata_above,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable form, which ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> InputSpec:
        """Spec from the output of ``to_json``.

        Raises:
            InputError: fields are unknown, missing or wrong.
        """
        try:
            values = dict(description)
            values.update({key: tuple(values[key]) for key in _TUPLE_FIELDS})
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"input description of an encoder cannot be read: {error}") from error


def represent(
    values: Array,
    representation: Representation,
    nodata_below: float | None = None,
    nodata_above: float | None = None,
) -> Array:
    """Convert stored values to a representation.

    Args:
        values: stored values, (..., C, H, W), a NumPy array or tensor of any real dtype. ``relief`` and ``elevation``
            expect the bands surface and terrain.
        representation: name of the representation, see ``modality.Modality``.
        nodata_below: stored values below this are nodata; so are infinities and NaN.
        nodata_above: stored values above this are nodata.

    Returns:
        (..., C, H, W) float32, of the same array library. Each value is finite, or NaN for nodata.
    """
    xp = array_namespace(values)
    is_float = xp.isdtype(values.dtype, "real floating")
    values = xp.astype(values, xp.float32, copy=False)
    if nodata_below is not None or nodata_above is not None:
        valid = xp.isfinite(values)
        valid = valid if nodata_below is None else valid & (values >= nodata_below)
        valid = valid if nodata_above is None else valid & (values <= nodata_above)
        values = xp.where(valid, values, xp.nan)
    elif is_float:
        values = _finite_or_nan(xp, values)
    if representation == "decibel":
        return 10.0 * xp.log10(xp.clip(values, min=_MIN_SIGMA0))
    if representation in ("relief", "elevation"):
        surface, terrain = values[..., 0, :, :], values[..., 1, :, :]
        height = surface - terrain
        if representation == "relief":
            surface = surface - _window_mean(xp, surface)
        return _finite_or_nan(xp, xp.stack((surface, height), axis=-3))
    return values


def _finite_or_nan(xp: Any, values: Array) -> Array:
    return xp.where(xp.isfinite(values), values, xp.nan)


def _window_mean(xp: Any, values: Array) -> Array:
    """Mean of (..., H, W) over valid pixels, (..., 1, 1); NaN without valid pixels."""
    nodata = xp.isnan(values)
    count = xp.sum(xp.astype(~nodata, xp.float32), axis=(-2, -1), keepdims=True)
    total = xp.sum(xp.where(nodata, 0.0, values), axis=(-2, -1), keepdims=True)
    return total / xp.where(count > 0, count, xp.nan)


def standardize(values: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """Standardise the channels of ``spec``: (..., C, H, W) float32, NaN for nodata (see ``fill_nodata``)."""
    values = represent(values, spec.representation, spec.nodata_below, spec.nodata_above)
    known = representation_channels(spec.representation, spec.bands)
    if spec.channels != known:
        values = values[..., [known.index(channel) for channel in spec.channels], :, :]
    mean = values.new_tensor(spec.mean).view(-1, 1, 1)
    std = values.new_tensor(spec.std).view(-1, 1, 1)
    return (values - mean) / std.clamp_min(MIN_STD)


def fill_nodata(values: torch.Tensor) -> torch.Tensor:
    """Replace nodata in standardised values of any shape by 0, the mean, so that no NaN reaches an encoder."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
