"""Links and anchors of the documentation, its generated pages, and the objective of the guide."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from bocage.recipes import list_recipes
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.objectives.masking import Mask
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.pooled_contrast import PooledConfig
from bocage.tools.main import COMMANDS

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs" / "site" / "pages.py"))
LINK = re.compile(r"\]\(((?!https?://|mailto:)[^)#\s]*)(?:#([^)]+))?\)")


def outside_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", outside_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def check_links(page: Path) -> None:
    for target, anchor in LINK.findall(outside_code(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("source", sorted({"README.md", *SITE["source_pages"]()} - {SITE["NOTEBOOK"]}))
def test_links_and_anchors_of_a_page_exist(source: str) -> None:
    check_links(ROOT / source)


# Some seconds: the configurations are imported.
def test_pages_of_the_site_are_complete(tmp_path: Path) -> None:
    SITE["write_pages"](tmp_path)  # raises for a dead link and for a key without description
    for page in tmp_path.rglob("*.md"):
        check_links(page)
    reference = {name: (tmp_path / "reference" / f"{name}.md").read_text() for name in ("recipe-keys", "recipe-files")}
    for key in ("engine.optimizer.learning_rate", "masking.ratio", "modality_dropout", "fractions", "cache.size"):
        assert f"| `{key}` |" in reference["recipe-keys"]
    assert "| `utae.architecture` | `utae` |" in reference["recipe-keys"]  # the default of the key, not of its class
    assert all(f"\n## {name}\n" in reference["recipe-files"] for name in list_recipes())
    commands = (tmp_path / "reference" / "commands.md").read_text()
    assert all(f"\n### bocage {name}\n" in commands for name in COMMANDS)
    assert (tmp_path / "reference" / "api" / "bocage.md").is_file()


# Some seconds: the example builds encoders.
def test_the_objective_of_the_guide_learns_with_and_without_absent_sensors() -> None:
    page = (ROOT / "docs" / "how-to" / "add-an-objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    encoders: dict[str, Encoder] = {}
    for name in ("SPOT_RGBI", "DEM_ELEV"):
        channels = len(FLAIR_HUB[name].channels)
        spec = InputSpec.from_modality(FLAIR_HUB[name], (0.0,) * channels, (1.0,) * channels)
        options = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
        encoders[name] = build_encoder(spec, EncoderConfig(options=options))
    objective = names["BarlowTwins"](encoders, PooledConfig(width=8, hidden=8))
    for batch, absent, learns in ((4, [], True), (4, [0], True), (4, [0, 1, 2], False), (1, [], False)):
        none = torch.zeros(batch, dtype=torch.bool)
        features = {
            name: [torch.randn(batch, item.widths[-1], 2, 2, requires_grad=True)] for name, item in encoders.items()
        }
        masks = {
            "SPOT_RGBI": Mask(dropped=none),
            "DEM_ELEV": Mask(dropped=none.index_fill(0, torch.tensor(absent, dtype=torch.long), True)),
        }
        ids = torch.arange(batch)
        loss, metrics = objective(EncodedBatch({}, masks, features, {}, {}, ids, ids, 51.2))
        loss.backward()
        assert torch.isfinite(loss) and (loss > 0) == learns and (set(metrics) == {"diagonal"}) == learns
        assert all(parameter.grad is not None for parameter in objective.parameters())
