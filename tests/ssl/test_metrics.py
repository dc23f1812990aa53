"""Metrics of a run: feature spread and effective rank, FLOPs, and the warnings of the monitors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_recipes import PRETRAIN
from tiny_run import TinySource, records, run
from torch import nn

from bocage import recipes
from bocage.shards.batch import Batch
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.engine.logging.metrics import (
    MAX_VECTORS,
    CollapseMonitor,
    ExplainedMonitor,
    FlopCounter,
    MetricWindow,
    ZeroLossMonitor,
    feature_std,
    peak_flops,
    rankme,
    sample_vectors,
)
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig

CPU = torch.device("cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("vectors", "rank"),
    [
        (torch.eye(7, 20), 7.0),
        (torch.eye(20, 7), 7.0),
        (torch.ones(50, 8), 1.0),
        (torch.eye(2, 8).repeat(30, 1), 2.0),
        (torch.diag(torch.tensor([3.0, 1.0])), 4 / 3**0.75),  # normalised singular values 3/4 and 1/4
        (torch.zeros(20, 8), 1.0),
    ],
)
def test_rankme_of_known_matrices(vectors: torch.Tensor, rank: float) -> None:
    assert rankme(vectors) == pytest.approx(rank, rel=1e-3)


def test_rankme_follows_its_formula() -> None:
    vectors = random(60, 24) @ torch.diag(torch.logspace(0, -3, 24))
    probabilities = torch.linalg.svdvals(vectors.double())
    probabilities = probabilities / probabilities.sum()
    expected = float((-(probabilities * probabilities.log()).sum()).exp())
    assert rankme(vectors) == pytest.approx(expected, rel=1e-4) == pytest.approx(rankme(vectors.T), rel=1e-4)


def test_feature_std_is_one_for_even_directions_and_zero_for_equal_ones() -> None:
    assert feature_std(random(4000, 64)) == pytest.approx(1.0, abs=0.02)
    assert feature_std(random(1, 64).repeat(100, 1)) == pytest.approx(0.0, abs=1e-5)


def test_vectors_are_taken_evenly_from_a_map() -> None:
    features = torch.arange(2 * 3 * 40 * 40, dtype=torch.float32).view(2, 3, 40, 40).requires_grad_()
    vectors = sample_vectors(features)
    assert vectors.shape == (MAX_VECTORS, 3) and not vectors.requires_grad
    columns = features.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    rows = [int((columns == vector).all(dim=1).nonzero()) for vector in vectors]
    assert min(rows) == 0 and max(rows) >= 3190 and len(set(rows)) == MAX_VECTORS
    assert sample_vectors(features[:1, :, :2, :2]).shape == (4, 3)


def test_collapse_is_reported_once_after_three_low_records() -> None:
    monitor = CollapseMonitor(0.05, 2.0)
    low, fine = {"feature_std/A": 0.01, "rankme/A": 9.0}, {"feature_std/A": 0.5, "rankme/A": 9.0}
    steps = enumerate((low, low, fine, low, low))
    assert [monitor.warnings(values, 50 * step) for step, values in steps] == [[]] * 5
    (message,) = monitor.warnings(low, 250)
    assert "features of A may be collapsing: feature_std 0.01, low in every record since step 150 (" in message
    assert monitor.warnings(low, 300) == monitor.warnings(fine, 350) == []
    frequent = CollapseMonitor(0.05, 2.0)
    assert [frequent.warnings(low, step) for step in range(100)] == [
        []
    ] * 100  # three records over fewer than 100 steps
    assert frequent.warnings(low, 100)
    both = CollapseMonitor(0.05, 20.0)
    (message,) = [warning for step in (0, 60, 120) for warning in both.warnings(low, step)]
    assert "feature_std 0.01, rankme 9, low" in message
    never = CollapseMonitor(0.0, 0.0)
    assert [never.warnings({"feature_std/A": 0.0, "rankme/A": 0.0}, 100 * step) for step in range(5)] == [[]] * 5


# Some 10 s: patches are simulated and sharded, and three runs pretrain on them.
@pytest.mark.slow
def test_a_run_records_feature_metrics_also_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "tree", patches=6, seed=3, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards").path
    names = ["AERIAL_RGBI", "SENTINEL2_TS"]
    overrides = [*PRETRAIN, f"shards={shards}", f"modalities=[{','.join(names)}]", "split=all", "reconstructions=0"]
    overrides += ["engine.log_every=3", "engine.optimizer.min_lr_ratio=1.0"]

    def lines(output: str, *steps: int) -> list[dict[str, float]]:
        for last in steps:
            pretrain(
                recipes.resolve(PretrainConfig, [*overrides, f"output={tmp_path / output}", f"engine.steps={last}"])
            )
        return [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]

    whole = lines("whole", 9)
    assert "bocage: 9 steps of 2 samples on 1 rank (cpu, fp32), a record every 3\n" in capsys.readouterr().err
    for name in names:
        assert all(1 <= line[f"rankme/{name}"] <= MAX_VECTORS for line in whole)
        assert all(0 <= line[f"feature_std/{name}"] < 2 for line in whole)
    # Runs that end after steps 4 and 7 add the records of these steps.
    parts = {line["step"]: line for line in lines("parts", 4, 7, 9)}
    assert whole[0].keys() == parts[3].keys()
    for name in names:
        assert parts[3][f"rankme/{name}"] == whole[0][f"rankme/{name}"]


class Products(nn.Module):
    """Two matrix products of known size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 40, bias=False), nn.Linear(40, 1, bias=False)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.second(self.first(torch.ones(len(batch), 30))).square().mean(), {}


