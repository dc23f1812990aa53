"""Random batches and small pretraining models of all FLAIR-HUB sensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bocage.shards.batch import Batch, GroundWindow, Sample
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import EncoderInput, quality_masks
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.collate import collate
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.objectives.decoder import DecoderConfig
from bocage.ssl.objectives.masked import MaskedConfig, MaskedReconstruction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.objectives.targets import TARGETS

SIDE = 51.2  # metres
NAMES = [modality.name for modality in FLAIR_HUB.inputs]
SWIN = EncoderConfig(
    options={
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
)
UTAE = EncoderConfig(
    architecture="utae",
    options={"encoder_widths": [16, 16, 32], "decoder_widths": [16, 16, 32], "d_model": 32, "n_head": 4, "d_k": 4},
)


def make_batch(count: int, dates: int = 9, missing: tuple[str, ...] = (), side: float = SIDE) -> Batch:
    """``count`` samples of random values with the keys "0", "1", ..., without the modalities ``missing``."""
    random = np.random.default_rng(0)
    modalities = [modality for modality in FLAIR_HUB.values() if modality.role != "label"]
    samples = []
    for index in range(count):
        arrays, days = {}, {}
        for modality in modalities:
            if modality.name in missing:
                continue
            pixels = round(side / modality.gsd)
            shape: tuple[int, ...] = (len(modality.bands), pixels, pixels)
            if modality.has_time_axis:
                shape = (dates, *shape)
                days[modality.name] = np.arange(dates, dtype=np.int32) * 30 - 130
            values = random.random(shape) * (0 if modality.role == "mask" else 200)
            arrays[modality.name] = values.astype(modality.dtype)
        seed = sample_seed(0, 0, str(index))
        samples.append(Sample(str(index), "D001-2020/AA", seed, GroundWindow(0, 0, side), arrays, days))
    return collate(samples, modalities)


def make_model(masking: MaskingConfig | None = None, names: list[str] = NAMES) -> PretrainingModel:
    """Small encoders with masked reconstruction; the same weights in every call."""
    torch.manual_seed(0)
    masking = masking or MaskingConfig()
    encoders: dict[str, Encoder] = {}
    for name in names:
        modality = FLAIR_HUB[name]
        channels = len(modality.channels)
        spec = InputSpec.from_modality(modality, (100.0,) * channels, (50.0,) * channels)
        config = SWIN if modality.role == "image" else UTAE
        encoders[name] = build_encoder(spec, config, mask_token=masking.images == "mask_token")
    masked_config = MaskedConfig(
        decoder=DecoderConfig(width=32, fusion_depth=1, query_depth=1, heads=4),
        targets=dict.fromkeys(TARGETS, 1.0),
        dates_per_sample=4,
    )
    modalities = {name: FLAIR_HUB[name] for name in names}
    masked = MaskedReconstruction(encoders, modalities, masked_config)
    return PretrainingModel(
        encoders, modalities, quality_masks(FLAIR_HUB, names), masking, {"masked": masked}, {"masked": 1.0}
    )


def masked_objective(model: PretrainingModel) -> MaskedReconstruction:
    """The masked reconstruction of a model."""
    objective = model.objectives["masked"]
    assert isinstance(objective, MaskedReconstruction)
    return objective


def fill_masked_with_noise(encoded: EncodedBatch) -> dict[str, EncoderInput]:
    """Copy the inputs of a batch, with noise wherever a unit, date, cube or modality is masked."""
    inputs = {}
    generator = torch.Generator().manual_seed(1)
    for name, item in encoded.inputs.items():
        mask = encoded.masks[name]
        noise = torch.randn(item.values.shape, generator=generator) * 10
        if mask.units is not None:
            unit = FLAIR_HUB[name].unit
            masked = (mask.units | mask.dropped[:, None, None]).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
            masked = masked[:, None]
        else:
            assert mask.dates is not None
            masked = (mask.dates | mask.dropped[:, None])[:, :, None, None, None]
            if mask.cubes is not None:
                masked = masked | mask.cubes[:, :, None]
        inputs[name] = replace(item, values=torch.where(masked, noise, item.values))
    return inputs
