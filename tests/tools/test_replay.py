"""A patch that breaks a training is found again from the dump of the step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file, save_file
from small_recipes import PRETRAIN

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.train import finetune
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import main

ROOT = Path(__file__).parents[2]
WORDS = [*PRETRAIN, "modalities=[DEM_ELEV]", "split=all", "window=51.2", "reconstructions=0", "engine.save_every=0"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Key of a patch with absurd heights, and words of a run that meets it with statistics of sane ones (seconds)."""
    folder = tmp_path_factory.mktemp("broken")
    write_tree(folder / "tree", patches=4, seed=5, dates=(3, 4))
    sane = write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "sane").path
    words = [*WORDS, "engine.steps=1"]
    pretrain(recipes.resolve(PretrainConfig, [*words, f"shards={sane}", f"output={folder / 'first'}"]))
    path = sorted((folder / "tree").rglob("*DEM_ELEV*.tif"))[1]
    with rasterio.open(path, "r+") as file:
        file.write(np.random.default_rng(0).choice([-1e30, 1e30], file.read().shape).astype(np.float32))
    shards = write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path
    encoder = folder / "first" / "encoders" / "DEM_ELEV"
    key = path.stem.replace("_DEM_ELEV", "")
    return key, [*WORDS, f"shards={shards}", f"encoders.DEM_ELEV={encoder}", "masking.modality_ratio=0"]


