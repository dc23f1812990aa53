"""``bocage evaluate``: scores, sensor ablations, and equal results on one and two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import save_segmentation
from bocage.finetune.train import build_task
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.patches import ShardPatches
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main

AERIAL, S2, COSIA, LPIS = "AERIAL_RGBI", "SENTINEL2_TS", "AERIAL_LABEL-COSIA", "ALL_LABEL-LPIS"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven simulated patches that lack sensors here and there, and an untrained model of two labels."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=7, seed=3, dates=(3, 5), gaps=0.2)
    write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")
    words = ["recipe=finetune_quickstart", f"modalities=[{AERIAL},{S2}]", f"labels=[{COSIA},{LPIS}]"]
    torch.manual_seed(0)
    task = build_task(recipes.resolve(FinetuneConfig, words), Manifest.open(folder / "shards"))
    save_segmentation(task, folder / "run" / "model")
    return folder


@pytest.mark.slow
def test_sensor_ablations_are_scored_on_the_same_patches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    words = ["evaluate", str(folder / "run"), str(folder / "shards")]
    assert main([*words, str(folder / "out"), "--missing", "--batch-size", "3"]) == 0
    said = capsys.readouterr()
    assert "without SENTINEL2_TS" in said.out
    # All sets of sensors are scored on the patches that have all sensors.
    held = ShardPatches(Manifest.open(folder / "shards")).has_modality
    complete, some = (int(both.sum()) for both in (held(AERIAL) & held(S2), held(AERIAL) | held(S2)))
    assert 0 < complete < some
    assert f"{some - complete} of {some} patches left out: they lack a sensor" in said.err
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    sets = {"all", f"without {AERIAL}", f"without {S2}", f"only {AERIAL}", f"only {S2}"}
    assert set(metrics) == {"patches", *sets}
    assert metrics["all"] != metrics[f"without {S2}"]
    for one, other in ((AERIAL, S2), (S2, AERIAL)):
        assert metrics[f"without {one}"] == metrics[f"only {other}"]
    pixels = {part: sum(map(sum, metrics[part][COSIA]["confusion"])) for part in sets}
    assert len(set(pixels.values())) == 1
    table = pq.read_table(folder / "out" / "confusions.parquet").to_pylist()
    assert {row["part"] for row in table} == sets
    assert (folder / "out" / "confusions" / f"without_{S2}_{LPIS}.png").is_file()

    assert main([*words, str(folder / "less"), "--without", S2]) == 0
    less = json.loads((folder / "less" / "metrics.json").read_text())
    assert metrics["patches"] == complete
    assert less["patches"] == held(AERIAL).sum()  # patches without the remaining sensor are left out


def test_shards_that_lack_a_sensor_and_a_label(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(FlairHubCatalogue.open(folder / "tree", modalities=[AERIAL, COSIA]), folder / "fewer")
    words = ["evaluate", str(folder / "run"), str(folder / "fewer"), str(folder / "fewer_scores"), "--missing"]
    assert main(words) == 0
    assert f"has no {S2}, {LPIS}: scoring without" in capsys.readouterr().err
    metrics = json.loads((folder / "fewer_scores" / "metrics.json").read_text())
    assert set(metrics) == {"patches", "all"}
    assert set(metrics["all"]) == {COSIA}


def test_invalid_options_raise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folder / "run"), str(folder / "shards"), str(folder / "none")]
    for more, message in (
        (["--without", "SPOT_RGBI"], "--without SPOT_RGBI: the model reads AERIAL_RGBI, SENTINEL2_TS"),
        (["--without", AERIAL, S2], "the model has no input left"),
        (["--split", "split_9"], "no split 'split_9'"),
        (["--value", "train"], "--value train needs --split"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "none").exists()


# About 20 s: three processes import torch.
@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["-m", "bocage", "evaluate", str(folder / "run"), str(folder / "shards")]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, out in (([], "one"), (two, "two")):
        line = [sys.executable, *launcher, *command, str(folder / out), "--batch-size", "2"]
        subprocess.run(line, env=environment, check=True)
    one, other = ((folder / out / "metrics.json").read_bytes() for out in ("one", "two"))
    assert one == other
    tables = [pq.read_table(folder / out / "confusions.parquet") for out in ("one", "two")]
    assert tables[0].equals(tables[1])
