"""Check that simulated land cover asks for more than colour: ``python tests/bench/scenes.py NEWFOLDER``.

The script simulates aerial images and land cover, and compares strict mIoU on the validation patches:

- logistic regression on the values of single pixels, with all training labels;
- the decoder of a fine-tuned model over a frozen encoder with random weights;
- the same model trained as a whole from scratch: the reference, 100 %.

Both models train on all labels until the learning rate has decayed to 0. The script fails if pixels reach more
than 60 % or the frozen encoder more than 75 % of the reference: features of such scenes could not be told apart. It
takes 40 minutes of two CPU cores. The same command resumes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from bocage import recipes
from bocage.finetune.study.results import analyze_study
from bocage.finetune.study.study_config import StudyConfig
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.evaluation.confusion import ConfusionMatrix, strict_scores
from bocage.ssl.evaluation.probe import LabelledCells, tuned_linear_probe

IMAGE, LABEL = "AERIAL_RGBI", "AERIAL_LABEL-COSIA"
PATCHES, SEED = 1000, 11
PIXELS = 1000  # of each patch, for logistic regression
STEPS = 6000
MAX_PIXELS, MAX_FROZEN = 0.6, 0.75
RECIPE = f"""
finetune: finetune_quickstart
overrides:
  - modalities=[{IMAGE}]
  - window=25.6
  - batch_size=8
  - workers=0
  - predictions=0
  - pictures=0
  - encoder_lr_scale=0.2
  - engine.steps={STEPS}
  - engine.log_every=250
  - engine.optimizer.learning_rate=5.0e-3
  - engine.optimizer.warmup_steps=100
initializations: {{scratch: {{}}}}
modes: [frozen, full]
fractions: [{{fraction: 1.0}}]
"""


def bocage(*arguments: str | Path) -> None:
    """Run a command of bocage."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "bocage", *map(str, arguments)], check=True, env=environment)


def shard(folder: Path) -> Path:
    """Simulate and shard the patches, unless they exist."""
    shards = folder / "shards"
    if not (shards / "manifest.parquet").exists():
        size = ["--patches", str(PATCHES), "--seed", str(SEED), "--workers", "2"]
        bocage("sample", folder / "tree", *size, "--modalities", IMAGE, LABEL)
        bocage("shard", folder / "tree", shards)
    return shards


def pixels(manifest: Manifest, subset: str) -> LabelledCells:
    """Draw pixels of the patches of a subset: their values, squares, square roots and NDVI, and their classes."""
    random, label = np.random.default_rng(0), manifest.registry[LABEL]
    features: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    patches: list[torch.Tensor] = []
    modalities = [manifest.registry[IMAGE], label]
    for batch in evaluation_batches(manifest, manifest.split("split_1", subset), modalities, batch_size=16):
        for image, classes in zip(batch.values[IMAGE], batch.values[LABEL], strict=True):
            chosen = torch.from_numpy(random.choice(classes.numel(), PIXELS, replace=False))
            values, known = image.flatten(1)[:, chosen].T.float() / 255, classes.flatten()[chosen].long()
            scored = torch.isin(known, torch.tensor(label.schemes[0].scored))
            ndvi = (values[:, 3:] - values[:, :1]) / (values[:, 3:] + values[:, :1] + 0.01)
            features.append(torch.cat([values, values.square(), values.sqrt(), ndvi], dim=1)[scored])
            labels.append(known[scored])
            patches.append(torch.full((int(scored.sum()),), len(patches)))
    return LabelledCells(torch.cat(features), torch.cat(labels), torch.cat(patches))


def pixel_miou(shards: Path) -> float:
    """Strict mIoU (%) of logistic regression on single pixels."""
    manifest = Manifest.open(shards)
    scheme = manifest.registry[LABEL].schemes[0]
    train, valid = pixels(manifest, "train"), pixels(manifest, "valid")
    predict, _ = tuned_linear_probe(train, None, scheme, (1e-5, 1e-3))
    matrix = ConfusionMatrix(scheme)
    matrix.update(valid.labels.view(1, 1, -1), predict(valid.features).view(1, 1, -1), ["all"])
    return strict_scores(matrix.total, scheme).miou


def main() -> None:
    """Print the three scores and the two ratios; exit with 1 if a ratio is too high."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the data and the runs")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    shards = shard(folder)
    recipe = folder / "study.yaml"
    recipe.write_text(RECIPE)
    words = [f"recipe={recipe}", f"shards={shards}", f"output={folder / 'study'}"]
    bocage("study", "run", *words, "--processes", "2")
    results = analyze_study(recipes.resolve(StudyConfig, words))[LABEL].results
    miou = {result.run.mode: result.valid_miou for result in results}
    trained, frozen = miou["full"], miou["frozen"]
    colours = pixel_miou(shards)
    print(f"trained as a whole: {trained:.1f} mIoU on the validation patches after {STEPS:,} steps")
    print(f"frozen random encoder: {frozen:.1f}, ratio {frozen / trained:.2f} (at most {MAX_FROZEN})")
    print(f"single pixels: {colours:.1f}, ratio {colours / trained:.2f} (at most {MAX_PIXELS})")
    sys.exit(frozen / trained > MAX_FROZEN or colours / trained > MAX_PIXELS)


if __name__ == "__main__":
    main()
