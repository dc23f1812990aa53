"""Fine-tune a segmentation model: build, train, evaluate the best checkpoint, and write scores and predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bocage.finetune.evaluation.evaluate import (
    Confusions,
    classification_report,
    compute_confusions,
    labelled_rows,
    scalar_metrics,
    write_results,
)
from bocage.finetune.evaluation.predict import draw_predictions, modalities_to_read, predict_patches
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import Segmentation, load_segmentation, save_segmentation
from bocage.finetune.models.supervision import TaskConfig
from bocage.finetune.models.targets import Target, only_label
from bocage.finetune.official.official_model import build_official, check_official_input
from bocage.finetune.subsets.sampling import LabelledPatches, disjoint_validation_mask, draw_subset, keys_digest
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write, check_outside_shards
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.read.dataset import TrainingStream
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.initialization import initialize_encoder
from bocage.ssl.engine.checkpoint.writer import step_folder
from bocage.ssl.engine.optim import decay_groups
from bocage.ssl.engine.parallel.distributed import is_main
from bocage.ssl.engine.trainer import Outcome, Trainer

# Keys of FinetuneConfig that do not affect training: a resumed run may change them.
_NOT_TRAINING = ("cache", "pictures", "predictions", "test")


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train a model, or resume its training, and evaluate its best checkpoint.

    Writes to ``output``:

    - ``checkpoints/`` and ``metrics.jsonl``, by the trainer, and ``pictures/`` at each evaluation;
    - ``model/``, the best checkpoint, which ``bocage predict`` and ``bocage map`` read;
    - ``metrics.json``, and the tables and pictures of ``evaluate.write_results``;
    - ``predictions/``, maps of some validation patches.

    Args:
        config: settings of the run.

    Returns:
        ``exit_code`` and ``stopped``. A run that was not stopped also returns the content of ``metrics.json`` and the
        paths ``model``, ``scores`` and ``picture`` (None without predictions, and on ranks other than 0).

    Raises:
        InputError: ``output`` is missing or lies among the shards, or see ``build_task`` and ``split_rows``. Nothing
            has been trained or written then.
    """
    if not config.output:
        raise InputError("output=PATH is missing: give a folder for the run")
    output = Path(config.output)
    check_outside_shards(output, config.shards)
    manifest = open_shards(config.shards, config.cache)
    torch.manual_seed(config.engine.seed)
    task = build_task(config, manifest)
    patches = ShardPatches(manifest)
    rows = split_rows(config, patches, task)

    outcome, validation = train_model(config, task, patches, rows)
    result: dict[str, Any] = {"exit_code": outcome.exit_code, "stopped": outcome.stopped}
    if outcome.stopped:
        return result

    checkpoint = outcome.best or outcome.last
    best = load_segmentation(checkpoint / "export").to(next(task.parameters()).device)
    confusions = evaluate_best(config, best, manifest, rows, validation.get(checkpoint.name))
    metrics = summarize_run(config, best, manifest, rows, outcome, confusions)
    picture = write_report(config, best, patches, rows, metrics, confusions) if is_main() else None
    return {**result, **metrics, "model": output / "model", "scores": output / "metrics.json", "picture": picture}


def build_task(config: FinetuneConfig, manifest: Manifest) -> Segmentation:
    """Build the model of a configuration and load its pretrained encoders; other weights are random.

    Args:
        config: settings of the run.
        manifest: manifest of the shards.

    Raises:
        InputError: a modality, label or other name is unknown, or an encoder reads another modality or other bands than
            the shards have.
    """
    modalities = _input_modalities(config, manifest)
    targets = _build_targets(config, manifest)
    if config.official:
        encoders = _build_official_encoders(config, modalities, targets)
    else:
        encoders = {modality.name: _build_encoder(config, manifest, modality) for modality in modalities}
    task = Segmentation(
        encoders,
        targets,
        config.decoder,
        quality_masks(manifest.registry, [modality.name for modality in modalities]),
        auxiliary=config.auxiliary,
        official=config.official,
        supervision=config.supervision,
    )
    window = config.window or task.patch_size
    pixels = round(window / task.gsd)
    if pixels % config.label_stride:
        raise InputError(
            f"label_stride={config.label_stride} does not divide the {pixels} pixels of window={window:g} metres"
        )
    return task


