"""Configuration of a pretraining run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bocage.shards.preprocess.augment import AugmentConfig
from bocage.shards.read.cache import CacheConfig
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.evaluation.probe import ProbeConfig
from bocage.ssl.objectives.dense_contrast import ContrastiveConfig
from bocage.ssl.objectives.latent import LatentConfig
from bocage.ssl.objectives.masked import MaskedConfig
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.pooled_contrast import PooledConfig

OBJECTIVES = ("masked", "contrastive", "pooled_contrast", "vicreg", "latent")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run.

    Attributes:
        recipe: name or path of the recipe.
        shards: folder written by ``bocage shard``, or its address (``shards.read.object_store``).
        cache: local cache for remote shards.
        output: folder for checkpoints, encoders, metrics and reconstruction figures.
        modalities: sensors to pretrain; empty for all input modalities of the shards.
        split: split column of the shards, or ``all`` to pretrain on every patch.
        train: value of the split column to pretrain on; other patches are left out.
        window: side of the ground window of a sample, in metres; null trains on whole patches.
        batch_size: samples per rank and step.
        workers: DataLoader workers per rank.
        swin: architecture of image encoders.
        utae: architecture of series encoders.
        architectures: architectures of single modalities, by name; they replace ``swin`` and ``utae``.
        encoders: initial weights of encoders, by modality (``ssl.encoders.initialization``): the folder of a saved
            encoder, ``hf:org/name``, ``imagenet`` or ``imagenet:FILE``. A saved encoder must have the architecture of
            this recipe and keeps its normalisation statistics. Encoders that are not listed start from scratch.
        augment: random changes of samples in addition to crops and orientation.
        masking: masking of the encoder inputs.
        weights: weight of each objective in the loss, by name: ``masked``, ``contrastive`` (dense), ``pooled_contrast``
            (NT-Xent of whole windows), ``vicreg``, ``latent``. Objectives that are not listed are left out.
        masked: masked reconstruction.
        contrastive: dense contrast.
        pooled: projection heads of ``pooled_contrast`` and ``vicreg``.
        latent: latent prediction.
        probe: probes of frozen features, measured every ``engine.evaluate_every`` steps.
        engine: training loop.
        reconstructions: number of samples whose reconstruction is drawn at each evaluation (``engine.evaluate_every``)
            and at the end of the run, if ``masked`` has a weight.

    Raises:
        ValueError: a number is out of range, an objective is unknown, no objective has a positive weight, or ``vicreg``
            has batches of one sample.
    """

    recipe: str = ""
    shards: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = "runs/pretrain"
    modalities: list[str] = field(default_factory=list)
    split: str = "split_1"
    train: str = "train"
    window: float | None = None
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
    pooled: PooledConfig = field(default_factory=PooledConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reconstructions: int = 2

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.window is not None and not 0 < self.window < math.inf:
            raise ValueError(f"window={self.window} must be a positive number of metres")
        for name, weight in self.weights.items():
            if name not in OBJECTIVES:
                raise ValueError(f"weights.{name}: not an objective; objectives: {', '.join(OBJECTIVES)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights.{name}={weight} must not be negative")
        if not any(self.weights.values()):
            raise ValueError("weights: at least one objective must have a weight above 0")
        if self.weights.get("vicreg") and self.batch_size < 2:
            raise ValueError("weights.vicreg needs a batch_size of at least 2: it compares the samples of a rank")
        for key in ("workers", "reconstructions"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")
