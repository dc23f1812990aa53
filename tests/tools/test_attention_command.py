"""``bocage attention``: pictures and table of the selected patches, and errors in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from small_series import OPTICAL, RADAR, series_encoder, write_series

from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import save_encoder
from bocage.tools.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shards``, the encoders ``optical`` and ``image``, and ``other``, of bands that the shards do not hold."""
    folder = tmp_path_factory.mktemp("attention")
    manifest = write_series(folder)
    save_encoder(series_encoder(manifest, OPTICAL), folder / "optical")
    save_encoder(series_encoder(manifest, RADAR), folder / "radar")
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
    spec = InputSpec.from_modality(FLAIR_HUB["SPOT_RGBI"], (0.0,) * 4, (1.0,) * 4)
    save_encoder(build_encoder(spec, EncoderConfig(options=small)), folder / "image")
    return folder


def test_pictures_and_table_of_selected_patches(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(folder / "shards")
    keys = manifest.column("key").to_pylist()[:2]
    arguments = ["attention", str(folder / "optical"), str(manifest.path), str(tmp_path / "out"), "--keys", *keys]
    assert main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{key}.png" for key in keys} | {"attention.csv"}
    with (tmp_path / "out" / "attention.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["key"] for line in lines] == [
        key for row, key in enumerate(keys) for _ in manifest.row(row)[f"dates.{OPTICAL}"]
    ]


def test_patches_spread_over_a_split(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(folder / "shards")
    arguments = ["attention", str(folder / "radar"), str(manifest.path), str(tmp_path), "--count", "2"]
    assert main(arguments) == 0
    keys = manifest.column("key").to_pylist()
    assert {path.stem for path in tmp_path.glob("*.png")} == {keys[0], keys[-1]}


@pytest.mark.parametrize(
    ("encoder", "arguments", "message"),
    [
        ("image", [], "is an encoder of SPOT_RGBI, an image: give an encoder of a series"),
        ("nowhere", [], "nowhere"),
        ("optical", ["--keys", "D000-2020_AA-S1-1_0-0"], "no patch D000-2020_AA-S1-1_0-0; keys look like D"),
        ("optical", ["--keys", "a", "--count", "3"], "--keys names the patches: leave out --count and --split"),
        ("optical", ["--split", "split_9"], "no split 'split_9'"),
    ],
)
def test_wrong_arguments_print_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: str, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["attention", str(folder / encoder), str(folder / "shards"), str(out), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_shards_without_the_series_or_its_bands_raise_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "optical" / "config.json").read_text()
    content = json.loads(text)
    content["bocage"]["input"]["modality"] = "PLANET_TS"
    other = tmp_path / "planet"
    other.mkdir()
    (other / "model.safetensors").write_bytes((folder / "optical" / "model.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps(content))
    assert main(["attention", str(other), str(folder / "shards"), str(tmp_path / "out")]) == 2
    assert "the shards have no PLANET_TS; they have SENTINEL2_TS" in capsys.readouterr().err

    for key in ("bands", "channels", "quantities", "wavelengths"):
        content["bocage"]["input"][key] = content["bocage"]["input"][key][::-1]
    content["bocage"]["input"]["modality"] = OPTICAL
    (other / "config.json").write_text(json.dumps(content))
    assert main(["attention", str(other), str(folder / "shards"), str(tmp_path / "out")]) == 2
    assert "SENTINEL2_TS has the bands B2, B3" in capsys.readouterr().err


def test_error_names_an_output_folder_that_cannot_be_created(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "file" / "out"
    out.parent.touch()
    assert main(["attention", str(folder / "optical"), str(folder / "shards"), str(out), "--count", "1"]) == 2
    assert "cannot be written" in capsys.readouterr().err
