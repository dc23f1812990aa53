"""The documentation: links lead somewhere, and every key of every recipe is told. ``make docs`` builds the pages."""

import ast
import re
import runpy
from pathlib import Path

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
