"""The segmentation task: a model and its labels, trained by the common loop, saved as one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bocage.finetune.models.losses import IGNORED, SegmentationLoss, scored_targets
from bocage.finetune.models.supervision import Supervision, TaskConfig, freeze, frozen_parts, without_some
from bocage.finetune.models.targets import Target
from bocage.finetune.models.uperfuse import Predictions, UPerFuse
from bocage.finetune.models.upernet import DecoderConfig
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.preprocess.augment import orient
from bocage.shards.preprocess.inputs import encoder_inputs
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.description import checked_input
from bocage.ssl.encoders.key_report import compare
from bocage.ssl.encoders.memory_limit import limited_memory
from bocage.ssl.encoders.weights import read_tensors

_SCHEMA = 3
_ROOM = 2**28  # bytes beyond twice the weights, for what is built and dropped
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Segmentation(nn.Module):
    """Class maps of one or several labels from any of the model's modalities.

    Args:
        encoders: by modality, images before series.
        targets: what is told apart, at least one; of one pixel size.
        decoder: widths and norm of the decoders.
        quality_masks: name of the quality mask of a series (``shards.inputs.quality_masks``).
        auxiliary: modalities with decoders of their own while training (deep supervision, arXiv 1409.5185).
        official: compute as the official code does, see ``UPerFuse``.
        supervision: how it learns. Frozen stages have the batch statistics and dropout of evaluation.

    Raises:
        InputError: labels named twice or of different pixels, keys of ``supervision`` that name nothing, or sensors
            left out of an official model, which has no stand-in for them.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        targets: Sequence[Target],
        decoder: DecoderConfig,
        quality_masks: Mapping[str, str],
        *,
        auxiliary: Collection[str] = (),
        official: bool = False,
        supervision: Supervision | None = None,
    ) -> None:
        super().__init__()
        supervision = supervision or Supervision()
        self.targets = {target.name: target for target in targets}
        if not targets:
            raise InputError("labels: name at least one")
        if len(self.targets) < len(targets):
            raise InputError(f"labels: {', '.join(target.name for target in targets)}: each can be given once")
        sizes = {target.label.gsd for target in targets}
        if len(sizes) > 1:
            raise InputError(f"labels: {', '.join(self.targets)} have pixels of different sizes")
        self.gsd = sizes.pop()
        if unknown := set(supervision.tasks) - set(self.targets):
            raise InputError(f"tasks: {', '.join(sorted(unknown))} not among the labels {', '.join(self.targets)}")
        rates = dict(supervision.modality_dropout)
        if unknown := set(rates) - set(encoders):
            raise InputError(
                f"modality_dropout: {', '.join(sorted(unknown))} not among the modalities {', '.join(encoders)}"
            )
        if official and any(rates.values()):
            raise InputError("modality_dropout: the official architecture has no stand-in for a missing sensor")
        self.modality_dropout = rates
        self.decoder_config = decoder
        self.quality_masks = dict(quality_masks)
        self.auxiliary_weight = supervision.auxiliary_weight
        self.label_stride = supervision.label_stride
        classes = {name: len(target.scheme) for name, target in self.targets.items()}
        self.model = UPerFuse(encoders, classes, decoder, auxiliary=auxiliary, official=official)
        tasks = {name: supervision.tasks.get(name, TaskConfig()) for name in self.targets}
        self.weights = {name: task.weight for name, task in tasks.items()}
        self.losses = nn.ModuleDict(
            {
                name: SegmentationLoss(task.loss, self.targets[name].scheme, f"tasks.{name}.loss")
                for name, task in tasks.items()
            }
        )
        freeze(encoders, supervision.freeze)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities it reads."""
        return list(self.model.encoders)

    @property
    def labels(self) -> list[str]:
        """Names of the labels it predicts."""
        return list(self.targets)

    @property
    def fusing(self) -> list[nn.Module]:
        """What puts the encoders' maps together: the fusion, where there is one, and the tokens of absent sensors."""
        return [part for part in (self.model.fusion, self.model.absent) if part is not None]

    def train(self, mode: bool = True) -> Segmentation:
        """Training mode for everything but frozen parts of encoders."""
        super().train(mode)
        for part in frozen_parts(self.model.encoders):
            part.eval()
        return self

    def predictions(self, batch: Batch, *, learning: bool = False) -> Predictions:
        """Logits at the labels' resolution.

        Where it is learning: of every ``label_stride``-th pixel, turned and without some sensors as seeds say.
        """
        specs = {name: self.model.encoder(name).spec for name in self.modalities if name in batch.values}
        inputs = encoder_inputs(
            batch, specs, self.quality_masks, oriented=learning, empty_is_absent=not self.model.official
        )
        if learning and inputs and any(self.modality_dropout.values()):
            inputs = without_some(inputs, batch.seeds, self.modality_dropout)
        side = float(batch.windows[0, 2])
        size = round(side / self.gsd)
        return self.model(inputs, side, size // self.label_stride if learning else size)

    def logits(self, batch: Batch) -> dict[str, torch.Tensor]:
        """By label, (B, classes, H, W) at the label's resolution."""
        return self.predictions(batch).logits

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch with labels, a scalar, oriented while training, and what to log of it.

        Logged are the share of pixels that are scored, with several labels the loss of each, and where there are
        auxiliary decoders the main loss alone and the mean of theirs.
        """
        predictions = self.predictions(batch, learning=self.training)
        main, auxiliary, scored, idle = [], [], [], []
        logs: dict[str, torch.Tensor] = {}
        for name, target in self.targets.items():
            labels = target.truth(batch)
            if self.training:
                start = self.label_stride // 2  # the pixel in the middle of what a logit covers
                labels = orient(labels, batch.seeds)[:, start :: self.label_stride, start :: self.label_stride]
            targets = scored_targets(labels, batch.present[name], target.scheme)
            loss = self.losses[name](predictions.logits[name], targets)
            if len(self.targets) > 1:
                logs[f"loss/{name}"] = loss.detach()
            main.append(self.weights[name] * loss)
            scored.append((targets != IGNORED).float().mean())
            for rows, logits in predictions.auxiliary.get(name, {}).values():
                if len(rows):
                    own = self.losses[name](logits, targets[rows.to(targets.device)])
                    auxiliary.append(self.weights[name] * own)
                else:
                    idle.append(logits.sum())  # nothing, but with gradients
        total = torch.stack(main).sum()
        logs["scored_pixels"] = torch.stack(scored).mean()
        if auxiliary:
            # Of one label the mean over decoders, of several the sum of these means, as the main losses add up.
            supervised = len(self.targets) * torch.stack(auxiliary).mean()
            logs |= {"main_loss": total.detach(), "auxiliary_loss": supervised.detach()}
            total = total + self.auxiliary_weight * supervised
        return total + sum(idle), logs

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        """By label, the likeliest class of every pixel, (B, H, W) uint8. The module must be in evaluation mode."""
        return {name: logits.argmax(dim=1).to(torch.uint8) for name, logits in self.logits(batch).items()}

    def to_json(self) -> dict[str, Any]:
        """What ``load_segmentation`` needs beside the weights."""
        encoders = {name: self.model.encoder(name) for name in self.modalities}
        return {
            "schema": _SCHEMA,
            "task": "segmentation",
            "targets": [target.to_json() for target in self.targets.values()],
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


def described(config: dict[str, Any], supervision: Supervision | None = None) -> Segmentation:
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
        [Target.from_json(item) for item in config["targets"]],
        DecoderConfig(**config["decoder"]),
        config["quality_masks"],
        auxiliary=config["auxiliary"],
        official=config["official"],
        supervision=supervision,
    )
