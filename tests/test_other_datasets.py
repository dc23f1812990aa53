"""Pretraining, probes, fine-tuning, maps and cards of datasets that are not FLAIR-HUB, at the size of tests."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from matplotlib.image import imread
from omegaconf import OmegaConf
from other_dataset import CROPS, OPTICAL, RADAR, RGB, ROOFS, SPLIT, TERRAIN, THERMAL, write_crops, write_roofs
from small_map import dates_file, ground, write
from small_recipes import PRETRAIN

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import load_segmentation, save_segmentation
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.finetune.official.convert import to_official
from bocage.finetune.train import build_task, finetune
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Registry
from bocage.shards.source.described.description import TAKEN_NAMES
from bocage.ssl.encoders.export import load_encoder, save_encoder
from bocage.ssl.pretrain import build_pretraining_model, pretrain
from bocage.ssl.pretrain_config import OBJECTIVES, PretrainConfig
from bocage.tools.main import main

LABELS = {"roofs": ROOFS, "crops": CROPS}
SENSORS = {"roofs": (RGB, THERMAL), "crops": (OPTICAL, RADAR, TERRAIN)}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Shards of 16 patches of each dataset."""
    folder = tmp_path_factory.mktemp("data")
    return {"roofs": write_roofs(folder / "roofs", 16), "crops": write_crops(folder / "crops")}


def pretraining(manifest: Manifest, output: Path, *words: str) -> PretrainConfig:
    settings = [f"shards={manifest.path}", f"output={output}", f"split={SPLIT}", "window=null", "batch_size=4"]
    return recipes.resolve(PretrainConfig, [*PRETRAIN, *settings, "engine.steps=3", *words])


