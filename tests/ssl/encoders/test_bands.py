"""Adapt encoders: known bands keep their weights, removed ones count as their mean, new ones have no effect."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import segmentation_models_pytorch as smp
import timm
import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec, standardize
from bocage.ssl.encoders.bands import NewBand, adapt_bands
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import load_encoder, save_encoder

AERIAL, S2 = "AERIAL_RGBI", "SENTINEL2_TS"
SWIN = EncoderConfig(options={"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]})
UTAE = EncoderConfig(
    architecture="utae",
    options={"encoder_widths": [16, 16, 32], "decoder_widths": [16, 16, 32], "d_model": 32, "n_head": 4},
)


def encoder(name: str) -> Encoder:
    torch.manual_seed(0)
    channels = len(FLAIR_HUB[name].channels)
    spec = InputSpec.from_modality(FLAIR_HUB[name], tuple(100.0 + 7 * i for i in range(channels)), (20.0,) * channels)
    return build_encoder(spec, SWIN if name == AERIAL else UTAE).eval()


def maps(model: Encoder, stored: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        values = standardize(stored, model.spec)
        if not model.spec.series:
            return model.features(values)
        dates = torch.tensor([[-30.0, 10.0, 90.0]])
        return model.features(values, dates, torch.zeros(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", [AERIAL, S2])
def test_known_bands_keep_their_weights_at_any_position(name: str) -> None:
    whole = encoder(name)
    stored = torch.rand(1, 4, 64, 64) * 200 if name == AERIAL else torch.rand(1, 3, 10, 10, 10) * 200
    chosen = [whole.spec.bands[at] for at in (3, 0, 1)]
    some = adapt_bands(whole, chosen)
    assert some.spec.bands == some.spec.channels == tuple(chosen)
    assert some.spec.wavelengths == tuple(whole.spec.wavelengths[at] for at in (3, 0, 1))
    rest = [at for at in range(len(whole.spec.bands)) if at not in (3, 0, 1)]
    at_mean = stored.clone()
    for at in rest:
        at_mean[..., at, :, :] = whole.spec.mean[at]
    for ours, theirs in zip(maps(some, stored[..., [3, 0, 1], :, :]), maps(whole, at_mean), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # An untrained new band has no effect.
    more = adapt_bands(whole, [*whole.spec.bands, "X"], {"X": NewBand(5.0, 2.0, wavelength=705.0)})
    padded = torch.cat([stored, torch.rand_like(stored[..., :1, :, :])], dim=-3)
    for ours, theirs in zip(maps(more, padded), maps(whole, stored), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert more.spec.wavelengths[-1] == 705.0


def test_adapted_encoders_load_in_timm_and_smp(tmp_path: Path) -> None:
    some = adapt_bands(encoder(AERIAL), ["NIR", "R", "G"])
    save_encoder(some, tmp_path / "some")
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = load_encoder(tmp_path / "some").features(image)
        plain = timm.create_model(f"local-dir:{tmp_path / 'some'}", pretrained=True, features_only=True).eval()(image)
        # segmentation-models-pytorch, torchgeo and terratorch load timm encoders this way.
        net = smp.Unet(f"tu-local-dir:{tmp_path / 'some'}", encoder_weights=True, in_channels=3, classes=5).eval()
        routed = net.encoder(image)
    for ours, theirs, through in zip(expected, plain, routed[-4:], strict=True):
        assert torch.equal(ours, theirs.permute(0, 3, 1, 2))
        assert torch.equal(ours, through)
    assert net(image).shape == (1, 5, 128, 128)


# Takes 10 s: the example with fewer and smaller windows.
@pytest.mark.slow
def test_example_trains_on_geotiffs(tmp_path: Path) -> None:
    save_encoder(encoder(AERIAL), tmp_path / "encoder")
    for folder, count in (("images", 3), ("labels", 1)):
        (tmp_path / folder).mkdir()
        profile = {"driver": "GTiff", "count": count, "height": 90, "width": 100, "dtype": "uint8"}
        with rasterio.open(tmp_path / folder / "a.tif", "w", **profile) as file:
            file.write(np.random.default_rng(0).integers(0, 3, (count, 90, 100), np.uint8))
    source = (Path(__file__).parents[3] / "examples" / "own_geotiffs.py").read_text()
    assert "256, 8, 1000" in source
    (tmp_path / "run.py").write_text(source.replace("256, 8, 1000", "64, 2, 21"))
    line = [sys.executable, "run.py", "encoder", "images", "labels", "3"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 20  loss" in done.stdout
    assert (tmp_path / "model.pt").is_file()


# Takes 10 s: images smaller than a window, with nodata; then missing arguments.
@pytest.mark.slow
def test_example_accepts_small_images_with_nodata_and_prints_usage(tmp_path: Path) -> None:
    save_encoder(encoder(AERIAL), tmp_path / "encoder")
    for folder, count, dtype in (("images", 3, "float32"), ("labels", 1, "uint8")):
        (tmp_path / folder).mkdir()
        profile = {"driver": "GTiff", "count": count, "height": 40, "width": 50, "dtype": dtype}
        with rasterio.open(tmp_path / folder / "a.tif", "w", nodata=np.nan if count == 3 else 255, **profile) as file:
            values = np.random.default_rng(0).integers(0, 3, (count, 40, 50)).astype(dtype)
            if count == 3:
                values[:, :9] = np.nan
            file.write(values)
    source = (Path(__file__).parents[3] / "examples" / "own_geotiffs.py").read_text()
    (tmp_path / "run.py").write_text(source.replace("256, 8, 1000", "64, 2, 1"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "run.py", *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = run("encoder", "images", "labels", "3")
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout
    done = run("encoder")
    assert done.returncode == 1 and "python own_geotiffs.py ENCODER IMAGES LABELS CLASSES" in done.stderr
    assert "Traceback" not in done.stderr


def test_new_band_requires_valid_statistics() -> None:
    for mean, std in ((0.0, 0.0), (0.0, -3.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="must be finite, std positive"):
            NewBand(mean, std)


def test_wrong_bands_raise_input_error() -> None:
    whole = encoder(AERIAL)
    for bands, new, message in (
        (["R", "SWIR"], {}, "band SWIR: the encoder knows R, G, B, NIR; describe other bands in new_bands"),
        (["R", "R"], {}, "each band can be given once"),
        (["SWIR"], {"SWIR": NewBand(1.0, 1.0)}, "the encoder knows none of them"),
        (["R"], {"R": NewBand(1.0, 1.0)}, "new band R: not in bands"),
    ):
        with pytest.raises(InputError, match=message):
            adapt_bands(whole, bands, new)
    heights = build_encoder(InputSpec.from_modality(FLAIR_HUB["DEM_ELEV"], (0.0, 0.0), (1.0, 1.0)), SWIN)
    with pytest.raises(InputError, match="read as relief, height, from all bands together"):
        adapt_bands(heights, ["DSM"])
