"""kNN and linear probes of frozen features: votes, regression, cell labels, and scores of a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recipes import PRETRAIN
from tiny_pretraining import make_model

from bocage import recipes
from bocage.shards.classes import COSIA
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.evaluation.probe import (
    LabelledCells,
    Probe,
    ProbeConfig,
    cell_features,
    knn_probe,
    linear_probe,
    majority_class,
    tuned_linear_probe,
)
from bocage.ssl.evaluation.raw_features import raw_cell_features
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig

COSIA_LABEL = "AERIAL_LABEL-COSIA"


def blobs(count: int, seed: int) -> LabelledCells:
    """Sample three classes (2, 5 and 7), each around another direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([2, 5, 7])[torch.randint(3, (count,), generator=generator)]
    centres = torch.eye(8)[labels]
    features = centres * 3 + torch.randn(count, 8, generator=generator) * 0.7
    return LabelledCells(features, labels, torch.arange(count) // 10)


def test_both_probes_classify_separated_classes() -> None:
    train, test = blobs(300, 0), blobs(200, 1)
    for predicted in (knn_probe(train, test.features, 19, 20), linear_probe(train, 19, 1e-3)(test.features)):
        assert (predicted == test.labels).float().mean() > 0.97


def test_knn_probe_equals_a_slow_vote() -> None:
    train, test = blobs(40, 0), blobs(25, 1)
    found = knn_probe(train, test.features, 19, 5)
    for query, predicted in zip(test.features, found.tolist(), strict=True):
        similarity = [float(torch.cosine_similarity(query, known, dim=0)) for known in train.features]
        best = sorted(range(40), key=lambda index: -similarity[index])[:5]
        votes: Counter[int] = Counter()
        for index in best:
            votes[int(train.labels[index])] += np.exp(similarity[index] / 0.07)
        assert predicted == max(votes, key=votes.__getitem__)
    assert knn_probe(train, test.features[:0], 19, 5).shape == (0,)
    assert len(knn_probe(train.select(torch.arange(2)), test.features, 19, 20)) == 25


def test_linear_probe_is_deterministic_and_independent_of_scale() -> None:
    train, test = blobs(200, 0), blobs(200, 1)
    first = linear_probe(train, 19, 1e-3)(test.features)
    assert torch.equal(first, linear_probe(train, 19, 1e-3)(test.features))
    scale = torch.logspace(-3, 3, 8)
    scaled = linear_probe(replace(train, features=train.features * scale), 19, 1e-3)(test.features * scale)
    assert (first == scaled).float().mean() > 0.99


def test_the_penalty_is_the_one_that_scores_best_on_validation_cells() -> None:
    train, test = blobs(400, 0), blobs(200, 1)
    noisy = replace(train, features=torch.cat([train.features * 0.05, torch.randn(400, 200)], dim=1))
    noisy_test = torch.cat([test.features * 0.05, torch.randn(200, 200)], dim=1)
    validation = replace(test, features=noisy_test)
    penalties = (0.0, 1e-2, 10.0)
    scores = {
        penalty: float((linear_probe(noisy, 19, penalty)(noisy_test) == test.labels).float().mean())
        for penalty in penalties
    }
    predict, chosen = tuned_linear_probe(noisy, validation, COSIA, penalties)
    assert scores[chosen] == max(scores.values()) > min(scores.values())
    assert (predict(noisy_test) == test.labels).float().mean() == pytest.approx(scores[chosen])
    # Without validation cells, every fourth training patch chooses.
    assert tuned_linear_probe(noisy, None, COSIA, penalties)[1] in penalties


def test_raw_features_of_images_and_series() -> None:
    values = torch.randn(2, 3, 16, 16)
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[0, 0, :4, :4] = False
    image = EncoderInput(torch.where(valid, values, 50.0), valid, torch.tensor([True, False]))
    rows, features = raw_cell_features(image, 4)
    assert rows.tolist() == [0] and features.shape == (1, 12, 4, 4)
    assert features[0, [0, 3, 6, 9], 0, 0].tolist() == [0, 0, 0, 0]  # no valid pixel
    cell = values[0, 1, 4:8, 8:12]
    expected = [cell.mean(), cell.std(correction=0), cell.min(), cell.max()]
    torch.testing.assert_close(features[0, 1::3, 1, 2], torch.stack(expected))
    # A series is interpolated between the dates that are not padded, here days -134 and 230.
    dates = torch.tensor([[230.0, 0.0, -134.0]])
    frames = torch.tensor([3.0, 99.0, 1.0]).view(1, 3, 1, 1, 1).expand(-1, -1, 2, 5, 5)
    padding = torch.tensor([[False, True, False]])
    series = EncoderInput(frames, torch.ones_like(frames, dtype=torch.bool), torch.tensor([True]), dates, padding)
    _, features = raw_cell_features(series, 5)
    torch.testing.assert_close(features.view(24, 2, 5, 5)[:, 1, 3, 2], torch.linspace(1.0, 3.0, 24))


def test_majority_class_is_the_most_frequent_scored_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 19, (3, 50, 50), generator=generator).to(torch.uint8)
    labels[0, :25] = 18  # undefined: two cells of four have no scored pixel
    found = majority_class(labels, COSIA, 2)
    for sample in range(3):
        for row in range(2):
            for column in range(2):
                part = labels[sample, row * 25 : row * 25 + 25, column * 25 : column * 25 + 25].flatten().tolist()
                counts = Counter(value for value in part if value in COSIA.scored)
                expected = min(counts, key=lambda value: (-counts[value], value)) if counts else -1
                assert found[sample, row, column] == expected
    assert (found[0, 0] == -1).all()


