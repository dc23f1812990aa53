"""Reconstruction pictures: their content, and that they are saved and sent to the tracker."""

import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from small_recipes import PRETRAIN
from tiny_pretraining import make_batch, make_model, masked_objective

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.inspect.composites import hillshade, series_composites
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.engine.logging.trackers import link_afterwards
from bocage.ssl.evaluation.reconstructions import reconstruction_figure, save_figure
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig

RELIEF = next(item.name for item in FLAIR_HUB.inputs if item.representation == "relief")
RADAR = next(item.name for item in FLAIR_HUB.inputs if item.representation == "decibel")
OPTICAL = next(item.name for item in FLAIR_HUB.inputs if item.role == "series" and item.name != RADAR)
MASK_GREY = 0.35


def draw(masking: MaskingConfig, name: str) -> tuple[list[np.ndarray], list[str]]:
    """Draw one modality of one sample; return its pictures in order, and their titles."""
    task = make_model(masking, names=[name]).eval()
    figure = reconstruction_figure(task, masked_objective(task), make_batch(2), 0, 7)
    axes = [axis for axis in figure.subfigs[1].axes if axis.images]
    return [np.asarray(axis.images[0].get_array()) for axis in axes], [axis.get_title("left") for axis in axes]


def is_masked(picture: np.ndarray) -> np.ndarray:
    return (picture == MASK_GREY).all(axis=-1)


def test_image_shows_target_visible_part_and_reconstruction() -> None:
    masking = MaskingConfig(modality_ratio=0.0)
    (target, visible, means, prediction, borrowed), titles = draw(masking, RELIEF)
    assert titles == [
        "target",
        "visible",
        "prediction: means of cells",
        "prediction",
        "prediction, with mean and contrast of the target",
    ]
    masked = is_masked(visible)
    assert masked.mean() == 0.75
    assert np.array_equal(target[~masked], visible[~masked])
    assert all(not np.array_equal(target, picture) for picture in (means, prediction, borrowed))
    assert not np.array_equal(prediction, borrowed)
    # Heights are shaded.
    surface = make_batch(2).values[RELIEF][0, 0].double()
    inside = surface.unfold(0, 5, 1).unfold(1, 5, 1).mean(dim=(-2, -1)).numpy()  # of 5 x 5 pixels
    shaded = hillshade(inside, FLAIR_HUB[RELIEF].gsd)
    assert np.allclose(target[3:-3, 3:-3, 0], shaded[1:-1, 1:-1], atol=2e-3)


@pytest.mark.parametrize("name", [OPTICAL, RADAR])
def test_series_is_a_strip_of_dates(name: str) -> None:
    shown, titles = draw(MaskingConfig(modality_ratio=0.0), name)
    columns = len(shown) // 4
    days = titles[:columns]
    assert columns == 7  # four masked dates (``masked.dates_per_sample``) and three visible ones
    assert all(len(day.split()) == 2 and day.split()[0].isdigit() for day in days)
    targets, visible, outputs = (shown[start : start + columns] for start in (0, columns, 2 * columns))
    masked = [is_masked(picture).all() for picture in visible]
    assert sum(masked) == 4
    for target, picture, output, is_date_masked in zip(targets, visible, outputs, masked, strict=True):
        assert np.array_equal(target, output) == (not is_date_masked)
        assert is_date_masked or np.array_equal(target, picture)
    # Targets are the stored values: radar in decibels, contrast over the dates shown.
    batch = make_batch(2)
    stored = batch.values[name][0].float()
    if name == RADAR:
        stored = 10 * stored.log10()
    dates = [date(2021, 5, 15) + timedelta(days=int(day)) for day in batch.dates[name][0]]
    indices = [[f"{day.day} {day:%b}" for day in dates].index(title) for title in days]
    frames = stored[indices].numpy()
    expected = series_composites(frames, FLAIR_HUB[name], np.ones(len(frames), bool))
    for target, composite in zip(targets, expected, strict=True):
        assert np.allclose(target, composite, atol=1e-3)


