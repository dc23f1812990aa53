"""Pretrain and fine-tune on all ranks of a torchrun launch, with DDP and with FSDP.

torchrun --nproc_per_node 2 fsdp_run.py SHARDS OUTPUT CASE [CASE ...]
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from small_recipes import PRETRAIN

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.train import finetune
from bocage.shards.errors import InputError
from bocage.ssl.engine.parallel.distributed import all_gather_with_grad, rank_and_world
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig

PRETRAINING = [
    *PRETRAIN,
    "modalities=[AERIAL_RGBI,DEM_ELEV,SENTINEL2_TS]",
    "split=all",
    "window=51.2",
    "batch_size=1",
    "engine.accumulation=2",
    "engine.ema_decay=0.5",
    "masking.map_ratio=0",
    "engine.steps=4",
    "engine.save_every=2",
    # At the recipe's rate, AdamW's full steps along gradients near zero let rounding grow to 1 % of the gradient.
    "engine.optimizer.learning_rate=1e-4",
]
IMAGES = "modalities=[AERIAL_RGBI,DEM_ELEV]"  # these encoders have no dropout, which depends on the number of ranks
LARS = ["engine.optimizer.name=lars", "engine.optimizer.learning_rate=1e-3", "engine.steps=2"]
FSDP = ["engine.parallel=fsdp", "engine.checkpoint=sharded", "engine.activation_checkpointing=true"]
FINETUNING = [
    "recipe=finetune_quickstart",
    "modalities=[AERIAL_RGBI,SENTINEL2_TS]",
    "auxiliary=[SENTINEL2_TS]",
    "split=all",
    "window=51.2",
    "batch_size=2",
    "predictions=0",
    "engine.steps=2",
    "engine.log_every=1",
    "engine.optimizer.warmup_steps=0",
]


def check_all_gather() -> None:
    """The gradient of ``all_gather_with_grad`` equals that on one rank, also where gradients are not contiguous."""
    rank, _ = rank_and_world()
    generator = torch.Generator().manual_seed(0)
    everything, factors = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((4, 3, 5), (4, 4))
    )
    rows = slice(2 * rank, 2 * rank + 2)

    def loss(queries: torch.Tensor, keys: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return (factor * (queries[:, 1] @ keys.transpose(0, 1)[2].T).exp()).sum()

    local = everything[rows].clone().requires_grad_()
    keys = all_gather_with_grad(local)
    assert torch.equal(keys, everything)
    loss(local, keys, factors[rows]).backward()
    single = everything.clone().requires_grad_()
    loss(single, single, factors).backward()
    assert local.grad is not None and single.grad is not None
    torch.testing.assert_close(local.grad, single.grad[rows])
    assert all_gather_with_grad(torch.tensor([rank == 1])).tolist() == [False, True]


def main(shards: str, output: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)

    def run_pretraining(name: str, *overrides: str) -> None:
        overrides = (*PRETRAINING, f"shards={shards}", f"output={output / name}", *overrides)
        assert pretrain(recipes.resolve(PretrainConfig, list(overrides))).exit_code == 0

    for case in cases:
        match case:
            case "ddp":
                run_pretraining(case)
            case "gather":
                check_all_gather()
            case "fsdp":
                run_pretraining(case, *FSDP)
            case "resharded":  # first saves shards of two ranks, then resumes from them and saves the full state
                run_pretraining(case, *FSDP, "engine.steps=2", "engine.optimizer.min_lr_ratio=1.0")
                run_pretraining(case, "engine.parallel=fsdp", "engine.resume_allow=['*']")
            case "images":
                run_pretraining(case, *FSDP, IMAGES)
            case "half":  # to be resumed on another number of ranks
                run_pretraining(case, *FSDP, IMAGES, "engine.steps=2", "engine.optimizer.min_lr_ratio=1.0")
            case "lars":
                run_pretraining(case, *FSDP, *LARS)
            case "lars_ddp":
                run_pretraining(case, *LARS)
            case "compiled":
                run_pretraining(case, *FSDP, "engine.compile=eager", "engine.steps=2", "modalities=[AERIAL_RGBI]")
            case "tuned" | "tuned_fsdp":
                parallel = "fsdp" if case == "tuned_fsdp" else "ddp"
                overrides = [*FINETUNING, f"engine.parallel={parallel}", f"shards={shards}", f"output={output / case}"]
                finetune(recipes.resolve(FinetuneConfig, overrides))
            case "blocked":  # one rank cannot write its shard
                run_pretraining(case, *FSDP, "engine.steps=2")
                if rank_and_world()[0] == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                try:
                    run_pretraining(case, *FSDP)
                except InputError as error:
                    print(f"refused on rank {rank_and_world()[0]}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
