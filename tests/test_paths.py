"""The main job end to end: real patches, real series, and a sensor that only a copy of the registry knows."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.merge import merge
from real_series import treesat_tree
from small_recipes import PRETRAIN

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.train import finetune
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB, Band, Modality, SimulatedSensor
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import load_encoder
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import main

DATA = Path(__file__).parent / "data"
COSIA, LPIS = "AERIAL_LABEL-COSIA", "ALL_LABEL-LPIS"


def losses(output: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def run_pretraining(shards: Path, output: Path, *words: str) -> None:
    config = recipes.resolve(PretrainConfig, [*PRETRAIN, f"shards={shards}", f"output={output}", "split=all", *words])
    assert pretrain(config).exit_code == 0


def take_real_patches_to_maps(folder: Path, *words: str) -> float:
    """GeoTIFF, shards, encoder, model, GeoTIFF; the fit (strict mIoU) on the three patches."""
    manifest = write_shards(FlairHubCatalogue.open(DATA / "flairhub_real"), folder / "shards")
    assert list(manifest.registry) == ["AERIAL_RGBI", "AERIAL_LABEL-COSIA"]
    run = folder / "pretrain"
    run_pretraining(manifest.path, run, "engine.steps=40", "engine.optimizer.learning_rate=2e-3")
    values = losses(run)
    assert np.mean(values[-5:]) < 0.97 * np.mean(values[:5])
    assert list((run / "reconstructions").glob("reconstruction_*.png"))

    settings = [
        "recipe=finetune_quickstart",
        f"shards={manifest.path}",
        f"output={folder / 'finetune'}",
        f"encoders.AERIAL_RGBI={run / 'encoders' / 'AERIAL_RGBI'}",
        "modalities=[AERIAL_RGBI]",
        "split=all",
        "workers=0",
        "predictions=3",
        *words,
    ]
    result = finetune(recipes.resolve(FinetuneConfig, settings))
    for key in manifest.column("key").to_pylist():
        domain, roi, tile = key.split("_")
        source = DATA / "flairhub_real" / f"{domain}_AERIAL_RGBI" / roi / f"{domain}_AERIAL_RGBI_{roi}_{tile}.tif"
        (path,) = (folder / "finetune" / "predictions").rglob(f"*{key}*.tif")
        with rasterio.open(source) as image, rasterio.open(path) as prediction:
            assert prediction.transform.almost_equals(image.transform, precision=1e-6)
            assert prediction.crs == image.crs
            assert prediction.shape == image.shape
    return float(result["valid"]["AERIAL_LABEL-COSIA"]["strict"]["miou"])


# About 20 s: two trainings of some dozen steps.
@pytest.mark.slow
def test_real_patches_from_geotiff_to_map(tmp_path: Path) -> None:
    assert take_real_patches_to_maps(tmp_path, "engine.steps=30") > 5


@pytest.mark.slow(minutes=6)  # It trains until three patches of 512 px are fitted.
def test_real_patches_are_fitted(tmp_path: Path) -> None:
    words = ("window=102.4", "batch_size=3", "decoder.norm=batch", "engine.steps=280")
    assert take_real_patches_to_maps(tmp_path, *words, "engine.optimizer.learning_rate=3e-3") > 80


@pytest.mark.slow(minutes=10)  # It trains until four simulated patches are fitted.
def test_simulated_scenes_are_fitted(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", patches=4, seed=5)
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    settings = [
        "recipe=finetune_quickstart",
        f"shards={manifest.path}",
        f"output={tmp_path / 'run'}",
        f"labels=[{COSIA},{LPIS}]",
        "modalities=[AERIAL_RGBI,SENTINEL2_TS]",
        "split=all",
        "workers=0",
        "predictions=0",
        "engine.steps=1600",
        "engine.optimizer.learning_rate=5e-3",
    ]
    result = finetune(recipes.resolve(FinetuneConfig, settings))
    for label in (COSIA, LPIS):
        assert result["valid"][label]["strict"]["miou"] > 75, label


# About 15 s: U-TAE on 146, 115 and 235 real dates.
@pytest.mark.slow
def test_real_series_drive_the_temporal_encoders(tmp_path: Path) -> None:
    treesat_tree(tmp_path / "tree")
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    row = manifest.row(0)
    assert [len(row[f"dates.{name}"]) for name in ("SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS")] == [
        146,
        115,
        235,
    ]
    assert datetime.fromtimestamp(row["dates.SENTINEL2_TS"][0] * 86400, UTC).strftime("%Y%m%d") == "20190103"
    output = tmp_path / "pretrain"
    run_pretraining(manifest.path, output, "window=102.4", "engine.steps=30", "engine.optimizer.learning_rate=3e-3")
    values = losses(output)
    assert np.mean(values[-5:]) < 0.97 * np.mean(values[:5])
    for name in ("SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS"):
        encoder = load_encoder(output / "encoders" / name)
        assert encoder.spec.series
        assert len(encoder.spec.mean) == len(FLAIR_HUB[name].channels)


@pytest.mark.slow
def test_an_eighth_sensor_needs_a_registry_entry_and_nothing_else(tmp_path: Path) -> None:
    sensor = Modality(
        name="PLANET_RE",
        role="image",
        bands=(
            Band(name="red", quantity="reflectance", wavelength=665.0),
            Band(name="edge", quantity="reflectance", wavelength=720.0),
        ),
        dtype="uint16",
        gsd=3.2,
        size=32,
        codec="reflectance",
        groups=(("red", "edge"),),
        unit=4,
        dates_table="PLANET",
        sensor=SimulatedSensor(gain=10_000.0, noise=20.0),
    )
    registry = FLAIR_HUB.with_modality(sensor)
    write_tree(tmp_path / "tree", patches=3, seed=0, registry=registry, dates=(6, 8))
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree", registry), tmp_path / "shards")
    assert manifest.counts["present"]["PLANET_RE"] == 3
    run_pretraining(Manifest.open(manifest.path).path, tmp_path / "run", "engine.steps=3")
    assert all(np.isfinite(losses(tmp_path / "run", "masked/PLANET_RE")))
    assert load_encoder(tmp_path / "run" / "encoders" / "PLANET_RE").spec.bands == ("red", "edge")


# Some seconds: three short trainings on the real patches.
def test_a_resumed_run_follows_its_shards_but_not_other_ones(tmp_path: Path) -> None:
    manifest = write_shards(FlairHubCatalogue.open(DATA / "flairhub_real"), tmp_path / "shards")
    run = tmp_path / "run"
    run_pretraining(manifest.path, run, "engine.steps=2")
    moved = manifest.path.rename(tmp_path / "moved")
    run_pretraining(moved, run, "engine.steps=3")
    assert len(losses(run)) == 3
    text = (moved / "dataset.json").read_text()
    description = json.loads(text)
    description["statistics"]["AERIAL_RGBI"]["mean"][0] += 5
    (moved / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"another configuration.*shards"):
        run_pretraining(moved, run, "engine.steps=4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=mae_multimodal"], "write shards with `bocage shard SRC OUT`"),
        (["recipe=quickstart", "shards=/nowhere"], "bocage shard SRC /nowhere"),
        (["recipe=quickstart", "shards=/nowhere", "engine.steps=5"], "bocage shard SRC /nowhere"),  # in the warm-up
        (["recipe=quickstart", "engine.stepps=3"], "did you mean 'engine.steps'?"),
        (["recipe=quickstart", "masking.images=packedd"], "masking.images"),
    ],
)
def test_wrong_input_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bocage.tools.main import main

    assert main(["pretrain", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_print_config_shows_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from bocage.tools.main import main

    assert main(["pretrain", "recipe=quickstart", "engine.steps=70", "--print-config"]) == 0
    config = capsys.readouterr().out
    assert "steps: 70" in config
    assert "window: 51.2" in config


@pytest.mark.slow  # Some 40 s: two trainings of a few steps on tiles of 512 px.
def test_drone_tiles_from_a_folder_to_a_map(tmp_path: Path) -> None:
    """The drone tutorial: describe, shard, pretrain, fine-tune, map a mosaic of neighbouring tiles."""
    drone, shards, file = DATA / "drone_buildings", tmp_path / "shards", tmp_path / "drone.yaml"
    assert main(["describe", str(drone), "-o", str(file)]) == 0
    assert main(["shard", str(drone), str(shards), f"dataset={file}"]) == 0
    steps = ["window=35.84", "workers=0", "engine.steps=4", "engine.optimizer.warmup_steps=1"]
    pretraining = ["recipe=own_imagery_quickstart", f"shards={shards}", f"output={tmp_path / 'pre'}", "batch_size=2"]
    assert main(["pretrain", *pretraining, *steps, "reconstructions=0"]) == 0
    training = ["recipe=finetune_own_imagery_quickstart", f"shards={shards}", f"output={tmp_path / 'run'}"]
    encoder = f"encoders.RGB={tmp_path / 'pre' / 'encoders' / 'RGB'}"
    assert main(["finetune", *training, *steps, "split=split_site", "valid=test", "predictions=0", encoder]) == 0
    tiles = sorted((drone / "zanzibar" / "image").glob("*.tif"))
    merge(tiles, dst_path=tmp_path / "mosaic.tif")
    assert (
        main(["map", str(tmp_path / "run"), str(tmp_path / "map"), "--raster", f"RGB={tmp_path / 'mosaic.tif'}"]) == 0
    )
    with rasterio.open(tmp_path / "mosaic.tif") as mosaic, rasterio.open(tmp_path / "map" / "LABEL.tif") as result:
        assert result.crs == mosaic.crs
        assert result.bounds == pytest.approx(mosaic.bounds, abs=0.2)
        assert result.width / result.height == pytest.approx(2.0, abs=0.01)
        assert set(np.unique(result.read(1))) <= set(range(5))
