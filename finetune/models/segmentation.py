"""Segmentation task: model, targets and loss for the training loop; saving to and loading from a folder."""

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

from bocage.finetune.models.losses import IGNORE_INDEX, SegmentationLoss, scored_targets
from bocage.finetune.models.supervision import (
    Supervision,
    TaskConfig,
    apply_modality_dropout,
    freeze_encoders,
    frozen_modules,
)
from bocage.finetune.models.targets import Target
from bocage.finetune.models.uperfuse import Predictions, UPerFuse
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.preprocess.augment import orient
from bocage.shards.preprocess.inputs import encoder_inputs
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.description import parse_input_spec
from bocage.ssl.encoders.memory_limit import limited_memory
from bocage.ssl.encoders.weights import compare_weights, read_tensors

_SCHEMA = 3
_EXTRA_MEMORY = 2**28  # bytes beyond twice the weights, for temporary tensors while the model is built
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Segmentation(nn.Module):
    """Semantic segmentation of one or several labels from any subset of the model's modalities.

    Args:
        encoders: encoders by modality, images before series.
        targets: labels to predict, at least one; all have the same pixel size.
        decoder: widths and norm of the decoders.
        quality_masks: name of the quality mask of each series that has one (``preprocess.inputs.quality_masks``).
        auxiliary: modalities with an auxiliary decoder during training (deep supervision, arXiv 1409.5185).
        official: whether to compute what the official code computes, see ``UPerFuse``.
        supervision: training settings; None for the defaults. Frozen stages always run in evaluation mode.

    Raises:
        InputError: a label is given twice, labels differ in pixel size, ``supervision`` names an unknown label or
            modality, or an official model has modality dropout.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        targets: Sequence[Target],
        decoder: UPerNetConfig,
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
            raise InputError(f"labels: {', '.join(target.name for target in targets)}: give each label once")
        sizes = {target.label.gsd for target in targets}
        if len(sizes) > 1:
            raise InputError(f"labels: {', '.join(self.targets)} have different pixel sizes: fine-tune them separately")
        self.gsd = sizes.pop()
        self.patch_size = targets[0].label.patch_size
        if unknown := set(supervision.tasks) - set(self.targets):
            raise InputError(f"tasks: {', '.join(sorted(unknown))} not among the labels {', '.join(self.targets)}")
        rates = dict(supervision.modality_dropout)
        if unknown := set(rates) - set(encoders):
            raise InputError(
                f"modality_dropout: {', '.join(sorted(unknown))} not among the modalities {', '.join(encoders)}"
            )
        if official and any(rates.values()):
            raise InputError("modality_dropout: official=true cannot process a sample without one of its sensors")
        self.modality_dropout = rates
        self.decoder_config = decoder
        self.quality_masks = dict(quality_masks)
        self.auxiliary_weight = supervision.auxiliary_weight
        self.label_stride = supervision.label_stride
        classes = {name: len(target.scheme) for name, target in self.targets.items()}
        self.model = UPerFuse(encoders, classes, decoder, auxiliary=auxiliary, official=official)
        tasks = {name: supervision.tasks.get(name, TaskConfig()) for name in self.targets}
        self.loss_weights = {name: task.weight for name, task in tasks.items()}
        self.losses = nn.ModuleDict(
            {
                name: SegmentationLoss(task.loss, self.targets[name].scheme, f"tasks.{name}.loss")
                for name, task in tasks.items()
            }
        )
        freeze_encoders(encoders, supervision.freeze)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities that the model reads."""
        return list(self.model.encoders)

    @property
    def labels(self) -> list[str]:
        """Names of the labels that the model predicts."""
        return list(self.targets)

    @property
    def fusion_modules(self) -> list[nn.Module]:
        """The fusion, if the model has one, and the tokens that replace absent modalities."""
        return [module for module in (self.model.fusion, self.model.absent) if module is not None]

    def train(self, mode: bool = True) -> Segmentation:
        """Set the training mode; frozen parts of encoders stay in evaluation mode."""
        super().train(mode)
        for module in frozen_modules(self.model.encoders):
            module.eval()
        return self

    def predictions(self, batch: Batch, *, training: bool = False) -> Predictions:
        """Compute logits at the label resolution.

        Args:
            batch: input batch.
            training: whether to orient the inputs at random, apply modality dropout, and compute logits for every
                ``label_stride``-th pixel only. The sample seeds determine the random numbers.
        """
        specs = {name: self.model.encoder(name).spec for name in self.modalities if name in batch.values}
        inputs = encoder_inputs(
            batch, specs, self.quality_masks, random_orientation=training, empty_is_absent=not self.model.official
        )
        if training and inputs and any(self.modality_dropout.values()):
            inputs = apply_modality_dropout(inputs, batch.seeds, self.modality_dropout)
        side = float(batch.windows[0, 2])
        size = round(side / self.gsd)
        return self.model(inputs, side, size // self.label_stride if training else size)

    def logits(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute (B, classes, H, W) logits by label, at the label resolution."""
        return self.predictions(batch).logits

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of a labelled batch. In training mode, inputs and labels are oriented at random.

        Returns:
            The scalar loss, and scalars to log: ``scored_pixels`` (fraction of pixels that are scored), with several
            labels ``loss/LABEL``, and with auxiliary decoders ``main_loss`` and ``auxiliary_loss``.
        """
        predictions = self.predictions(batch, training=self.training)
        main, auxiliary, scored, zero_losses = [], [], [], []
        logs: dict[str, torch.Tensor] = {}
        for name, target in self.targets.items():
            labels = target.truth(batch)
            if self.training:
                start = self.label_stride // 2  # the pixel at the centre of the block that a logit covers
                labels = orient(labels, batch.seeds)[:, start :: self.label_stride, start :: self.label_stride]
            targets = scored_targets(labels, batch.present[name], target.scheme)
            loss = self.losses[name](predictions.logits[name], targets)
            if len(self.targets) > 1:
                logs[f"loss/{name}"] = loss.detach()
            main.append(self.loss_weights[name] * loss)
            scored.append((targets != IGNORE_INDEX).float().mean())
            for rows, logits in predictions.auxiliary.get(name, {}).values():
                if len(rows):
                    auxiliary_loss = self.losses[name](logits, targets[rows.to(targets.device)])
                    auxiliary.append(self.loss_weights[name] * auxiliary_loss)
                else:
                    zero_losses.append(logits.sum())  # 0, but the decoder's parameters get (zero) gradients
        total = torch.stack(main).sum()
        logs["scored_pixels"] = torch.stack(scored).mean()
        if auxiliary:
            # The mean over decoders for each label, summed over labels as the main losses are.
            supervised = len(self.targets) * torch.stack(auxiliary).mean()
            logs |= {"main_loss": total.detach(), "auxiliary_loss": supervised.detach()}
            total = total + self.auxiliary_weight * supervised
        return total + sum(zero_losses), logs

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Predict the class of every pixel, (B, H, W) uint8 by label. The module must be in evaluation mode."""
        return {name: logits.argmax(dim=1).to(torch.uint8) for name, logits in self.logits(batch).items()}

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``config.json``, from which ``segmentation_from_json`` builds the model."""
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
    """Write ``config.json`` and ``model.safetensors``, which ``load_segmentation`` reads."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in task.model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / _WEIGHTS) as path:
        save_file(weights, path)
    with atomic_write(folder / _CONFIG) as path:
        path.write_text(json.dumps(task.to_json(), indent=1) + "\n", encoding="utf-8")


def load_segmentation(folder: Path) -> Segmentation:
    """Load the model that ``save_segmentation`` wrote, on the CPU and in evaluation mode. No stored code is executed.

    Raises:
        InputError: the folder or a file is missing, damaged or of another schema version, or the weights do not fit
            the configuration.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, raises nothing for overlong names or unreadable folders
        parent = folder.parent
        runs = sorted(
            name
            for name in (os.listdir(parent) if os.path.isdir(parent) else [])
            if os.path.isfile(parent / name / folder.name / _CONFIG)
        )
        hint = f"; the runs in {parent} are {', '.join(runs)}" if runs else ""
        raise InputError(f"{folder}: no fine-tuned model here; give the output folder of `bocage finetune`{hint}")
    path = folder / _CONFIG
    config = _read_config(path)
    stored = read_tensors(folder / _WEIGHTS)
    # A hostile configuration may describe a huge model, so the size of the weights limits the memory to build it.
    limit = 2 * sum(tensor.nbytes for tensor in stored.values()) + _EXTRA_MEMORY
    try:
        with torch.random.fork_rng(devices=[]), limited_memory(parameters=limit, buffers=limit):
            task = segmentation_from_json(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a segmentation model: {type(error).__name__} {reason}") from error
    report = compare_weights(task.model.state_dict(), stored)
    if not report.complete:
        raise InputError(f"{folder / _WEIGHTS} does not fit {_CONFIG} in the same folder: {report}")
    task.model.load_state_dict(stored)
    return task.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.parent}: no fine-tuned model here; give the output folder of `bocage finetune`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or config.get("task") != "segmentation":
        raise InputError(f"{path} does not describe a segmentation model")
    if config.get("schema") != _SCHEMA:
        raise InputError(
            f"{path} has schema {str(config.get('schema'))[:20]}, but this version of bocage reads schema {_SCHEMA}: "
            "fine-tune again, or install the version that wrote it"
        )
    return config


def segmentation_from_json(config: dict[str, Any], supervision: Supervision | None = None) -> Segmentation:
    """Build the model that ``Segmentation.to_json`` described, with random weights.

    Args:
        config: content of ``config.json``.
        supervision: training settings; None for the defaults.

    Raises:
        InputError: a value is invalid. Malformed entries also raise KeyError, TypeError or other built-in errors.
    """
    encoders = {
        name: build_encoder(parse_input_spec(item["input"]), EncoderConfig(**item["config"]))
        for name, item in config["encoders"].items()
    }
    return Segmentation(
        encoders,
        [Target.from_json(item) for item in config["targets"]],
        UPerNetConfig(**config["decoder"]),
        config["quality_masks"],
        auxiliary=config["auxiliary"],
        official=config["official"],
        supervision=supervision,
    )