def records(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# About 4 s for each objective: three steps of two small encoders, and probes.
@pytest.mark.parametrize("dataset", LABELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(dataset: str, objective: str, manifests: dict[str, Manifest], tmp_path: Path) -> None:
    words = ["weights.masked=0", f"weights.{objective}=1", "latent.decoder.width=32", "latent.decoder.heads=4"]
    words += [f"probe.label={LABELS[dataset]}", "probe.patches=8", "engine.evaluate_every=3"]
    assert pretrain(pretraining(manifests[dataset], tmp_path, *words)).exit_code == 0
    lines = records(tmp_path)
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    for name in SENSORS[dataset]:
        assert 0 <= lines[-1][f"evaluation/linear_miou/{name}"] <= 100
        spec = load_encoder(tmp_path / "encoders" / name).spec
        assert spec.bands == tuple(band.name for band in manifests[dataset].registry[name].bands)
    assert (tmp_path / "reconstructions").exists() == (objective == "masked")


def test_mask_units_are_whole_patches_of_a_swin(tmp_path: Path) -> None:
    manifest = write_roofs(tmp_path, 4, (RGB, ROOFS))
    manifest.registry = Registry((replace(manifest.registry[RGB], unit=2), manifest.registry[ROOFS]))
    with pytest.raises(InputError, match="ORTHO_RGB: its mask unit of 2 px is not a multiple of the 4-px patches of"):
        build_pretraining_model(pretraining(manifest, tmp_path / "run"), manifest)


def finetuning(manifest: Manifest, output: Path, *words: str) -> FinetuneConfig:
    """Configuration of a small model of all sensors of the shards, for their only label."""
    small = [word for word in PRETRAIN if word.startswith(("swin", "utae", "workers", "engine"))]
    settings = [f"shards={manifest.path}", f"output={output}", f"split={SPLIT}", "window=null", "batch_size=4"]
    settings += ["labels=[]", "modalities=[]", "engine.steps=4", "engine.evaluate_every=2"]
    return recipes.resolve(FinetuneConfig, ["recipe=finetune_quickstart", *small, *settings, *words])


# Some seconds each: four steps of a small model, evaluation and prediction of a few patches.
@pytest.mark.parametrize("norm", ["group", pytest.param("batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dataset", LABELS)
def test_a_model_of_the_only_label_trains(
    dataset: str, norm: str, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    manifest, label = manifests[dataset], LABELS[dataset]
    auxiliary = f"auxiliary=[{SENSORS[dataset][1]}]"
    result = finetune(finetuning(manifest, tmp_path, f"decoder.norm={norm}", auxiliary))
    scheme = manifest.registry[label].schemes[0]
    assert result["labels"] == {
        label: {
            "level": 1,
            "grouping": "",
            "classes": list(scheme.classes),
            "unscored": list(scheme.unscored),
            "background": scheme.background,
        }
    }
    assert np.sum(result["test"][label]["confusion"]) == 4 * manifest.registry[label].size ** 2
    written = "panels.png" if dataset == "roofs" else "predictions.csv"
    assert (tmp_path / "predictions" / written).is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["split=split_1"], r"no split 'split_1'; set split= to one of: split_blocks; split=all takes"),
        (["valid=val"], r"no sample has split_blocks = 'val'; values: test, train, valid"),
        ([f"tasks.{ROOFS}.grouping=flair_challenge"], r"groups the classes of FLAIR-HUB's COSIA only: leave it out"),
        ([f"tasks.{ROOFS}.level=2"], r"ROOFS has one level, not 2"),
        (["window=10"], r"window=10: not whole pixels in every modality; .* 0.264, 0.528, 0.792, ... 16.896 m wide"),
        (["labels=[COSIA]"], r"labels: COSIA is not a label of .*; its labels are ROOFS"),
    ],
)
def test_settings_of_flair_hub_are_refused_in_one_sentence(
    words: list[str], sentence: str, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        finetune(finetuning(manifests["roofs"], tmp_path / "run", *words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_official_models_are_for_flair_hub_only(manifests: dict[str, Manifest], tmp_path: Path) -> None:
    words = ["recipe=official/lc_a", "labels=[]", "modalities=[]", f"split={SPLIT}"]
    for dataset, name in (("roofs", RGB), ("crops", TERRAIN)):
        config = recipes.resolve(FinetuneConfig, [*words, f"shards={manifests[dataset].path}", f"output={tmp_path}"])
        with pytest.raises(InputError, match=f"models of FLAIR-HUB, which read AERIAL_RGBI, .*: {name} of these"):
            finetune(replace(config, encoders={}))
    config = replace(finetuning(manifests["roofs"], tmp_path), decoder=UPerNetConfig())
    task = build_task(config, manifests["roofs"])
    with pytest.raises(InputError, match="official checkpoints are for FLAIR-HUB, which has no ORTHO_RGB"):
        to_official(task)


@pytest.fixture(scope="module")
def models(manifests: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of untrained models, by dataset: one step each."""
    folder = tmp_path_factory.mktemp("models")
    for dataset, manifest in manifests.items():
        finetune(finetuning(manifest, folder / dataset, "engine.steps=1", "predictions=0", "pictures=0"))
    return {dataset: folder / dataset for dataset in manifests}


def test_predictions_lie_where_their_patches_do(
    manifests: dict[str, Manifest], models: dict[str, Path], tmp_path: Path
) -> None:
    manifest = manifests["roofs"]
    assert main(["predict", str(models["roofs"]), str(manifest.path), str(tmp_path), "--split", SPLIT]) == 0
    label = manifest.registry[ROOFS]
    for row in manifest.split(SPLIT, "test"):
        values = manifest.row(int(row))
        with rasterio.open(tmp_path / f"{values['key']}.tif") as file:
            assert (file.width, file.height, file.crs.to_string()) == (label.size, label.size, values["crs"])
            left, bottom, right, top = file.bounds
            assert (left, top) == (values["left"], values["top"])
            assert (right - left, top - bottom) == pytest.approx((values["side"],) * 2)
            assert file.tags(1)["CLASS_1"] == label.schemes[0].classes[1]


def test_classes_of_series_of_one_pixel_are_a_table(
    manifests: dict[str, Manifest], models: dict[str, Path], tmp_path: Path
) -> None:
    manifest, scheme = manifests["crops"], manifests["crops"].registry[CROPS].schemes[0]
    assert main(["predict", str(models["crops"]), str(manifest.path), str(tmp_path), "--split", SPLIT]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [manifest.row(int(row)) for row in manifest.split(SPLIT, "test")]
    assert [line["key"] for line in lines] == [row["key"] for row in expected]
    for line, row in zip(lines, expected):
        assert (float(line["x"]), float(line["y"])) == (row["left"] + 5, row["top"] - 5) and line["crs"] == row["crs"]
        assert line[CROPS] == scheme.classes[int(line[f"{CROPS}_value"])]


def test_a_table_without_labels_is_classified(models: dict[str, Path], tmp_path: Path) -> None:
    bands = {"B2": 490, "B3": 560, "B4": 665, "B8": 842, "B11": 1610}
    columns = {band: np.arange(400, 412, dtype=np.uint16) * number for number, band in enumerate(bands, start=1)}
    days = [f"2021{month:02}15" for month in (3, 6, 9) for _ in range(4)]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"id": list("abcd") * 3, "day": days, **columns}), tmp_path / "tables" / "t.parquet")
    sensor = {"role": "series", "dtype": "uint16", "bands": bands}
    labels = {CROPS: {"column": "crop", "classes": {1: "maize"}}}
    values = {"name": "t", "kind": "table", "patch": 10, "table": {"key": "id", "date": "day"}}
    description = {**values, "sensors": {OPTICAL: sensor}, "labels": labels}
    (tmp_path / "t.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(description)))
    described = f"dataset={tmp_path / 't.yaml'}"
    assert main(["predict", str(models["crops"]), str(tmp_path / "tables"), str(tmp_path / "out"), described]) == 0
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[:4] for line in lines[1:]] == [[key, "", "0.0", "0.0"] for key in "abcd"]


def test_maps_of_small_patches_and_of_single_pixels(models: dict[str, Path], tmp_path: Path) -> None:
    image = write(tmp_path / "image.tif", ground(300, 200)[:3], 0.132)
    assert main(["map", str(models["roofs"]), str(tmp_path / "roofs"), "--raster", f"{RGB}={image}"]) == 0
    with rasterio.open(tmp_path / "roofs" / f"{ROOFS}.tif") as file:
        assert (file.shape, file.res) == ((300, 200), (0.132, 0.132))
        assert set(np.unique(file.read())) <= {0, 1, 2, 3}
    series = np.random.default_rng(0).integers(1, 4000, (60, 9, 14)).astype(np.uint16)
    series[:, 2, 3] = 0
    pixels = write(tmp_path / "series.tif", series, 10.0, nodata=0)
    words = ["--raster", f"{OPTICAL}={pixels}", "--dates", f"{OPTICAL}={dates_file(tmp_path, 12)}"]
    assert main(["map", str(models["crops"]), str(tmp_path / "crops"), *words]) == 0
    with rasterio.open(tmp_path / "crops" / f"{CROPS}.tif") as file:
        assert (file.shape, file.res) == ((9, 14), (10.0, 10.0))
        assert np.argwhere(file.read(1) == 255).tolist() == [[2, 3]]


def test_attention_of_a_single_pixel(manifests: dict[str, Manifest], models: dict[str, Path], tmp_path: Path) -> None:
    model = load_segmentation(models["crops"] / "model")
    save_encoder(model.model.encoder(OPTICAL), tmp_path / "encoder")
    shards = str(manifests["crops"].path)
    assert main(["attention", str(tmp_path / "encoder"), shards, str(tmp_path / "out"), "--count", "2"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize("dataset", LABELS)
def test_the_contact_sheet_shows_any_sensor(dataset: str, manifests: dict[str, Manifest], tmp_path: Path) -> None:
    shards = str(manifests[dataset].path)
    assert main(["inspect", shards, "--rows", "--picture", str(tmp_path / "sheet.png")]) == 0
    assert imread(tmp_path / "sheet.png")[..., :3].std() > 0.1


# Some seconds: a pretraining of one step, and its probes.
@pytest.mark.parametrize("dataset", LABELS)
def test_cards_name_the_dataset_and_never_flair_hub(
    dataset: str, manifests: dict[str, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, name = manifests[dataset], SENSORS[dataset][0]
    words = ["engine.steps=1", "engine.save_every=1", "reconstructions=0", f"modalities=[{name}]"]
    assert pretrain(pretraining(manifest, tmp_path / "run", *words)).exit_code == 0
    encoder = str(tmp_path / "run" / "encoders" / name)
    probe = ["study", "probe", encoder, str(manifest.path), str(tmp_path / "probe"), "--split", SPLIT, "--kinds", "knn"]
    assert main(probe) == 0
    publish = ["publish", str(tmp_path / "run"), str(tmp_path / "out"), "--shards", str(manifest.path)]
    publish += ["--scores", *map(str, (tmp_path / "probe").glob("knn-*")), "--license", "apache-2.0"]
    if dataset == "crops":  # its shards name no licence
        assert main(publish) == 2
        assert "--data-license: the licence of Crops is unknown" in capsys.readouterr().err
        publish += ["--data-license", "cc0-1.0"]
    for claim in ("FLAIR-HUB", "IGNF/FLAIR-HUB"):
        assert main([*publish, "--dataset", claim]) == 2
        assert f"--dataset {claim}: the shards are of {manifest.dataset.name}" in capsys.readouterr().err
    assert main(publish) == 0
    published = tmp_path / "out" / name
    files = {path.name: path.read_text() for path in published.iterdir() if path.suffix != ".safetensors"}
    assert not any("flair" in text.lower() or "102.4" in text for text in files.values())
    card = files["README.md"]
    if dataset == "roofs":
        assert "pretrained without labels on\n[Roofs](https://example.org/roofs) with bocage" in card
        assert "Data (Roofs): CC-BY-4.0.\n" in card and "Attribution of the data: Town hall.\n" in card
        assert "cropped from patches of 16.896 m (128 x 128 pixels)" in card and "cells of 2.112 m" in card
    else:
        assert "Data (Crops): cc0-1.0.\n" in card and "Attribution" not in card
        assert "cropped from patches of 10 m (1 x 1 pixels)" in card and "cells of 10 m" in card
    for source in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        source = source.replace("local-dir:.", f"local-dir:{published}").replace(
            'load_encoder(".")', "load_encoder(HERE)"
        )
        exec(compile(source, "card", "exec"), {"HERE": published})


def test_no_sensor_has_the_name_of_an_attribute_of_torch() -> None:
    attributes = {name for name in dir(torch.nn.ModuleDict()) if name.isalnum()}
    assert attributes <= TAKEN_NAMES


# Some seconds: three tiles of 512 px.
def test_predictions_of_web_map_tiles_have_the_pixels_of_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiles in EPSG:3857 at 27.6 degrees: 0.132 m on the ground are 0.149 units."""
    tiles = Path(__file__).parent / "data" / "drone_buildings" / "banepa"
    folders = ["--images", str(tiles / "image"), "--labels", str(tiles / "label")]
    assert main(["shard", *folders, str(tmp_path / "shards")]) == 0
    manifest = Manifest.open(tmp_path / "shards")
    task = build_task(finetuning(manifest, tmp_path / "run"), manifest)
    save_segmentation(task, tmp_path / "run" / "model")
    assert main(["predict", str(tmp_path / "run"), str(manifest.path), str(tmp_path / "maps")]) == 0
    sources = {path.stem: path for path in (tiles / "image").glob("*.tif")}
    maps = sorted((tmp_path / "maps").glob("*.tif"))
    assert len(maps) == 3
    for path in maps:
        (source,) = (image for stem, image in sources.items() if path.stem in stem)
        with rasterio.open(source) as image, rasterio.open(path) as prediction:
            assert prediction.crs == image.crs and prediction.shape == image.shape
            assert prediction.bounds == pytest.approx(image.bounds)
    # The same images without a description.
    images = tmp_path / "images"
    shutil.copytree(tiles / "image", images)
    command = ["predict", str(tmp_path / "run"), str(images), str(tmp_path / "out")]
    assert main([*command, "--preview", "2"]) == 2
    assert "--preview: is not for images" in capsys.readouterr().err
    twin = next(images.glob("*.tif")).with_suffix(".png")
    twin.touch()
    assert main(command) == 2
    assert "their maps would share the folder" in capsys.readouterr().err
    twin.unlink()
    assert main([*command, "--batch-size", "1"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(sources)
