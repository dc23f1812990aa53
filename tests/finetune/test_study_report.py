"""Studies of few labels: what is made of the scores of their cells, and a whole study."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_study import LPIS, S2, SMALL, known_shards, scored, shards, study  # noqa: F401  (two are fixtures)

from bocage.finetune.evaluation.evaluate import write_tables
from bocage.finetune.models.targets import Target
from bocage.finetune.study.grid import LabelFraction, study_runs
from bocage.finetune.study.report import write_report
from bocage.finetune.study.results import analyses
from bocage.finetune.study.runs import CellFolders
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.evaluation.confusion import ConfusionMatrix
from bocage.tools.main import main


# Some ten seconds: figures for light and dark pages.
def test_a_report_says_what_the_cells_scored(tmp_path: Path) -> None:
    settings = study(
        tmp_path / "out",
        modes=["full"],
        starts={"scratch": {}, "ours": {S2: "x"}, "same": {S2: "y"}},
        shares=[LabelFraction(fraction=0.01, draws=3), LabelFraction(fraction=1.0, seeds=3)],
        learning_rates=[1.0, 0.1],
        watts=300,
    )
    scored(settings, {"scratch": 0.0, "ours": 1.0, "same": 0.0})
    found = analyses(settings)[LPIS]
    assert found.part == "test"
    assert set(found.rates.values()) == {0.1}  # the better one, by validation
    for share in (0.01, 1.0):
        difference = found.differences["ours", "full"][share]
        assert difference.corrected < 0.05
        assert difference.estimate.interval[0] > 0
        assert found.differences["same", "full"][share].estimate.value == 0
        alone = found.curves["ours", "full"][share].interval
        paired = difference.estimate.interval
        assert paired[1] - paired[0] < alone[1] - alone[0]
    needed = found.needed["ours", "full", "scratch"]
    assert needed.value < 0.1  # half the gain is worth ten times the labels
    assert needed.interval[1] < 1
    assert found.needed["scratch", "full", "ours"].value == np.inf
    assert np.isnan(found.classes("ours", "full", 0.01)).sum() == 1

    page = write_report(settings, tmp_path / "report")
    text = page.read_text()
    value = found.curves["ours", "full"][0.01].value
    assert f"{value:.1f} (" in text
    assert "ours, full: above scratch at 1 %, 100 % of the labels" in text
    assert "same, full: not told apart from scratch at any share" in text
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", text)  # nothing is fetched
    assert not re.findall(r"<script|@import|url\(", text)
    rows = (tmp_path / "report" / "curves.csv").read_text().splitlines()
    assert len(rows) == 1 + 6
    assert f"ours,full,0.01,3,{value:.4f}" in "\n".join(rows)
    assert '<th scope="col">1 % (1)</th>' in text  # of a share the labelled patches too
    assert (tmp_path / "report" / "cells.csv").read_text().count("\n") == 1 + 3 * 6 * 2
    assert r"\toprule" in (tmp_path / "report" / "tables.tex").read_text()
    assert "kWh" in text
    again = write_report(settings, tmp_path / "again")
    assert again.read_bytes() == page.read_bytes()


def test_reports_need_cells_of_this_study_on_the_same_patches(tmp_path: Path) -> None:
    settings = study(tmp_path, modes=["full"], shares=[LabelFraction(fraction=0.1, draws=2)])
    with pytest.raises(InputError, match="no cell of this study is finished"):
        analyses(settings)
    scored(settings, {"scratch": 0.0, "ours": 1.0}, part="valid")
    found = analyses(settings)[LPIS]
    assert found.part == "valid"
    assert found.rates["ours", "full", 0.1] is None
    folder = CellFolders(settings).of(study_runs(settings)[0])
    matrix = ConfusionMatrix(Target(label=FLAIR_HUB[LPIS]).scheme)
    for region in range(24):  # the same regions, but more pixels of them
        matrix.by_roi[f"D{region % 6:03}-2020/R{region}"] = np.full((23, 23), 99)
    write_tables(folder, {"valid": {LPIS: matrix}})
    with pytest.raises(InputError, match="measured on different patches"):
        analyses(settings)


# Some seconds: figures again.
def test_an_unfinished_study_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    settings = study(
        tmp_path / "out",
        shares=[LabelFraction(fraction=0.1, draws=3), LabelFraction(fraction=1.0)],
        learning_rates=[1.0, 0.1],
    )
    scored(settings, {"scratch": 0.0, "ours": 1.0})
    folders = CellFolders(settings)
    for cell in study_runs(settings):
        # Of scratch all labels alone, of ours a share; one rate lacks the runs that would have shown it to be worse.
        apart = cell.mode == "full" and cell.fraction == (0.1 if cell.start == "scratch" else 1.0)
        if apart or (cell.rate == 0.1 and cell.draw > 0) or (cell.mode == "knn" and cell.fraction == 1.0):
            (folders.of(cell) / "metrics.json").unlink()
    name = next(cell for cell in study_runs(settings) if cell.mode == "full" and folders.finished(cell)).name
    path = tmp_path / "out" / "cells" / name / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "skipped_steps": 2}))
    found = analyses(settings)[LPIS]
    assert set(found.differences) == {("ours", "knn")}
    assert found.rates["ours", "full", 0.1] == 0.1  # over the one run that both have
    assert found.differences["ours", "knn"][0.1].estimate.runs == 3
    text = write_report(settings, tmp_path / "report").read_text()
    assert "cells have no result yet; nothing here counts them" in text
    assert "to match ours at 10 %" in text
    assert (
        f"Of 1 run some steps were left out because their loss was not finite, see skipped_steps in cells.csv: {name}"
        in text
    )
    assert "Probes learn from at most" in text


# About two minutes: 24 small patches, and cells of every mode, each a process of its own.
@pytest.mark.slow
def test_a_study_from_shards_to_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = FLAIR_HUB.subset(["SPOT_RGBI", S2, "SENTINEL2_MSK-SC", "AERIAL_LABEL-COSIA", LPIS])
    write_tree(tmp_path / "tree", patches=24, seed=1, dates=(4, 5), registry=registry)
    written = write_shards(Catalogue.open(tmp_path / "tree", registry), tmp_path / "shards").path
    words = [*SMALL[2:], "modalities=[SPOT_RGBI,SENTINEL2_TS]", "labels=[AERIAL_LABEL-COSIA,ALL_LABEL-LPIS]"]
    recipe = tmp_path / "study.yaml"
    settings = {
        "shards": str(written),
        "output": str(tmp_path / "out"),
        "finetune": "finetune_quickstart",
        "background": False,
        "missing": True,
        "words": words,
        "starts": {"scratch": {}},
        "modes": ["knn", "linear", "frozen", "full"],
        "shares": [{"fraction": 0.5, "draws": 2}],
    }
    recipe.write_text(json.dumps(settings))
    word = f"recipe={recipe}"
    # Ctrl-C while the cost is measured: neither a cost nor a fault.
    line = [sys.executable, "-m", "bocage", "study", "run", word, "--dry-run"]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    said = ""
    while "step 1/5" not in said:
        said += child.stdout.readline()
    child.send_signal(signal.SIGINT)
    said += child.communicate()[0]
    assert child.returncode == 130, said
    assert "stopped before the cost was measured; nothing of it is kept" in said
    assert "Traceback" not in said
    assert main(["study", "run", word, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 runs" in out
    assert "hours of a process" in out
    assert not (tmp_path / "out").exists()
    assert main(["study", "run", word, "--processes", "2"]) == 0
    assert main(["study", "report", word]) == 0
    text = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "without SPOT_RGBI" in text
    assert 'id="aerial-label-cosia"' in text
    assert not list((tmp_path / "out" / "cells").glob("*/checkpoints"))
    assert (
        len(list((tmp_path / "out" / "features").glob("*/SPOT*"))) == 2
    )  # of a random encoder a draw, for both probes
    capsys.readouterr()
    began = time.monotonic()
    assert main(["study", "run", word]) == 0
    assert time.monotonic() - began < 10
