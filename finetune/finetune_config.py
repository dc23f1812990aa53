"""Configuration of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field

from bocage.finetune.models.supervision import Supervision, TaskConfig
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.finetune.subsets.sampling import SAMPLING_UNITS, SamplingUnit
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.shards.read.cache import CacheConfig
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.engine.engine_config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of a fine-tuning run.

    Attributes:
        recipe: name of the recipe.
        shards: folder that ``bocage shard`` wrote, or its address (see ``shards.read.object_store``).
        cache: location and size of the local cache of remote shards.
        output: folder of the run: checkpoints, model, scores, predictions.
        labels: label rasters to predict, with one decoder each; empty for the label raster of the shards, if they have
            only one. Samples that lack one of the labels are still used for the others.
        tasks: level, grouping, weight and loss by label; the default is ``TaskConfig()``.
        modalities: inputs of the model; empty means every input of the shards.
        encoders: source of pretrained weights by modality (see ``ssl.encoders.initialization``): the folder of a saved
            encoder, ``hf:org/name``, ``imagenet`` or ``imagenet:FILE``. Other encoders start from scratch. A saved
            encoder keeps its architecture; ImageNet weights are loaded into the architecture of ``swin``.
        freeze: frozen encoders: ``MODALITY`` freezes all of one, ``MODALITY:STAGES`` its stem and first stages.
        modality_dropout: probability of dropping a modality from a training sample, by modality; one always remains.
        swin: architecture of image encoders that start from scratch.
        utae: architecture of time-series encoders that start from scratch.
        decoder: widths and norm of the decoders.
        official: whether to build the model of IGN's code for FLAIR-HUB (see ``finetune.official``), with its channels,
            normalisation, fixed image sizes and heads of series. Patches that lack a modality are left out.
        auxiliary: modalities with an auxiliary decoder during training (deep supervision).
        auxiliary_weight: weight of the mean loss of the auxiliary decoders in the total loss.
        split: split column of the shards, or ``all`` to train on every patch and validate on the same ones.
        train: value of the split column to train on.
        valid: value of the split column to validate on.
        test: value of the split column to test on; without such patches there is no test.
        train_fraction: fraction of the training patches to use (see ``finetune.subsets``).
        draw: number of the random draw of the subset. Subsets of one draw are nested: a larger fraction contains the
            smaller ones.
        sampling_unit: unit that is drawn: single patches (``patch``) or whole regions of interest (``roi``).
        disjoint_validation: whether to validate on whole regions that contain no training patch. They are drawn within
            each domain from the patches of ``train`` and ``valid``, about as many patches as ``valid`` has.
        window: side of the ground window of a training sample, in metres; null trains on whole patches.
            Evaluation uses whole patches.
        label_stride: stride of the label pixels, along both axes, that the training loss uses. Logits are computed for
            these pixels only, which saves most of the time where sensors are much coarser than labels. Evaluation uses
            all pixels.
        batch_size: samples per rank and micro-batch.
        workers: DataLoader workers per rank.
        encoder_lr_scale: learning rate of the encoders, as a multiple of ``engine.optimizer.learning_rate``, which is
            the rate of the decoders.
        head_steps: first steps in which the encoders do not learn, so that the decoders fit their features before they
            change (linear probing, then fine-tuning: LP-FT, arXiv 2202.10054).
        fusion_lr_scale: learning rate of the fusion and of the tokens of absent modalities, as such a multiple.
        predictions: number of validation patches to write as GeoTIFFs at the end.
        pictures: number of validation patches to draw at each evaluation: input, label, prediction and errors.
        engine: settings of the trainer.

    Raises:
        ValueError: a number is out of range, ``sampling_unit`` is unknown, or two settings exclude each other.
    """

    recipe: str = ""
    shards: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = ""
    labels: list[str] = field(default_factory=list)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    modalities: list[str] = field(default_factory=list)
    encoders: dict[str, str] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    modality_dropout: dict[str, float] = field(default_factory=dict)
    swin: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="swin"))
    utae: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="utae"))
    decoder: UPerNetConfig = field(default_factory=UPerNetConfig)
    official: bool = False
    auxiliary: list[str] = field(default_factory=list)
    auxiliary_weight: float = 0.4
    split: str = "split_1"
    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    train_fraction: float = 1.0
    draw: int = 0
    sampling_unit: SamplingUnit = "patch"
    disjoint_validation: bool = False
    window: float | None = None
    label_stride: int = 1
    batch_size: int = 4
    workers: int = 0
    encoder_lr_scale: float = 1.0
    head_steps: int = 0
    fusion_lr_scale: float = 1.0
    predictions: int = 8
    pictures: int = 4
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction={self.train_fraction} must be above 0 and at most 1")
        if self.sampling_unit not in SAMPLING_UNITS:
            raise ValueError(f"sampling_unit={self.sampling_unit} is not one of {', '.join(SAMPLING_UNITS)}")
        if self.disjoint_validation and self.split == EVERY_SAMPLE:
            raise ValueError(
                f"disjoint_validation: split={EVERY_SAMPLE} validates on the training patches; name a split column"
            )
        for key, value in (("batch_size", self.batch_size), ("label_stride", self.label_stride)):
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if self.batch_size == 1 and self.decoder.norm == "batch":
            raise ValueError("batch_size=1 cannot train decoder.norm=batch; use decoder.norm=group")
        if min(self.workers, self.predictions, self.pictures, self.head_steps) < 0:
            raise ValueError("workers, predictions, pictures and head_steps must not be negative")
        if min(self.encoder_lr_scale, self.fusion_lr_scale, self.auxiliary_weight) < 0:
            raise ValueError("encoder_lr_scale, fusion_lr_scale and auxiliary_weight must not be negative")
        if self.official:
            self._check_official()
        for name, rate in self.modality_dropout.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"modality_dropout.{name}={rate} is not a probability in [0, 1]")

    def _check_official(self) -> None:
        changed = {
            f"decoder={self.decoder}": self.decoder != UPerNetConfig(),
            f"swin.options={self.swin.options}": bool(self.swin.options),
            f"window={self.window}": self.window is not None,
            f"label_stride={self.label_stride}": self.label_stride != 1,
        }
        for key, differs in changed.items():
            if differs:
                raise ValueError(
                    f"{key}: official=true has a fixed decoder and Swin and trains on whole patches; leave it out"
                )

    @property
    def supervision(self) -> Supervision:
        """Training settings of the model."""
        return Supervision(
            freeze=self.freeze,
            modality_dropout=self.modality_dropout,
            auxiliary_weight=self.auxiliary_weight,
            label_stride=self.label_stride,
            tasks=self.tasks,
        )
