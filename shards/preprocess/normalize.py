"""Stored values to what an encoder sees: representation, also of the statistics, and standardisation.

``represent`` is written against the array API (https://data-apis.org/array-api): packing calls it on NumPy's arrays, in
processes that never import torch, training on tensors of its device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from array_api_compat import array_namespace

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality, Representation, channels_of

if TYPE_CHECKING:  # sharding has no use for torch, which would double a worker's memory
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

_TUPLES = ("bands", "quantities", "wavelengths", "channels", "mean", "std")
LEAST_STD = 1e-6
"""Floor of standard deviations: a constant channel stays finite."""

_SIGMA0_FLOOR = 1e-4  # -40 dB: zeros at the swath's edge would give minus infinity


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What an encoder needs to know of its input; part of a published encoder.

    Attributes:
        modality: the dataset's name of the sensor.
        bands: stored bands in the order the arrays hold them.
        quantities: by band, what it measures (``modality.Quantity``).
        wavelengths: by band, its centre wavelength in nm; None for bands that are not optical.
        channels: channels of the representation, in the order the encoder reads them; not necessarily all of them.
        representation: see ``modality.Modality``.
        mean, std: by channel, in units of the representation.
        gsd: ground sampling distance, metres.
        series: whether arrays have a time axis; dates are days since 15 May of their own year.
        nodata_below: stored values under this are holes.

    Raises:
        ValueError: fields of different lengths, or channels that the representation does not have.
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

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std):
            raise ValueError(
                f"{self.modality}: {len(self.channels)} channels, {len(self.mean)} means, {len(self.std)} stds"
            )
        known = channels_of(self.representation, self.bands)
        if unknown := set(self.channels) - set(known):
            raise ValueError(f"{self.modality}: channels {', '.join(sorted(unknown))} are not among {', '.join(known)}")
        if not len(self.bands) == len(self.quantities) == len(self.wavelengths):
            raise ValueError(
                f"{self.modality}: {len(self.bands)} bands, {len(self.quantities)} quantities, "
                f"{len(self.wavelengths)} wavelengths"
            )

    @classmethod
    def of(cls, modality: Modality, mean: tuple[float, ...], std: tuple[float, ...]) -> InputSpec:
        """The input of an encoder of ``modality`` with these channel statistics."""
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
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable description; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> InputSpec:
        """The spec described by ``to_json``.

        Raises:
            InputError: unknown, missing or wrong fields.
        """
        try:
            values = dict(description)
            values.update({key: tuple(values[key]) for key in _TUPLES})
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"input description of an encoder cannot be read: {error}") from error


def represent(values: Array, representation: Representation, nodata_below: float | None = None) -> Array:
    """The representation of stored values, an array of NumPy or of torch like the one given.

    Args:
        values: (..., C, H, W) in any real dtype. ``relief`` and ``elevation`` expect the bands surface, terrain.
        representation: see ``modality.Modality``.
        nodata_below: stored values under this are holes, as are infinities and NaN.

    Returns:
        (..., C, H, W) float32; every value is finite, or NaN for a hole.
    """
    xp = array_namespace(values)
    is_float = xp.isdtype(values.dtype, "real floating")
    values = xp.astype(values, xp.float32, copy=False)
    if nodata_below is not None:
        values = xp.where(xp.isfinite(values) & (values >= nodata_below), values, xp.nan)
    elif is_float:
        values = _finite_or_nan(xp, values)
    if representation == "decibel":
        return 10.0 * xp.log10(xp.clip(values, min=_SIGMA0_FLOOR))
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
    """Means of (..., H, W) over what is not NaN, (..., 1, 1); NaN where nothing is left."""
    holes = xp.isnan(values)
    count = xp.sum(xp.astype(~holes, xp.float32), axis=(-2, -1), keepdims=True)
    total = xp.sum(xp.where(holes, 0.0, values), axis=(-2, -1), keepdims=True)
    return total / xp.where(count > 0, count, xp.nan)


def standardize(values: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """The spec's channels, standardised: (..., C, H, W) float32; holes are NaN (``fill_holes`` closes them)."""
    values = represent(values, spec.representation, spec.nodata_below)
    known = channels_of(spec.representation, spec.bands)
    if spec.channels != known:
        values = values[..., [known.index(channel) for channel in spec.channels], :, :]
    mean = values.new_tensor(spec.mean).view(-1, 1, 1)
    std = values.new_tensor(spec.std).view(-1, 1, 1)
    return (values - mean) / std.clamp_min(LEAST_STD)


def fill_holes(values: torch.Tensor) -> torch.Tensor:
    """Standardised values, of any shape, with holes at the mean, so that no NaN reaches an encoder."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
