"""Probe untrained encoders on one or more ranks: ``python probe_run.py SHARDS OUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from bocage import recipes
from bocage.shards.format.manifest import Manifest
from bocage.ssl.evaluation.probe import Probe, ProbeConfig
from bocage.ssl.pretrain import build_pretraining_model
from bocage.ssl.pretrain_config import PretrainConfig


def main(shards: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = PartialState(cpu=True)
    manifest = Manifest.open(shards)
    torch.manual_seed(0)
    overrides = ["recipe=quickstart", "modalities=[AERIAL_RGBI,SENTINEL2_TS]"]
    task = build_pretraining_model(recipes.resolve(PretrainConfig, overrides), manifest).eval()
    config = ProbeConfig(label="AERIAL_LABEL-COSIA", patches=7, train="all", test="all")
    scores = Probe(manifest, config, "all").scores(task, batch_size=1, workers=0)
    if ranks.is_main_process:
        Path(out).write_text(json.dumps({"ranks": ranks.num_processes, "scores": scores}))
    ranks.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