def test_masked_cubes_are_grey() -> None:
    shown, _ = draw(MaskingConfig(modality_ratio=0.0, cube_probability=1.0), OPTICAL)
    visible = [is_masked(picture) for picture in shown[len(shown) // 4 : 2 * len(shown) // 4]]
    assert any(0 < masked.mean() < 1 for masked in visible)


def test_titles_mark_absent_modalities() -> None:
    task = make_model(MaskingConfig(modality_ratio=1.0), names=[OPTICAL, RELIEF]).eval()
    figure = reconstruction_figure(task, masked_objective(task), make_batch(2, missing=(RELIEF,)), 0, 7)
    titles = [item._suptitle.get_text() for item in figure.subfigs[1:]]  # type: ignore[attr-defined]
    assert titles == [f"{RELIEF} (absent)", OPTICAL]


# Some 15 s: patches are simulated, and two runs train.
@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_pictures_are_saved_and_tracked_at_each_evaluation(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_tree(tmp_path / "tree", patches=4, seed=3, dates=(3, 4))
    write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    words = [
        *PRETRAIN,
        f"shards={tmp_path / 'shards'}",
        f"modalities=[{RELIEF},{OPTICAL}]",
        "split=all",
        "reconstructions=2",
    ]
    words += ["window=51.2", "engine.steps=4", "engine.evaluate_every=2", f"engine.tracker={tracker}"]
    pretrain(recipes.resolve(PretrainConfig, [*words, f"output={tmp_path / 'run'}"]))
    paths = sorted((tmp_path / "run" / "reconstructions").iterdir())
    assert [path.name.rpartition("_")[2] for path in paths] == ["step-0000002.png", "step-0000004.png"] * 2
    for path in paths:
        assert image.imread(path).shape[0] > 500
    assert not np.array_equal(image.imread(paths[0]), image.imread(paths[1]))
    if tracker == "wandb":
        kept = list((tmp_path / "run").glob("wandb/offline-run-*/files/media/images/**/*.png"))
        assert len(kept) == 4
    else:
        written = [path.read_bytes() for path in (tmp_path / "run").rglob("events.out.tfevents*")]
        assert sum(content.count(b"PNG") for content in written) == 4
        last = tmp_path / "run" / "checkpoints" / "step-00000004"
        assert str(last).encode() in b"".join(written)
        link_afterwards("tensorboard", tmp_path / "run", "bocage", "a run", 4, {"published/DEM_ELEV": "hf:org/name"})
        written = [path.read_bytes() for path in (tmp_path / "run" / "bocage").glob("events.out.tfevents*")]
        assert b"hf:org/name" in b"".join(written)


# Some 10 s: patches are simulated, and a run trains.
def test_run_continues_if_pictures_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "tree", patches=2, seed=3, dates=(3, 4))
    write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    words = [*PRETRAIN, f"shards={tmp_path / 'shards'}", f"modalities=[{OPTICAL}]", "split=all", "window=51.2"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reconstructions").write_text("a file")
    outcome = pretrain(recipes.resolve(PretrainConfig, [*words, "engine.steps=2", f"output={tmp_path / 'run'}"]))
    assert outcome.exit_code == 0 and outcome.last.is_dir() and (tmp_path / "run" / "encoders" / OPTICAL).is_dir()
    assert "step 2: pictures could not be drawn: " in capsys.readouterr().err


# Some 10 s: two processes import everything.
@pytest.mark.slow
def test_run_continues_if_a_picture_fails_on_one_of_two_ranks(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(__file__).parents[2] / "support" / "tiny_run.py"), str(tmp_path / "run"), "--draw-fails"]
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 12: pictures could not be drawn: out of colours") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000012").is_dir()


def test_error_names_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    figure = reconstruction_figure(
        task := make_model(names=[OPTICAL]).eval(), masked_objective(task), make_batch(1), 0, 7
    )
    (tmp_path / "pictures").write_text("a file")
    with pytest.raises(InputError, match=r"pictures/a\.png cannot be written"):
        save_figure(figure, tmp_path / "pictures" / "a.png")