def test_flops_are_three_times_the_forward_pass(tmp_path: Path) -> None:
    counter = FlopCounter(CPU, "fp32", compiled=False)
    assert counter.metrics(1, 1.0) == {}
    for size in (5, 50):  # only the first pass is counted
        with counter.count():
            torch.ones(size, 30) @ torch.ones(30, 40)
    assert counter.metrics(2, 0.5) == {"tflops": pytest.approx(3 * 2 * 5 * 30 * 40 * 2 / 0.5 / 1e12)}
    compiled = FlopCounter(CPU, "fp32", compiled=True)
    with compiled.count():
        torch.ones(5, 30) @ torch.ones(30, 40)
    assert compiled.metrics(1, 1.0) == {}
    run(tmp_path, TinySource(4), task=Products(), steps=4)  # type: ignore[arg-type]
    for line in records(tmp_path):
        assert line["tflops"] * 1e12 * line["step_seconds"] == pytest.approx(3 * 2 * 4 * (30 * 40 + 40))
        assert "mfu" not in line


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("AMD Instinct MI250X", "bf16", 191.5e12),
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 3060", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_peak_flops_of_devices(device: str, precision: str, expected: float | None) -> None:
    assert peak_flops(device, precision) == expected  # type: ignore[arg-type]


def test_a_zero_gradient_or_loss_term_is_reported_once() -> None:
    monitor = ZeroLossMonitor()
    assert not monitor.warnings({"gradient_norm": 1.0, "masked": 0.5, "contrastive": 0.0}, 20)
    (warning,) = monitor.warnings({"gradient_norm": 1.0, "masked": 0.5, "contrastive": 0.0}, 40)
    assert warning.startswith("the loss term contrastive is exactly 0 in every record since step 20")
    assert not monitor.warnings({"gradient_norm": 0.0, "masked": 0.0, "contrastive": 0.0}, 60)
    warnings = monitor.warnings({"gradient_norm": 0.0, "masked": 0.1, "contrastive": 0.0}, 80)
    assert [text.partition(" is ")[0] for text in warnings] == ["the gradient"]


def test_a_ratio_is_the_quotient_of_its_sums_also_after_a_resume() -> None:
    window = MetricWindow()
    window.add({"explained/A": torch.tensor([1.0, 2.0]), "loss": torch.tensor(3.0)})
    window = MetricWindow.from_state(window.state(), CPU)
    window.add({"explained/A": torch.tensor([0.0, 2.0]), "explained/B": torch.tensor([0.0, 0.0])})
    averages = window.averages()
    assert averages["explained/A"] == 0.25
    assert "explained/B" not in averages  # nothing was masked
    assert averages["loss"] == 3.0


def test_a_loss_that_explains_nothing_for_500_steps_is_reported_once() -> None:
    monitor = ExplainedMonitor(0.05)
    name = "masked/explained/A"
    assert not monitor.warnings({name: 0.01, "loss": 1.0}, 100)
    assert not monitor.warnings({name: 0.2}, 400)  # starts anew
    assert not monitor.warnings({name: 0.01}, 500)
    # Single targets are recorded, not judged: pixels are hard to predict beside statistics.
    (warning,) = monitor.warnings({name: 0.04, f"{name}/pixels": 0.01}, 1000)
    assert warning.startswith(f"{name} is 4.0%, and below 5% in every record since step 500")
    assert not monitor.warnings({name: 0.01}, 2000)
    never = ExplainedMonitor(0.0)
    assert not any(never.warnings({name: 0.0}, step) for step in (0, 1000))
