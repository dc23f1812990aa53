"""Compiled blocks and activation checkpointing train to the same weights as plain blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import PRETRAIN
from tiny_run import MODALITY, TinySource, TinyTask, run
from torch import nn

from bocage import recipes
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.engine.parallel.block_compile import repeated_blocks
from bocage.ssl.pretrain import build_pretraining_model, pretrain
from bocage.ssl.pretrain_config import PretrainConfig


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some seconds: patches are simulated and sharded."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=4, seed=0, dates=(4, 5))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")


def trained(manifest: Manifest, output: Path, *overrides: str) -> dict[str, torch.Tensor]:
    overrides = (
        f"shards={manifest.path}",
        f"output={output}",
        "split=all",
        "engine.steps=2",
        "modalities=[AERIAL_RGBI]",
        *overrides,
    )
    checkpoint = pretrain(
        recipes.resolve(PretrainConfig, [*PRETRAIN, "swin.options.depths=[2,1,1,1]", *overrides])
    ).last
    return load_file(checkpoint / "model.safetensors")


# Some 10 s: two trainings each.
@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.activation_checkpointing=true",),
        # A minute: graphs of all block classes are captured.
        pytest.param(("engine.compile=eager",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_weights_equal_those_of_plain_blocks(overrides: tuple[str, ...], manifest: Manifest, tmp_path: Path) -> None:
    torch.compiler.reset()
    plain = trained(manifest, tmp_path / "plain")
    weights = trained(manifest, tmp_path / "other", *overrides)
    assert weights.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5, msg=name)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.convolution(values).relu()


class BlockTask(TinyTask):
    """A ``TinyTask`` behind two blocks."""

    def __init__(self) -> None:
        super().__init__(plain=True)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = batch.values[MODALITY]
        return super().forward(replace(batch, values={MODALITY: self.blocks(values)}))


def test_compiled_blocks_train_to_the_same_bits_and_are_plain_afterwards(tmp_path: Path) -> None:
    torch.compiler.reset()
    counts = torch._dynamo.utils.counters
    tasks = []
    for backend in ("none", "eager"):
        counts.clear()
        torch.manual_seed(1)
        _, task = run(tmp_path / backend, task=BlockTask(), compile=backend)
        assert (counts["stats"]["unique_graphs"] > 0) == (backend == "eager")
        tasks.append(task.state_dict())
    assert tasks[0].keys() == tasks[1].keys()
    assert all(torch.equal(tasks[0][name], tasks[1][name]) for name in tasks[0])
    counts.clear()
    task(next(TinySource().batches(0, 0, 1)))
    assert not counts["stats"]


def test_repeated_blocks_have_most_weights_and_do_not_overlap(manifest: Manifest) -> None:
    task = build_pretraining_model(
        recipes.resolve(PretrainConfig, ["recipe=quickstart", "weights.contrastive=0"]), manifest
    )
    blocks = repeated_blocks(task)
    names = {type(block).__name__ for block in blocks}
    assert "SwinTransformerBlock" in names
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert sum(map(torch.Tensor.numel, parameters)) > 0.6 * sum(map(torch.Tensor.numel, task.parameters()))


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^engine\.compile=eager: TinyTask has no repeated blocks"):
        run(tmp_path, compile="eager")
    with pytest.raises(InputError, match=r"^engine\.activation_checkpointing: only Swin encoders support it"):
        run(tmp_path, activation_checkpointing=True)
