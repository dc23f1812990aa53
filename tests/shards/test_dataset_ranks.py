"""Two torchrun ranks of the training loop read every sample once, in the order of one rank."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_tree import write_tree

from bocage.shards.read.sampler import GlobalShuffle
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

SCRIPT = Path(__file__).parents[1] / "support" / "rank_run.py"
COUNT = 42


# 10 to 20 s: torchrun starts two interpreters that import torch.
@pytest.mark.slow
def test_ranks_of_the_training_loop_split_the_samples(tmp_path: Path) -> None:
    keys = [f"D001-2020_AA-S1-1_0-{column}" for column in range(COUNT)]
    write_tree(tmp_path / "tree", keys, ["SENTINEL1-ASC_TS"])
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards", samples_per_shard=8)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    # Seven steps of two batches of three are one epoch; the eighth begins the next.
    command += [str(manifest.path), str(tmp_path / "run"), "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    ranks = json.loads((tmp_path / "run" / "ranks.json").read_text())

    evaluated = [rank["evaluated"] for rank in ranks]
    # Ranks take batches of 4 in turn, and the last batch has 2.
    assert [len(rank_keys) for rank_keys in evaluated] == [22, 20]
    assert Counter(key for rank_keys in evaluated for key in rank_keys) == Counter(keys)

    rounds = zip(*(rank["trained"] for rank in ranks), strict=True)
    trained = [batch[index] for batches in rounds for index in range(3) for batch in batches]
    order = GlobalShuffle(np.arange(COUNT), manifest.index.shard, seed=2)
    expected = [manifest.index.key(order.at(position)[1]) for position in range(len(trained))]
    assert trained == expected
    assert Counter(trained[:COUNT]) == Counter(keys)
