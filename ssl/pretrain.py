"""Pretraining from a recipe: shards to one published encoder a modality."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bocage.shards.errors import InputError
from bocage.shards.files import check_apart
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import PATCH_SIZE, Modality
from bocage.shards.preprocess.augment import AugmentConfig
from bocage.shards.preprocess.inputs import quality_masks, wanted_modalities
from bocage.shards.read.cache import CacheConfig
from bocage.shards.read.dataset import TrainingStream, evaluation_batches
from bocage.shards.read.open import open_shards
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.encoders.initialization import pretrained_encoder
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.parallel.distributed import is_main, launcher_rank_and_world
from bocage.ssl.engine.run import Outcome
from bocage.ssl.engine.trainer import train
from bocage.ssl.evaluation.probe import Probe, ProbeConfig
from bocage.ssl.evaluation.reconstructions import reconstruction_figure, save_figure
from bocage.ssl.objectives.dense_contrast import ContrastiveConfig, DenseContrast
from bocage.ssl.objectives.latent import LatentConfig, LatentPrediction
from bocage.ssl.objectives.masked import MaskedConfig, MaskedReconstruction
from bocage.ssl.objectives.masking import MaskingConfig, check_window
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.objectives.pooled_contrast import PooledConfig, PooledContrast, PooledVICReg

OBJECTIVES = ("masked", "contrastive", "global", "vicreg", "latent")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run.

    Attributes:
        recipe: the recipe it came from.
        shards: folder written by ``bocage shard``, or its address (``shards.remote``).
        cache: where shards of another machine are kept, and how many.
        output: folder of checkpoints, encoders, metrics and pictures.
        modalities: sensors to pretrain; empty for all inputs the shards hold.
        split: split column of the shards, or ``all`` to pretrain on every patch.
        train: value of the split to pretrain on; validation and test images are left out.
        window: side of the ground window of a sample, metres.
        batch_size: samples per rank and step.
        workers: reading processes per rank.
        swin, utae: encoders of images and of series.
        architectures: encoders of single modalities, by name, in place of these.
        encoders: by modality, where the weights of its encoder start from (``ssl.encoders.sources``): the folder of a
            saved encoder, ``hf:org/name``, ``imagenet`` or ``imagenet:FILE``. It must be built as this recipe builds
            it, and keeps its statistics. The others start from scratch.
        augment: random changes of samples, beside crops and orientation.
        masking: what is hidden.
        weights: of the objectives in the loss, by name: ``masked``, ``contrastive`` (dense), ``global`` (NT-Xent of
            whole windows), ``vicreg``, ``latent``. Those not named are left out.
        masked: the masked objective.
        contrastive: the dense contrastive objective.
        summaries: the global ones.
        latent: latent prediction.
        probe: what probes of frozen features are measured on; ``engine.evaluate_every`` says when.
        engine: the training loop.
        pictures: samples whose reconstruction is drawn at each evaluation (``engine.evaluate_every``) and at the end,
            by the masked objective.

    Raises:
        ValueError: a number out of its range, an unknown objective, none that weighs, or ``vicreg`` of single samples.
    """

    recipe: str = ""
    shards: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = "runs/pretrain"
    modalities: list[str] = field(default_factory=list)
    split: str = "split_1"
    train: str = "train"
    window: float = PATCH_SIZE
    batch_size: int = 8
    workers: int = 4
    swin: EncoderConfig = field(default_factory=EncoderConfig)
    utae: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="utae"))
    architectures: dict[str, EncoderConfig] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    weights: dict[str, float] = field(default_factory=lambda: {"masked": 1.0})
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    summaries: PooledConfig = field(default_factory=PooledConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    pictures: int = 2

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if not 0 < self.window < math.inf:
            raise ValueError(f"window={self.window} must be a positive number of metres")
        for name, weight in self.weights.items():
            if name not in OBJECTIVES:
                raise ValueError(f"weights.{name}: not an objective; objectives: {', '.join(OBJECTIVES)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights.{name}={weight} must not be negative")
        if not any(self.weights.values()):
            raise ValueError("weights: at least one objective must weigh more than 0")
        if self.weights.get("vicreg") and self.batch_size < 2:
            raise ValueError("weights.vicreg needs a batch_size of at least 2: it compares the samples of a rank")
        for key in ("workers", "pictures"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")


def build_task(config: PretrainConfig, manifest: Manifest) -> PretrainingModel:
    """The encoders and the objective of a run, with the statistics of the shards.

    Raises:
        InputError: a key that names another modality than those of the run, or encoders, weights of encoders or
            objectives that cannot be built of them.
    """
    registry = manifest.registry
    names = config.modalities or [modality.name for modality in registry.inputs]
    for key in ("architectures", "encoders"):
        if unknown := sorted(set(getattr(config, key)) - set(names)):
            raise InputError(f"{key}.{unknown[0]}: not one of the modalities of this run ({', '.join(names)})")
    modalities = {name: _input(registry[name]) for name in names}
    encoders: dict[str, Encoder] = {}
    for name, modality in modalities.items():
        chosen = config.architectures.get(name, config.swin if modality.role == "image" else config.utae)
        encoder = build_encoder(manifest.input_spec(name), chosen, mask_token=config.masking.images == "mask_token")
        if name in config.encoders:
            encoder = pretrained_encoder(encoder, config.encoders[name], keep_architecture=True)
        encoders[name] = encoder
    weights = {name: weight for name, weight in config.weights.items() if weight > 0}
    terms: dict[str, nn.Module] = {}
    if "masked" in weights:
        terms["masked"] = MaskedReconstruction(encoders, modalities, config.masked)
    if "contrastive" in weights:
        terms["contrastive"] = DenseContrast(encoders, modalities, config.contrastive)
    if "global" in weights:
        terms["global"] = PooledContrast(encoders, config.summaries)
    if "vicreg" in weights:
        terms["vicreg"] = PooledVICReg(encoders, config.summaries)
    if "latent" in weights:
        terms["latent"] = LatentPrediction(encoders, modalities, config.latent)
    masks = quality_masks(registry, names)
    return PretrainingModel(encoders, modalities, masks, config.masking, terms, weights, config.augment)


def _input(modality: Modality) -> Modality:
    if not modality.is_input:
        raise InputError(f"modalities: {modality.name} is a {modality.role}, not an input of an encoder")
    return modality


def _check_comparisons(config: PretrainConfig) -> None:
    """Raises ``InputError`` where a term would compare a sample or a sensor with nothing, and be 0 in every step."""
    compared = [name for name in ("contrastive", "global") if config.weights.get(name)]
    alone = config.batch_size * launcher_rank_and_world()[1] < 2
    for name in compared:
        if alone and not (name == "contrastive" and config.contrastive.queue):
            raise InputError(
                f"weights.{name} tells samples apart, and batch_size=1 on one rank has none to tell from: give "
                f"batch_size=2 or more{', or contrastive.queue=4096' if name == 'contrastive' else ''}"
            )
        if config.masking.modality_ratio == 1:
            raise InputError(f"weights.{name} compares sensors, and masking.modality_ratio=1 leaves one: lower it")


def export_encoders(task: nn.Module, folder: Path) -> None:
    """Write each encoder of the task to ``folder/MODALITY``."""
    assert isinstance(task, PretrainingModel)
    for name in task.encoders:
        save_encoder(task.encoder(name), folder / name)


def pretrain(config: PretrainConfig) -> Outcome:
    """Run a recipe to its last step, or resume it; encoders end up in ``output/encoders/MODALITY``.

    Raises:
        InputError: the recipe has no ``output`` or does not fit the shards; else as ``train``.
        DivergenceError: see ``EngineConfig.max_bad_steps``.
    """
    if not config.output:
        raise InputError("output= is empty: give a folder for the run")
    check_apart(Path(config.output), config.shards)
    manifest = open_shards(config.shards, config.cache)
    rows = manifest.split(config.split, config.train)
    torch.manual_seed(config.engine.seed)  # before weights are drawn
    task = build_task(config, manifest)
    check_window(task.modalities, config.window, config.masking, reconstructed="masked" in task.terms)
    _check_comparisons(config)
    modalities = wanted_modalities(manifest.registry, list(task.encoders), [])
    source = TrainingStream(
        manifest,
        rows,
        modalities,
        batch_size=config.batch_size,
        window=config.window,
        seed=config.engine.seed,
        workers=config.workers,
    )
    probe = Probe(manifest, config.probe, config.split) if config.probe.label else None

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        assert probe is not None and isinstance(module, PretrainingModel)
        return probe.figures(module, config.batch_size, config.workers)

    output = Path(config.output)
    pictures, drawn = output / "pictures", config.pictures > 0 and "masked" in task.terms
    outcome = train(
        task,
        source,
        config.engine,
        output=output,
        recipe=config.recipe,
        # What the shards hold matters, not where they lie; what is only looked at does not matter.
        resolved={
            **{key: value for key, value in asdict(config).items() if key not in ("cache", "pictures", "probe")},
            "shards": manifest.digest,
        },
        evaluate=evaluate if probe is not None else None,
        draw=draws(manifest, rows, modalities, config, pictures) if drawn else None,
        export=export_encoders,
        rebuild={
            "command": "pretrain",
            "config": asdict(config),
            "inputs": {name: task.encoder(name).spec.to_json() for name in task.encoders},
        },
    )
    if outcome.exit_code == 0 and is_main():
        export_encoders(task, output / "encoders")
        for path in sorted(pictures.glob(f"*_step-{outcome.step:07d}.png")):
            print(f"reconstruction: {path}")
        print(f"encoders: {output / 'encoders'}")
    return outcome


def draws(
    manifest: Manifest, trained: np.ndarray, modalities: list[Modality], config: PretrainConfig, folder: Path
) -> Callable[[nn.Module, int], dict[str, Path]]:
    """A function (task, step) that draws what the masked decoder makes of some windows, always the same.

    They are of patches that are not among ``trained``, (N,) int64 rows, if there are such. It returns paths by name.
    """
    others = np.setdiff1d(np.arange(len(manifest)), trained)
    rows = (others if len(others) else trained)[: config.pictures]

    def draw(task: nn.Module, step: int) -> dict[str, Path]:
        assert isinstance(task, PretrainingModel)
        objective, device = task.terms["masked"], next(task.parameters()).device
        assert isinstance(objective, MaskedReconstruction)
        paths = {}
        for batch in evaluation_batches(manifest, rows, modalities, batch_size=1, window=config.window):
            key = batch.keys[0]
            paths[f"reconstruction/{key}"] = folder / f"reconstruction_{key}_step-{step:07d}.png"
            save_figure(
                reconstruction_figure(task, objective, batch.to(device), 0, step), paths[f"reconstruction/{key}"]
            )
        return paths

    return draw