def _input_modalities(config: FinetuneConfig, manifest: Manifest) -> Sequence[Modality]:
    """Return the modalities that the model reads: the configured ones, or all inputs that some patch has."""
    registry, has_modality = manifest.registry, ShardPatches(manifest).has_modality
    names = config.modalities or [modality.name for modality in registry.inputs if has_modality(modality.name).any()]
    for name in names:
        if name not in registry or not registry[name].is_input:
            available = ", ".join(modality.name for modality in registry.inputs)
            raise InputError(f"modalities: {name} is not an input of {manifest.path}; its inputs are {available}")
    modalities = registry.subset(names).inputs
    inputs = [modality.name for modality in modalities]
    if unused := set(config.encoders) - set(inputs):
        raise InputError(f"encoders: {', '.join(sorted(unused))} not among the modalities {', '.join(inputs)}")
    return modalities


def _build_targets(config: FinetuneConfig, manifest: Manifest) -> list[Target]:
    registry = manifest.registry
    targets = []
    for name in config.labels or [only_label(manifest)]:
        if name not in registry or registry[name].role != "label":
            available = ", ".join(modality.name for modality in registry.labels) or "none"
            raise InputError(f"labels: {name} is not a label of {manifest.path}; its labels are {available}")
        task = config.tasks.get(name, TaskConfig())
        targets.append(Target(label=registry[name], band=task.level - 1, grouping=task.grouping))
    return targets


def _build_official_encoders(
    config: FinetuneConfig, modalities: Sequence[Modality], targets: Sequence[Target]
) -> dict[str, Encoder]:
    """Build the encoders of the official code; the heads of series have the classes of all targets.

    Raises:
        InputError: a modality is not an input of FLAIR-HUB's official models.
    """
    for modality in modalities:
        check_official_input(modality)
    classes = {target.name: len(target.scheme) for target in targets}
    names = [modality.name for modality in modalities]
    model = build_official(names, classes, f"{config.swin.name}-upernet", auxiliary=config.auxiliary).uperfuse
    encoders = {name: model.encoder(name) for name in model.encoders}
    for name, source in config.encoders.items():
        encoders[name] = initialize_encoder(encoders[name], source, keep_architecture=True)
    return encoders


def _build_encoder(config: FinetuneConfig, manifest: Manifest, modality: Modality) -> Encoder:
    name = modality.name
    # Built even if it is replaced: with one seed, all other weights then start the same with any initialisation.
    scratch = build_encoder(manifest.input_spec(name), config.utae if modality.role == "series" else config.swin)
    if name not in config.encoders:
        return scratch
    return initialize_encoder(scratch, config.encoders[name], keep_architecture=False)


