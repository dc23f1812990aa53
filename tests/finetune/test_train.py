import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from tiny_segmentation import AERIAL, COSIA, DECODER, LPIS, SWIN, UTAE

from bocage import recipes
from bocage.finetune.evaluation.evaluate import compute_confusions, labelled_rows
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import load_segmentation, save_segmentation
from bocage.finetune.models.supervision import TaskConfig
from bocage.finetune.train import build_task, finetune
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.read.patches import ShardPatches
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.optim import OptimizerConfig
from bocage.tools.main import main

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three genuine patches: aerial image and CoSIA label, no metadata."""
    out = tmp_path_factory.mktemp("real") / "shards"
    write_shards(FlairHubCatalogue.open(REAL), out)
    return out


def config(shards: Path, output: Path, **changes: object) -> FinetuneConfig:
    settings: dict[str, object] = {
        "recipe": "test",
        "shards": str(shards),
        "output": str(output),
        "labels": [COSIA],
        "swin": SWIN,
        "utae": UTAE,
        "decoder": DECODER,
        "split": "all",
        "window": 51.2,
        "batch_size": 2,
        "predictions": 3,
        "engine": EngineConfig(steps=4, save_every=2, log_every=1, optimizer=OptimizerConfig(learning_rate=3e-3)),
    }
    return FinetuneConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_real_patches_from_shards_to_maps(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Some seconds: training, evaluation and prediction of three whole patches of 512 px.
    torch.set_num_threads(1)
    run = tmp_path / "run"
    result = finetune(config(shards, run))
    assert result["exit_code"] == 0
    assert result["patches"] == {"train": 3, "valid": 3}
    stored = json.loads((run / "metrics.json").read_text())
    assert stored["valid"] == result["valid"]
    assert np.sum(stored["valid"][COSIA]["confusion"]) == 3 * 512 * 512
    assert stored["fit_only"] == ["valid"]
    assert (run / "predictions" / "panels.png").is_file()

    manifest = Manifest.open(shards)
    assert main(["predict", str(run), str(shards), str(tmp_path / "maps")]) == 0
    assert "3 maps in" in capsys.readouterr().out
    counted = np.zeros((19, 19), np.int64)
    for index in range(len(manifest)):
        row = manifest.row(index)
        domain, roi, cell = row["key"].split("_")
        source = REAL / f"{domain}_{AERIAL}" / roi / f"{domain}_{AERIAL}_{roi}_{cell}.tif"
        label = REAL / f"{domain}_{COSIA}" / roi / f"{domain}_{COSIA}_{roi}_{cell}.tif"
        with rasterio.open(tmp_path / "maps" / f"{row['key']}.tif") as file, rasterio.open(source) as image:
            assert file.transform.almost_equals(image.transform)
            assert file.bounds == pytest.approx(image.bounds)
            assert "Lambert" in file.crs.to_wkt()
            predicted = file.read(1)
        # The same model on the same patches gives the files that the run wrote.
        assert (run / "predictions" / f"{row['key']}.tif").read_bytes() == (
            tmp_path / "maps" / f"{row['key']}.tif"
        ).read_bytes()
        with rasterio.open(label) as file:
            np.add.at(counted, (file.read(1).ravel(), predicted.ravel()), 1)
    assert counted.tolist() == stored["valid"][COSIA]["confusion"]

    (tmp_path / "file").touch()
    assert main(["predict", str(run), str(shards), str(tmp_path / "file")]) == 2
    assert "cannot create the folder" in capsys.readouterr().err

    # A finished run that is started again trains nothing and returns the same scores.
    again = finetune(config(shards, run))
    assert again["valid"] == result["valid"]
    assert "complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "frozen"),
    [
        ("encoder_lr_scale", 0.0, ("encoders",)),
        ("fusion_lr_scale", 0.0, ("fusion", "absent")),
        ("head_steps", 1000, ("encoders",)),
        ("head_steps", 1, ()),
    ],
)
def test_encoders_and_fusion_have_their_own_learning_rates(
    simulated: Path, tmp_path: Path, key: str, value: float, frozen: tuple[str, ...]
) -> None:
    torch.set_num_threads(1)
    settings = config(simulated, tmp_path, modalities=["SPOT_RGBI", "SENTINEL2_TS"], predictions=0, **{key: value})
    torch.manual_seed(settings.engine.seed)
    before = dict(build_task(settings, Manifest.open(simulated)).model.named_parameters())
    finetune(settings)
    after = dict(load_segmentation(tmp_path / "model").model.named_parameters())
    moved = {name.partition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"encoders", "fusion", "absent", "decoders"} - set(frozen)


def test_wrong_sources_of_patches_raise(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_segmentation(build_task(config(shards, tmp_path), Manifest.open(shards)), tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for source, out, sentence in (
        (tmp_path / "empty", "out", "has neither shards (dataset.json) nor a FLAIR-HUB tree"),
        (next(shards.glob("*.tar")), "out", "is a file: give an image, or the folder of the shards"),
        (shards, shards, "or inside it: give another folder for the maps"),
    ):
        assert main(["predict", str(tmp_path), str(source), str(tmp_path / out)]) == 2
        assert sentence in capsys.readouterr().err


def test_patches_without_the_sensors_of_the_model_are_skipped(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = build_task(config(simulated, tmp_path, modalities=["SPOT_RGBI"]), Manifest.open(simulated))
    save_segmentation(task, tmp_path / "model")
    held = ShardPatches(Manifest.open(simulated)).has_modality("SPOT_RGBI")
    assert 0 < held.sum() < len(held)
    for source in (simulated, simulated.parent / "tree"):
        out = tmp_path / source.name
        assert main(["predict", str(tmp_path), str(source), str(out), "--preview", "0"]) == 0
        assert f"{(~held).sum()} of {len(held)} patches left out" in capsys.readouterr().err
        assert len(list(out.glob("*.tif"))) == held.sum()


# Some twenty seconds: three processes load torch.
@pytest.mark.slow
def test_two_ranks_compute_the_same_confusions_as_one(simulated: Path, tmp_path: Path) -> None:
    words = ["recipe=finetune_quickstart", f"shards={simulated}", "modalities=[SPOT_RGBI]", "split=all", "workers=0"]
    words += ["engine.steps=1", "engine.optimizer.learning_rate=1e-12", "predictions=0", "pictures=0"]
    words += ["engine.optimizer.warmup_steps=1"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, out, batch in ((two, "two", 1), ([], "one", 2)):
        line = [sys.executable, *launcher, "-m", "bocage", "finetune", *words]
        line += [f"output={tmp_path / out}", f"batch_size={batch}"]
        subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    one, other = (pq.read_table(tmp_path / out / "confusions.parquet") for out in ("one", "two"))
    assert one.equals(other)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six simulated patches, some of which lack sensors."""
    folder = tmp_path_factory.mktemp("simulated")
    write_tree(folder / "tree", patches=6, seed=3, gaps=0.3)
    write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")
    return folder / "shards"


