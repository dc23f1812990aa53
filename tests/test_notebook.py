"""The notebook runs from top to bottom, as Jupyter would run it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


# A minute: it simulates patches, pretrains encoders and fine-tunes.
@pytest.mark.slow(minutes=1)
def test_the_notebook_runs_and_is_kept_without_outputs(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    ran = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output for cell in ran.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    said = "".join(output.get("text", "") for cell in ran.cells for output in cell.get("outputs", []))
    assert "strict mIoU of validation patches" in said
    assert not re.search(r"\x1b\[[?\d]*[A-KSThl]", said)  # no cursor that moves, though Jupyter sets FORCE_COLOR
