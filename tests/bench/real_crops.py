"""What pretraining is worth on real crop series: ``python tests/bench/real_crops.py TABLES NEWFOLDER``.

TABLES holds the two French tables of ESA WorldCereal's repository (src/worldcereal/data): 1,000 series of single
pixels in five H3 cells, of which ``tests/data/worldcereal_fr`` has eighty. The small U-TAE is pretrained on their
Sentinel-2 series without labels, and compared in two ways.

- Probes by region: after several numbers of steps on all series, those of each H3 cell are classified by a probe that
  was fitted on the other cells. Macro F1 counts all of them together. Controls are random weights and raw inputs
  (interpolated series). ``2022`` fits on the series of 2023 and classifies those of 2022 alone, whose region, Corsica,
  grows other crops.
- A label study: series are split at random, 60 % to train. The encoder is pretrained on these alone, then probed and
  fine-tuned on 10, 25 and 100 % of their labels. The page is ``NEWFOLDER/study/report/report.html``.

It takes 40 minutes of two CPU cores; the same command resumes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bocage
from bocage.finetune.probes.feature_cache import DenseFeatureCache, PatchTensorStore
from bocage.shards.classes import ClassScheme
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.evaluation.probe import PENALTIES, LabelledCells, knn_probe, majority_class, tuned_linear_probe

DESCRIPTION = Path(__file__).parents[2] / "examples" / "datasets" / "worldcereal.yaml"
SENSOR, LABEL = "S2", "CROP"
STEPS, SEEDS = (300, 1000, 4000), (0, 1)
NEIGHBOURS = 20
RANDOM_SPLIT = "{by: key, train: 0.6, valid: 0.15, test: 0.25, allow_mixed_regions: true}"
RECIPE = f"""
finetune: finetune_own_imagery_quickstart
overrides:
  - labels=[{LABEL}]
  - modalities=[{SENSOR}]
  - split=split_random
  - batch_size=32
  - workers=0
  - predictions=0
  - pictures=0
  - engine.steps=400
  - engine.save_every=0
initializations: {{scratch: {{}}}}
reference: scratch
modes: [knn, linear, full]
fractions:
  - {{fraction: 0.1, draws: 4}}
  - {{fraction: 0.25, draws: 3}}
  - {{fraction: 1.0}}
learning_rates: [1.0e-3, 4.0e-3]
variants:
  plain: []
  slow: [encoder_lr_scale=0.2]
"""
LOADING: dict[str, Any] = {"batch_size": 64, "workers": 0}


def run_bocage(*arguments: str | Path) -> None:
    """Run a command of bocage."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "bocage", *map(str, arguments)], env=environment, check=True)


def shard(tables: Path, folder: Path) -> Path:
    """Shard the tables, with a random split beside those of the example."""
    description = folder / "worldcereal.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    description.write_text(DESCRIPTION.read_text().replace("splits:", f"splits:\n  split_random: {RANDOM_SPLIT}"))
    run_bocage("shard", tables, folder / "shards", f"dataset={description}")
    return folder / "shards"


def pretrain(shards: Path, output: Path, steps: int, *settings: str) -> Path:
    """Pretrain the small U-TAE without labels, unless it was done before; return the folder of the encoder."""
    encoder = output / "encoders" / SENSOR
    if not encoder.is_dir():
        words = [f"shards={shards}", f"output={output}", f"modalities=[{SENSOR}]", "batch_size=64", "workers=0"]
        run_bocage("pretrain", "recipe=own_imagery_quickstart", *words, f"engine.steps={steps}", *settings)
    return encoder


def macro_f1(truth: torch.Tensor, predicted: torch.Tensor, scheme: ClassScheme) -> float:
    """Mean of the F1 scores (%) of the scored classes that occur."""
    scores = []
    for value in scheme.scored:
        if (occurrences := int((truth == value).sum())) > 0:
            hits = int(((truth == value) & (predicted == value)).sum())
            scores.append(100 * 2 * hits / (occurrences + int((predicted == value).sum())))
    return float(np.mean(scores))


