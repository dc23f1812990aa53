"""Pretrain from a recipe: train on shards and publish one encoder per modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bocage.shards.errors import InputError
from bocage.shards.files import check_outside_shards
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import quality_masks, required_modalities
from bocage.shards.read.dataset import TrainingStream, evaluation_batches
from bocage.shards.read.open import open_shards
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.encoders.initialization import initialize_encoder, load_teacher
from bocage.ssl.engine.parallel.distributed import is_main, launcher_rank_and_world
from bocage.ssl.engine.trainer import Outcome, Trainer
from bocage.ssl.evaluation.probe import Probe
from bocage.ssl.evaluation.reconstructions import reconstruction_figure, save_figure
from bocage.ssl.objectives.dense_contrast import DenseContrast
from bocage.ssl.objectives.latent import LatentPrediction
from bocage.ssl.objectives.masked import MaskedReconstruction
from bocage.ssl.objectives.masking import check_window, is_single_unit
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.objectives.pooled_contrast import PooledContrast, PooledVICReg
from bocage.ssl.pretrain_config import PretrainConfig

RECONSTRUCTIONS_FOLDER = "reconstructions"


def pretrain(config: PretrainConfig) -> Outcome:
    """Run a recipe to its last step, or resume it, and write the encoders to ``output/encoders/MODALITY``.

    Raises:
        InputError: ``output`` is empty, or the recipe does not fit the shards; also, see ``Trainer``.
        DivergenceError: see ``EngineConfig.max_bad_steps``.
    """
    if not config.output:
        raise InputError("output= is empty: give a folder for the run")
    check_outside_shards(Path(config.output), config.shards)
    manifest = open_shards(config.shards, config.cache)
    rows = manifest.split(config.split, config.train)
    torch.manual_seed(config.engine.seed)  # seeds the weight initialization
    model = build_pretraining_model(config, manifest)
    check_window(model.modalities, config.window, config.masking, reconstructed="masked" in model.objectives)
    _check_negatives(config)
    modalities = required_modalities(manifest.registry, list(model.encoders), [])
    source = TrainingStream(
        manifest,
        rows,
        modalities,
        batch_size=config.batch_size,
        window=config.window,
        seed=config.engine.seed,
        workers=config.workers,
    )
    output = Path(config.output)
    figures = output / RECONSTRUCTIONS_FOLDER
    draws_figures = config.reconstructions > 0 and "masked" in model.objectives
    trainer = Trainer(
        model,
        source,
        config.engine,
        output=output,
        recipe=config.recipe,
        resolved_config=_resume_config(config, manifest),
        evaluate=_probe_function(config, manifest),
        draw=_figure_function(config, manifest, rows, modalities, figures) if draws_figures else None,
        export=export_encoders,
        rebuild={
            "command": "pretrain",
            "config": asdict(config),
            "inputs": {name: model.encoder(name).spec.to_json() for name in model.encoders},
        },
    )
    outcome = trainer.fit()
    if outcome.exit_code == 0 and is_main():
        export_encoders(model, output / "encoders")
    return outcome


def build_pretraining_model(config: PretrainConfig, manifest: Manifest) -> PretrainingModel:
    """Build the encoders and objectives of a run, with the normalisation statistics of the shards.

    Raises:
        InputError: a key names a modality that is not in the run, or encoders, initial weights or objectives cannot
            be built for these modalities.
    """
    registry = manifest.registry
    names = config.modalities or [modality.name for modality in registry.inputs]
    by_modality: dict[str, Mapping[str, object]] = {
        "architectures": config.architectures,
        "encoders": config.encoders,
        "masking.units": config.masking.units,
        "latent.teachers": config.latent.teachers,
    }
    for key, values in by_modality.items():
        if unknown := sorted(set(values) - set(names)):
            raise InputError(f"{key}.{unknown[0]}: not one of the modalities of this run ({', '.join(names)})")
    modalities = {name: _input_modality(registry[name], config.masking.units.get(name)) for name in names}
    encoders: dict[str, Encoder] = {}
    for name, modality in modalities.items():
        architecture = config.architectures.get(name, config.swin if modality.role == "image" else config.utae)
        mask_token = config.masking.images == "mask_token"
        encoder = build_encoder(manifest.input_spec(name), architecture, mask_token=mask_token)
        is_divided = modality.role == "image" and not is_single_unit(modality)
        if is_divided and modality.unit % encoder.strides[0]:
            raise InputError(
                f"{name}: its mask unit of {modality.unit} px is not a multiple of the {encoder.strides[0]}-px patches "
                "of its Swin: shard it with another unit"
            )
        if name in config.encoders:
            encoder = initialize_encoder(encoder, config.encoders[name], keep_architecture=True)
        encoders[name] = encoder
    weights = {name: weight for name, weight in config.weights.items() if weight > 0}
    objectives: dict[str, nn.Module] = {}
    if "masked" in weights:
        objectives["masked"] = MaskedReconstruction(encoders, modalities, config.masked)
    if "contrastive" in weights:
        objectives["contrastive"] = DenseContrast(encoders, modalities, config.contrastive)
    if "pooled_contrast" in weights:
        objectives["pooled_contrast"] = PooledContrast(encoders, config.pooled)
    if "vicreg" in weights:
        objectives["vicreg"] = PooledVICReg(encoders, config.pooled)
    if "latent" in weights:
        teachers = {
            name: load_teacher(f"latent.teachers.{name}", source, encoders[name].spec)
            for name, source in config.latent.teachers.items()
        }
        objectives["latent"] = LatentPrediction(encoders, modalities, config.latent, teachers)
    masks = quality_masks(registry, names)
    return PretrainingModel(encoders, modalities, masks, config.masking, objectives, weights, config.augment)


def export_encoders(model: nn.Module, folder: Path) -> None:
    """Write each encoder of the model to ``folder/MODALITY``."""
    assert isinstance(model, PretrainingModel)
    for name in model.encoders:
        save_encoder(model.encoder(name), folder / name)


def _input_modality(modality: Modality, unit: int | None) -> Modality:
    """Check the role of a modality, and replace its mask unit if ``unit`` is not None."""
    if not modality.is_input:
        raise InputError(f"modalities: {modality.name} is a {modality.role}, not an input of an encoder")
    if unit is None:
        return modality
    if unit < 1 or modality.size % unit:
        raise InputError(f"masking.units.{modality.name}={unit}: does not divide its {modality.size} px")
    return replace(modality, unit=unit)


def _check_negatives(config: PretrainConfig) -> None:
    """Check that contrastive objectives have other samples and other sensors to compare with.

    Raises:
        InputError: they have none, so that their loss would be 0 in every step.
    """
    single_sample = config.batch_size * launcher_rank_and_world()[1] < 2
    for name in ("contrastive", "pooled_contrast"):
        if not config.weights.get(name):
            continue
        has_queue = name == "contrastive" and config.contrastive.queue > 0
        if single_sample and not has_queue:
            queue = " or contrastive.queue=4096" if name == "contrastive" else ""
            raise InputError(
                f"batch_size=1 on one rank leaves no negatives for weights.{name}: use batch_size=2 or more{queue}"
            )
        if config.masking.modality_ratio == 1:
            raise InputError(
                f"weights.{name} compares sensors, and masking.modality_ratio=1 leaves one per sample: lower it"
            )


def _resume_config(config: PretrainConfig, manifest: Manifest) -> dict[str, object]:
    """Configuration that must be equal to resume the run.

    It identifies shards by their content, not by their location, and leaves out what does not affect training.
    """
    values = {key: value for key, value in asdict(config).items() if key not in ("cache", "reconstructions", "probe")}
    return {**values, "shards": manifest.digest}


def _probe_function(config: PretrainConfig, manifest: Manifest) -> Callable[[nn.Module, int], dict[str, float]] | None:
    """Function (model, step) that returns the scores of the probes by name; None without ``probe.label``."""
    if not config.probe.label:
        return None
    probe = Probe(manifest, config.probe, config.split)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, PretrainingModel)
        return probe.scores(model, config.batch_size, config.workers)

    return evaluate


def _figure_function(
    config: PretrainConfig, manifest: Manifest, train_rows: np.ndarray, modalities: list[Modality], folder: Path
) -> Callable[[nn.Module, int], dict[str, Path]]:
    """Function (model, step) that draws reconstructions of the same windows each time, and returns paths by name.

    The windows lie in patches outside ``train_rows``, (N,) int64 manifest rows, if there are any.
    """
    other_rows = np.setdiff1d(np.arange(len(manifest)), train_rows)
    rows = (other_rows if len(other_rows) else train_rows)[: config.reconstructions]

    def draw(model: nn.Module, step: int) -> dict[str, Path]:
        assert isinstance(model, PretrainingModel)
        objective, device = model.objectives["masked"], next(model.parameters()).device
        assert isinstance(objective, MaskedReconstruction)
        paths = {}
        for batch in evaluation_batches(manifest, rows, modalities, batch_size=1, window=config.window):
            key = batch.keys[0]
            path = folder / f"reconstruction_{key}_step-{step:07d}.png"
            save_figure(reconstruction_figure(model, objective, batch.to(device), 0, step), path)
            paths[f"reconstruction/{key}"] = path
        return paths

    return draw
