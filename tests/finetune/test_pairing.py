"""Runs from pretrained encoders and from scratch differ in the encoders alone."""

from pathlib import Path

import torch

from bocage import recipes
from bocage.finetune.config import FinetuneConfig
from bocage.finetune.train import build_task
from bocage.shards.format.manifest import Manifest
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import save_encoder

SENSORS = ("AERIAL_RGBI", "SENTINEL2_TS")


def weights(manifest: Manifest, *words: str) -> dict[str, torch.Tensor]:
    words = ("recipe=finetune_quickstart", f"modalities=[{','.join(SENSORS)}]", *words)
    torch.manual_seed(3)
    return build_task(recipes.resolve(FinetuneConfig, list(words)), manifest).state_dict()


def test_one_seed_draws_the_same_decoder_for_both_initialisations(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", patches=3, seed=0, dates=(4, 5))
    manifest = write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards")
    torch.manual_seed(11)
    config = recipes.resolve(FinetuneConfig, ["recipe=finetune_quickstart", f"modalities=[{','.join(SENSORS)}]"])
    save_encoder(build_task(config, manifest).model.encoder(SENSORS[0]), tmp_path / "encoder")
    scratch = weights(manifest)
    pretrained = weights(manifest, f"encoders.{SENSORS[0]}={tmp_path / 'encoder'}")
    different = {name for name in scratch if not torch.equal(scratch[name], pretrained[name])}
    assert different
    assert all(name.startswith(f"model.encoders.{SENSORS[0]}.") for name in different)
