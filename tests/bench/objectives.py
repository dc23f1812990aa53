"""What the objectives cost: ``python tests/bench/objectives.py SHARDS``.

Step time (forward and backward, processor seconds of one thread, which other work on the machine disturbs less) and
peak memory of Swin-T on the aerial image at 256 and 512 px: ``packed`` and ``mask_token`` with the fusion decoder of
the full-size recipes, beside supervised training of the same encoder with UPerNet (``supervised``). Then all seven
sensors: dense contrast beside the masked objective (``combined``) against the masked one alone. The variants take turns
in one process; ratios are medians over turns. Memory is what the process holds at most beyond what it held before the
first step, each variant in a process of its own.
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
ALONE = {
    "packed": ["masking.images=packed"],
    "mask_token": ["masking.images=mask_token"],
}
TOGETHER = {"masked": ["weights.contrastive=0"], "combined": []}


def built(variant: str, side: float, manifest: Manifest) -> tuple[nn.Module, Batch]:
    """The task of a variant and a batch for it."""
    aerial = max(manifest.registry.by_role("image"), key=lambda item: item.size * len(item.bands)).name
    torch.manual_seed(0)
    task: nn.Module
    labels = []
    if variant == "supervised":
        words = ["recipe=finetune_cosia", f"modalities=[{aerial}]", *SWIN]
        config = recipes.resolve(FinetuneConfig, words)
        task, labels = finetuning.build_task(config, manifest), config.labels
        names = [aerial]
    else:
        own = ALONE.get(variant) or TOGETHER[variant]
        alone = [f"modalities=[{aerial}]", "weights.contrastive=0"] if variant in ALONE else []
        words = ["recipe=mae_multimodal", *SWIN, *alone, *own]
        task = pretraining.build_pretraining_model(recipes.resolve(PretrainConfig, words), manifest)
        assert isinstance(task, PretrainingModel)
        names = list(task.encoders)
    modalities = required_modalities(manifest.registry, names, labels)
    rows = manifest.split("all", "")
    stream = TrainingStream(manifest, rows, modalities, batch_size=BATCH, window=side, seed=0, workers=0)
    return task.train(), next(iter(stream.batches(0, 0, 1)))


def step(task: nn.Module, batch: Batch) -> float:
    """Processor seconds of a forward and a backward pass."""
    began = time.process_time()
    loss, _ = task(batch)
    loss.backward()
    task.zero_grad()
    return time.process_time() - began


def peak(variant: str, side: float, manifest: Manifest) -> float:
    """MB that two steps hold at most beyond what there was before."""
    task, batch = built(variant, side, manifest)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building
    for _ in range(2):
        step(task, batch)
    status = Path("/proc/self/status").read_text().split()
    return (int(status[status.index("VmHWM:") + 1]) * 1024 - before) / 1e6


def compared(variants: list[str], against: str, side: float, arguments: argparse.Namespace) -> None:
    """Print time and memory of each variant, and ratios to ``against``."""
    manifest = Manifest.open(arguments.shards)
    tasks = {variant: built(variant, side, manifest) for variant in variants}
    for task, batch in tasks.values():
        step(task, batch)  # warms up
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(arguments.turns):
        for variant, (task, batch) in tasks.items():
            seconds[variant].append(step(task, batch))
    for variant in variants:
        line = [sys.executable, __file__, str(arguments.shards), "--peak", variant, "--side", str(side)]
        memory = float(subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1])
        ratios = [own / other for own, other in zip(seconds[variant], seconds[against], strict=True)]
        print(
            f"{SIDES[side]} px  {variant:10}  {statistics.median(seconds[variant]):6.2f} s a step  "
            f"{statistics.median(ratios):5.2f} x {against} ({min(ratios):.2f} to {max(ratios):.2f})  "
            f"{memory:6.0f} MB",
            flush=True,
        )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--peak", help="print the peak memory of one variant alone")
    parser.add_argument("--side", type=float, default=51.2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak(arguments.peak, arguments.side, Manifest.open(arguments.shards)))
        return
    for side in SIDES:
        compared([*ALONE, "supervised"], "mask_token", side, arguments)
    for side in SIDES:
        compared(list(TOGETHER), "masked", side, arguments)


if __name__ == "__main__":
    main()
