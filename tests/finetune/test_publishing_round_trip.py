"""Publish encoders of a pretraining, then load them in environments without bocage."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bocage import recipes
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import load_encoder
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import main

pytestmark = pytest.mark.slow(minutes=4)  # A pretraining, and virtual environments with torch

ROOT = Path(__file__).parents[2]
TERMS = ["--dataset", "IGNF/FLAIR-HUB", "--data-license", "etalab-2.0", "--license", "etalab-2.0"]
IMAGES = ("AERIAL_RGBI", "SPOT_RGBI")
TIMM_ALONE = """
import importlib.util, json, sys
import timm, torch
from safetensors.torch import load_file

assert importlib.util.find_spec("bocage") is None
worst = {}
for name in sys.argv[1:]:
    kept = load_file(f"{name}.safetensors")
    encoder = timm.create_model(f"local-dir:runs/published/{name}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        maps = encoder(kept["images"])
    worst[name] = max(float((m.permute(0, 3, 1, 2) - kept[f"map{i}"]).abs().max()) for i, m in enumerate(maps))
    assert len(maps) == len(kept) - 1
    other = timm.create_model(f"local-dir:runs/published/{name}", pretrained=True, features_only=True, in_chans=3)
    assert other(kept["images"][:, :3])[0].shape == maps[0].shape
print(json.dumps(worst))
"""
COMPARE = """
import importlib.util, sys
import timm, torch
from safetensors.torch import load_file

assert importlib.util.find_spec("bocage") is None
kept = load_file("AERIAL_RGBI.safetensors")
encoder = task.model.encoder.eval()
alone = timm.create_model("local-dir:runs/published/AERIAL_RGBI", pretrained=True, features_only=True).eval()
with torch.no_grad():
    maps, others = encoder(kept["images"])[-4:], alone(kept["images"])
for index, (found, other) in enumerate(zip(maps, others, strict=True)):
    found = found if found.shape == kept[f"map{index}"].shape else found.permute(0, 3, 1, 2)
    assert torch.equal(found, other.permute(0, 3, 1, 2)), index
    worst = float((found - kept[f"map{index}"]).abs().max())
    print(index, worst)
    assert worst <= 1e-5, (index, worst)  # terratorch changes torch's rounding
task.train()
logits = task.model(kept["images"])
logits = getattr(logits, "output", logits)
assert logits.shape == (2, 19, 256, 256)
logits.mean().backward()
assert all(parameter.grad is not None for parameter in encoder.parameters())
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the quickstart recipe, its published encoders, and reference features from ``load_encoder``."""
    folder = tmp_path_factory.mktemp("round_trip")
    write_tree(folder / "tree", patches=40, seed=0)
    shards = write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path
    words = [
        "recipe=quickstart",
        f"shards={shards}",
        f"output={folder / 'run'}",
        "engine.steps=20",
        "reconstructions=0",
    ]
    assert pretrain(recipes.resolve(PretrainConfig, words)).exit_code == 0
    given = [
        "publish",
        str(folder / "run"),
        str(folder / "runs" / "published"),
        "--shards",
        str(shards),
        "--without-scores",
    ]
    assert main([*given, "--modalities", *IMAGES, *TERMS]) == 0
    for name in IMAGES:
        encoder = load_encoder(folder / "run" / "encoders" / name).eval()
        images = torch.randn(2, len(encoder.spec.channels), 256, 256, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            maps = encoder.features(images)
        kept = {f"map{index}": found.contiguous() for index, found in enumerate(maps)}
        save_file({"images": images, **kept}, folder / f"{name}.safetensors")
    return folder


def environment(folder: Path, *packages: str) -> Path:
    """Create a virtual environment with these packages and the installed torch version; return its interpreter."""
    pinned = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pinned, *packages], check=True)
    return python


def test_timm_alone_gives_the_same_features(published: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", f"timm=={importlib.metadata.version('timm')}", "safetensors")
    done = subprocess.run([str(python), "-c", TIMM_ALONE, *IMAGES], cwd=published, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    print(worst)
    assert max(worst.values()) <= 1e-6


# torchgeo 0.8.1 needs requests without declaring it.
@pytest.mark.parametrize(("library", "extra"), [("torchgeo", ["requests"]), ("terratorch", [])])
def test_the_documented_code_gives_the_same_features(
    library: str, extra: list[str], published: Path, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "how-to" / "publish.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"from {library}" in code]
    python = environment(tmp_path / "venv", library, *extra)
    done = subprocess.run([str(python), "-c", block + COMPARE], cwd=published, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
