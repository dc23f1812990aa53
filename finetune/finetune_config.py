"""The configuration of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field

from bocage.finetune.models.supervision import Supervision, TaskConfig
from bocage.finetune.models.upernet import DecoderConfig
from bocage.finetune.subsets.draw import TRACKS, Track
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.shards.modality import PATCH_SIZE
from bocage.shards.read.cache import CacheConfig
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.engine.config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Attributes:
        recipe: name of the recipe it came from.
        shards: folder that ``bocage shard`` wrote, or its address (``shards.remote``).
        cache: where shards of another machine are kept, and how many.
        output: folder of the run: checkpoints, model, scores, predictions.
        labels: label rasters to learn, one decoder each on what the encoders share. Samples that lack one of them
            teach the others.
        tasks: by label, its level, grouping, weight and loss, where they are not those of ``TaskConfig``.
        modalities: inputs of the model; empty means every input the shards hold.
        encoders: by modality, where the weights of its encoder come from (``ssl.encoders.sources``): the folder of a
            saved encoder, ``hf:org/name``, ``imagenet`` or ``imagenet:FILE``. The others start from scratch. A saved
            encoder keeps its own architecture; ImageNet weights go into the one that ``swin`` describes.
        freeze: encoders that stay as they are, ``MODALITY``, or whose stem and first stages do, ``MODALITY:STAGES``.
        modality_dropout: by modality, the probability that a training sample goes without it; one always stays.
        swin, utae: how encoders from scratch are built, for images and for series.
        decoder: widths and norm of the decoder.
        official: build and compute as IGN's code does (``finetune.official``): its channels and normalisation, Swins of
            one image size, heads of series. Sensors must all be there: patches that lack one are left out.
        auxiliary: modalities with decoders of their own while training (deep supervision).
        auxiliary_weight: weight of the mean of their losses beside the main one.
        split: split column of the shards, or ``all``: train on every patch and measure the fit on the same ones.
        train, valid, test: values of the split. Without patches of the value ``test`` nothing is tested.
        train_fraction: share of the training patches to use (``finetune.subsets``).
        draw: which subset of that size; those of one draw are nested, a larger one holds the smaller ones.
        track: whether subsets are of single patches (``patch``) or of whole regions (``roi``).
        disjoint_validation: validate on whole regions that nothing is trained on, drawn within domains from the patches
            of ``train`` and ``valid``, about as many as ``valid`` has.
        window: side of the ground window trained on, metres. Evaluation sees whole patches.
        label_stride: learn from every which pixel of labels, along both axes: logits are made for these alone, which
            saves most of the time of a step where sensors are far coarser than labels. Evaluation counts all pixels.
        batch_size: samples a rank and micro-batch.
        workers: reading processes of each rank.
        encoder_lr: learning rate of pretrained and other encoders, as a multiple of ``engine``'s, which is that of the
            decoders.
        fusion_lr: that of the fusion and of the tokens of absent sensors.
        predictions: validation patches to write as GeoTIFFs at the end.
        pictures: validation patches to draw at each evaluation of training: input, label, prediction and errors.
        engine: the training loop.

    Raises:
        ValueError: a number out of its range, an unknown ``track``, or choices that exclude each other.
    """

    recipe: str = ""
    shards: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = ""
    labels: list[str] = field(default_factory=lambda: ["AERIAL_LABEL-COSIA"])
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    modalities: list[str] = field(default_factory=list)
    encoders: dict[str, str] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    modality_dropout: dict[str, float] = field(default_factory=dict)
    swin: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="swin"))
    utae: EncoderConfig = field(default_factory=lambda: EncoderConfig(architecture="utae"))
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    official: bool = False
    auxiliary: list[str] = field(default_factory=list)
    auxiliary_weight: float = 0.4
    split: str = "split_1"
    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    train_fraction: float = 1.0
    draw: int = 0
    track: Track = "patch"
    disjoint_validation: bool = False
    window: float = PATCH_SIZE
    label_stride: int = 1
    batch_size: int = 4
    workers: int = 0
    encoder_lr: float = 1.0
    fusion_lr: float = 1.0
    predictions: int = 8
    pictures: int = 4
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction={self.train_fraction} is not in (0, 1]")
        if self.track not in TRACKS:
            raise ValueError(f"track={self.track} is not one of {', '.join(TRACKS)}")
        if self.disjoint_validation and self.split == EVERY_SAMPLE:
            raise ValueError(f"disjoint_validation: split={EVERY_SAMPLE} validates on what it trains on; name a split")
        for key, value in (("batch_size", self.batch_size), ("label_stride", self.label_stride)):
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if self.batch_size == 1 and self.decoder.norm == "batch":
            raise ValueError("batch_size=1 cannot train decoder.norm=batch; use decoder.norm=group")
        if min(self.workers, self.predictions, self.pictures) < 0:
            raise ValueError("workers, predictions and pictures must not be negative")
        if min(self.encoder_lr, self.fusion_lr, self.auxiliary_weight) < 0:
            raise ValueError("encoder_lr, fusion_lr and auxiliary_weight must not be negative")
        if self.official:
            self._check_official()
        for name, rate in self.modality_dropout.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"modality_dropout.{name}={rate} is not a probability in [0, 1]")

    def _check_official(self) -> None:
        wrong = {
            f"decoder={self.decoder}": self.decoder != DecoderConfig(),
            f"swin.options={self.swin.options}": bool(self.swin.options),
            f"window={self.window}": self.window != PATCH_SIZE,
            f"label_stride={self.label_stride}": self.label_stride != 1,
        }
        for key, differs in wrong.items():
            if differs:
                raise ValueError(
                    f"{key}: official=true has its own decoder and Swin, and learns from whole patches; leave it out"
                )

    @property
    def supervision(self) -> Supervision:
        """How the model learns."""
        return Supervision(
            freeze=self.freeze,
            modality_dropout=self.modality_dropout,
            auxiliary_weight=self.auxiliary_weight,
            label_stride=self.label_stride,
            tasks=self.tasks,
        )
