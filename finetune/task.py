"""The segmentation task: a model and a label, trained by the common loop, saved as one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bocage.finetune.losses import IGNORED, cross_entropy, scored_targets
from bocage.finetune.uperfuse import Predictions, UPerFuse
from bocage.finetune.upernet import DecoderConfig
from bocage.shards.augment import orient
from bocage.shards.batch import Batch
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.inputs import encoder_inputs
from bocage.shards.modality import Modality
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.description import checked_input
from bocage.ssl.encoders.keys import compare
from bocage.ssl.encoders.limits import limited_memory
from bocage.ssl.encoders.registry import build_encoder
from bocage.ssl.encoders.weight_files import read_tensors

_SCHEMA = 2
_ROOM = 2**28  # bytes beyond twice the weights, for what is built and dropped
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Segmentation(nn.Module):
    """Class maps of one label band from any of the model's modalities.

    Args:
        encoders: by modality, images before series.
        label: the label raster.
        band: which of its bands, from 0; LPIS has one a level.
        decoder: widths and norm of the decoder.
        quality_masks: name of the quality mask of a series (``shards.inputs.quality_masks``).
        frozen: modalities whose encoder does not learn. Its batch statistics and dropout are those of evaluation.
        auxiliary: modalities with a decoder of their own while training (deep supervision, arXiv 1409.5185).
        auxiliary_weight: weight of the mean of their losses beside the main one.
        official: compute as the official code does, see ``UPerFuse``.

    Raises:
        InputError: a band that the label does not have, or a frozen modality that the model does not read.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        label: Modality,
        band: int,
        decoder: DecoderConfig,
        quality_masks: Mapping[str, str],
        frozen: Collection[str] = (),
        auxiliary: Collection[str] = (),
        auxiliary_weight: float = 0.4,
        official: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= band < len(label.schemes):
            raise InputError(f"{label.name} has levels 1 to {len(label.schemes)}, not {band + 1}")
        if unknown := set(frozen) - set(encoders):
            raise InputError(f"freeze: {', '.join(sorted(unknown))} not among the modalities {', '.join(encoders)}")
        self.label, self.band, self.decoder_config = label, band, decoder
        self.quality_masks = dict(quality_masks)
        self.frozen = frozenset(frozen)
        self.auxiliary_weight = auxiliary_weight
        self.model = UPerFuse(encoders, {label.name: len(self.scheme)}, decoder, auxiliary=auxiliary, official=official)
        for name in self.frozen:
            self.model.encoder(name).requires_grad_(False)

    @property
    def scheme(self) -> ClassScheme:
        """The classes it tells apart."""
        return self.label.schemes[self.band]

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities it reads."""
        return list(self.model.encoders)

    def train(self, mode: bool = True) -> Segmentation:
        """Training mode for everything but frozen encoders."""
        super().train(mode)
        for name in self.frozen:
            self.model.encoder(name).eval()
        return self

    def predictions(self, batch: Batch, *, oriented: bool = False) -> Predictions:
        """Logits at the label's resolution; ``oriented`` turns each sample at random, as its seed says."""
        specs = {name: self.model.encoder(name).spec for name in self.modalities if name in batch.values}
        inputs = encoder_inputs(
            batch, specs, self.quality_masks, oriented=oriented, empty_is_absent=not self.model.official
        )
        side = float(batch.windows[0, 2])
        return self.model(inputs, side, round(side / self.label.gsd))

    def logits(self, batch: Batch) -> torch.Tensor:
        """(B, classes, H, W) at the label's resolution."""
        return self.predictions(batch).logits[self.label.name]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch with labels, oriented while training, and what to log of it.

        Logged are the share of pixels that are scored and, where there are auxiliary decoders, the main loss alone and
        the mean of theirs.
        """
        name = self.label.name
        predictions = self.predictions(batch, oriented=self.training)
        labels = self.truth(batch)
        if self.training:
            labels = orient(labels, batch.seeds)
        targets = scored_targets(labels, batch.present[name], self.scheme)
        loss = cross_entropy(predictions.logits[name], targets)
        logs = {"scored_pixels": (targets != IGNORED).float().mean()}
        supervised = predictions.auxiliary.get(name, {}).values()
        loss = loss + sum(logits.sum() for rows, logits in supervised if not len(rows))  # nothing, but with gradients
        found = [(rows, logits) for rows, logits in supervised if len(rows)]
        if found:
            losses = [cross_entropy(logits, targets[rows.to(targets.device)]) for rows, logits in found]
            auxiliary = torch.stack(losses).mean()
            logs |= {"main_loss": loss.detach(), "auxiliary_loss": auxiliary.detach()}
            loss = loss + self.auxiliary_weight * auxiliary
        return loss, logs

    def truth(self, batch: Batch) -> torch.Tensor:
        """The label band, (B, H, W) uint8."""
        return batch.values[self.label.name][:, self.band]

    @torch.no_grad()
    def predict(self, batch: Batch) -> torch.Tensor:
        """The likeliest class of every pixel, (B, H, W) uint8. The module must be in evaluation mode."""
        return self.logits(batch).argmax(dim=1).to(torch.uint8)

    def to_json(self) -> dict[str, Any]:
        """What ``load_segmentation`` needs beside the weights."""
        encoders = {name: self.model.encoder(name) for name in self.modalities}
        return {
            "schema": _SCHEMA,
            "task": "segmentation",
            "label": self.label.to_json(),
            "band": self.band,
            "decoder": asdict(self.decoder_config),
            "encoders": {
                name: {"input": encoder.spec.to_json(), "config": asdict(encoder.config)}
                for name, encoder in encoders.items()
            },
            "quality_masks": self.quality_masks,
            "auxiliary": list(self.model.auxiliary),
            "official": self.model.official,
        }


def save_segmentation(task: Segmentation, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, all that ``load_segmentation`` needs."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in task.model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with written_atomically(folder / _WEIGHTS) as path:
        save_file(weights, path)
    with written_atomically(folder / _CONFIG) as path:
        path.write_text(json.dumps(task.to_json(), indent=1) + "\n", encoding="utf-8")


def load_segmentation(folder: Path) -> Segmentation:
    """The model that ``save_segmentation`` wrote, on the CPU and in evaluation mode; nothing stored is executed.

    Raises:
        InputError: the folder or a file is missing, damaged, of another version, or does not fit the other.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, no exception for names too long or folders closed to us
        parent = folder.parent
        below = sorted(
            name
            for name in (os.listdir(parent) if os.path.isdir(parent) else [])
            if os.path.isfile(parent / name / folder.name / _CONFIG)
        )
        hint = f"; there is one in {', '.join(below)} below it" if below else ""
        raise InputError(f"{folder}: no fine-tuned model here; give the output folder of `bocage finetune`{hint}")
    path = folder / _CONFIG
    config = _read_config(path)
    stored = read_tensors(folder / _WEIGHTS)
    # As for encoders: a description may ask for anything, its weights tell what is reasonable.
    room = 2 * sum(tensor.nbytes for tensor in stored.values()) + _ROOM
    try:
        with torch.random.fork_rng(devices=[]), limited_memory(parameters=room, buffers=room):
            task = described(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a segmentation model: {type(error).__name__} {reason}") from error
    report = compare(task.model.state_dict(), stored)
    if not report.complete:
        raise InputError(f"{folder / _WEIGHTS} does not fit {_CONFIG} beside it: {report}")
    task.model.load_state_dict(stored)
    return task.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no fine-tuned model here; give the folder of `bocage finetune`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or config.get("task") != "segmentation":
        raise InputError(f"{path} does not describe a segmentation model")
    if config.get("schema") != _SCHEMA:
        raise InputError(
            f"{path} has schema {str(config.get('schema'))[:20]}, this bocage reads {_SCHEMA}: fine-tune again, or "
            "install the bocage that wrote it"
        )
    return config


def described(config: dict[str, Any], frozen: Collection[str] = (), auxiliary_weight: float = 0.4) -> Segmentation:
    """The model that ``Segmentation.to_json`` describes, with fresh weights.

    Raises:
        InputError, or what Python says of a key or value that is not as ``to_json`` writes it.
    """
    encoders = {
        name: build_encoder(checked_input(item["input"]), EncoderConfig(**item["config"]))
        for name, item in config["encoders"].items()
    }
    return Segmentation(
        encoders,
        Modality.from_json(config["label"]),
        config["band"],
        DecoderConfig(**config["decoder"]),
        config["quality_masks"],
        frozen,
        config["auxiliary"],
        auxiliary_weight,
        config["official"],
    )
