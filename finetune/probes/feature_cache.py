"""Cache dense features of frozen encoders, and labels, on a grid of ground cells.

Features depend only on the encoder and the patch, so they are computed once. Each encoder and set of shards has a
folder with files of 256 patches. An interrupted computation resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bocage.finetune.models.targets import Target
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import encoder_inputs, quality_masks, required_modalities
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.evaluation.probe import FeatureExtractor, majority_class, present_features
from bocage.ssl.evaluation.raw_features import raw_cell_features

_PATCHES_PER_FILE = 256


class PatchTensorStore:
    """Store one tensor per patch key in safetensors files.

    Args:
        folder: folder of the files, created by the first ``add``.

    Raises:
        InputError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._location: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    keys = json.loads((file.metadata() or {})["keys"])
            except (SafetensorError, KeyError, ValueError, OSError) as error:
                raise InputError(f"{path}: not a file of features: {error}; delete it to compute it again") from error
            self._location |= {key: (path, index) for index, key in enumerate(keys)}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Return the indices of the ``keys`` that are not stored."""
        return [index for index, key in enumerate(keys) if key not in self._location]

    def add(self, keys: Sequence[str], values: torch.Tensor) -> None:
        """Store ``values``, (N, ...), under N ``keys`` in a new file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        file = self.folder / f"{name}.safetensors"
        with atomic_write(file, concurrent=True) as path:  # runs of a study share the folder
            save_file({"values": values.contiguous()}, path, {"keys": json.dumps(list(keys))})
        self._location |= {key: (file, index) for index, key in enumerate(keys)}

    def read(self, keys: Sequence[str]) -> torch.Tensor:
        """Read the tensors of N ``keys`` as one tensor, (N, ...), in the order of the keys."""
        positions_by_file: dict[Path, list[int]] = {}
        for position, key in enumerate(keys):
            positions_by_file.setdefault(self._location[key][0], []).append(position)
        values: torch.Tensor | None = None
        for path, positions in positions_by_file.items():
            with safe_open(path, "pt") as file:
                stored = file.get_slice("values")  # reads only the requested patches
                for position in positions:
                    index = self._location[keys[position]][1]
                    value = stored[index : index + 1]
                    if values is None:
                        values = value.new_empty(len(keys), *value.shape[1:])
                    values[position] = value[0]
        assert values is not None
        return values


def encoder_digest(encoder: Encoder) -> str:
    """Compute the SHA-256 of an encoder's weights, input specification and architecture."""
    digest = hashlib.sha256(json.dumps([encoder.spec.to_json(), asdict(encoder.config)]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class DenseFeatureCache:
    """Compute and cache features and labels of patches on a grid of cells.

    Args:
        root: folder of the cache; entries of the same encoders and shards are reused.
        manifest: manifest of the shards.
        cell: side of a cell in metres, rounded so that cells divide a patch.
    """

    def __init__(self, root: Path, manifest: Manifest, cell: float) -> None:
        self.root, self.manifest = root, manifest
        self.cells = max(1, round(manifest.registry.patch_size / cell))

    def features(
        self,
        encoder: Encoder,
        rows: np.ndarray,
        *,
        batch_size: int,
        workers: int,
        progress: Callable[[int], None] | None = None,
    ) -> PatchTensorStore:
        """Return the features of patches, (C, cells, cells) float16 each; zeros for patches without the sensor.

        All feature maps of the encoder are averaged over cells or interpolated to them. Each map is normalised over
        its channels.

        Args:
            encoder: frozen encoder.
            rows: (N,) int64 rows of the manifest.
            batch_size: patches per batch.
            workers: DataLoader workers.
            progress: callback that receives the number of finished patches.
        """
        device = next(encoder.parameters()).device
        folder = f"{encoder.spec.modality}-{encoder_digest(encoder)[:16]}"
        extract = partial(present_features, encoder)
        return self._features(encoder.spec, folder, extract, rows, device, batch_size, workers, progress)

    def raw_features(
        self,
        spec: InputSpec,
        rows: np.ndarray,
        *,
        batch_size: int,
        workers: int,
        progress: Callable[[int], None] | None = None,
    ) -> PatchTensorStore:
        """Return the raw inputs of patches (``raw_cell_features``) in the form of ``features``.

        Args:
            spec: input of the encoder that they are compared with.
            rows: (N,) int64 rows of the manifest.
            batch_size: patches per batch.
            workers: DataLoader workers.
            progress: callback that receives the number of finished patches.
        """
        digest = hashlib.sha256(json.dumps(spec.to_json()).encode()).hexdigest()[:16]
        folder, device = f"{spec.modality}-raw-{digest}", torch.device("cpu")
        return self._features(spec, folder, raw_cell_features, rows, device, batch_size, workers, progress)

    def _features(
        self,
        spec: InputSpec,
        folder: str,
        extract: FeatureExtractor,
        rows: np.ndarray,
        device: torch.device,
        batch_size: int,
        workers: int,
        progress: Callable[[int], None] | None,
    ) -> PatchTensorStore:
        name, registry = spec.modality, self.manifest.registry
        masks = quality_masks(registry, [name])

        @torch.no_grad()
        def compute_features(batch: Batch) -> torch.Tensor:
            inputs = encoder_inputs(batch, {name: spec}, masks, random_orientation=False)[name]
            present, values = extract(inputs, self.cells)
            features = torch.zeros(len(batch), *values.shape[1:], dtype=torch.float16)
            features[present.cpu()] = values.to("cpu", torch.float16)
            return features

        modalities = required_modalities(registry, [name], [])
        return self._complete(folder, rows, modalities, compute_features, device, batch_size, workers, progress)

    def labels(self, target: Target, rows: np.ndarray, *, batch_size: int, workers: int) -> PatchTensorStore:
        """Return the labels of patches, (cells, cells) int16 each: the majority scored class of a cell, or -1.

        Args:
            target: label to read.
            rows: (N,) int64 rows of the manifest.
            batch_size: patches per batch.
            workers: DataLoader workers.
        """

        def compute_labels(batch: Batch) -> torch.Tensor:
            labels = majority_class(target.truth(batch), target.scheme, self.cells)
            labels[~batch.present[target.name]] = -1
            return labels.to(torch.int16)

        folder = "-".join(filter(None, (target.name, str(target.band + 1), target.grouping)))
        return self._complete(
            folder, rows, [target.label], compute_labels, torch.device("cpu"), batch_size, workers, None
        )

    def _complete(
        self,
        folder: str,
        rows: np.ndarray,
        modalities: Sequence[Modality],
        compute: Callable[[Batch], torch.Tensor],
        device: torch.device,
        batch_size: int,
        workers: int,
        progress: Callable[[int], None] | None,
    ) -> PatchTensorStore:
        """Return the store of a folder, after computing the patches of ``rows`` that it lacks."""
        store = PatchTensorStore(self.root / self.manifest.digest[:16] / f"{folder}-{self.cells}")
        keys = self.manifest.column("key").take(rows).to_pylist()
        missing = store.missing(keys)
        done = len(keys) - len(missing)
        for start in range(0, len(missing), _PATCHES_PER_FILE):
            chunk = missing[start : start + _PATCHES_PER_FILE]
            batches = evaluation_batches(self.manifest, rows[chunk], modalities, batch_size=batch_size, workers=workers)
            values = []
            for batch in batches:
                values.append(compute(batch.to(device)))
                done += len(batch)
                if progress is not None:
                    progress(done)
            store.add([keys[index] for index in chunk], torch.cat(values))
        return store
