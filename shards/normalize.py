"""Stored values to what an encoder sees: representation and standardisation, on the device where training runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality, Representation, channels_of

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
        """The spec described by ``to_json``; raises ``InputError`` on unknown, missing or wrong fields."""
        try:
            values = dict(description)
            values.update({key: tuple(values[key]) for key in _TUPLES})
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"input description of an encoder cannot be read: {error}") from error


def represent(values: torch.Tensor, representation: Representation, nodata_below: float | None = None) -> torch.Tensor:
    """The representation of stored values.

    Args:
        values: (..., C, H, W) in any dtype. ``relief`` and ``elevation`` expect the bands surface, terrain.
        representation: see ``modality.Modality``.
        nodata_below: stored values under this are holes, as are infinities and NaN.

    Returns:
        (..., C, H, W) float32; every value is finite, or NaN for a hole.
    """
    may_have_holes = values.is_floating_point()
    values = values.to(torch.float32)
    if may_have_holes:
        values = _finite_or_nan(values)
    if nodata_below is not None:
        values = torch.where(values < nodata_below, torch.nan, values)
    if representation == "decibel":
        return 10.0 * torch.log10(values.clamp_min(_SIGMA0_FLOOR))
    if representation in ("relief", "elevation"):
        surface, terrain = values.unbind(dim=-3)
        height = surface - terrain
        if representation == "relief":
            surface = surface - surface.nanmean(dim=(-2, -1), keepdim=True)
        return _finite_or_nan(torch.stack((surface, height), dim=-3))
    return values


def _finite_or_nan(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isfinite(), values, torch.nan)


def standardize(values: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """The spec's channels, standardised: (..., C, H, W) float32; holes are NaN (``fill_holes`` closes them)."""
    values = represent(values, spec.representation, spec.nodata_below)
    known = channels_of(spec.representation, spec.bands)
    if spec.channels != known:
        values = values[..., [known.index(channel) for channel in spec.channels], :, :]
    mean = torch.tensor(spec.mean, device=values.device).view(-1, 1, 1)
    std = torch.tensor(spec.std, device=values.device).view(-1, 1, 1)
    return (values - mean) / std.clamp_min(LEAST_STD)


def fill_holes(values: torch.Tensor) -> torch.Tensor:
    """Standardised values with holes at the mean, so that no NaN reaches an encoder."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
