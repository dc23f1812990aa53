"""Which dates an encoder looks at: the attention of U-TAE over the series of patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.inputs import encoder_inputs, quality_masks, wanted_modalities
from bocage.shards.preprocess.normalize import represent
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.utae import UTAE


@dataclass(frozen=True)
class DateAttention:
    """Attention of an encoder over the T dates of one patch, in order of days; padded dates are not among them.

    Attributes:
        key: the patch.
        days: (T,) datetime64[D].
        frames: (T, C, H, W) float32, values of the modality's representation, whatever the encoder reads; NaN in holes.
        used: (T,) bool, False where the encoder was not shown the date, because of clouds or snow.
        unclear: (T,) probability of cloud or snow, whichever is greater, percent, mean over pixels; None where the
            shards hold no quality mask.
        attention: (n_head, T, h, w) float32 at the deepest size: for each head and pixel at least 0, 1 in total over
            the dates, and 0 at dates that are not used.
    """

    key: str
    days: np.ndarray
    frames: np.ndarray
    used: np.ndarray
    unclear: np.ndarray | None
    attention: np.ndarray

    @property
    def by_head(self) -> np.ndarray:
        """(n_head, T), mean over pixels."""
        return self.attention.mean(axis=(2, 3))

    @property
    def by_date(self) -> np.ndarray:
        """(T,), mean over heads and pixels."""
        return self.attention.mean(axis=(0, 2, 3))

    @property
    def effective_dates(self) -> float:
        """exp(entropy) of ``by_date``: n when it is spread evenly over n dates, 1 when it stands on one."""
        shares = self.by_date[self.by_date > 0].astype(np.float64)
        return float(np.exp(-(shares * np.log(shares)).sum()))


def require_temporal(encoder: Encoder, name: str) -> UTAE:
    """``encoder``, which must attend over dates.

    Raises:
        InputError: it does not; the message calls it ``name``.
    """
    if not isinstance(encoder, UTAE):
        raise InputError(
            f"{name}: an encoder of {encoder.spec.modality}, an image: only encoders of series attend over dates"
        )
    return encoder


def rows_with_dates(manifest: Manifest, modality: str, rows: np.ndarray) -> np.ndarray:
    """Those of the ``rows``, (N,) int64, whose sample has at least one date of the series.

    Raises:
        InputError: the shards do not hold the modality, or none of the rows has a date.
    """
    if modality not in manifest.registry:
        raise InputError(f"{manifest.path}: the shards hold no {modality}; they hold {', '.join(manifest.registry)}")
    counts = pc.fill_null(pc.list_value_length(manifest.column(f"dates.{modality}")), 0).to_numpy()
    lengths = manifest.column(f"length.{modality}").to_numpy()
    rows = rows[(counts[rows] > 0) & (lengths[rows] > 0)]
    if len(rows) == 0:
        raise InputError(f"{manifest.path}: none of these patches has a date of {modality}")
    return rows


def rows_of_keys(manifest: Manifest, modality: str, keys: list[str]) -> np.ndarray:
    """Rows of the patches ``keys``, (N,) int64, in their order, each once.

    Raises:
        InputError: a key that the shards do not hold, or a patch without a date of the series.
    """
    place = {key: row for row, key in enumerate(manifest.column("key").to_pylist())}
    unknown = [key for key in keys if key not in place]
    if unknown:
        example = next(iter(place), "none")
        raise InputError(f"{manifest.path}: no patch {', '.join(unknown)}; keys look like {example}")
    rows = np.array([place[key] for key in dict.fromkeys(keys)], np.int64)
    dated = set(rows_with_dates(manifest, modality, rows).tolist())
    undated = [key for key in keys if place[key] not in dated]
    if undated:
        raise InputError(f"{manifest.path}: no date of {modality} in {', '.join(undated)}; leave them out")
    return rows


def attend(
    encoder: UTAE,
    manifest: Manifest,
    rows: np.ndarray,
    *,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
) -> Iterator[DateAttention]:
    """Attention over the dates of each patch, in the order of ``rows``.

    The encoder sees what it sees in training: dates that the quality mask calls unclear are left out.

    Args:
        encoder: of a series whose bands the shards hold; put into evaluation mode.
        manifest: open shards.
        rows: (N,) int64, manifest rows that have dates (``rows_with_dates``).
        batch_size: patches at a time.
        device: where the encoder runs.
    """
    spec = encoder.spec
    name = spec.modality
    masks = quality_masks(manifest.registry, [name])
    modality = manifest.registry[name]
    modalities = wanted_modalities(manifest.registry, [name], [])
    encoder = encoder.to(device).eval()
    days = manifest.column(f"dates.{name}")
    done = 0
    for batch in evaluation_batches(manifest, rows, modalities, batch_size=batch_size):
        batch = batch.to(device)
        given = encoder_inputs(batch, {name: spec}, masks, oriented=False)[name]
        assert given.dates is not None
        assert given.padding is not None
        with torch.inference_mode():
            attention = encoder(given.values, given.dates, given.padding, attention=True).attention
        for index, key in enumerate(batch.keys):
            taken = np.array(days[int(rows[done + index])].as_py(), "datetime64[D]")
            # A padded date has no place in the table of days, and all of them stand at the end.
            order = np.argsort(taken, kind="stable")
            frames = represent(batch.values[name][index], modality.representation, modality.nodata_below)
            unclear = None
            if name in masks and batch.present[masks[name]][index]:
                unclear = batch.values[masks[name]][index].float().amax(dim=1).mean(dim=(1, 2)).cpu().numpy()[order]
            yield DateAttention(
                key=key,
                days=taken[order],
                frames=frames.cpu().numpy()[order],
                used=~given.padding[index].cpu().numpy()[order],
                unclear=unclear,
                attention=attention[:, index].float().cpu().numpy()[:, order],
            )
        done += len(batch)
