"""Probes of frozen encoders: cached features, and scores that agree with the probes of pretraining."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_segmentation import COSIA, LPIS, S1, SWIN

from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.probes.feature_cache import DenseFeatureCache, PatchTensorStore, encoder_digest
from bocage.finetune.probes.probe import run_probe
from bocage.finetune.train import build_task, split_rows
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.read.patches import ShardPatches
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.evaluation.probe import Probe, ProbeConfig
from bocage.ssl.pretrain import build_pretraining_model as pretraining
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import main

SPOT = "SPOT_RGBI"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty simulated patches, some of which lack the sensor."""
    folder = tmp_path_factory.mktemp("probing")
    registry = FLAIR_HUB.subset([SPOT, S1, COSIA, LPIS])
    write_tree(folder / "tree", patches=60, seed=2, registry=registry, gaps=0.3, dates=(3, 3))
    return write_shards(FlairHubCatalogue.open(folder / "tree", registry), folder / "shards").path


def config(shards: Path, output: Path, **changes: object) -> FinetuneConfig:
    settings: dict[str, object] = {
        "shards": str(shards),
        "output": str(output),
        "labels": [COSIA],
        "modalities": [SPOT],
        "swin": SWIN,
        "engine": EngineConfig(steps=1),
    }
    return FinetuneConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_scores_agree_with_the_probes_of_pretraining(shards: Path, tmp_path: Path) -> None:
    settings = config(shards, tmp_path / "knn")
    found = {
        kind: run_probe(replace(settings, output=str(tmp_path / kind)), kind, tmp_path) for kind in ("knn", "linear")
    }
    manifest = Manifest.open(shards)
    torch.manual_seed(0)
    task = pretraining(PretrainConfig(modalities=[SPOT], swin=SWIN), manifest).eval()
    torch.manual_seed(0)
    initial = build_task(settings, manifest).model.encoder(SPOT)
    task.encoder(SPOT).load_state_dict(initial.state_dict(), strict=False)
    penalties = [found["linear"]["penalties"][COSIA]]
    figures = Probe(manifest, ProbeConfig(label=COSIA, patches=1000, penalties=penalties), "split_1").scores(task, 4, 0)
    for kind, metrics in found.items():
        assert metrics["valid"][COSIA]["strict"]["miou"] == pytest.approx(figures[f"{kind}_miou/{SPOT}"], abs=0.7)
        stored = json.loads((tmp_path / kind / "metrics.json").read_text())
        assert stored["valid"] == metrics["valid"]
        assert (tmp_path / kind / "confusions.parquet").is_file()
    assert found["knn"]["train_keys"] == found["linear"]["train_keys"]


def test_features_are_cached_and_resume(shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(shards)
    task = build_task(config(shards, tmp_path), manifest).eval()
    encoder = task.model.encoder(SPOT)
    rows = np.arange(40)
    reported: list[int] = []
    dense = DenseFeatureCache(tmp_path, manifest, 12.8)
    first = dense.features(encoder, rows[:12], batch_size=5, workers=0, progress=reported.append)
    assert reported == [5, 10, 12]
    second = dense.features(encoder, rows, batch_size=3, workers=0, progress=reported.append)
    assert reported[3:5] == [15, 18]
    keys = manifest.column("key").take(rows).to_pylist()
    values = second.read(keys[::-1])
    assert values.shape == (40, sum(encoder.widths), 8, 8)
    assert torch.equal(values.flip(0)[:12], first.read(keys[:12]))
    present = ShardPatches(manifest).has_modality(SPOT)[rows]
    assert not present.all()
    assert np.array_equal((values.flip(0) != 0).any(dim=(1, 2, 3)).numpy(), present)
    reported.clear()
    dense.features(encoder, rows, batch_size=3, workers=0, progress=reported.append)
    assert not reported
    with torch.no_grad():
        next(encoder.parameters()).add_(0.1)
    assert dense.features(encoder, rows[:2], batch_size=2, workers=0).missing(keys) == list(range(2, 40))


def test_a_damaged_file_raises(shards: Path, tmp_path: Path) -> None:
    files = PatchTensorStore(tmp_path)
    files.add(["a", "b"], torch.zeros(2, 3))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="not a file of features"):
        PatchTensorStore(tmp_path)


