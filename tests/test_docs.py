"""The documentation: links lead somewhere, and every key of every recipe is told. ``make docs`` builds the pages."""

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import torch

from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.objectives.masking import Mask
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.pooled_contrast import PooledConfig

ROOT = Path(__file__).parents[1]
PAGES = runpy.run_path(str(ROOT / "docs" / "site" / "pages.py"))


# Some seconds: the rooms are imported for their dataclasses.
def test_links_lead_somewhere_and_every_key_is_told(tmp_path: Path) -> None:
    PAGES["put_together"](tmp_path / "out")  # raises on either
    keys = (tmp_path / "out" / "reference" / "recipes.md").read_text()
    for key in ("engine.optimizer.learning_rate", "masking.ratio", "modality_dropout", "shares", "cache.size"):
        assert f"| `{key}` |" in keys
    assert "| `utae.architecture` | `utae` |" in keys  # of this key, and not of its class
    for page in (tmp_path / "out").glob("*.md"):
        for name in re.findall(r"\]\(([^)#\s]+\.(?:md|png|svg))", page.read_text()):
            assert name.startswith("http") or (page.parent / name).is_file(), f"{page.name}: {name}"


def test_anchors_of_pages_exist() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", path.read_text()):
            if target.startswith("http"):
                continue
            page = path if not target else path.parent / target
            heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
            assert anchor in known, f"{path.name}: {target}#{anchor}"


# Some seconds: encoders of the example's page, which is executed as it stands.
def test_the_objective_of_the_page_learns_and_takes_samples_that_lack_sensors() -> None:
    page = (ROOT / "docs" / "adding-an-objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    there: dict[str, Any] = {}
    exec(code, there)
    torch.manual_seed(0)
    encoders: dict[str, Encoder] = {}
    for name in ("SPOT_RGBI", "DEM_ELEV"):
        channels = len(FLAIR_HUB[name].channels)
        spec = InputSpec.of(FLAIR_HUB[name], (0.0,) * channels, (1.0,) * channels)
        options = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
        encoders[name] = build_encoder(spec, EncoderConfig(options=options))
    term = there["Barlow"](encoders, PooledConfig(width=8, hidden=8))
    for batch, absent, learns in ((4, [], True), (4, [0], True), (4, [0, 1, 2], False), (1, [], False)):
        whole = torch.zeros(batch, dtype=torch.bool)
        maps = {name: [torch.randn(batch, encoders[name].widths[-1], 2, 2, requires_grad=True)] for name in encoders}
        masks = {
            "SPOT_RGBI": Mask(whole=whole),
            "DEM_ELEV": Mask(whole=whole.index_fill(0, torch.tensor(absent, dtype=torch.long), True)),
        }
        view = EncodedBatch({}, masks, maps, {}, {}, torch.arange(batch), torch.arange(batch), 51.2, False)
        loss, figures = term(view)
        loss.backward()
        assert torch.isfinite(loss) and (loss > 0) == learns and (set(figures) == {"own"}) == learns
        assert all(parameter.grad is not None for parameter in term.parameters())


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    said = []
    for folder in ("shards", "ssl", "finetune", "tools", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    said.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    own = [row for row in rows if "(torch)" not in row]
    assert len(own) > 40
    for row in own:
        words = re.compile(".*".join(re.escape(part) for part in re.findall(r"`([^`]+)`", row)), re.DOTALL)
        assert any(words.search(text) for text in said), row
