"""Label-efficiency studies: analysis and report of simulated scores, and a complete study."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_study import LPIS, S2, SMALL, known_shards, shards, study, write_scores  # noqa: F401  (two are fixtures)

from bocage.finetune.evaluation.evaluate import write_tables
from bocage.finetune.models.targets import Target
from bocage.finetune.study.report import write_report
from bocage.finetune.study.results import analyze_study
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import LabelFraction, study_runs
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.evaluation.confusion import ConfusionMatrix
from bocage.tools.main import main


# Some ten seconds: figures for light and dark pages.
def test_the_report_shows_the_scores_of_the_runs(tmp_path: Path) -> None:
    settings = study(
        tmp_path / "out",
        modes=["full"],
        initializations={"scratch": {}, "ours": {S2: "x"}, "same": {S2: "y"}},
        fractions=[LabelFraction(fraction=0.01, draws=3), LabelFraction(fraction=1.0, seeds=3)],
        learning_rates=[1.0, 0.1],
        watts=300,
    )
    write_scores(settings, {"scratch": 0.0, "ours": 1.0, "same": 0.0})
    found = analyze_study(settings)[LPIS]
    assert found.part == "test"
    assert set(found.settings.values()) == {(0.1, "")}  # the better one, by validation
    for fraction in (0.01, 1.0):
        difference = found.differences["ours", "full"][fraction]
        assert difference.p_holm < 0.05
        assert difference.estimate.interval[0] > 0
        assert found.differences["same", "full"][fraction].estimate.value == 0
        alone = found.curves["ours", "full"][fraction].interval
        paired = difference.estimate.interval
        assert paired[1] - paired[0] < alone[1] - alone[0]
    needed = found.labels_needed["ours", "full", "scratch"]
    assert needed.value < 0.1  # the gain equals that of more than ten times the labels
    assert needed.interval[1] < 1
    assert found.labels_needed["scratch", "full", "ours"].value == np.inf
    assert np.isnan(found.class_iou("ours", "full", 0.01)).sum() == 1

    page = write_report(settings, tmp_path / "report")
    text = page.read_text()
    value = found.curves["ours", "full"][0.01].value
    assert f"{value:.1f} (" in text
    assert "ours, full: significantly above scratch at 1 %, 100 % of the labels" in text
    assert "same, full: no significant difference to scratch at any fraction" in text
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", text)  # the page loads nothing
    assert not re.findall(r"<script|@import|url\(", text)
    rows = (tmp_path / "report" / "curves.csv").read_text().splitlines()
    assert len(rows) == 1 + 6
    assert f"ours,full,0.01,3,{value:.4f}" in "\n".join(rows)
    assert '<th scope="col">1 % (1)</th>' in text  # fraction and number of patches
    assert (tmp_path / "report" / "runs.csv").read_text().count("\n") == 1 + 3 * 6 * 2
    assert r"\toprule" in (tmp_path / "report" / "tables.tex").read_text()
    assert "kWh" in text
    again = write_report(settings, tmp_path / "again")
    assert again.read_bytes() == page.read_bytes()


def test_reports_need_finished_runs_on_the_same_patches(tmp_path: Path) -> None:
    settings = study(tmp_path, modes=["full"], fractions=[LabelFraction(fraction=0.1, draws=2)])
    with pytest.raises(InputError, match="no run of this study is finished"):
        analyze_study(settings)
    write_scores(settings, {"scratch": 0.0, "ours": 1.0}, part="valid")
    found = analyze_study(settings)[LPIS]
    assert found.part == "valid"
    assert found.settings["ours", "full", 0.1] == (None, "")
    folder = RunFolders(settings).path(study_runs(settings)[0])
    matrix = ConfusionMatrix(Target(label=FLAIR_HUB[LPIS]).scheme)
    for region in range(24):  # the same regions, but more pixels of them
        matrix.by_roi[f"D{region % 6:03}-2020/R{region}"] = np.full((23, 23), 99)
    write_tables(folder, {"valid": {LPIS: matrix}})
    with pytest.raises(InputError, match="scored on different patches"):
        analyze_study(settings)


# Some seconds: figures again.
def test_an_unfinished_study_can_be_reported(tmp_path: Path) -> None:
    settings = study(
        tmp_path / "out",
        fractions=[LabelFraction(fraction=0.1, draws=3), LabelFraction(fraction=1.0)],
        learning_rates=[1.0, 0.1],
    )
    write_scores(settings, {"scratch": 0.0, "ours": 1.0})
    folders = RunFolders(settings)
    for run in study_runs(settings):
        # Full: scratch keeps only all labels and ours only 10 %. One learning rate has only the first draw.
        apart = run.mode == "full" and run.fraction == (0.1 if run.initialization == "scratch" else 1.0)
        if apart or (run.learning_rate == 0.1 and run.draw > 0) or (run.mode == "knn" and run.fraction == 1.0):
            (folders.path(run) / "metrics.json").unlink()
    name = next(run for run in study_runs(settings) if run.mode == "full" and folders.is_finished(run)).name
    path = tmp_path / "out" / "runs" / name / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "skipped_steps": 2}))
    found = analyze_study(settings)[LPIS]
    assert set(found.differences) == {("ours", "knn")}
    assert found.settings["ours", "full", 0.1] == (0.1, "")  # over the one run that both have
    assert found.differences["ours", "knn"][0.1].estimate.runs == 3
    text = write_report(settings, tmp_path / "report").read_text()
    assert "runs have no result yet and are not included" in text
    assert "to match ours at 10 %" in text
    assert f"1 run skipped steps with a non-finite loss, see skipped_steps in runs.csv: {name}" in text
    assert "Probes train on at most" in text


# About two minutes: 24 small patches, and runs of every mode, each in its own process.
@pytest.mark.slow(minutes=1)
def test_a_complete_study_from_shards_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = FLAIR_HUB.subset(["SPOT_RGBI", S2, "SENTINEL2_MSK-SC", "AERIAL_LABEL-COSIA", LPIS])
    write_tree(tmp_path / "tree", patches=24, seed=1, dates=(4, 5), registry=registry)
    written = write_shards(FlairHubCatalogue.open(tmp_path / "tree", registry), tmp_path / "shards").path
    overrides = [*SMALL[2:], "modalities=[SPOT_RGBI,SENTINEL2_TS]", "labels=[AERIAL_LABEL-COSIA,ALL_LABEL-LPIS]"]
    recipe = tmp_path / "study.yaml"
    settings = {
        "shards": str(written),
        "output": str(tmp_path / "out"),
        "finetune": "finetune_quickstart",
        "background": False,
        "missing": True,
        "overrides": overrides,
        "initializations": {"scratch": {}},
        "modes": ["knn", "linear", "frozen", "full"],
        "fractions": [{"fraction": 0.5, "draws": 2}],
    }
    recipe.write_text(json.dumps(settings))
    word = f"recipe={recipe}"
    # Ctrl-C during the cost measurement exits without a traceback.
    line = [sys.executable, "-m", "bocage", "study", "run", word, "--dry-run"]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    output = ""
    while "step 1/5" not in output:
        output += child.stdout.readline()
    child.send_signal(signal.SIGINT)
    output += child.communicate()[0]
    assert child.returncode == 130, output
    assert "stopped before the cost was measured" in output
    assert "Traceback" not in output
    assert main(["study", "run", word, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 runs" in out
    assert "process hours" in out
    assert not (tmp_path / "out").exists()
    assert main(["study", "run", word, "--processes", "2"]) == 0
    assert main(["study", "report", word]) == 0
    text = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "without SPOT_RGBI" in text
    assert 'id="aerial-label-cosia"' in text
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))
    # One random encoder per draw and the raw inputs, shared by both probes.
    assert len(list((tmp_path / "out" / "features").glob("*/SPOT*"))) == 3
    capsys.readouterr()
    began = time.monotonic()
    assert main(["study", "run", word]) == 0
    assert time.monotonic() - began < 10