def test_encoder_digests_depend_on_the_weights(shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(shards)
    torch.manual_seed(0)
    one = build_task(config(shards, tmp_path), manifest).model.encoder(SPOT)
    torch.manual_seed(0)
    same = build_task(config(shards, tmp_path), manifest).model.encoder(SPOT)
    other = build_task(config(shards, tmp_path), manifest).model.encoder(SPOT)
    assert encoder_digest(one) == encoder_digest(same) != encoder_digest(other)


@pytest.mark.parametrize("sampling_unit", ["patch", "roi"])
def test_train_valid_and_test_patches_are_disjoint(shards: Path, tmp_path: Path, sampling_unit: str) -> None:
    manifest = Manifest.open(shards)
    rois = np.array(manifest.column("roi").to_pylist())
    split = np.array(manifest.column("split_1").to_pylist())
    for fraction in (0.3, 0.6, 1.0):
        for disjoint in (False, True):
            settings = config(
                shards,
                tmp_path,
                train_fraction=fraction,
                sampling_unit=sampling_unit,
                disjoint_validation=disjoint,
                draw=1,
            )
            task = build_task(settings, manifest)
            rows = split_rows(settings, ShardPatches(manifest), task)
            assert set(split[rows["test"]]) == {"test"}
            assert "test" not in {*split[rows["train"]], *split[rows["valid"]]}
            assert not set(rows["train"]) & set(rows["valid"])
            if disjoint:
                assert not set(rois[rows["train"]]) & set(rois[rows["valid"]])


def test_the_commands_write_subsets_and_probe_an_encoder(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "subsets", str(shards), str(tmp_path / "subsets"), "--fractions", "0.1", "0.5"]) == 0
    description = json.loads((tmp_path / "subsets" / "subsets.json").read_text())
    assert {(item["sampling_unit"], item["draw"]) for item in description["subsets"]} == {
        (sampling_unit, draw) for sampling_unit in ("patch", "roi") for draw in range(3)
    }
    manifest = Manifest.open(shards)
    encoder = build_task(config(shards, tmp_path), manifest).model.encoder(SPOT)
    save_encoder(encoder, tmp_path / "encoder")
    words = ["--fraction", "0.5", "--draw", "2", "--kinds", "knn"]
    assert main(["study", "probe", str(tmp_path / "encoder"), str(shards), str(tmp_path / "probe"), *words]) == 0
    scores = tmp_path / "probe" / "knn-AERIAL_LABEL-COSIA-0.5-draw2"
    metrics = json.loads((scores / "metrics.json").read_text())
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {"features", scores.name}
    (same,) = [
        item
        for item in description["subsets"]
        if (item["sampling_unit"], item["draw"], item["fraction"]) == ("patch", 2, 0.5)
    ]
    # The subset is drawn from all labelled patches; a probe leaves out those without its sensor.
    assert same["patches"] >= metrics["patches"]["train"] > 0
    capsys.readouterr()
    save_encoder(build_task(config(shards, tmp_path), manifest).model.encoder(SPOT), tmp_path / "other")
    assert main(["study", "probe", str(tmp_path / "other"), str(shards), str(tmp_path / "probe"), *words]) == 2
    assert f"{scores} holds scores of other weights: give another OUT" in capsys.readouterr().err
    assert main(["study", "subsets", str(shards), str(tmp_path / "no"), "--label", SPOT]) == 2
    assert f"--label {SPOT}: not a label of" in capsys.readouterr().err
    assert main(["study", "subsets", str(shards), str(tmp_path / "no"), "--fractions", "1"]) == 2
    assert "fractions: give at least one, each between 0 and 1" in capsys.readouterr().err
