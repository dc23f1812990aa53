"""Fine-tuning from shards to scores: builds the task, trains it, keeps the best checkpoint, measures it, predicts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bocage.finetune.predict import predict_patches, readable_modalities
from bocage.finetune.task import Segmentation, load_segmentation, save_segmentation
from bocage.finetune.upernet import DecoderConfig
from bocage.shards.cache import CacheConfig
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.inputs import quality_masks
from bocage.shards.manifest import EVERY_SAMPLE, Manifest
from bocage.shards.modality import PATCH_SIZE, Modality
from bocage.shards.remote import open_shards
from bocage.shards.stream import TrainingStream, evaluation_batches
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.registry import build_encoder
from bocage.ssl.encoders.sources import pretrained_encoder
from bocage.ssl.engine.checkpoint import step_folder
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.distributed import is_main, rank_and_world
from bocage.ssl.engine.loop import train
from bocage.ssl.engine.optim import decay_groups
from bocage.ssl.metrics import ConfusionMatrix, official_scores, strict_scores


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Attributes:
        recipe: name of the recipe it came from.
        shards: folder that ``bocage shard`` wrote, or its address (``shards.remote``).
        cache: where shards of another machine are kept, and how many.
        output: folder of the run: checkpoints, model, scores, predictions.
        label: label raster.
        level: which of its bands, from 1; LPIS has three.
        modalities: inputs of the model; empty means every input the shards hold.
        encoders: by modality, where the weights of its encoder come from (``ssl.encoders.sources``): the folder of a
            saved encoder, ``hf:org/name``, ``imagenet`` or ``imagenet:FILE``. The others start from scratch. A saved
            encoder keeps its own architecture; ImageNet weights go into the one that ``swin`` describes.
        freeze: modalities whose encoder stays as it is.
        swin, utae: how encoders from scratch are built, for images and for series.
        decoder: widths and norm of the decoder.
        auxiliary: modalities with a decoder of their own while training (deep supervision).
        auxiliary_weight: weight of the mean of their losses beside the main one.
        split: split column of the shards, or ``all``: train on every patch and measure the fit on the same ones.
        train, valid, test: values of the split. Without patches of the value ``test`` nothing is tested.
        train_fraction: share of the training patches to use. Subsets are drawn by key and nested: a larger share
            holds the smaller ones.
        window: side of the ground window trained on, metres. Evaluation sees whole patches.
        batch_size: samples a rank and micro-batch.
        workers: reading processes of each rank.
        encoder_lr: learning rate of pretrained and other encoders, as a multiple of ``engine``'s.
        predictions: validation patches to write as GeoTIFFs at the end.
        engine: the training loop.
    """

    recipe: str = ""
    shards: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = ""
    label: str = "AERIAL_LABEL-COSIA"
    level: int = 1
    modalities: list[str] = field(default_factory=list)
    encoders: dict[str, str] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    swin: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="swin"))
    utae: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="utae"))
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    auxiliary: list[str] = field(default_factory=list)
    auxiliary_weight: float = 0.4
    split: str = "split_1"
    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    train_fraction: float = 1.0
    window: float = PATCH_SIZE
    batch_size: int = 4
    workers: int = 0
    encoder_lr: float = 1.0
    predictions: int = 8
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction={self.train_fraction} is not in (0, 1]")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.batch_size == 1 and self.decoder.norm == "batch":
            raise ValueError("batch_size=1 cannot train decoder.norm=batch; use decoder.norm=group")
        if min(self.workers, self.predictions, self.encoder_lr, self.auxiliary_weight) < 0:
            raise ValueError("workers, predictions, encoder_lr and auxiliary_weight must not be negative")


