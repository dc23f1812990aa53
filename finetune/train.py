"""Fine-tuning from shards to scores: builds the task, trains it, keeps the best checkpoint, measures it, predicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bocage.finetune.config import FinetuneConfig
from bocage.finetune.evaluation.evaluate import Confusions, confusion, labelled_rows, monitored, summary, write_results
from bocage.finetune.evaluation.predict import draw_patches, predict_patches, readable_modalities
from bocage.finetune.models.segmentation import Segmentation, load_segmentation, save_segmentation
from bocage.finetune.models.supervision import TaskConfig
from bocage.finetune.models.targets import Target
from bocage.finetune.official.model import build_official
from bocage.finetune.subsets.draw import LabelledPatches, disjoint_regions, keys_digest, subset
from bocage.shards.errors import InputError
from bocage.shards.files import check_apart, written_atomically
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.read.dataset import TrainingStream
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.initialization import pretrained_encoder
from bocage.ssl.engine.checkpoint.files import step_folder
from bocage.ssl.engine.optim import decay_groups
from bocage.ssl.engine.parallel.distributed import is_main
from bocage.ssl.engine.trainer import train


def build_task(config: FinetuneConfig, manifest: Manifest) -> Segmentation:
    """The model that a configuration asks for, encoders loaded, everything else drawn from torch's generator.

    Raises:
        InputError: unknown names, or an encoder of another modality or other bands than the shards hold.
    """
    registry, held = manifest.registry, ShardPatches(manifest).held
    names = config.modalities or [modality.name for modality in registry.inputs if held(modality.name).any()]
    there = ", ".join(modality.name for modality in registry.inputs)
    for name in names:
        if name not in registry or not registry[name].is_input:
            raise InputError(f"modalities: {name} is not an input that {manifest.path} holds; inputs there: {there}")
    chosen = registry.subset(names).inputs
    inputs = [modality.name for modality in chosen]
    if unused := set(config.encoders) - set(inputs):
        raise InputError(f"encoders: {', '.join(sorted(unused))} not among the modalities {', '.join(inputs)}")
    for name in config.labels:
        if name not in registry or registry[name].role != "label":
            there = ", ".join(modality.name for modality in registry.labels) or "none"
            raise InputError(f"labels: {name} is not a label that {manifest.path} holds; labels there: {there}")
    tasks = [config.tasks.get(name, TaskConfig()) for name in config.labels]
    targets = [
        Target(label=registry[name], band=task.level - 1, grouping=task.grouping)
        for name, task in zip(config.labels, tasks, strict=True)
    ]
    if config.official:
        encoders = _official_encoders(config, chosen, targets)
    else:
        encoders = {modality.name: _encoder(config, manifest, modality) for modality in chosen}
    task = Segmentation(
        encoders,
        targets,
        config.decoder,
        quality_masks(registry, inputs),
        auxiliary=config.auxiliary,
        official=config.official,
        supervision=config.supervision,
    )
    pixels = round(config.window / task.gsd)
    if pixels % config.label_stride:
        raise InputError(
            f"label_stride={config.label_stride} does not divide the {pixels} pixels of window={config.window} metres"
        )
    return task


def _official_encoders(
    config: FinetuneConfig, modalities: Sequence[Modality], targets: Sequence[Target]
) -> dict[str, Encoder]:
    """The encoders that the official code builds for these labels, the heads of series with all their classes."""
    classes = {target.name: len(target.scheme) for target in targets}
    names = [modality.name for modality in modalities]
    model = build_official(names, classes, f"{config.swin.name}-upernet", auxiliary=config.auxiliary).uperfuse
    encoders = {name: model.encoder(name) for name in model.encoders}
    for name, source in config.encoders.items():
        encoders[name] = pretrained_encoder(encoders[name], source, keep_architecture=True)
    return encoders


def _encoder(config: FinetuneConfig, manifest: Manifest, modality: Modality) -> Encoder:
    name = modality.name
    own = config.utae if modality.role == "series" else config.swin
    # Drawn even when it is replaced: with one seed, what is not pretrained starts the same from either initialisation.
    scratch = build_encoder(manifest.input_spec(name), own)
    if name not in config.encoders:
        return scratch
    return pretrained_encoder(scratch, config.encoders[name], keep_architecture=False)


def parts_of(config: FinetuneConfig, patches: ShardPatches, task: Segmentation) -> dict[str, np.ndarray]:
    """Rows of the patches of ``train``, ``valid`` and, where there are any, ``test``: (N,) int64 each, ascending.

    Raises:
        InputError: a part without patches.
    """
    manifest = patches.manifest
    train = labelled_rows(patches, task, config.split, config.train)
    parts = {"train": train, "valid": train}
    if config.split != EVERY_SAMPLE:
        parts["valid"] = labelled_rows(patches, task, config.split, config.valid)
        if config.test in manifest.column(config.split).unique().to_pylist():
            parts["test"] = labelled_rows(patches, task, config.split, config.test)
    # Regions and subsets are drawn from all labelled patches, whatever the model reads: models of other sensors learn
    # from the same patches and are measured on the same regions.
    pool = patches.split(config.split, config.train)
    if config.disjoint_validation:
        pool = np.union1d(pool, patches.split(config.split, config.valid))
    pool = pool[np.any([patches.held(name) for name in task.labels if name in patches.registry], axis=0)[pool]]
    if config.disjoint_validation:
        rois, domains = (np.array(manifest.column(name).take(pool).to_pylist()) for name in ("roi", "domain"))
        share = len(parts["valid"]) / (len(parts["train"]) + len(parts["valid"]))
        held_out = disjoint_regions(rois, domains, share)
        both = np.union1d(parts["train"], parts["valid"])
        parts |= {"train": np.intersect1d(both, pool[~held_out]), "valid": np.intersect1d(both, pool[held_out])}
        pool = pool[~held_out]
        if not len(parts["valid"]):
            raise InputError(f"disjoint_validation: the domains of {patches.path} have one region each, which stays")
    if config.train_fraction < 1:
        drawn = LabelledPatches.read(manifest, pool, list(task.targets.values()))
        chosen = pool[subset(drawn, config.train_fraction, draw=config.draw, track=config.track)]
        parts["train"] = np.intersect1d(parts["train"], chosen)
        if not len(parts["train"]):
            raise InputError(
                f"train_fraction={config.train_fraction}: none of the {len(chosen)} patches of draw {config.draw} has "
                "one of the modalities; take a larger share or another draw"
            )
        if config.split == EVERY_SAMPLE:
            parts["valid"] = parts["train"]
    return parts


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, or finish training, and measure the best checkpoint.

    Leaves in ``output``: ``checkpoints/`` and ``metrics.jsonl`` (the loop's), ``pictures/`` of each evaluation,
    ``model/`` (the best checkpoint, what ``bocage predict`` reads), ``metrics.json``, ``confusions.parquet`` and
    ``scores.parquet`` (``measure.write_results``), ``confusions/`` (pictures), ``predictions/``.

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
    check_apart(Path(config.output), config.shards)
    manifest, output = open_shards(config.shards, config.cache), Path(config.output)
    torch.manual_seed(config.engine.seed)
    task = build_task(config, manifest)
    patches = ShardPatches(manifest)
    rows = parts_of(config, patches, task)
    source = TrainingStream(
        manifest,
        rows["train"],
        readable_modalities(task, patches, labels=task.labels),
        batch_size=config.batch_size,
        window=config.window,
        seed=config.engine.seed,
        workers=config.workers,
    )

    def measure(module: Segmentation, part: str) -> Confusions:
        return confusion(module, manifest, rows[part], batch_size=config.batch_size, workers=config.workers)

    measured: dict[str, Confusions] = {}  # by checkpoint, what need not be measured twice

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, Segmentation)
        found = measured[step_folder(output, step).name] = measure(module, "valid")
        return monitored(found)

    def draw(module: nn.Module, step: int) -> dict[str, Path]:
        assert isinstance(module, Segmentation)
        shown = rows["valid"][: config.pictures]
        folder = output / "pictures"
        return draw_patches(module, patches, shown, folder, f"predictions_{step:08d}", batch_size=config.batch_size)

    unheeded = ("cache", "pictures", "predictions", "test")
    outcome = train(
        task,
        source,
        config.engine,
        output=output,
        recipe=config.recipe,
        # What the shards hold matters, not where they lie; what is measured or drawn at the end does not matter.
        resolved={
            **{key: value for key, value in asdict(config).items() if key not in unheeded},
            "shards": manifest.digest,
        },
        evaluate=evaluate,
        draw=draw if config.pictures else None,
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
        "labels": {name: target.facts() for name, target in best.targets.items()},
        "modalities": best.modalities,
        "pretrained": config.encoders,
        "steps": outcome.step,
        # Of them, those that changed nothing because a loss or gradient was not finite.
        "skipped_steps": int(outcome.metrics.get("skipped_steps") or 0),
        "checkpoint": (outcome.best or outcome.last).name,
        "patches": {part: len(indices) for part, indices in rows.items()},
        "train_keys": keys_digest(manifest.column("key").take(rows["train"]).to_pylist()),
        # Which parts were measured on patches that were trained on.
        "fit_only": ["valid"] if config.split == EVERY_SAMPLE else [],
    }
    parts: dict[str, Confusions] = {}
    for part in [name for name in ("valid", "test") if name in rows]:
        # The loop evaluates in the precision of training; what is reported is float32, as predictions are.
        known = part == "valid" and config.engine.precision == "fp32" and metrics["checkpoint"] in measured
        parts[part] = measured[metrics["checkpoint"]] if known else measure(best, part)
        metrics[part] = {name: summary(matrix) for name, matrix in parts[part].items()}
    picture: Path | None = None
    if is_main():
        save_segmentation(best, output / "model")
        write_results(output, parts)
        with written_atomically(output / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        if config.predictions:
            picture = predict_patches(
                best,
                patches,
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
    """The loop's groups, each parted in three: decoders, fusion and encoders learn at rates of their own."""
    optimizer = config.engine.optimizer

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(module, Segmentation)
        rates: dict[int, float] = {}
        for part, rate in ((module.model.encoders, config.encoder_lr), *((p, config.fusion_lr) for p in module.fusing)):
            rates |= {id(parameter): rate for parameter in part.parameters()}
        parted = []
        for group in decay_groups(module, optimizer):
            # The first group's rate is the one that is recorded: the decoders', which is the optimiser's own.
            for rate in dict.fromkeys((1.0, config.fusion_lr, config.encoder_lr)):
                parameters = [parameter for parameter in group["params"] if rates.get(id(parameter), 1.0) == rate]
                if parameters:
                    parted.append({**group, "params": parameters, "lr_scale": group["lr_scale"] * rate})
        return parted

    return groups