def test_crops_from_series_with_gaps(simulated: Path, tmp_path: Path) -> None:
    # Some seconds: it simulates and shards patches first. Clouds, missing series and an LPIS level, without any image.
    torch.set_num_threads(1)
    manifest = Manifest.open(simulated)
    series = ["SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS"]
    chosen = config(
        simulated,
        tmp_path / "run",
        labels=[LPIS],
        tasks={LPIS: TaskConfig(level=2)},
        modalities=series,
        predictions=1,
    )
    result = finetune(chosen)
    held = [any(manifest.row(index)[f"length.{name}"] for name in series) for index in range(len(manifest))]
    assert result["patches"]["train"] == sum(held)
    assert len(result["labels"][LPIS]["classes"]) == 31
    assert np.shape(result["valid"][LPIS]["confusion"]) == (31, 31)
    assert result["valid"][LPIS]["strict"]["miou_without_background"] is not None
    assert len(list((tmp_path / "run" / "predictions").glob("*.tif"))) == 1


@pytest.mark.slow
def test_two_labels_from_shards_to_maps_and_tables(simulated: Path, tmp_path: Path) -> None:
    # Some seconds: a real run with two labels, modality dropout, and all outputs.
    torch.set_num_threads(1)
    run = tmp_path / "run"
    chosen = config(
        simulated,
        run,
        labels=[COSIA, LPIS],
        tasks={COSIA: TaskConfig(grouping="flair_challenge"), LPIS: TaskConfig(weight=0.5)},
        modalities=[AERIAL, "SENTINEL2_TS"],
        modality_dropout={AERIAL: 0.5, "SENTINEL2_TS": 0.2},
        predictions=2,
        pictures=2,
    )
    result = finetune(chosen)
    assert {name: len(item["classes"]) for name, item in result["labels"].items()} == {COSIA: 13, LPIS: 23}
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    means = [result["valid"][label]["strict"]["miou"] for label in (COSIA, LPIS)]
    assert last["evaluation/miou"] == pytest.approx(np.mean(means))
    assert last[f"evaluation/miou/{LPIS}"] == pytest.approx(means[1])

    counts = pq.read_table(run / "confusions.parquet").to_pylist()
    scores = pq.read_table(run / "scores.parquet").to_pylist()
    for label in (COSIA, LPIS):
        found, names = result["valid"][label], result["labels"][label]["classes"]
        matrix = np.zeros((len(names), len(names)), np.int64)
        for row in counts:
            if row["label"] == label:
                matrix[names.index(row["truth"]), names.index(row["predicted"])] += row["pixels"]
        assert matrix.tolist() == found["confusion"]
        whole = [row for row in scores if (row["label"], row["domain"]) == (label, "all")]
        for kind in ("iou", "precision", "recall", "f1"):
            assert {row["class"]: row[kind] for row in whole} == found["strict"][kind]
        assert set(found["domains"]) == {row["domain"] for row in counts if row["label"] == label}
        assert sum(item["pixels"] for item in found["domains"].values()) == matrix.sum()
        assert len(list((run / "predictions" / label).glob("*.tif"))) == 2
        assert (run / "predictions" / label / "panels.png").is_file()
        assert (run / "confusions" / f"valid_{label}.png").is_file()
        assert len(list((run / "pictures").glob(f"predictions_*_{label}.png"))) == 1
    with rasterio.open(next((run / "predictions" / COSIA).glob("*.tif"))) as file:
        assert file.tags(1)["CLASS_12"] == "other"
    assert main(["predict", str(run), str(simulated), str(tmp_path / "maps"), "--preview", "0"]) == 0
    held = ShardPatches(Manifest.open(simulated)).has_modality
    seen = (held(AERIAL) | held("SENTINEL2_TS")).sum()
    assert len(list((tmp_path / "maps" / LPIS).glob("*.tif"))) == seen
    assert not list((tmp_path / "maps").rglob("*.png"))


