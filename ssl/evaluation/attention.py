"""Compute the attention of U-TAE over the dates of each patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.inputs import encoder_inputs, quality_masks, required_modalities
from bocage.shards.preprocess.normalize import represent
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.utae import UTAE


@dataclass(frozen=True)
class DateAttention:
    """Attention over the T dates of one patch in chronological order, without padded dates.

    Attributes:
        key: key of the patch.
        days: calendar days, (T,) datetime64[D].
        frames: values in the modality's representation, even if the encoder reads another one, (T, C, H, W) float32;
            NaN at nodata pixels.
        used: False at dates masked from the encoder because of clouds or snow, (T,) bool.
        cloud_or_snow: probability of cloud or of snow, the greater of the two, mean over pixels, in percent, (T,); None
            if the shards have no quality mask for this patch.
        attention: attention of each head at the deepest level, (n_head, T, h, w) float32: at least 0, with sum 1 over
            the dates, and 0 at unused dates.
    """

    key: str
    days: np.ndarray
    frames: np.ndarray
    used: np.ndarray
    cloud_or_snow: np.ndarray | None
    attention: np.ndarray

    @property
    def by_head(self) -> np.ndarray:
        """Mean over pixels, (n_head, T)."""
        return self.attention.mean(axis=(2, 3))

    @property
    def by_date(self) -> np.ndarray:
        """Mean over heads and pixels, (T,)."""
        return self.attention.mean(axis=(0, 2, 3))

    @property
    def effective_dates(self) -> float:
        """exp(entropy) of ``by_date``: n for equal attention to n dates, 1 if all attention is on one date."""
        probabilities = self.by_date[self.by_date > 0].astype(np.float64)
        return float(np.exp(-(probabilities * np.log(probabilities)).sum()))


def require_temporal(encoder: Encoder, name: str) -> UTAE:
    """Return ``encoder`` if it attends over dates.

    Args:
        encoder: encoder to check.
        name: name of the encoder in the error message.

    Raises:
        InputError: the encoder is not a U-TAE.
    """
    if not isinstance(encoder, UTAE):
        raise InputError(
            f"{name} is an encoder of {encoder.spec.modality}, an image: give an encoder of a series, which attends "
            "over dates"
        )
    return encoder


def rows_with_dates(manifest: Manifest, modality: str, rows: np.ndarray) -> np.ndarray:
    """Select the rows whose sample has at least one date of the series.

    Args:
        manifest: open shards.
        modality: name of the series.
        rows: manifest rows, (N,) int64.

    Raises:
        InputError: the shards do not have the modality, or none of the rows has a date.
    """
    if modality not in manifest.registry:
        raise InputError(f"{manifest.path}: the shards have no {modality}; they have {', '.join(manifest.registry)}")
    counts = pc.fill_null(pc.list_value_length(manifest.column(f"dates.{modality}")), 0).to_numpy()
    lengths = manifest.column(f"length.{modality}").to_numpy()
    rows = rows[(counts[rows] > 0) & (lengths[rows] > 0)]
    if len(rows) == 0:
        raise InputError(f"{manifest.path}: none of these patches has a date of {modality}")
    return rows


def rows_for_keys(manifest: Manifest, modality: str, keys: list[str]) -> np.ndarray:
    """Find the rows of patches by key, (N,) int64, in the order of ``keys``, without repetition.

    Raises:
        InputError: the shards do not have a key, or a patch has no date of the series.
    """
    row_of_key = {key: row for row, key in enumerate(manifest.column("key").to_pylist())}
    unknown = [key for key in keys if key not in row_of_key]
    if unknown:
        example = next(iter(row_of_key), "none")
        raise InputError(f"{manifest.path}: no patch {', '.join(unknown)}; keys look like {example}")
    rows = np.array([row_of_key[key] for key in dict.fromkeys(keys)], np.int64)
    dated = set(rows_with_dates(manifest, modality, rows).tolist())
    undated = [key for key in keys if row_of_key[key] not in dated]
    if undated:
        raise InputError(f"{manifest.path}: no date of {modality} in {', '.join(undated)}; leave them out")
    return rows


def compute_attention(
    encoder: UTAE,
    manifest: Manifest,
    rows: np.ndarray,
    *,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
) -> Iterator[DateAttention]:
    """Compute the attention over the dates of each patch, in the order of ``rows``.

    As in training, dates with too much cloud or snow in the quality mask are masked.

    Args:
        encoder: encoder of a series whose bands the shards have; switched to evaluation mode.
        manifest: open shards.
        rows: manifest rows with dates (``rows_with_dates``), (N,) int64.
        batch_size: patches per batch.
        device: device of the encoder.
    """
    spec = encoder.spec
    name = spec.modality
    masks = quality_masks(manifest.registry, [name])
    modality = manifest.registry[name]
    modalities = required_modalities(manifest.registry, [name], [])
    encoder = encoder.to(device).eval()
    days = manifest.column(f"dates.{name}")
    done = 0
    for batch in evaluation_batches(manifest, rows, modalities, batch_size=batch_size):
        batch = batch.to(device)
        inputs = encoder_inputs(batch, {name: spec}, masks, random_orientation=False)[name]
        assert inputs.dates is not None
        assert inputs.padding is not None
        with torch.inference_mode():
            attention = encoder(inputs.values, inputs.dates, inputs.padding, attention=True).attention
        for index, key in enumerate(batch.keys):
            unsorted_days = np.array(days[int(rows[done + index])].as_py(), "datetime64[D]")
            # Padded dates come last in the batch and are not in the manifest, so ``order`` excludes them.
            order = np.argsort(unsorted_days, kind="stable")
            frames = represent(
                batch.values[name][index], modality.representation, modality.nodata_below, modality.nodata_above
            )
            cloud_or_snow = None
            if name in masks and batch.present[masks[name]][index]:
                cloud_or_snow = (
                    batch.values[masks[name]][index].float().amax(dim=1).mean(dim=(1, 2)).cpu().numpy()[order]
                )
            yield DateAttention(
                key=key,
                days=unsorted_days[order],
                frames=frames.cpu().numpy()[order],
                used=~inputs.padding[index].cpu().numpy()[order],
                cloud_or_snow=cloud_or_snow,
                attention=attention[:, index].float().cpu().numpy()[:, order],
            )
        done += len(batch)