def build_task(config: FinetuneConfig, manifest: Manifest) -> Segmentation:
    """The model that a configuration asks for, encoders loaded, everything else drawn from torch's generator.

    Raises:
        InputError: unknown names, or an encoder of another modality or other bands than the shards hold.
    """
    registry = manifest.registry
    names = config.modalities or [modality.name for modality in registry.inputs if _held(manifest, modality.name).any()]
    held = ", ".join(modality.name for modality in registry.inputs)
    for name in names:
        if name not in registry or not registry[name].is_input:
            raise InputError(f"modalities: {name} is not an input that {manifest.path} holds; inputs there: {held}")
    chosen = registry.subset(names).inputs
    inputs = [modality.name for modality in chosen]
    if unused := set(config.encoders) - set(inputs):
        raise InputError(f"encoders: {', '.join(sorted(unused))} not among the modalities {', '.join(inputs)}")
    label = registry[config.label]
    if label.role != "label":
        raise InputError(f"label={label.name} is not a label; labels: {', '.join(m.name for m in registry.labels)}")
    return Segmentation(
        {modality.name: _encoder(config, manifest, modality) for modality in chosen},
        label,
        config.level - 1,
        config.decoder,
        quality_masks(registry, inputs),
        config.freeze,
        config.auxiliary,
        config.auxiliary_weight,
    )


def _encoder(config: FinetuneConfig, manifest: Manifest, modality: Modality) -> Encoder:
    name = modality.name
    own = config.utae if modality.role == "series" else config.swin
    # Drawn even when it is replaced: with one seed, what is not pretrained starts the same from either initialisation.
    scratch = build_encoder(manifest.input_spec(name), own)
    if name not in config.encoders:
        return scratch
    return pretrained_encoder(scratch, config.encoders[name], keep_architecture=False)


def labelled_rows(manifest: Manifest, config: FinetuneConfig, task: Segmentation, value: str) -> np.ndarray:
    """Manifest rows of one value of the split that have the label and at least one of the model's modalities.

    Raises:
        InputError: there is none.
    """
    rows = manifest.split(config.split, value)
    inputs = np.stack([_held(manifest, name)[rows] for name in task.modalities])
    rows = rows[_held(manifest, task.label.name)[rows] & inputs.any(axis=0)]
    if len(rows) == 0:
        where = "the shards" if config.split == EVERY_SAMPLE else f"{config.split}={value}"
        raise InputError(f"{manifest.path}: no patch of {where} has {task.label.name} and one of the modalities")
    return rows


def _held(manifest: Manifest, name: str) -> np.ndarray:
    """(samples,) bool: which samples have a modality."""
    return manifest.column(f"length.{name}").to_numpy() > 0


def nested_subset(rows: np.ndarray, keys: Sequence[str], fraction: float) -> np.ndarray:
    """The ``fraction`` (at least one) of ``rows`` whose keys come first in hash order, in their original order.

    The order depends on nothing but the keys, so subsets are nested and the same in every run and in any shards.
    """
    count = max(1, math.ceil(fraction * len(rows) - 1e-9))
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    first = sorted(range(len(rows)), key=digests.__getitem__)[:count]
    return rows[np.sort(first)]


