"""Measure step time and memory of the objectives: ``python tests/bench/objectives.py SHARDS``.

The first comparison trains Swin-T on the aerial image at 256 and 512 px: ``packed`` and ``mask_token`` with the fusion
decoder of the full-size recipes, and supervised training of the same encoder with UPerNet (``supervised``). The second
trains on all seven sensors: the masked objective with dense contrast (``combined``) and alone (``masked``).

A step is a forward and a backward pass. Its time is in CPU seconds of one thread, which other processes disturb less.
The variants run in turns in one process, and ratios are medians over turns. Memory is the peak of a process beyond its
memory before the first step; each variant is measured in a new process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from bocage import recipes
from bocage.finetune import train as finetuning
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.shards.batch import Batch
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.inputs import required_modalities
from bocage.shards.read.dataset import TrainingStream
from bocage.ssl import pretrain as pretraining
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.pretrain_config import PretrainConfig

SIDES = {51.2: 256, 102.4: 512}
SWIN = ["swin.name=swin_tiny_patch4_window7_224", "swin.options={drop_path_rate: 0.0}"]
BATCH = 2
AERIAL = {
    "packed": ["masking.images=packed"],
    "mask_token": ["masking.images=mask_token"],
}
ALL_SENSORS = {"masked": ["weights.contrastive=0"], "combined": []}


def build(variant: str, side: float, manifest: Manifest) -> tuple[nn.Module, Batch]:
    """Build the module of a variant in training mode, and a batch for it."""
    aerial = max(manifest.registry.by_role("image"), key=lambda item: item.size * len(item.bands)).name
    torch.manual_seed(0)
    task: nn.Module
    labels = []
    if variant == "supervised":
        overrides = ["recipe=finetune_cosia", f"modalities=[{aerial}]", *SWIN]
        config = recipes.resolve(FinetuneConfig, overrides)
        task, labels = finetuning.build_task(config, manifest), config.labels
        names = [aerial]
    else:
        overrides = ["recipe=mae_multimodal", *SWIN]
        if variant in AERIAL:
            overrides += [f"modalities=[{aerial}]", "weights.contrastive=0", *AERIAL[variant]]
        else:
            overrides += ALL_SENSORS[variant]
        task = pretraining.build_pretraining_model(recipes.resolve(PretrainConfig, overrides), manifest)
        assert isinstance(task, PretrainingModel)
        names = list(task.encoders)
    modalities = required_modalities(manifest.registry, names, labels)
    rows = manifest.split("all", "")
    stream = TrainingStream(manifest, rows, modalities, batch_size=BATCH, window=side, seed=0, workers=0)
    return task.train(), next(iter(stream.batches(0, 0, 1)))


def step(task: nn.Module, batch: Batch) -> float:
    """Run a forward and a backward pass; return its CPU seconds."""
    started = time.process_time()
    loss, _ = task(batch)
    loss.backward()
    task.zero_grad()
    return time.process_time() - started


def peak_memory(variant: str, side: float, manifest: Manifest) -> float:
    """Return the peak memory of two steps beyond the memory before them, in MB."""
    task, batch = build(variant, side, manifest)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM) after the model is built
    for _ in range(2):
        step(task, batch)
    status = Path("/proc/self/status").read_text().split()
    return (int(status[status.index("VmHWM:") + 1]) * 1024 - before) / 1e6


def compare(variants: list[str], reference: str, side: float, arguments: argparse.Namespace) -> None:
    """Print time and memory of each variant, and the ratio of its time to the ``reference`` variant."""
    manifest = Manifest.open(arguments.shards)
    tasks = {variant: build(variant, side, manifest) for variant in variants}
    for task, batch in tasks.values():
        step(task, batch)  # warm-up
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(arguments.turns):
        for variant, (task, batch) in tasks.items():
            seconds[variant].append(step(task, batch))
    for variant in variants:
        command = [sys.executable, __file__, str(arguments.shards), "--peak", variant, "--side", str(side)]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ratios = [value / base for value, base in zip(seconds[variant], seconds[reference], strict=True)]
        print(
            f"{SIDES[side]} px  {variant:10}  {statistics.median(seconds[variant]):6.2f} s per step  "
            f"{statistics.median(ratios):5.2f} x {reference} ({min(ratios):.2f} to {max(ratios):.2f})  "
            f"{memory:6.0f} MB",
            flush=True,
        )


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of shards")
    parser.add_argument("--turns", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--peak", metavar="VARIANT", help="print only the peak memory of one variant, MB")
    parser.add_argument("--side", type=float, default=51.2, help="window side for --peak, in metres (default 51.2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak_memory(arguments.peak, arguments.side, Manifest.open(arguments.shards)))
        return
    for side in SIDES:
        compare([*AERIAL, "supervised"], "mask_token", side, arguments)
    for side in SIDES:
        compare(list(ALL_SENSORS), "masked", side, arguments)


if __name__ == "__main__":
    main()
