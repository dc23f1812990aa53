"""The segmentation task: a model and a label, trained by the common loop, saved as one folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
from bocage.shards.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.registry import build_encoder

_SCHEMA = 1
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
        inputs = encoder_inputs(batch, specs, self.quality_masks, oriented=oriented)
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
        found = predictions.auxiliary.get(name, {}).values()
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
    """The model that ``save_segmentation`` wrote, on the CPU and in evaluation mode.

    Raises:
        InputError: the folder or a file is missing, damaged, or does not fit the other.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if config["schema"] != _SCHEMA or config["task"] != "segmentation":
            raise InputError(f"{folder / _CONFIG}: not a segmentation model of this version of bocage")
        encoders = {
            name: build_encoder(InputSpec.from_json(item["input"]), EncoderConfig(**item["config"]))
            for name, item in config["encoders"].items()
        }
        label = Modality.from_json(config["label"])
        task = Segmentation(
            encoders,
            label,
            config["band"],
            DecoderConfig(**config["decoder"]),
            config["quality_masks"],
            auxiliary=config["auxiliary"],
            official=config["official"],
        )
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no fine-tuned model here; give the output folder of `bocage finetune`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / _CONFIG}: cannot be read as a segmentation model: {error!r}") from error
    try:
        weights = load_file(folder / _WEIGHTS)
        task.model.load_state_dict(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / _WEIGHTS}: cannot be read: {error}") from error
    except RuntimeError as error:  # torch lists every missing, unexpected or misshapen tensor
        raise InputError(f"{folder / _WEIGHTS}: does not fit {_CONFIG}: {' '.join(str(error).split())}") from error
    return task.eval()