@torch.no_grad()
def confusion(
    task: Segmentation, manifest: Manifest, rows: np.ndarray, *, batch_size: int, workers: int
) -> ConfusionMatrix:
    """The confusion matrix of whole patches, shared out over the ranks; the same on all of them. A collective call."""
    rank, world = rank_and_world()
    device = next(task.parameters()).device
    matrix = ConfusionMatrix(task.scheme)
    batches = evaluation_batches(
        manifest,
        rows,
        readable_modalities(task, manifest, labels=True),
        batch_size=batch_size,
        workers=workers,
        rank=rank,
        world=world,
    )
    for batch in batches:
        moved = batch.to(device)
        matrix.update(task.truth(moved), task.predict(moved), batch.rois, batch.present[task.label.name])
    return matrix.merged()


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, or finish training, and measure the best checkpoint.

    Leaves in ``output``: ``checkpoints/`` and ``metrics.jsonl`` (the loop's), ``model/`` (the best checkpoint, what
    ``bocage predict`` reads), ``metrics.json``, ``predictions/``.

    Args:
        config: the run.

    Returns:
        ``exit_code``, ``stopped``, and unless stopped the contents of ``metrics.json`` and the paths ``model``,
        ``scores`` and ``picture`` (None without predictions).

    Raises:
        InputError: see ``build_task``; nothing has been trained then.
    """
    if not config.output:
        raise InputError("output=PATH is missing: give a folder for the run")
    manifest, output = open_shards(config.shards, config.cache), Path(config.output)
    torch.manual_seed(config.engine.seed)
    task = build_task(config, manifest)
    rows = {"train": labelled_rows(manifest, config, task, config.train)}
    keys = manifest.column("key").take(rows["train"]).to_pylist()
    rows["train"] = nested_subset(rows["train"], keys, config.train_fraction)
    rows["valid"] = (
        labelled_rows(manifest, config, task, config.valid) if config.split != EVERY_SAMPLE else rows["train"]
    )
    if config.split != EVERY_SAMPLE and config.test in manifest.column(config.split).unique().to_pylist():
        rows["test"] = labelled_rows(manifest, config, task, config.test)
    source = TrainingStream(
        manifest,
        rows["train"],
        readable_modalities(task, manifest, labels=True),
        batch_size=config.batch_size,
        window=config.window,
        seed=config.engine.seed,
        workers=config.workers,
    )

    def measure(module: Segmentation, part: str) -> ConfusionMatrix:
        return confusion(module, manifest, rows[part], batch_size=config.batch_size, workers=config.workers)

    measured: dict[str, ConfusionMatrix] = {}  # by checkpoint, what need not be measured twice

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, Segmentation)
        found = measured[step_folder(output, step).name] = measure(module, "valid")
        matrix = found.total
        strict, official = strict_scores(matrix, module.scheme), official_scores(matrix, module.scheme)
        return {"miou": strict.miou, "oa": strict.oa, "official_miou": official.miou, "official_oa": official.oa}

    outcome = train(
        task,
        source,
        config.engine,
        output=output,
        recipe=config.recipe,
        # What the shards hold matters, not where they lie; what is measured or drawn at the end does not matter.
        resolved={
            **{key: value for key, value in asdict(config).items() if key not in ("cache", "predictions", "test")},
            "shards": manifest.digest,
        },
        evaluate=evaluate,
        monitor="miou",
        export=_export,
        parameter_groups=_parameter_groups(config),
        rebuild={"command": "finetune", "config": asdict(config), "model": task.to_json()},
    )
    result: dict[str, Any] = {"exit_code": outcome.exit_code, "stopped": outcome.stopped}
    if outcome.stopped:
        return result
    device = next(task.parameters()).device
    best = load_segmentation((outcome.best or outcome.last) / "export").to(device)
    metrics: dict[str, Any] = {
        "recipe": config.recipe,
        "label": best.label.name,
        "level": config.level,
        "modalities": best.modalities,
        "pretrained": config.encoders,
        "steps": outcome.step,
        "checkpoint": (outcome.best or outcome.last).name,
        "patches": {part: len(indices) for part, indices in rows.items()},
        "classes": list(best.scheme.classes),
        # Which parts were measured on patches that were trained on.
        "fit_only": ["valid"] if config.split == EVERY_SAMPLE else [],
    }
    for part in [name for name in ("valid", "test") if name in rows]:
        # The loop evaluates in the precision of training; what is reported is float32, as predictions are.
        known = part == "valid" and config.engine.precision == "fp32" and metrics["checkpoint"] in measured
        matrix = (measured[metrics["checkpoint"]] if known else measure(best, part)).total
        metrics[part] = {
            "strict": strict_scores(matrix, best.scheme).to_json(),
            "official": official_scores(matrix, best.scheme).to_json(),
            "confusion": matrix.tolist(),
        }
    picture: Path | None = None
    if is_main():
        save_segmentation(best, output / "model")
        with written_atomically(output / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        if config.predictions:
            picture = predict_patches(
                best,
                manifest,
                rows["valid"][: config.predictions],
                output / "predictions",
                batch_size=config.batch_size,
                device=device,
            )
    return {**result, **metrics, "model": output / "model", "scores": output / "metrics.json", "picture": picture}


def _export(module: nn.Module, folder: Path) -> None:
    assert isinstance(module, Segmentation)
    save_segmentation(module, folder)


def _parameter_groups(config: FinetuneConfig) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """The loop's groups, each parted in two: encoders learn at ``encoder_lr`` times the rate of the rest."""
    optimizer = config.engine.optimizer

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(module, Segmentation)
        encoders = {id(parameter) for parameter in module.model.encoders.parameters()}
        parted = []
        for group in decay_groups(module, optimizer):
            for inside, rate in ((False, 1.0), (True, config.encoder_lr)):
                parameters = [parameter for parameter in group["params"] if (id(parameter) in encoders) == inside]
                if parameters:
                    parted.append({**group, "params": parameters, "lr_scale": group["lr_scale"] * rate})
        return parted

    return groups
