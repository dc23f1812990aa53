"""Small encoders and synthetic samples whose classes all sensors can distinguish, for tests of fine-tuning."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bocage.finetune.models.segmentation import Segmentation
from bocage.finetune.models.supervision import Supervision
from bocage.finetune.models.targets import Target
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.shards.batch import Batch, GroundWindow, Sample
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks, required_modalities
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.collate import collate
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder

AERIAL, DEM, S2, S1 = "AERIAL_RGBI", "DEM_ELEV", "SENTINEL2_TS", "SENTINEL1-ASC_TS"
COSIA, LPIS = "AERIAL_LABEL-COSIA", "ALL_LABEL-LPIS"
CLASSES = (0, 3, 8)
WINDOW = GroundWindow(left=0.0, top=0.0, side=51.2)
SWIN = EncoderConfig(
    architecture="swin", options={"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "window_size": 4}
)
UTAE = EncoderConfig(
    architecture="utae",
    options={"encoder_widths": [16, 16, 32], "decoder_widths": [16, 16, 32], "d_model": 32, "n_head": 4, "d_k": 4},
)
DECODER = UPerNetConfig(pyramid_width=32, width=16, norm="group")


def encoders(*names: str) -> dict[str, Encoder]:
    built = {}
    for name in names:
        modality = FLAIR_HUB[name]
        channels = len(modality.channels)
        spec = InputSpec.from_modality(modality, (128.0,) * channels, (64.0,) * channels)
        built[name] = build_encoder(spec, UTAE if spec.series else SWIN)
    return built


def task(
    *names: str,
    labels: tuple[str, ...] = (COSIA,),
    band: int = 0,
    decoder: UPerNetConfig = DECODER,
    auxiliary: tuple[str, ...] = (),
    official: bool = False,
    **supervision: Any,
) -> Segmentation:
    torch.manual_seed(0)
    return Segmentation(
        encoders(*names),
        [Target(label=FLAIR_HUB[label], band=band) for label in labels],
        decoder,
        quality_masks(FLAIR_HUB, list(names)),
        auxiliary=auxiliary,
        official=official,
        supervision=Supervision(**supervision),
    )


def sample(index: int, modalities: tuple[str, ...]) -> Sample:
    """A checkerboard of 5 x 5 cells of three classes, as observed by the given sensors."""
    random = np.random.default_rng(index)
    cells = random.integers(0, len(CLASSES), (5, 5))
    grey = np.array([20, 128, 236])[cells]
    arrays, dates = {}, {}
    for name in modalities:
        modality = FLAIR_HUB[name]
        size = round(WINDOW.side / modality.gsd)
        cell = np.minimum(np.arange(size) * 5 // size, 4)
        image = (grey if modality.is_input else np.array(CLASSES)[cells])[cell[:, None], cell[None, :]]
        array = np.broadcast_to(image, (len(modality.bands), size, size))
        if modality.has_time_axis:
            array = np.broadcast_to(array, (3 + index % 2, *array.shape))
            dates[name] = np.arange(len(array), dtype=np.int32) * 30
        arrays[name] = np.ascontiguousarray(array, dtype=modality.dtype)
    return Sample(f"D001-2020_AA_0-{index}", f"D001-2020/A{index % 2}", index, WINDOW, arrays, dates)


def batch(*modalities: tuple[str, ...], inputs: tuple[str, ...], labels: tuple[str, ...] = (COSIA,)) -> Batch:
    """Collate one sample per tuple of modalities that it has; all ``inputs`` are in the batch."""
    samples = [sample(index, (*names, *labels)) for index, names in enumerate(modalities)]
    required = required_modalities(FLAIR_HUB, list(inputs), list(labels))
    return collate(samples, required)


def trained(model: Segmentation, data: Batch, steps: int, learning_rate: float = 5e-3) -> float:
    """Pixel accuracy in evaluation mode after some steps on one batch, of all labels together."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for epoch in range(steps):
        seeds = torch.tensor([sample_seed(0, epoch, key) for key in data.keys])
        loss, _ = model(replace(data, seeds=seeds))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    predicted = model.predict(data)
    correct = [predicted[name] == target.truth(data) for name, target in model.targets.items()]
    return float(torch.stack(correct).float().mean())
