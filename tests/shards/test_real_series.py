"""Real series of Sentinel-1 and -2 go through shards bit by bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from real_series import pastis_tree, treesat_tree

from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards


@pytest.mark.parametrize(("make", "patches"), [(treesat_tree, 1), (pastis_tree, 18)])
def test_real_series_come_back_to_the_bit(
    tmp_path: Path, make: Callable[[Path], dict[tuple[str, str], np.ndarray]], patches: int
) -> None:
    written = make(tmp_path / "tree")
    manifest = write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards")
    assert len(manifest) == patches
    compared = 0
    modalities = list(manifest.registry.values())
    for batch in evaluation_batches(manifest, np.arange(patches), modalities, batch_size=1):
        for modality in modalities:
            wanted = written[batch.keys[0], modality.name]
            found = batch.values[modality.name][0].numpy()
            assert found.dtype == wanted.dtype
            assert found.shape == wanted.shape
            assert found.tobytes() == wanted.tobytes()
            compared += 1
    assert compared == len(written)