def split_rows(config: FinetuneConfig, patches: ShardPatches, task: Segmentation) -> dict[str, np.ndarray]:
    """Select the patches to train on, to validate on and to test on.

    Args:
        config: settings of the run.
        patches: patches of the shards.
        task: model, which needs one of its modalities and one of its labels in each patch.

    Returns:
        (N,) int64 rows, ascending, for ``train``, ``valid`` and, if the split has the value ``config.test``, ``test``.

    Raises:
        InputError: there is no patch to train on or to validate on.
    """
    manifest = patches.manifest
    train = labelled_rows(patches, task, config.split, config.train)
    rows = {"train": train, "valid": train}
    if config.split != EVERY_SAMPLE:
        rows["valid"] = labelled_rows(patches, task, config.split, config.valid)
        if config.test in manifest.column(config.split).unique().to_pylist():
            rows["test"] = labelled_rows(patches, task, config.split, config.test)
    # Regions and subsets are drawn from all labelled patches, whatever modalities the model reads: models of different
    # sensors then train on the same patches and are evaluated on the same regions.
    pool = patches.split(config.split, config.train)
    if config.disjoint_validation:
        pool = np.union1d(pool, patches.split(config.split, config.valid))
    labels = [name for name in task.labels if name in patches.registry]
    pool = pool[np.any([patches.has_modality(name) for name in labels], axis=0)[pool]]
    if config.disjoint_validation:
        rois, domains = (np.array(manifest.column(name).take(pool).to_pylist()) for name in ("roi", "domain"))
        fraction = len(rows["valid"]) / (len(rows["train"]) + len(rows["valid"]))
        held_out = disjoint_validation_mask(rois, domains, fraction)
        usable = np.union1d(rows["train"], rows["valid"])
        rows |= {"train": np.intersect1d(usable, pool[~held_out]), "valid": np.intersect1d(usable, pool[held_out])}
        pool = pool[~held_out]
        if not len(rows["valid"]):
            raise InputError(
                f"disjoint_validation: {patches.path} has no domain with a second region to validate on; "
                "use disjoint_validation=false"
            )
    if config.train_fraction < 1:
        labelled = LabelledPatches.read(manifest, pool, list(task.targets.values()))
        subset = draw_subset(labelled, config.train_fraction, draw=config.draw, sampling_unit=config.sampling_unit)
        rows["train"] = np.intersect1d(rows["train"], pool[subset])
        if not len(rows["train"]):
            raise InputError(
                f"train_fraction={config.train_fraction}: none of the {len(subset)} patches of draw {config.draw} has "
                "one of the modalities; use a larger fraction or another draw"
            )
        if config.split == EVERY_SAMPLE:
            rows["valid"] = rows["train"]
    return rows


def train_model(
    config: FinetuneConfig, task: Segmentation, patches: ShardPatches, rows: dict[str, np.ndarray]
) -> tuple[Outcome, dict[str, Confusions]]:
    """Train the model, with evaluation and pictures of validation patches.

    Args:
        config: settings of the run.
        task: model to train, in place.
        patches: patches of the shards.
        rows: rows of each part, see ``split_rows``.

    Returns:
        Outcome of the training, and the validation confusion matrices by name of the checkpoint.
    """
    manifest, output = patches.manifest, Path(config.output)
    source = TrainingStream(
        manifest,
        rows["train"],
        modalities_to_read(task, patches, labels=task.labels),
        batch_size=config.batch_size,
        window=config.window,
        seed=config.engine.seed,
        workers=config.workers,
    )
    validation: dict[str, Confusions] = {}

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, Segmentation)
        confusions = compute_confusions(
            module, manifest, rows["valid"], batch_size=config.batch_size, workers=config.workers
        )
        validation[step_folder(output, step).name] = confusions
        return scalar_metrics(confusions)

    def draw(module: nn.Module, step: int) -> dict[str, Path]:
        assert isinstance(module, Segmentation)
        name, shown = f"predictions_{step:08d}", rows["valid"][: config.pictures]
        return draw_predictions(module, patches, shown, output / "pictures", name, batch_size=config.batch_size)

    # The identity of the shards matters to a resumed run, not their address.
    resolved = {key: value for key, value in asdict(config).items() if key not in _NOT_TRAINING}
    trainer = Trainer(
        task,
        source,
        config.engine,
        output=output,
        recipe=config.recipe,
        resolved_config={**resolved, "shards": manifest.digest},
        evaluate=evaluate,
        draw=draw if config.pictures else None,
        monitor="miou",
        export=_export,
        parameter_groups=scaled_parameter_groups(config),
        rebuild={"command": "finetune", "config": asdict(config), "model": task.to_json()},
    )
    return trainer.fit(), validation


def _export(module: nn.Module, folder: Path) -> None:
    assert isinstance(module, Segmentation)
    save_segmentation(module, folder)


