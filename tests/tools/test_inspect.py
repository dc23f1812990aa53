import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.summary import most_complete_row, summarize
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patches of all ten rasters; the first lacks the labels and the historical image."""
    folder = tmp_path_factory.mktemp("inspect")
    tree = folder / "tree"
    write_tree(tree, patches=3, seed=0)
    _, place, cell = FlairHubCatalogue.open(tree).keys()[0].split("_")
    for path in tree.rglob(f"*_{place}_{cell}.tif"):
        if "LABEL" in path.name or "RLT" in path.name:
            path.unlink()
    return write_shards(FlairHubCatalogue.open(tree), folder / "out", samples_per_shard=2, order="roi").path


def test_numbers(shards: Path) -> None:
    manifest = Manifest.open(shards)
    numbers = summarize(manifest)
    assert (numbers["patches"], numbers["shards"], sum(numbers["domains"].values())) == (3, 2, 3)
    assert numbers["rois"] == len(set(manifest.column("roi").to_pylist()))
    assert numbers["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert numbers["source_bytes"] > numbers["bytes"]
    for split, values in numbers["splits"].items():
        assert values == {value: len(manifest.split(split, value)) for value in values}
    present = {name: item["present"] for name, item in numbers["modalities"].items()}
    assert present == manifest.counts["present"] and present["AERIAL_LABEL-COSIA"] == 2
    steps = sorted(len(manifest.index.dates("SENTINEL2_TS", row)) for row in range(3))
    assert list(numbers["dates"]["SENTINEL2_TS"].values()) == [3, *steps]
    assert list(numbers["classes"]) == ["AERIAL_LABEL-COSIA COSIA", *(f"ALL_LABEL-LPIS level-{k}" for k in (1, 2, 3))]
    histograms = [row["histogram.AERIAL_LABEL-COSIA.COSIA"] for row in map(manifest.row, (1, 2))]
    water = sum(histogram[6] for histogram in histograms) / (2 * 512 * 512)
    assert numbers["classes"]["AERIAL_LABEL-COSIA COSIA"]["water"] == pytest.approx(water)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in numbers["classes"].values())
    assert most_complete_row(manifest) == 1


# Imports matplotlib and draws twice.
def test_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = Manifest.open(shards).index.keys.to_pylist()
    picture, report = tmp_path / "patch.png", tmp_path / "numbers.json"
    assert main(["inspect", str(shards), "--rows", "--picture", str(picture), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert f"row 1: {keys[1]}" in printed and f"{keys[1]}: " in printed
    assert json.loads(report.read_text())["patches"] == 3
    whole = imread(picture)
    assert whole.shape[1] == 1560 and whole[..., :3].std() > 0.2
    assert main(["inspect", str(shards), "--key", keys[0], "--picture", str(picture)]) == 0
    assert imread(picture).shape[0] < whole.shape[0]  # missing labels have no legend
    assert not list(tmp_path.glob("*.tmp"))


def test_wrong_words_are_one_sentence(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["--key", "D999"], "no patch 'D999'; keys look like D"),
        (["--picture", str(shards / "dataset.json" / "where.png")], "cannot be written: "),
        (["--json", str(tmp_path / "no" / "where.json")], "cannot be written: No such file"),
    ):
        assert main(["inspect", str(shards), *words]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "bocage shard SRC" in capsys.readouterr().err