def folds(regions: np.ndarray, years: np.ndarray, transfer: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield masks of the series to fit on and to classify."""
    if transfer:
        yield torch.from_numpy(years == "2023"), torch.from_numpy(years == "2022")
        return
    for region in sorted(set(regions)):
        yield torch.from_numpy(regions != region), torch.from_numpy(regions == region)


def probe(
    features: torch.Tensor, labels: torch.Tensor, regions: np.ndarray, years: np.ndarray, scheme: ClassScheme
) -> str:
    """Score features (N, C) by region and by year."""
    scores = []
    for transfer in (False, True):
        truth, linear, nearest = [], [], []
        for fitted, tested in folds(regions, years, transfer):
            train = LabelledCells(features[fitted], labels[fitted], torch.arange(int(fitted.sum())))
            classify, _ = tuned_linear_probe(train, None, scheme, PENALTIES)
            truth.append(labels[tested])
            linear.append(classify(features[tested]))
            nearest.append(knn_probe(train, features[tested], len(scheme), NEIGHBOURS))
        scores += [macro_f1(torch.cat(truth), torch.cat(parts), scheme) for parts in (linear, nearest)]
    return "  ".join(f"{score:8.1f}" for score in scores)


def probe_by_region(shards: Path, folder: Path) -> None:
    """Pretrain on all series, and print a table of the probes."""
    manifest = Manifest.open(shards)
    present = [manifest.column(f"length.{name}").to_numpy() > 0 for name in (SENSOR, LABEL)]
    rows = np.flatnonzero(present[0] & present[1])
    scheme = manifest.registry[LABEL].schemes[0]
    batches = evaluation_batches(manifest, rows, [manifest.registry[LABEL]], **LOADING)
    labels = torch.cat([majority_class(batch.values[LABEL][:, 0], scheme, 1) for batch in batches]).flatten()
    scored = labels >= 0
    rows, labels = rows[scored.numpy()], labels[scored]
    keys, regions, years = (np.array(manifest.column(name).take(rows).to_pylist()) for name in ("key", "roi", "domain"))
    cache = DenseFeatureCache(folder / "features", manifest, manifest.registry.patch_size)

    def score(name: str, store: PatchTensorStore) -> None:
        features = store.read(keys.tolist()).flatten(1).float()
        print(f"{name:24}  {probe(features, labels, regions, years, scheme)}", flush=True)

    print(f"{len(rows)} series, {len(set(regions))} regions; macro F1 (%)")
    print(f"{'':24}  {'linear':>8}  {'kNN':>8}  {'2022':>8}  {'kNN 2022':>8}")
    for steps, seed in product(STEPS, SEEDS):
        folder_of_encoder = pretrain(shards, folder / f"steps{steps}-seed{seed}", steps, f"engine.seed={seed}")
        encoder = bocage.load_encoder(folder_of_encoder).eval()
        if steps == STEPS[0]:
            if seed == SEEDS[0]:
                score("raw inputs", cache.raw_features(encoder.spec, rows, **LOADING))
            torch.manual_seed(seed)
            random = build_encoder(encoder.spec, encoder.config).eval()
            score(f"random weights, seed {seed}", cache.features(random, rows, **LOADING))
        score(f"{steps:,} steps, seed {seed}", cache.features(encoder, rows, **LOADING))


def main() -> None:
    """Probe by region, then run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    shards = shard(arguments.tables, folder)
    probe_by_region(shards, folder)
    encoder = pretrain(shards, folder / "train-part", STEPS[-1], "split=split_random")
    recipe = folder / "study.yaml"
    recipe.write_text(RECIPE)
    words = [f"recipe={recipe}", f"shards={shards}", f"output={folder / 'study'}"]
    words.append(f"initializations.masked.{SENSOR}={encoder}")
    run_bocage("study", "run", *words, "--processes", "2")
    run_bocage("study", "report", *words)


if __name__ == "__main__":
    main()
