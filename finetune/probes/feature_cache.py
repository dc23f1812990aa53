"""Dense features of frozen encoders, and labels, on cells of the ground, kept in files that every probe reads.

Features of a patch depend on nothing but the encoder and the patch, so they are computed once: a folder for each
encoder and set of shards, with files of some hundred patches. An interrupted computation goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from bocage.shards.modality import PATCH_SIZE, Modality
from bocage.shards.preprocess.inputs import encoder_inputs, quality_masks, required_modalities
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.evaluation.probe import majority_class, present_features

_PATCHES = 256  # of a file


class PatchTensorStore:
    """Tensors of patches by key, in files of some hundred.

    Args:
        folder: made when something is added.

    Raises:
        InputError: a file that is not as this class writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    keys = json.loads((file.metadata() or {})["keys"])
            except (SafetensorError, KeyError, ValueError, OSError) as error:
                raise InputError(f"{path}: not a file of features: {error}; delete it, and it is made again") from error
            self._places |= {key: (path, index) for index, key in enumerate(keys)}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Places of those of the ``keys`` that are not there."""
        return [place for place, key in enumerate(keys) if key not in self._places]

    def add(self, keys: Sequence[str], values: torch.Tensor) -> None:
        """Keep ``values[i]`` of (N, ...) as those of ``keys[i]``, in one more file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        final = self.folder / f"{name}.safetensors"
        with atomic_write(final, concurrent=True) as path:  # cells of a study may share a folder
            save_file({"values": values.contiguous()}, path, {"keys": json.dumps(list(keys))})
        self._places |= {key: (final, index) for index, key in enumerate(keys)}

    def read(self, keys: Sequence[str]) -> torch.Tensor:
        """The values of N ``keys``, (N, ...), in that order."""
        by_file: dict[Path, list[int]] = {}
        for place, key in enumerate(keys):
            by_file.setdefault(self._places[key][0], []).append(place)
        found: torch.Tensor | None = None
        for path, places in by_file.items():
            with safe_open(path, "pt") as file:
                stored = file.get_slice("values")  # few of many patches may be wanted
                for place in places:
                    index = self._places[keys[place]][1]
                    values = stored[index : index + 1]
                    if found is None:
                        found = values.new_empty(len(keys), *values.shape[1:])
                    found[place] = values[0]
        assert found is not None
        return found


def encoder_digest(encoder: Encoder) -> str:
    """What decides an encoder's features: a SHA-256 of its weights, input and architecture."""
    digest = hashlib.sha256(json.dumps([encoder.spec.to_json(), asdict(encoder.config)]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class DenseFeatureCache:
    """Features and labels of patches on a grid of cells.

    Args:
        root: of the files; what is there of the same encoders and shards is used.
        manifest: of the shards.
        cell: side of a cell, metres, rounded so that cells divide a patch.
    """

    def __init__(self, root: Path, manifest: Manifest, cell: float) -> None:
        self.root, self.manifest = root, manifest
        self.cells = round(PATCH_SIZE / cell)

    def features(
        self,
        encoder: Encoder,
        rows: np.ndarray,
        *,
        batch_size: int,
        workers: int,
        progress: Callable[[int], None] | None = None,
    ) -> PatchTensorStore:
        """(C, cells, cells) float16 features of rows of the manifest, zeros for patches without the sensor.

        All maps of the encoder, averaged over cells or interpolated to them, each normalised over its channels.
        """
        name = encoder.spec.modality
        registry = self.manifest.registry
        masks = quality_masks(registry, [name])
        width = sum(encoder.widths)

        @torch.no_grad()
        def of(batch: Batch) -> torch.Tensor:
            given = encoder_inputs(batch, {name: encoder.spec}, masks, random_orientation=False)[name]
            found = torch.zeros(len(batch), width, self.cells, self.cells, dtype=torch.float16)
            there, values = present_features(encoder, given, self.cells)
            found[there.cpu()] = values.to("cpu", torch.float16)
            return found

        device = next(encoder.parameters()).device
        folder = f"{name}-{encoder_digest(encoder)[:16]}"
        modalities = required_modalities(registry, [name], [])
        return self._of(folder, rows, modalities, of, device, batch_size, workers, progress)

    def labels(self, target: Target, rows: np.ndarray, *, batch_size: int, workers: int) -> PatchTensorStore:
        """(cells, cells) int16 of rows of the manifest, (N,) int64: the commonest scored class of a cell, or -1."""

        def of(batch: Batch) -> torch.Tensor:
            found = majority_class(target.truth(batch), target.scheme, self.cells)
            found[~batch.present[target.name]] = -1
            return found.to(torch.int16)

        folder = "-".join(filter(None, (target.name, str(target.band + 1), target.grouping)))
        return self._of(folder, rows, [target.label], of, torch.device("cpu"), batch_size, workers, None)

    def _of(
        self,
        folder: str,
        rows: np.ndarray,
        modalities: Sequence[Modality],
        of: Callable[[Batch], torch.Tensor],
        device: torch.device,
        batch_size: int,
        workers: int,
        progress: Callable[[int], None] | None,
    ) -> PatchTensorStore:
        """Files of what ``of`` says of at least the patches of some rows; what is missing is computed."""
        files = PatchTensorStore(self.root / self.manifest.digest[:16] / f"{folder}-{self.cells}")
        keys = self.manifest.column("key").take(rows).to_pylist()
        wanted = files.missing(keys)
        done = len(keys) - len(wanted)
        for start in range(0, len(wanted), _PATCHES):
            part = wanted[start : start + _PATCHES]
            batches = evaluation_batches(self.manifest, rows[part], modalities, batch_size=batch_size, workers=workers)
            found = []
            for batch in batches:
                found.append(of(batch.to(device)))
                done += len(batch)
                if progress is not None:
                    progress(done)
            files.add([keys[place] for place in part], torch.cat(found))
        return files
