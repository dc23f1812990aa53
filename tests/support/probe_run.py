"""Probes of untrained encoders, for a test that asks one rank and two: ``python probe_run.py SHARDS OUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from bocage import recipes
from bocage.shards.format.manifest import Manifest
from bocage.ssl.evaluation.probe import Probe, ProbeConfig
from bocage.ssl.pretrain import PretrainConfig, build_task


def main(shards: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = PartialState(cpu=True)
    manifest = Manifest.open(shards)
    torch.manual_seed(0)
    words = ["recipe=quickstart", "modalities=[AERIAL_RGBI,SENTINEL2_TS]"]
    task = build_task(recipes.resolve(PretrainConfig, words), manifest).eval()
    config = ProbeConfig(label="AERIAL_LABEL-COSIA", patches=7, train="all", test="all")
    figures = Probe(manifest, config, "all").figures(task, batch_size=1, workers=0)
    if ranks.is_main_process:
        Path(out).write_text(json.dumps({"ranks": ranks.num_processes, "figures": figures}))
    ranks.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
