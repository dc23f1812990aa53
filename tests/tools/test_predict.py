"""``bocage predict`` on files that are not sharded, some of which are bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_map import ground, saved, write
from tiny_segmentation import AERIAL, COSIA

from bocage.tools.main import main

SIZE = 64
DESCRIPTION = f"""
name: fields
patch: {SIZE} px
sensors:
  {AERIAL}:
    files: "{{name}}.tif"
    bands: {{R: 650, G: 550, B: 460, NIR: 840}}
    dtype: uint8
    pixel: 0.2
"""


def cut(path: Path) -> None:
    """Make a raster unreadable but for its header."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Some seconds: a small model maps two images.
def test_bad_images_of_a_folder_are_named_and_the_others_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = saved(tmp_path / "run"), tmp_path / "images"
    images.mkdir()
    for name, bands in (("a", 4), ("cut", 4), ("grey", 1), ("z", 4)):
        write(images / f"{name}.tif", ground(SIZE, SIZE)[:bands], 0.2)
    (images / "picture.bmp").write_bytes(b"BM")
    cut(images / "cut.tif")
    words = ["predict", str(run), str(images), str(tmp_path / "out")]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert f"maps of 2 images in {tmp_path / 'out'}" in printed.out
    errors = printed.err.splitlines()
    for text in (f"{images / 'cut.tif'}: cannot be read", "grey.tif has 1 band;", f"{images / 'picture.bmp'}: cannot"):
        assert any(line.startswith("skipped: ") and text in line for line in errors), text
    assert errors[-1].startswith(f"bocage: error: {images}: 3 of 5 images without a map")
    assert all((tmp_path / "out" / name / f"{COSIA}.tif").is_file() for name in "az")
    for name in ("cut.tif", "grey.tif", "picture.bmp"):
        (images / name).unlink()
    assert main(words) == 0


def test_bad_patches_of_a_described_dataset_are_named_and_the_others_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source, file = saved(tmp_path / "run"), tmp_path / "source", tmp_path / "dataset.yaml"
    source.mkdir()
    file.write_text(DESCRIPTION)
    for number, name in enumerate(("a", "b", "cut", "grey", "z")):
        bands = 1 if name == "grey" else 4
        write(source / f"{name}.tif", ground(SIZE, SIZE)[:bands], 0.2, left=700_000 + number * 0.2 * SIZE)
    cut(source / "cut.tif")
    (source / "notes.txt").touch()
    words = ["predict", str(run), str(source), str(tmp_path / "out"), f"dataset={file}", "--batch-size", "2"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert f"3 maps in {tmp_path / 'out'}" in printed.out
    errors = printed.err.splitlines()
    assert "note: 1 name not understood, e.g. notes.txt" in errors
    for text in (f"{source / 'cut.tif'}: cannot be read", f"{source / 'grey.tif'}: 1 bands, but"):
        assert any(line.startswith("skipped: ") and text in line for line in errors), text
    assert errors[-1].startswith(f"bocage: error: {source}: 2 of 5 patches without a prediction")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tif")) == ["a.tif", "b.tif", "z.tif"]
    for name in ("cut.tif", "grey.tif"):
        (source / name).unlink()
    assert main(words) == 0


def test_files_of_a_patch_that_lie_elsewhere_than_its_image_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source, file = saved(tmp_path / "run"), tmp_path / "source", tmp_path / "dataset.yaml"
    source.mkdir()
    label = "classes: {0: a, 1: b}, pixel: 0.2"
    text = DESCRIPTION.replace("{name}.tif", "{name}_image.tif")
    file.write_text(text + f'labels:\n  {COSIA}: {{files: "{{name}}_mask.tif", {label}}}\n')
    for name, offset in (("a", 0.0), ("b", 50.0)):
        write(source / f"{name}_image.tif", ground(SIZE, SIZE), 0.2)
        write(source / f"{name}_mask.tif", np.ones((1, SIZE, SIZE), np.uint8), 0.2, left=700_000 + offset)
    assert main(["predict", str(run), str(source), str(tmp_path / "out"), f"dataset={file}"]) == 2
    assert f"skipped: {source / 'b_mask.tif'}: corners lie" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*.tif")] == ["a.tif"]


def test_maps_do_not_go_into_the_folder_of_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = saved(tmp_path / "run"), tmp_path / "images"
    images.mkdir()
    write(images / "a.tif", np.zeros((4, SIZE, SIZE), np.uint8), 0.2)
    for out in (images, images / "maps" / "new"):
        assert main(["predict", str(run), str(images), str(out)]) == 2
        assert "or inside it: give another folder for the maps" in capsys.readouterr().err
    assert not (images / "maps").exists()


def test_a_missing_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, missing = saved(tmp_path / "run"), tmp_path / "none.PNG"
    assert main(["predict", str(run), str(missing), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"bocage: error: {missing}: no such file\n"


def test_an_image_with_a_name_like_flair_hub_is_an_image(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write(images / "D012-2019_orchard.tif", np.full((4, SIZE, SIZE), 9, np.uint8), 0.2)
    assert main(["predict", str(saved(tmp_path / "run")), str(images), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "D012-2019_orchard" / f"{COSIA}.tif").is_file()