def test_a_tree_gives_the_same_predictions_as_its_shards(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    chosen = config(simulated, tmp_path, modalities=[AERIAL, "SENTINEL2_TS"])
    save_segmentation(build_task(chosen, Manifest.open(simulated)), tmp_path / "run" / "model")
    for source, out in ((simulated, "shards"), (simulated.parent / "tree", "tree")):
        words = [str(tmp_path / "run"), str(source), str(tmp_path / out), "--split", "split_1", "--value", "train"]
        assert main(["predict", *words]) == 0
    maps = sorted(path.name for path in (tmp_path / "tree").glob("*.tif"))
    assert maps == sorted(path.name for path in (tmp_path / "shards").glob("*.tif"))
    assert maps
    for name in maps:
        with rasterio.open(tmp_path / "tree" / name) as one, rasterio.open(tmp_path / "shards" / name) as other:
            assert np.array_equal(one.read(), other.read())
            assert one.transform == other.transform
            assert one.crs == other.crs
    assert (
        main(["predict", str(tmp_path / "run"), str(simulated.parent / "tree"), str(tmp_path / "x"), "--split", "s"])
        == 2
    )
    assert "no split 's'; splits: split_1" in capsys.readouterr().err


def test_training_starts_from_a_pretrained_encoder(shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(shards)
    encoder = build_encoder(manifest.input_spec(AERIAL), SWIN)
    save_encoder(encoder, tmp_path / "encoder")
    start = config(shards, tmp_path / "run", encoders={AERIAL: str(tmp_path / "encoder")}, freeze=[AERIAL])
    task = build_task(start, manifest)
    for name, value in encoder.state_dict().items():
        assert torch.equal(task.model.encoder(AERIAL).state_dict()[name], value)
    assert not any(parameter.requires_grad for parameter in task.model.encoder(AERIAL).parameters())

    other = replace(FLAIR_HUB[AERIAL], name="AERIAL-2_RGBI")
    spec = replace(manifest.input_spec(AERIAL), modality=other.name)
    save_encoder(build_encoder(spec, SWIN), tmp_path / "other")
    with pytest.raises(InputError, match=r"is an encoder of AERIAL-2_RGBI"):
        build_task(config(shards, tmp_path, encoders={AERIAL: str(tmp_path / "other")}), manifest)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shards": ""}, r"`bocage shard SRC OUT`"),
        ({"output": ""}, r"output=PATH is missing"),
        ({"modalities": ["DEM_ELEV"]}, r"DEM_ELEV is not an input of .*; its inputs are AERIAL_RGBI"),
        ({"modalities": [COSIA]}, r"is not an input"),
        ({"encoders": {"SPOT_RGBI": "x"}}, r"encoders: SPOT_RGBI not among the modalities AERIAL_RGBI"),
        ({"labels": [LPIS]}, r"labels: ALL_LABEL-LPIS is not a label of .*; its labels are AERIAL_LABEL-COSIA"),
        ({"labels": [AERIAL]}, r"labels: AERIAL_RGBI is not a label of .*; its labels are AERIAL_LABEL-COSIA"),
        ({"labels": [COSIA, COSIA]}, r"give each label once"),
        ({"tasks": {COSIA: TaskConfig(level=2)}}, r"AERIAL_LABEL-COSIA has one level, not 2"),
        ({"tasks": {LPIS: TaskConfig()}}, r"tasks: ALL_LABEL-LPIS not among the labels AERIAL_LABEL-COSIA"),
        ({"tasks": {COSIA: TaskConfig(grouping="flair")}}, r"grouping=flair is not one of flair_challenge"),
        ({"modality_dropout": {"SPOT_RGBI": 0.5}}, r"modality_dropout: SPOT_RGBI not among"),
        ({"freeze": [f"{AERIAL}:9"]}, r"freeze: AERIAL_RGBI:9: the encoder of AERIAL_RGBI has 0 to 4 stages"),
        ({"split": "split_1"}, r"no split 'split_1'"),
        ({"freeze": ["SPOT_RGBI"]}, r"freeze: SPOT_RGBI"),
        ({"window": 33.3}, r"window=33.3"),
        ({"window": 51.2, "label_stride": 3}, r"label_stride=3 does not divide the 256 pixels of window=51.2 metres"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    shards: Path, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        finetune(replace(config(shards, tmp_path / "run"), **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"sampling_unit": "pixel"}, "sampling_unit=pixel"),
        ({"disjoint_validation": True}, "disjoint_validation: split=all"),
        ({"batch_size": 0}, "batch_size"),
        ({"label_stride": 0}, "label_stride=0 must be at least 1"),
        ({"workers": -1}, "workers"),
        ({"batch_size": 1, "decoder": replace(DECODER, norm="batch")}, "decoder.norm=group"),
    ],
)
def test_invalid_values_are_named(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        config(Path("s"), Path("o"), **changes)


def test_evaluation_counts_every_patch_once_for_any_batch_size(shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(shards)
    settings = config(shards, tmp_path)
    torch.manual_seed(0)
    task = build_task(settings, manifest).eval()
    rows = labelled_rows(ShardPatches(manifest), task, "all", "train")
    matrices = [compute_confusions(task, manifest, rows, batch_size=size, workers=0) for size in (1, 2)]
    assert matrices[0][COSIA].total.sum() == 3 * 512 * 512
    assert np.array_equal(matrices[0][COSIA].total, matrices[1][COSIA].total)
    assert set(matrices[0][COSIA].by_roi) == {manifest.row(index)["roi"] for index in range(3)}


def test_recipes_resolve_and_print(capsys: pytest.CaptureFixture[str]) -> None:
    full = recipes.resolve(FinetuneConfig, ["recipe=finetune_cosia"])
    small = recipes.resolve(FinetuneConfig, ["recipe=finetune_quickstart", "engine.steps=30"])
    assert full.modalities == small.modalities == [modality.name for modality in FLAIR_HUB.inputs]
    assert (full.swin.name, small.engine.steps, small.engine.tracker) == ("swin_base_patch4_window12_384", 30, "none")
    assert main(["finetune", "recipe=finetune_quickstart", "--print-config"]) == 0
    assert "recipe: finetune_quickstart" in capsys.readouterr().out
    assert main(["finetune", "recipe=finetune_cosia"]) == 2
    assert "`bocage shard SRC OUT`" in capsys.readouterr().err
    assert main(["finetune", "recipe=finetune_cosia", "batchsize=3"]) == 2
    assert "did you mean 'batch_size'?" in capsys.readouterr().err
