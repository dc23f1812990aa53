"""Attention over dates: values, calendar days, table and pictures without overlapping texts."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from small_series import OPTICAL, RADAR, series_encoder, write_series

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.composites import colour_bands, series_composites
from bocage.shards.modality import FLAIR_HUB, Band, Modality
from bocage.shards.preprocess.normalize import fill_nodata, standardize
from bocage.shards.read.dataset import ShardDataset, days_since_may
from bocage.ssl.evaluation.attention import DateAttention, compute_attention, rows_for_keys, rows_with_dates
from bocage.ssl.evaluation.attention_figures import attention_figure, write_attention


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_series(tmp_path_factory.mktemp("series"), missing=2)


def random_attention(
    dates: int, heads: int, *, modality: Modality = FLAIR_HUB[OPTICAL], quality: bool = True
) -> DateAttention:
    """Make random attention; with a quality mask, every fourth date is unused."""
    random = np.random.default_rng(dates)
    used = np.arange(dates) % 4 != 1 if quality else np.ones(dates, bool)
    attention = random.random((heads, dates, 10, 10)) ** 8 * used[:, None, None]
    return DateAttention(
        key="D083-2020_NU-S2-1_13-3",
        days=np.datetime64("2020-01-02") + np.arange(dates) * 365 // dates,
        frames=random.uniform(100, 3000, (dates, len(modality.channels), 10, 10)).astype(np.float32),
        used=used,
        cloud_or_snow=100.0 * ~used if quality else None,
        attention=(attention / attention.sum(axis=1, keepdims=True)).astype(np.float32),
    )


def test_attention_equals_the_encoder_on_each_patch(manifest: Manifest) -> None:
    encoder = series_encoder(manifest, RADAR)
    rows = np.arange(len(manifest))
    dataset = ShardDataset(manifest, [FLAIR_HUB[RADAR]], 102.4, seed=0)
    for row, item in zip(rows, compute_attention(encoder, manifest, rows), strict=True):
        stored = manifest.row(int(row))
        days = np.array(stored[f"dates.{RADAR}"], "datetime64[D]")
        assert item.key == stored["key"]
        assert np.array_equal(item.days, np.sort(days))
        values = fill_nodata(standardize(torch.from_numpy(dataset[0, int(row)].arrays[RADAR]), encoder.spec))
        with torch.no_grad():
            alone = encoder(values[None], torch.from_numpy(days_since_may(days))[None], attention=True).attention
        assert alone is not None
        assert np.allclose(item.attention, alone[:, 0].numpy(), atol=1e-5)
        assert item.used.all()
        assert item.cloud_or_snow is None


def test_padded_dates_are_removed_and_cloudy_dates_get_zero(manifest: Manifest) -> None:
    rows = rows_with_dates(manifest, OPTICAL, np.arange(len(manifest)))
    assert len(rows) == len(manifest) - 1
    items = list(compute_attention(series_encoder(manifest, OPTICAL), manifest, rows, batch_size=len(rows)))
    assert len({len(item.days) for item in items}) > 1  # so the batch has padded dates
    assert not all(item.used.all() for item in items)
    for row, item in zip(rows, items, strict=True):
        assert item.attention.shape == (4, len(manifest.row(int(row))[f"dates.{OPTICAL}"]), 10, 10)
        assert np.allclose(item.attention.sum(axis=1), 1, atol=1e-5)
        assert not item.attention[:, ~item.used].any()
        assert item.cloud_or_snow is not None
        assert item.cloud_or_snow[~item.used].min(initial=100) > item.cloud_or_snow[item.used].max()


def test_effective_dates() -> None:
    item = random_attention(8, 2)
    even = np.zeros_like(item.attention)
    even[:, [0, 2, 3]] = 1 / 3
    single = np.zeros_like(even)
    single[:, 4] = 1
    for attention, expected in ((even, 3.0), (single, 1.0)):
        changed = DateAttention(item.key, item.days, item.frames, item.used, item.cloud_or_snow, attention)
        assert changed.effective_dates == pytest.approx(expected, rel=1e-5)
    assert 1 < item.effective_dates < 6


def test_without_a_quality_mask_every_date_is_used(tmp_path: Path) -> None:
    manifest = write_series(tmp_path, quality=False)
    out = tmp_path / "out"
    encoder = series_encoder(manifest, OPTICAL)
    with write_attention(encoder, manifest, np.array([1]), out).open(newline="") as file:
        lines = list(csv.DictReader(file))
    row = manifest.row(1)
    assert [line["date"] for line in lines] == sorted(str(np.datetime64(day, "D")) for day in row[f"dates.{OPTICAL}"])
    assert {(line["key"], line["used"], line["cloud_or_snow_percent"]) for line in lines} == {(row["key"], "yes", "")}
    shares = np.array([float(line["attention"]) for line in lines])
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    effective = np.exp(-(shares * np.log(shares)).sum())
    assert np.allclose([float(line["effective_dates"]) for line in lines], effective, atol=1e-2)
    assert imread(out / f"{row['key']}.png").shape[1] == 1200
    assert len(list(out.iterdir())) == 2


def test_rows_for_keys(manifest: Manifest) -> None:
    keys = manifest.column("key").to_pylist()
    assert rows_for_keys(manifest, RADAR, [keys[3], keys[0], keys[3]]).tolist() == [3, 0]
    with pytest.raises(InputError, match=f"no patch D1, D2; keys look like {keys[0]}"):
        rows_for_keys(manifest, RADAR, [keys[0], "D1", "D2"])
    lost = next(key for row, key in enumerate(keys) if not manifest.row(row)[f"length.{OPTICAL}"])
    with pytest.raises(InputError, match=f"no date of {OPTICAL} in {lost}; leave them out"):
        rows_for_keys(manifest, OPTICAL, [*keys])
    with pytest.raises(InputError, match=f"none of these patches has a date of {OPTICAL}"):
        rows_for_keys(manifest, OPTICAL, [lost])


def ticks_out_of_view(figure: Figure) -> set[Text]:
    """Labels that matplotlib keeps but does not draw."""
    labels: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high or not axes.axison]
            labels.update(label for tick in hidden for label in (tick.label1, tick.label2))
    return labels


# Takes seconds, because matplotlib lays out a thousand artists.
@pytest.mark.parametrize(("dates", "heads"), [(1, 1), (5, 16), (32, 4), (72, 16), (150, 16)])
def test_texts_of_a_picture_are_inside_it_and_do_not_overlap(dates: int, heads: int) -> None:
    figure = attention_figure(random_attention(dates, heads), FLAIR_HUB[OPTICAL])
    figure.canvas.draw()
    unseen = ticks_out_of_view(figure)
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text not in unseen]
    texts = [text for text in shown if text.get_text().strip()]
    days = [text for text in texts if text.get_text().startswith("2020-")]
    assert min(dates, 50) <= len(days) <= dates
    # Ranks above neighbouring bars may touch; they are the figures in bold.
    ranks = {text for text in texts if text.get_text().isdigit() and text.get_fontweight() == "bold"}
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text not in ranks]
    for name, box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, name
        assert box.y0 >= 0 and box.y1 <= figure.bbox.y1, name
    for (name, one), (other, two) in itertools.combinations(boxes, 2):
        across = min(one.x1, two.x1) - max(one.x0, two.x0)
        along = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert across <= 1 or along <= 1, f"{name} over {other}"


def test_picture_shows_all_dates_and_those_with_most_attention_large() -> None:
    item = random_attention(20, 4)
    figure = attention_figure(item, FLAIR_HUB[OPTICAL])
    thumbnails = figure.axes[0]
    assert len(thumbnails.images) == 20
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    order = np.argsort(-item.by_date)[:6]
    assert titles == [
        f"{rank}:  {item.days[index]}   {100 * item.by_date[index]:.1f} %" for rank, index in enumerate(order, start=1)
    ]
    assert all(item.used[order])


def test_dates_are_in_true_colour_with_the_contrast_of_used_dates() -> None:
    sensor = FLAIR_HUB[OPTICAL]
    bands = colour_bands(sensor)
    assert bands is not None
    assert [sensor.bands[band].name for band in bands] == ["B4", "B3", "B2"]
    frames = np.zeros((3, 10, 4, 4), np.float32)
    frames[0, bands[0], :2] = 3000  # half of the first date is red
    frames[1, bands[2], 0, 0] = np.nan
    frames[2] = 12_000
    shown = series_composites(frames, sensor, np.array([True, True, False]))
    assert shown.shape == (3, 4, 4, 3)
    assert shown[0, 0, 0].tolist() == [1, 0, 0]
    assert shown[1].tolist() == np.zeros((4, 4, 3)).tolist()
    assert (shown[2] == 1).all()


def test_radar_is_a_composite_and_other_sensors_are_grey() -> None:
    random = np.random.default_rng(0)
    radar = random.normal(-12, 3, (2, 2, 5, 5)).astype(np.float32)
    all_dates = np.ones(2, bool)
    shown = series_composites(radar, FLAIR_HUB[RADAR], all_dates)
    ratio = radar[:, 0] - radar[:, 1]
    assert np.argmax(shown[..., 2]) in np.flatnonzero(ratio >= np.percentile(ratio, 98))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 25
    thermal = Modality(
        name="THERMAL_TS",
        role="series",
        bands=(Band(name="T", quantity="reflectance", wavelength=11_000.0),),
        dtype="uint16",
        gsd=10.24,
        size=10,
        codec="plain",
        groups=(("T",),),
        unit=5,
        dates_table="THERMAL",
    )
    grey = series_composites(radar[:, :1], thermal, all_dates)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()
    holes = series_composites(np.full_like(radar, np.nan), FLAIR_HUB[RADAR], all_dates)
    assert not holes.any()