def test_cell_features_contain_all_maps() -> None:
    encoder = make_model(names=["SPOT_RGBI"]).encoder("SPOT_RGBI").eval()
    values = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = cell_features(encoder, values, None, None, 8)
    assert features.shape == (2, sum(encoder.widths), 8, 8)  # of maps of 16 to 2 cells a side


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of simulated patches; takes seconds."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=12, seed=3, dates=(3, 4))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")


# Takes 10 s, because two runs pretrain.
def test_run_logs_probe_scores_and_is_not_changed_by_them(manifest: Manifest, tmp_path: Path) -> None:
    words = [*PRETRAIN, f"shards={manifest.path}", "modalities=[AERIAL_RGBI,SENTINEL2_TS]", "reconstructions=0"]
    words += ["split=all", "window=51.2", "engine.steps=4", "engine.evaluate_every=2", "engine.ema_decay=0.5"]

    def lines(name: str, *more: str) -> list[dict[str, float]]:
        pretrain(recipes.resolve(PretrainConfig, [*words, *more, f"output={tmp_path / name}"]))
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    plain = lines("plain")
    probed = lines("probed", f"probe.label={COSIA_LABEL}", "probe.patches=6", "probe.train=all", "probe.test=all")
    assert [line["loss"] for line in plain] == [line["loss"] for line in probed]
    for line, expected in zip(probed, (False, True, False, True), strict=True):
        for name in ("AERIAL_RGBI", "SENTINEL2_TS"):
            for key in (f"evaluation/knn_miou/{name}", f"evaluation/linear_miou/{name}"):
                assert (key in line) == expected
                assert not expected or 0 < line[key] <= 100
    by_class = [value for key, value in probed[-1].items() if key.startswith("evaluation/linear_iou/AERIAL_RGBI/")]
    assert np.mean(by_class) == pytest.approx(probed[-1]["evaluation/linear_miou/AERIAL_RGBI"])


# Takes 25 s, because three processes import everything.
@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one_for_an_odd_number_of_patches(manifest: Manifest, tmp_path: Path) -> None:
    script = [str(Path(__file__).parents[2] / "support" / "probe_run.py"), str(manifest.path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, words in (("one", script), ("two", [*launcher, *script])):
        subprocess.run([sys.executable, *words, str(tmp_path / name)], check=True, capture_output=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["scores"] == two["scores"]
    assert any(name.startswith("linear_iou/SENTINEL2_TS/") for name in one["scores"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label": "COSIA"}, "probe.label=COSIA is not a label of .*; labels: AERIAL_LABEL-COSIA, ALL_LABEL-LPIS"),
        ({"label": "AERIAL_RGBI"}, "probe.label=AERIAL_RGBI is not a label"),
        ({"label": COSIA_LABEL, "level": 2}, "probe.level=2: AERIAL_LABEL-COSIA has levels 1 to 1"),
    ],
)
def test_error_names_a_wrong_label(keys: dict[str, str | int], message: str, manifest: Manifest) -> None:
    with pytest.raises(InputError, match=message):
        Probe(manifest, ProbeConfig(**keys), "all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys", [{"patches": 0}, {"neighbours": 0}, {"level": 0}, {"cell": 0.0}, {"penalties": [-1.0]}, {"penalties": []}]
)
def test_error_names_the_key_of_a_wrong_value(keys: dict[str, float]) -> None:
    (key,) = keys
    with pytest.raises(ValueError, match=rf"probe\.{key}="):
        ProbeConfig(**keys)  # type: ignore[arg-type]
