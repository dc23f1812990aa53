"""``bocage describe``, and shards of two folders without a description."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from small_tree import CORNER, write_raster

from bocage.recipes.loader import load_dataset
from bocage.shards.format.manifest import Manifest
from bocage.shards.source.described.description import build_registry
from bocage.tools.cli.image_options import read_classes
from bocage.tools.main import main

DRONE = Path(__file__).parents[1] / "data" / "drone_buildings"
BANEPA = ["--images", str(DRONE / "banepa" / "image"), "--labels", str(DRONE / "banepa" / "label")]
ROOFS = ("background", "concrete", "tin or metal", "clay tiles", "unknown")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(ROOFS) + "\n")
    return path


def test_the_draft_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(DRONE)]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["patch"] == "512 px"
    file = tmp_path / "drone.yaml"
    assert main(["describe", str(DRONE), "-o", str(file)]) == 0
    assert file.read_text() == printed
    out = capsys.readouterr().out
    assert out.startswith(f"{file}: read its comments, then run bocage shard {DRONE} OUT dataset={file}")
    assert load_dataset(str(file), []).name == "drone_buildings"
    assert main(["describe", str(DRONE), "-o", str(file)]) == 2
    assert f"-o {file}: exists" in capsys.readouterr().err
    assert main(["describe", str(DRONE), "-o", str(tmp_path / "no" / "x.yaml")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_what_to_repair_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        bands = np.full((3, 64, 64), number, np.uint8)
        write_raster(tmp_path / "photos" / f"{number}.tif", bands, 0.5, photometric="rgb")
        write_raster(tmp_path / "masks" / f"{number}.tif", bands, 0.5)
    assert main(["describe", str(tmp_path), "-o", str(tmp_path / "d.yaml")]) == 0
    note = "masks/0.tif seems to be a label but has 3 bands: convert 2 such files to one band of class numbers"
    assert f"note: {note}\n" in capsys.readouterr().err
    assert f"Check: {note}." in (tmp_path / "d.yaml").read_text().replace("\n#", "")


def test_two_folders_are_sharded_as_their_description_is(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*BANEPA, "--bands", "R,G,B", "--classes", str(classes)]
    assert main(["shard", *words, str(tmp_path / "short")]) == 0
    errors = capsys.readouterr().err
    command = next(line for line in errors.splitlines() if "bocage describe" in line).partition("bocage ")[2]
    file = tmp_path / "dataset.yaml"
    assert main([*shlex.split(command)[:-1], str(file)]) == 0
    assert main(["shard", str(DRONE / "banepa"), str(tmp_path / "long"), f"dataset={file}"]) == 0
    short, long = Manifest.open(tmp_path / "short"), Manifest.open(tmp_path / "long")
    assert [shard.sha256 for shard in short.shards] == [shard.sha256 for shard in long.shards]
    assert short.registry["LABEL"].schemes[0].classes == ROOFS
    assert short.counts["present"] == {"RGB": 3, "LABEL": 3}


def test_only_the_two_folders_are_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        place = (CORNER[0] + 32 * number, CORNER[1])
        array = np.random.default_rng(number).integers(0, 2, (3, 64, 64)).astype(np.uint8)
        write_raster(tmp_path / "b" / "images" / f"{number}.tif", array, 0.5, place, photometric="rgb")
        write_raster(tmp_path / "b" / "masks" / f"{number}.tif", array[:1], 0.5, place)
        (tmp_path / "archive").mkdir(exist_ok=True)
        (tmp_path / "archive" / f"{number}.tif").touch()
    folders = ["--images", str(tmp_path / "b" / "images"), "--labels", str(tmp_path / "b" / "masks")]
    assert main(["shard", *folders, str(tmp_path / "b" / "out")]) == 0
    shutil.move(tmp_path / "b" / "masks", tmp_path / "masks")
    folders[-1] = str(tmp_path / "masks")
    capsys.readouterr()
    assert main(["shard", *folders, str(tmp_path / "out")]) == 0
    assert "2 names not understood, e.g. archive/, b/out/" in capsys.readouterr().err
    assert len(Manifest.open(tmp_path / "out")) == 2


def test_values_may_be_overridden_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered = tmp_path / "numbered.txt"
    numbered.write_text("".join(f"{value} {name}\n" for value, name in enumerate(ROOFS[:4])))
    words = ["shard", *BANEPA, "--classes", str(numbered), "--ignore=-1,4", str(tmp_path / "out"), "name=roofs"]
    assert main(words) == 0
    assert " --ignore=-1,4 -o dataset.yaml" in capsys.readouterr().err
    manifest = Manifest.open(tmp_path / "out")
    assert manifest.dataset.name == "roofs"
    scheme = manifest.registry["LABEL"].schemes[0]
    assert scheme.classes == (*ROOFS[:4], "ignored") and scheme.unscored == (4,)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["shard", *BANEPA], "0 paths given; with --images give one, OUT"),
        (["shard", *BANEPA, "a", "b"], "2 paths given; with --images give one, OUT"),
        (["shard", *BANEPA, "out", "dataset=d.yaml"], "dataset=d.yaml: --images describes the dataset already"),
        (["shard", *BANEPA, "out", "--modalities", "RGB"], "--modalities applies to FLAIR-HUB only"),
        (["shard", *BANEPA, "out", "--bands", "R,G"], "--bands names 2 bands, but"),
        (["shard", *BANEPA, "out", "--bands", "R,G,G"], "--bands R,G,G: G is given twice"),
        (["shard", *BANEPA, "out", "--bands", "R,G,T"], "the wavelength of T is unknown"),
        (["shard", *BANEPA, "out", "--ignore", "few"], "--ignore few: give whole numbers"),
        (["shard", *BANEPA, "out", "--classes", "none.txt"], "--classes none.txt: cannot be read: No such file"),
        (["shard", *BANEPA, "out", "ptach=3"], "ptach"),
        (["shard", *BANEPA[2:], "out"], "--labels: needs --images DIR"),
        (["shard", *BANEPA[:2], "out", "--ignore", "4"], "--ignore: needs --labels DIR"),
        (["shard", *BANEPA[:2], "out", "--picture", "p.png"], "--picture: needs --dry-run"),
        (["shard", "--images", "nowhere", "out"], "--images nowhere: no such folder"),
        (["describe"], "give either a FOLDER to describe, or --images DIR"),
        (["describe", str(DRONE), *BANEPA], "give either a FOLDER to describe, or --images DIR"),
        (["describe", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_words_are_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if words == ["shard", *BANEPA]:
        with pytest.raises(SystemExit):
            main(words)
        assert "the following arguments are required: PATH" in capsys.readouterr().err
        return
    assert main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bocage: error: ") and sentence in last
    assert not list(tmp_path.iterdir())


def test_the_file_of_an_undeclared_class_is_named_and_absent_classes_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        place = (CORNER[0] + 32 * number, CORNER[1])
        image = np.random.default_rng(number).integers(0, 255, (3, 64, 64)).astype(np.uint8)
        write_raster(tmp_path / "images" / f"{number}.tif", image, 0.5, place, photometric="rgb", tiled=False)
        mask = np.full((1, 64, 64), 7 if number == 2 else number % 2, np.uint8)
        write_raster(tmp_path / "masks" / f"{number}.tif", mask, 0.5, place, tiled=False)
    (tmp_path / "classes.txt").write_text("ground\nroof\nwater\n")
    words = ["describe", "--images", str(tmp_path / "images"), "--labels", str(tmp_path / "masks"), "--classes"]
    assert main([*words, str(tmp_path / "classes.txt")]) == 2
    assert "masks/2.tif: values that are neither in --classes nor in --ignore: 7" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "classes.txt"), "--ignore", "7"]) == 0
    assert "MASKS: class 2 water does not occur in 4 sampled files" in capsys.readouterr().out


def test_classes_by_line_or_by_value(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    for text, expected in (
        ("ground\n\nroof\n", {0: "ground", 2: "roof"}),
        ("0 ground\n7: tin roof\n", {0: "ground", 7: "tin roof"}),
        ("\ufeff3,a\n1,b", {3: "a", 1: "b"}),
        ("-1 sea\n0 ground", {-1: "sea", 0: "ground"}),
    ):
        path.write_text(text, encoding="utf-8")
        assert read_classes(path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line"),
        ("1 a\n1 b", "line 2"),
        ("a\nb\na", "line 3"),
        ("0 ground\n\nroof\n2 tree", "line 3, 'roof', has no value before its name, but line 1, '0 ground', has one"),
    ],
)
def test_wrong_classes(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert main(["describe", *BANEPA, "--classes", str(tmp_path / "classes.txt")]) == 2
    assert message in capsys.readouterr().err


def test_bands_have_to_be_named_if_the_files_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        bands = np.full((2, 64, 64), number, np.uint16)
        write_raster(tmp_path / "images" / f"{number}.tif", bands, 0.5, (CORNER[0] + 32 * number, CORNER[1]))
    words = ["shard", "--images", str(tmp_path / "images"), str(tmp_path / "out")]
    assert main(words) == 2
    assert "the files do not say what B1, B2 of 2 bands mean" in capsys.readouterr().err
    assert main([*words, "--bands", "VV,T=11000"]) == 0
    (sensor,) = Manifest.open(tmp_path / "out").registry.inputs
    assert [(band.quantity, band.wavelength) for band in sensor.bands] == [
        ("backscatter_vv", None),
        ("reflectance", 11000),
    ]


# Some seconds: imports matplotlib and draws.
@pytest.mark.parametrize("source", ["described", "FLAIR-HUB"])
def test_a_dry_run_says_what_it_understood(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if source == "described":
        file = tmp_path / "drone.yaml"
        assert main(["describe", str(DRONE), "-o", str(file)]) == 0
        words = [str(DRONE), str(tmp_path / "out"), f"dataset={file}"]
        expected = ["RGB", "R 650", "512 x 0.14 m", "colour", "5: class 0, class", "banepa_unlabelled", "split_site"]
    else:
        words = [str(DRONE.parent / "flairhub_real"), str(tmp_path / "out")]
        expected = ["AERIAL_RGBI", "NIR 840", "512 x 0.2 m", "19: building", "D051-2019"]
    capsys.readouterr()
    assert main(["shard", *words, "--dry-run", "--picture", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    for text in (*expected, "dry run: nothing is written", "estimated size", f"patches: {tmp_path / 'sheet.png'}"):
        assert text in printed
    assert imread(tmp_path / "sheet.png")[..., :3].std() > 0.1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


def test_a_dry_run_names_sampled_patches_that_cannot_be_read_and_draws_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        bands = np.random.default_rng(number).integers(0, 255, (3, 64, 64)).astype(np.uint8)
        place = (CORNER[0] + 32 * number, CORNER[1])
        write_raster(tmp_path / "images" / f"{number}.tif", bands, 0.5, place, photometric="rgb", tiled=False)
    damaged = tmp_path / "images" / "0.tif"
    damaged.write_bytes(damaged.read_bytes()[:-4000])
    words = ["shard", "--images", str(tmp_path / "images"), str(tmp_path / "out"), "--dry-run", "--picture"]
    assert main([*words, str(tmp_path / "sheet.png")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "sampled patches that cannot be read │ 1 of 3" in printed
    assert f"skipped: {damaged}: cannot be read" in printed
    height = imread(tmp_path / "sheet.png").shape[0]
    damaged.unlink()
    assert main([*words, str(tmp_path / "again.png")]) == 0
    assert imread(tmp_path / "again.png").shape[0] == height  # two patches each
    assert main([*words, str(tmp_path / "new" / "sheet.png")]) == 0
    assert main([*words, str(tmp_path / "again.png" / "sheet.png")]) == 2
    assert "cannot be written: " in capsys.readouterr().err


def test_text_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[bold]data[/x]"
    for number in range(2):
        write_raster(folder / "images" / f"{number}.tif", np.full((3, 64, 64), 90, np.uint8), 0.5, photometric="rgb")
        write_raster(folder / "masks" / f"{number}.tif", np.full((1, 64, 64), number, np.uint8), 0.5)
    (tmp_path / "classes.txt").write_text("0 [/x]\n1 [red]:car:[/red]\n")
    words = ["shard", "--images", str(folder / "images"), "--labels", str(folder / "masks"), str(tmp_path / "out")]
    words += ["--classes", str(tmp_path / "classes.txt")]
    assert main([*words, "--dry-run"]) == 0
    assert "2: [/x], [red]:car:[/red]" in capsys.readouterr().out
    assert main(words) == 0 and main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "[/x]" in printed and "[red]:car:[/red]" in printed


@pytest.mark.parametrize("name", ["folder", "file"])
def test_names_that_are_not_utf_8_are_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = os.fsdecode(b"d\xe9j\xe0")
    folder = tmp_path / (wrong if name == "folder" else "images")
    for number in range(2):
        write_raster(tmp_path / f"{number}.tif", np.full((3, 64, 64), 90, np.uint8), 0.5, photometric="rgb")
        folder.mkdir(exist_ok=True)
        (tmp_path / f"{number}.tif").rename(folder / f"{wrong if name == 'file' else ''}{number}.tif")
    (folder / f"{wrong}.txt").touch()
    file = tmp_path / "dataset.yaml"
    sensor = "{files: '{name}.tif', bands: {R: 650, G: 550, B: 460}, dtype: uint8, pixel: 0.5}"
    for kind in ("tiles", "rasters"):
        file.write_text(f"name: t\nkind: {kind}\npatch: 64 px\nsensors:\n  RGB: {sensor}\n")
        assert main(["shard", str(folder), str(tmp_path / "out"), f"dataset={file}"]) == 2
        assert re.search(r"error: \S*d\\xe9j\\xe0(0\.tif)?: the name is not UTF-8; rename", capsys.readouterr().err)
    for words in (["describe", str(folder)], ["shard", "--images", str(folder), str(tmp_path / "out")]):
        assert main(words) == 2
        assert re.search(r"error: \S*d\\xe9j\\xe0(0\.tif)?: the name is not UTF-8; rename", capsys.readouterr().err)
    if name == "file":
        for number in range(2):
            (folder / f"{wrong}{number}.tif").rename(folder / f"{number}.tif")
        assert main(["shard", str(folder), str(tmp_path / "out"), f"dataset={file}"]) == 0


@pytest.mark.parametrize("page", ["how-to/datasets", "tutorials/drone-images"])
def test_descriptions_in_the_documentation_load(page: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "dataset.yaml").write_text(block, encoding="utf-8")
        assert build_registry(load_dataset(str(tmp_path / "dataset.yaml"), [])).inputs