@pytest.fixture(scope="module")
def dump(broken: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    words = ["batch_size=1", "engine.accumulation=2", "engine.steps=4", "engine.ema_decay=0.9"]
    outcome = pretrain(recipes.resolve(PretrainConfig, [*broken[1], *words, f"output={output}"]))
    assert outcome.metrics["skipped_steps"]
    return min((output / "bad_steps").iterdir())


def test_the_sample_and_the_module_are_named(
    dump: Path, broken: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(dump), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"step {int(dump.name[5:])} of recipe quickstart, 1 ranks, fp32; here on cpu" in said
    assert f"samples with which this happens alone: {broken[0]}\n" in said
    assert "first module whose output is not finite: objectives.masked\n" in said
    assert said.count("was not finite") == 1
    # The sane micro-batch of the same step gives what it gave.
    (sane,) = [line for line in said.splitlines() if line.startswith("rank") and "was not finite" not in line]
    assert sane.split("loss ")[1].split(", was ")[0] == sane.split(", was ")[1]


def test_without_the_cause_everything_is_finite(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / dump.name
    shutil.copytree(dump, copy)
    content = torch.load(copy / "rank-00000.pt", weights_only=True)
    for batch in content["batches"]:
        batch["values"]["DEM_ELEV"].clamp_(max=100.0)
    torch.save(content, copy / "rank-00000.pt")
    assert main(["replay", str(copy)]) == 0
    assert "everything is finite here" in capsys.readouterr().out


def test_weights_that_are_broken_themselves_are_told_from_gradients(
    dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / dump.name
    shutil.copytree(dump, copy)
    weights = load_file(copy / "model.safetensors")
    weights["objectives.masked.heads.DEM_ELEV.pixels.bias"][0] = torch.nan
    save_file(weights, copy / "model.safetensors")
    assert main(["replay", str(copy)]) == 0
    assert "first module whose output is not finite: objectives.masked.heads.DEM_ELEV" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["none", "other shards", "no rank", "payload", "no weights", "json", "device"])
def test_what_cannot_be_replayed_is_one_sentence(
    what: str, dump: Path, broken: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, words = tmp_path / dump.name, list[str]()
    shutil.copytree(dump, copy)
    expected = {
        "none": "no such folder",
        "other shards": "are not the shards of this run",
        "no rank": "rank-00000.pt is missing",
        "payload": "nothing in it was executed",
        "no weights": "model.safetensors",
        "json": "dump.json is not readable JSON",
        "device": "--device nowhere",
    }[what]
    match what:
        case "none":
            copy = tmp_path / "nowhere"
        case "other shards":
            (shards,) = [word[7:] for word in broken[1] if word.startswith("shards=")]
            words = ["--shards", str(Path(shards).with_name("sane"))]
        case "no rank":
            (copy / "rank-00000.pt").unlink()
        case "payload":
            torch.save({"random": Payload()}, copy / "rank-00000.pt")
        case "no weights":
            (copy / "model.safetensors").unlink()
        case "json":
            (copy / "dump.json").write_text("{")
        case "device":
            words = ["--device", "nowhere"]
    assert main(["replay", str(copy), *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not Path("executed").exists()


class Payload:
    """Makes a file when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def run_of(words: list[str], output: Path, *more: str) -> Path:
    """The first dump of a run on one rank."""
    pretrain(recipes.resolve(PretrainConfig, [*words, *more, "engine.steps=4", f"output={output}"]))
    return min((output / "bad_steps").iterdir())


def test_the_encoder_it_started_from_may_be_gone(
    broken: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, words = broken
    (start,) = [word.split("=")[1] for word in words if word.startswith("encoders.")]
    shutil.copytree(start, tmp_path / "encoder")
    own = [word for word in words if not word.startswith("encoders.")]
    folder = run_of(own, tmp_path / "run", f"encoders.DEM_ELEV={tmp_path / 'encoder'}")
    shutil.rmtree(tmp_path / "encoder")
    assert main(["replay", str(folder)]) == 0
    assert f"samples with which this happens alone: {key}" in capsys.readouterr().out


# A queue would carry what is not finite from one sample to the next, and VICReg wants two samples.
def test_queues_and_losses_of_batches_do_not_blame_others(
    broken: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, words = broken
    own = [word for word in words if not word.startswith("modalities=")]
    more = ["modalities=[DEM_ELEV,SENTINEL2_TS]", "weights.contrastive=1", "contrastive.queue=64", "weights.vicreg=1"]
    assert main(["replay", str(run_of(own, tmp_path, *more, "batch_size=4"))]) == 0
    said = capsys.readouterr().out
    assert f"samples with which this happens alone: {key}\n" in said


# Some 5 s: patches are simulated, sharded and fine-tuned on.
@pytest.mark.slow
def test_statistics_of_batches_are_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tuning with batch normalisation, at a rate that ends it."""
    write_tree(tmp_path / "tree", patches=4, seed=5, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards").path
    words = ["recipe=finetune_quickstart", "modalities=[AERIAL_RGBI]", "decoder.norm=batch", "batch_size=2"]
    words += ["split=all", "window=51.2", "predictions=0", "engine.steps=6", "engine.optimizer.learning_rate=1e30"]
    words += ["engine.optimizer.warmup_steps=0", f"shards={shards}", f"output={tmp_path / 'run'}"]
    finetune(recipes.resolve(FinetuneConfig, words))
    assert main(["replay", str(min((tmp_path / "run" / "bad_steps").iterdir()))]) == 0
    said = capsys.readouterr().out
    assert "was not finite" in said
    assert "first module whose output is not finite: model." in said
    assert "samples with which this happens alone" in said


def test_a_dump_that_lacks_facts_is_named(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / dump.name
    shutil.copytree(dump, copy)
    facts = json.loads((copy / "dump.json").read_text())
    del facts["scale"], facts["threads"]
    (copy / "dump.json").write_text(json.dumps(facts))
    assert main(["replay", str(copy)]) == 2
    assert "dump.json lacks scale, threads: it is damaged" in capsys.readouterr().err


# About 40 s: torchrun starts two interpreters, twice; the second time ranks replay their parts together.
@pytest.mark.slow
def test_ranks_that_compare_their_samples_replay_together(
    broken: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, words = broken
    own = [word for word in words if not word.startswith("modalities=")]
    own += ["modalities=[DEM_ELEV,SENTINEL2_TS]", "weights.contrastive=1", "batch_size=1", "engine.steps=4"]
    own += ["engine.accumulation=2", f"output={tmp_path}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}

    def launched(*what: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*launch, *what], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)

    assert launched("pretrain.py", *own).returncode == 0
    folder = min((tmp_path / "bad_steps").iterdir())
    assert main(["replay", str(folder)]) == 0
    assert "torchrun --nproc_per_node 2 -m bocage replay" in capsys.readouterr().out
    together = launched("-m", "bocage", "replay", str(folder))
    assert together.returncode == 0, together.stderr
    finite = [line for line in together.stdout.splitlines() if line.startswith("rank") and "not finite" not in line]
    assert finite
    for line in finite:
        assert line.split("loss ")[1].split(", was ")[0] == line.split(", was ")[1]
    assert f"samples with which this happens alone: {key}" in together.stdout


# About 30 s: torchrun starts two interpreters, and the dump of both ranks is replayed.
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_step_of_two_ranks_replays(
    parallel: str, broken: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, words = broken
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "pretrain.py"]
    command += [*words, "batch_size=1", "engine.steps=2", f"output={tmp_path}", f"engine.parallel={parallel}"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "bad_steps").iterdir()
    found = json.loads((folder / "dump.json").read_text())["found"]
    (bad,) = [rank for rank, entry in enumerate(found) if not entry["finite"]]
    assert f"loss is not finite on rank {bad} (samples {key})" in result.stderr
    assert f"bocage replay {folder}" in result.stderr
    assert main(["replay", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"rank {bad}, micro-batch 1: loss nan, was not finite" in said
    assert f"samples with which this happens alone: {key}" in said