def scaled_parameter_groups(config: FinetuneConfig) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """Return a function that splits the default parameter groups by the learning rates of encoders and fusion."""
    decoders, fusion, encoders = (1.0, 0), (config.fusion_lr_scale, 0), (config.encoder_lr_scale, config.head_steps)

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(module, Segmentation)
        rate_of: dict[int, tuple[float, int]] = {}
        for part in module.fusion_modules:
            rate_of |= {id(parameter): fusion for parameter in part.parameters()}
        rate_of |= {id(parameter): encoders for parameter in module.model.encoders.parameters()}
        split = []
        for group in decay_groups(module, config.engine.optimizer):
            # The decoders come first: the rate of the first group is the one that the trainer records.
            for rate in dict.fromkeys((decoders, fusion, encoders)):
                parameters = [item for item in group["params"] if rate_of.get(id(item), decoders) == rate]
                if parameters:
                    scale, first_step = rate
                    scaled = {"lr_scale": group["lr_scale"] * scale, "first_step": first_step}
                    split.append({**group, "params": parameters, **scaled})
        return split

    return groups


def evaluate_best(
    config: FinetuneConfig,
    best: Segmentation,
    manifest: Manifest,
    rows: dict[str, np.ndarray],
    validation: Confusions | None,
) -> dict[str, Confusions]:
    """Evaluate the best checkpoint in float32 on ``valid`` and, if there is one, ``test``. All ranks must call this.

    Args:
        config: settings of the run.
        best: model of the best checkpoint, in evaluation mode.
        manifest: manifest of the shards.
        rows: rows of each part, see ``split_rows``.
        validation: validation confusion matrices of this checkpoint from training, if it was evaluated in this process.

    Returns:
        Confusion matrices by part and label.
    """
    confusions: dict[str, Confusions] = {}
    for part in [name for name in ("valid", "test") if name in rows]:
        # Training evaluates in its own precision. Reported scores are those of float32, as are predictions.
        if part == "valid" and config.engine.precision == "fp32" and validation is not None:
            confusions[part] = validation
        else:
            confusions[part] = compute_confusions(
                best, manifest, rows[part], batch_size=config.batch_size, workers=config.workers
            )
    return confusions


def summarize_run(
    config: FinetuneConfig,
    best: Segmentation,
    manifest: Manifest,
    rows: dict[str, np.ndarray],
    outcome: Outcome,
    confusions: dict[str, Confusions],
) -> dict[str, Any]:
    """Return the content of ``metrics.json``: the model, the training, the patches, and the scores of each part."""
    metrics: dict[str, Any] = {
        "recipe": config.recipe,
        "labels": {name: target.scheme_to_json() for name, target in best.targets.items()},
        "modalities": best.modalities,
        "pretrained": config.encoders,
        "steps": outcome.step,
        # Steps without an update, because the loss or a gradient was not finite.
        "skipped_steps": int(outcome.metrics.get("skipped_steps") or 0),
        "checkpoint": (outcome.best or outcome.last).name,
        "patches": {part: len(part_rows) for part, part_rows in rows.items()},
        "train_keys": keys_digest(manifest.column("key").take(rows["train"]).to_pylist()),
        # Parts that the model was trained on.
        "fit_only": ["valid"] if config.split == EVERY_SAMPLE else [],
    }
    for part, by_label in confusions.items():
        metrics[part] = {name: classification_report(matrix) for name, matrix in by_label.items()}
    return metrics


def write_report(
    config: FinetuneConfig,
    best: Segmentation,
    patches: ShardPatches,
    rows: dict[str, np.ndarray],
    metrics: dict[str, Any],
    confusions: dict[str, Confusions],
) -> Path | None:
    """Write the model, its scores and some predictions to ``output``; rank 0 calls this.

    Returns:
        Path of the picture of the predictions, or None without predictions.
    """
    output = Path(config.output)
    save_segmentation(best, output / "model")
    write_results(output, confusions)
    with atomic_write(output / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if not config.predictions:
        return None
    return predict_patches(
        best,
        patches,
        rows["valid"][: config.predictions],
        output / "predictions",
        batch_size=config.batch_size,
        device=next(best.parameters()).device,
    )
