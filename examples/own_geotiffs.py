"""Fine-tune a published encoder on your own GeoTIFFs, with your own bands.

python own_geotiffs.py ENCODER IMAGES LABELS CLASSES

IMAGES and LABELS are folders of GeoTIFFs with the same file names. Labels have class values from 0, and 255 for
unlabelled pixels. Set BANDS to the bands of your images, here near infrared, red and green. The script writes adapted/,
the encoder for these bands, and model.pt, a U-Net of segmentation-models-pytorch (pip install -e '.[losses]').
"""

import random
import sys
from pathlib import Path

import numpy as np
import rasterio
import segmentation_models_pytorch as smp
import torch

from bocage import adapt_bands, load_encoder, save_encoder

BANDS, SIDE, BATCH, STEPS = ["NIR", "R", "G"], 256, 8, 1000
if len(sys.argv) != 5:
    sys.exit(__doc__)

encoder = adapt_bands(load_encoder(sys.argv[1]), BANDS)  # a folder, a .zip or hf:org/name
save_encoder(encoder, "adapted")
model = smp.Unet("tu-local-dir:adapted", encoder_weights=True, in_channels=len(BANDS), classes=int(sys.argv[4]))
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.spec.mean, encoder.spec.std))
images = sorted(Path(sys.argv[2]).glob("*.tif"))
if not images:
    sys.exit(f"{sys.argv[2]}: no file NAME.tif")


def window(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a random window: standardised values and classes."""
    with rasterio.open(path) as image, rasterio.open(Path(sys.argv[3], path.name)) as label:
        if image.count != len(BANDS):
            sys.exit(f"{path} has {image.count} bands, BANDS has {len(BANDS)}")
        left, top = (random.randint(0, max(0, length - SIDE)) for length in (image.width, image.height))
        area = rasterio.windows.Window(left, top, SIDE, SIDE)
        # Nodata pixels, and pixels beyond the edges of small images, get the mean and no class.
        values = image.read(window=area, boundless=True, masked=True).astype(np.float32).filled(np.nan)
        classes = label.read(1, window=area, boundless=True, fill_value=255)
        return torch.nan_to_num((torch.from_numpy(values) - mean) / std), torch.from_numpy(classes.astype(np.int64))


optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
for step in range(STEPS):
    inputs, targets = (torch.stack(items) for items in zip(*(window(random.choice(images)) for _ in range(BATCH))))
    loss = torch.nn.functional.cross_entropy(model(inputs), targets, ignore_index=255)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}  loss {loss.item():.3f}", flush=True)
torch.save(model.state_dict(), "model.pt")
