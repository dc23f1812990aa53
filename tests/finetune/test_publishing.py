"""Publishing encoders: the folder, the card and its code, and uploads with the hub's own client."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hub_stand_in import Hub
from small_recipes import PRETRAIN
from wandb_records import read_offline_runs

from bocage import recipes
from bocage.finetune.publishing.release import check_publication
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import load_encoder
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import main

SPOT, DEM, S2, COSIA, LPIS = "SPOT_RGBI", "DEM_ELEV", "SENTINEL2_TS", "AERIAL_LABEL-COSIA", "ALL_LABEL-LPIS"
RUN = [*PRETRAIN, "engine.steps=3", "engine.log_every=1", "engine.tracker=wandb", "reconstructions=0"]
pytestmark = pytest.mark.slow  # about a minute; test_other_datasets publishes in the fast suite
TERMS = ["--dataset", "IGNF/FLAIR-HUB", "--data-license", "etalab-2.0", "--license", "apache-2.0"]


# About 20 s: a pretraining of three steps and six probes.
@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shards, a pretraining of three sensors, probes of its encoders, and the published encoders."""
    folder = tmp_path_factory.mktemp("publication")
    registry = FLAIR_HUB.subset([SPOT, DEM, S2, "SENTINEL2_MSK-SC", COSIA, LPIS])
    write_tree(folder / "tree", patches=36, seed=1, registry=registry, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(folder / "tree", registry), folder / "shards").path
    words = [*RUN, f"shards={shards}", f"output={folder / 'run'}"]
    os.environ["WANDB_MODE"] = "offline"
    assert pretrain(recipes.resolve(PretrainConfig, words)).exit_code == 0
    for name, label in ((SPOT, COSIA), (DEM, COSIA), (S2, LPIS)):
        encoder = str(folder / "run" / "encoders" / name)
        assert main(["study", "probe", encoder, str(shards), str(folder / "probes" / name), "--label", label]) == 0
    assert main(publish_command(folder)) == 0
    yield folder
    del os.environ["WANDB_MODE"]


def publish_command(folder: Path, *others: str) -> list[str]:
    scores = [str(path.parent) for path in sorted((folder / "probes").glob("*/*/metrics.json"))]
    command = ["publish", str(folder / "run"), str(folder / "out"), "--shards", str(folder / "shards")]
    return [*command, "--scores", *scores, *TERMS, *others]


def code(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def executed(source: str, folder: Path, **environment: str) -> str:
    line = [sys.executable, "-c", source]
    done = subprocess.run(line, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_is_complete_and_its_hashes_match(world: Path) -> None:
    for name in (SPOT, DEM, S2):
        folder = world / "out" / name
        assert {path.name for path in folder.iterdir()} == {
            *("model.safetensors", "config.json", "README.md", "metrics.json", "recipe.yaml", "preprocessing.json"),
            "SHA256SUMS",
        }
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
        check_publication(folder)
        assert (folder / "model.safetensors").read_bytes() == (
            world / "run" / "encoders" / name / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("name", [SPOT, S2])
def test_the_card_agrees_with_the_facts(world: Path, name: str) -> None:
    folder = world / "out" / name
    facts = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["datasets"]) == ("apache-2.0", ["IGNF/FLAIR-HUB"])
    in_header = [metric["value"] for item in header["model-index"][0]["results"] for metric in item["metrics"]]
    assert in_header == [score["miou"] for score in facts["scores"]]
    start = f"| {LPIS if name == S2 else COSIA} "
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith(start)]
    assert len(rows) == len(facts["scores"]) == 2
    for row, score in zip(rows, facts["scores"], strict=True):
        assert row[3].strip() == f"{score['miou']:.2f}"
        assert score["regions"] == 2
        assert row[4].strip() == "too few regions"
    # The scores equal those in the files of the probes.
    for score in facts["scores"]:
        (path,) = (world / "probes" / name).glob(f"{score['probe']}-*/metrics.json")
        assert json.loads(path.read_text())["test"][score["label"]]["strict"]["miou"] == pytest.approx(
            score["miou"], rel=1e-12
        )
    manifest = Manifest.open(world / "shards")
    trained = manifest.split("split_1", "train")
    assert facts["data"]["patches"] == len(trained)
    years = {domain[-4:] for domain in manifest.column("domain").take(trained).to_pylist()}
    assert {facts["data"]["first_date"][:4], facts["data"]["last_date"][:4]} <= years
    for fact in (
        "3, 6 windows in total",
        "masked x 1",
        facts["data"]["first_date"],
        facts["data"]["shards"],
    ):
        assert fact in card
    assert all(domain in card for domain in facts["data"]["domains"])
    assert "[FLAIR-HUB](https://huggingface.co/datasets/IGNF/FLAIR-HUB)" in card and "Garioud et al., 2025" in card
    assert "Data (FLAIR-HUB): etalab-2.0." in card
    assert re.search(r"Of the test patches with .*, 0 were used in pretraining", card)
    assert str(world) not in "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")


def test_the_tracker_links_the_checkpoint_and_the_published_encoders(world: Path) -> None:
    shown = read_offline_runs(world / "run")
    assert len(shown["ids"]) == 1  # publishing resumes the same tracker run
    assert [step for step, _ in shown["history"]] == [1, 2, 3]
    assert shown["summary"]["checkpoint"] == str(world / "run" / "checkpoints" / "step-00000003")
    for name in (SPOT, DEM, S2):
        assert shown["summary"][f"published_folder/{name}"] == str(world / "out" / name)


def test_scores_with_enough_regions_have_intervals(world: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    shutil.copytree(next((world / "probes" / SPOT).glob("linear-*")), probe)
    # Copy the cells to more regions, i times as many to the i-th: the score does not change, and the regions differ.
    table = pq.read_table(probe / "confusions.parquet")
    copies = [
        table.set_column(
            table.schema.get_field_index("roi"), "roi", pc.binary_join_element_wise(table["roi"], str(i), "")
        ).set_column(table.schema.get_field_index("pixels"), "pixels", pc.multiply(table["pixels"], i))
        for i in range(1, 5)
    ]
    pq.write_table(pa.concat_tables(copies), probe / "confusions.parquet")
    words = publish_command(world)
    words[2] = str(tmp_path / "out")
    words[words.index("--scores") : words.index("--dataset")] = ["--scores", str(probe), "--modalities", SPOT]
    assert main(words) == 0
    (score,) = json.loads((tmp_path / "out" / SPOT / "metrics.json").read_text())["scores"]
    low, high = score["interval"]
    assert score["regions"] == 8
    assert low < score["miou"] < high
    assert f" {low:.1f} to {high:.1f} |" in (tmp_path / "out" / SPOT / "README.md").read_text()


@pytest.mark.parametrize("name", [SPOT, DEM, S2])
def test_the_code_of_the_card_runs(world: Path, name: str) -> None:
    folder = world / "out" / name
    blocks = code((folder / "README.md").read_text())
    shown = "print([tuple(item.shape) for item in maps])"
    if name == S2:
        (ours,) = blocks
        assert executed(f"{ours}\n{shown}", folder).strip() == "[(1, 16, 10, 10), (1, 16, 10, 10), (1, 32, 10, 10)]"
        return
    timm_alone, ours = blocks
    # timm alone gives the same feature maps as bocage.
    same = (
        "import sys\nassert not any(name.startswith('bocage') for name in sys.modules)\n"
        "plain, given = maps, (image - mean) / std\n"
        f"{ours}\n"
        "with torch.no_grad():\n    maps = encoder.features(given)\n"
        "assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(plain, maps, strict=True))\n"
    )
    executed(f"{timm_alone}\n{same}", folder)


def test_the_recipe_resolves_to_the_configuration_of_the_run(world: Path) -> None:
    path = world / "out" / SPOT / "recipe.yaml"
    again = recipes.resolve(PretrainConfig, [f"recipe={path}"])
    first = recipes.resolve(PretrainConfig, RUN)
    for key in ("masking", "weights", "masked", "swin", "utae", "window", "batch_size", "split", "train"):
        assert getattr(again, key) == getattr(first, key)
    assert replace(again.engine, tracker="wandb") == first.engine  # tracker settings are left out of the recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("another split", "were used in pretraining, without labels"),
        ("other scores", "has scores of other weights than"),
        ("no scores", "--scores: none for SENTINEL2_TS: run `bocage study probe`"),
        ("other shards", "was not trained on"),
        ("unfinished", "is at step 3 of 5: finish the run"),
        ("nothing learned", "no step had a finite loss"),
        ("replaced", "does not have the weights of"),
        ("damaged", "is damaged"),
        ("occupied", "exists and is not a published encoder"),
        ("no licence", "--license='' is not how the hub writes licences"),
        ("no encoder", "has no encoder of AERIAL_RGBI; it has DEM_ELEV, SENTINEL2_TS, SPOT_RGBI"),
        ("description", "config.json differs from that of"),
        ("same patches", "has scores on the probe's training patches"),
        ("twice", "given twice"),
        ("not a probe", "is not of a probe"),
        ("no name", "--license=other is not a licence"),
        ("a file", "cannot be written: "),
        ("place", "hf:na me/x is not of the form hf:org/name"),
    ],
)
def test_missing_and_contradicting_facts_raise(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    run, out, words = tmp_path / "run", tmp_path / "out", publish_command(world)
    shutil.copytree(world / "run", run)
    words[1:3] = [str(run), str(out)]
    if change == "another split":
        state = next((run / "checkpoints").glob("*/state.json"))
        _edited(run, state, lambda content: content["config"].update(split="all"))
        assert main(words) == 0
        assert message in (out / SPOT / "README.md").read_text()
        return
    if change in ("other scores", "same patches", "not a probe"):
        probe = tmp_path / "probe"
        shutil.copytree(next((world / "probes" / SPOT).glob("knn-*")), probe)
        metrics = json.loads((probe / "metrics.json").read_text())
        if change == "other scores":
            metrics["weights"][SPOT] = "0" * 64
        elif change == "same patches":
            metrics["split"] = "all"
        else:
            del metrics["modalities"]
        (probe / "metrics.json").write_text(json.dumps(metrics))
        words.insert(words.index("--scores") + 1, str(probe))
    if change == "no scores":
        words = [word for word in words if f"/{S2}/" not in word]
    if change == "other shards":
        shutil.copytree(world / "shards", tmp_path / "shards")
        content = json.loads((tmp_path / "shards" / "dataset.json").read_text())
        (tmp_path / "shards" / "dataset.json").write_text(json.dumps({**content, "created_by": "bocage 0"}))
        words[words.index("--shards") + 1] = str(tmp_path / "shards")
    if change == "unfinished":
        state = next((run / "checkpoints").glob("*/state.json"))
        _edited(run, state, lambda content: content["config"]["engine"].update(steps=5))
    if change == "nothing learned":
        state = next((run / "checkpoints").glob("*/state.json"))
        _edited(run, state, lambda content: content["state"].update(skipped=3))
    if change == "replaced":
        with (run / "encoders" / SPOT / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
    if change == "damaged":
        next((run / "checkpoints").glob("*/optimizer.pt")).write_bytes(b"")
    if change == "occupied":
        (out / SPOT).mkdir(parents=True)
        (out / SPOT / "mine.txt").touch()
        words += ["--modalities", SPOT]
        words = [word for word in words if f"/{S2}/" not in word and f"/{DEM}/" not in word]
    if change == "no licence":
        words[words.index("--license") + 1] = ""
    if change == "no encoder":
        words[words.index("--scores") :] = ["--without-scores", *TERMS, "--modalities", "AERIAL_RGBI"]
    if change == "description":
        path = run / "encoders" / SPOT / "config.json"
        path.write_text(path.read_text().replace('"std"', ' "std"', 1))
    if change == "twice":
        words.insert(words.index("--scores") + 1, words[words.index("--scores") + 1])
    if change == "no name":
        words[words.index("--license") + 1] = "other"
    if change == "a file":
        out.touch()
    if change == "place":
        words += ["--to", "hf:na me/x"]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    if change == "occupied":
        assert [path.name for path in (out / SPOT).iterdir()] == ["mine.txt"]


def _edited(run: Path, path: Path, change: object) -> None:
    """Change a JSON file of a checkpoint, and its size and hash in the checkpoint's list of files."""
    import hashlib

    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    marker = path.with_name("complete.json")
    listed = json.loads(marker.read_text())
    listed["files"][path.name] = {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    marker.write_text(json.dumps(listed))


def test_changed_facts_are_detected(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / SPOT
    shutil.copytree(world / "out" / SPOT, folder)
    facts = json.loads((folder / "metrics.json").read_text())
    facts["scores"][0]["miou"] += 1
    (folder / "metrics.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"metrics.json was changed since publication"):
        check_publication(folder)
    sums = subprocess.run(
        ["sha256sum", *(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "SHA256SUMS").write_text(sums.stdout)
    with pytest.raises(InputError, match=r"README.md disagrees with metrics.json"):
        check_publication(folder)


def test_publishing_again_replaces_the_folder(world: Path, tmp_path: Path) -> None:
    words = publish_command(world)
    words[2] = str(tmp_path)
    words[words.index("--scores") : words.index("--dataset")] = ["--without-scores"]
    assert main(words) == 0
    assert main(words) == 0
    card = (tmp_path / S2 / "README.md").read_text()
    assert "Not measured." in card and "evaluation/" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == [DEM, S2, SPOT]


def test_files_changed_by_hand_are_kept(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = publish_command(world)
    words[2] = str(tmp_path)
    assert main(words) == 0
    (tmp_path / SPOT / "notes.txt").write_text("mine")
    card = tmp_path / S2 / "README.md"
    card.write_text(card.read_text() + "edited")
    assert main([*words, "--modalities", SPOT, S2, DEM]) == 2
    assert "notes.txt is not part of the publication: move it away" in capsys.readouterr().err
    (tmp_path / SPOT / "notes.txt").unlink()
    assert main(words) == 2
    assert "README.md was changed since publication: move " in capsys.readouterr().err
    assert card.read_text().endswith("edited")


def test_local_paths_are_left_out_of_the_recipe(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    state = next((run / "checkpoints").glob("*/state.json"))
    _edited(run, state, lambda content: content["config"].update(encoders={SPOT: "/home/me/earlier", DEM: "imagenet"}))
    words = publish_command(world)
    words[1:3] = [str(run), str(tmp_path / "out")]
    assert main(words) == 0
    text = (tmp_path / "out" / SPOT / "recipe.yaml").read_text()
    assert "# SPOT_RGBI started from a local encoder, earlier" in text and "/home/me" not in text
    config = recipes.resolve(PretrainConfig, [f"recipe={tmp_path / 'out' / SPOT / 'recipe.yaml'}"])
    assert config.encoders == {DEM: "imagenet"}


def test_a_zip_of_the_folder_loads(world: Path, tmp_path: Path) -> None:
    for packed in ("flat", "nested"):
        root, base = (world / "out" / S2, ".") if packed == "flat" else (world / "out", S2)
        path = Path(shutil.make_archive(str(tmp_path / packed), "zip", root, base))
        same(load_encoder(path), load_encoder(world / "out" / S2))
    both = Path(shutil.make_archive(str(tmp_path / "both"), "zip", world / "out"))
    with pytest.raises(InputError, match=r"both.zip holds 3 files named config.json: give a zip of one encoder"):
        load_encoder(both)
    (tmp_path / "no.zip").write_bytes(both.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"no.zip cannot be unpacked"):
        load_encoder(tmp_path / "no.zip")


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# The commands run in another process, since the hub's client reads its endpoint when it is imported.
COMMANDS = """
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from bocage.tools.main import main
for line in sys.stdin:
    words, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(words)
    print(json.dumps([status, said.getvalue()]), flush=True)
"""


# About 40 s: nine publications of up to three encoders, and the code of two cards in other processes.
@pytest.mark.slow
def test_upload_to_the_hub_and_download(world: Path, tmp_path: Path) -> None:
    hub = Hub()
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    words = publish_command(world, "--to", "hf:team/fields", "--collection", "Fields")
    words[2] = str(tmp_path / "out")
    line = [sys.executable, "-c", COMMANDS]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, env={**os.environ, **environment}, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def said(*others: str, token: str = "hf_secret", status: int = 0) -> str:
        print(json.dumps([[*words, *others], token]), file=asked, flush=True)
        found, text = json.loads(answers.readline())
        assert found == status, text
        assert "hf_secret" not in text
        return str(text)

    # Without a token, and with --dry-run, nothing is sent.
    text = said(token="")
    assert "would upload" in text and "hf:team/fields-spot-rgbi, private if it is new" in text
    assert "set HF_TOKEN or run `hf auth login`" in text
    said("--dry-run")
    assert hub.requests == []

    text = said()
    assert set(hub.repositories) == {"team/fields-spot-rgbi", "team/fields-dem-elev", "team/fields-sentinel2-ts"}
    assert sorted(hub.collections["team/fields"]) == sorted(hub.repositories)
    for name in (SPOT, DEM, S2):
        repository = f"team/fields-{name.lower().replace('_', '-')}"
        assert hub.repositories[repository]["private"] is True
        assert len(hub.repositories[repository]["commits"]) == 1
        local = {path.name: path.read_bytes() for path in (tmp_path / "out" / name).iterdir()}
        assert hub.files(repository) == local
        (address,) = re.findall(rf"{hub.address}/{repository}/commit/\w+", text)
        assert read_offline_runs(world / "run")["summary"][f"published/{name}"] == address
    # Other files of the repository stay, and uploading to a branch does not change main.
    hub.repositories["team/fields-spot-rgbi"]["branches"]["main"]["own.bin"] = b"own"
    text = said("--revision", "next")
    assert "0%|" not in text  # no bar in a log
    assert hub.files("team/fields-spot-rgbi")["own.bin"] == b"own"
    assert 'hf-hub:team/fields-spot-rgbi@next"' in hub.files("team/fields-spot-rgbi", "next")["README.md"].decode()

    # The code of an uploaded card runs; test_the_code_of_the_card_runs covers the other encoders.
    repository = "team/fields-sentinel2-ts"
    for block in code(hub.files(repository, "next")["README.md"].decode()):
        assert f"{repository}@next" in block
        executed(block, tmp_path, **environment)

    # A dry run does not change the tracker. A repository with another encoder or other files is not overwritten.
    linked = read_offline_runs(world / "run")["summary"]
    said("--dry-run")
    assert read_offline_runs(world / "run")["summary"] == linked
    whole, words = words, [word for word in words if f"/{S2}/" not in word and f"/{DEM}/" not in word]
    words[words.index("--to") :] = ["--modalities", SPOT, "--to", "hf:team/fields-dem-elev"]
    before = hub.files("team/fields-dem-elev")
    assert "hf:team/fields-dem-elev holds an encoder of DEM_ELEV: choose another name" in said(status=2)
    kept = hub.repositories["team/fields-dem-elev"]["branches"]["main"].pop("config.json")
    assert "holds other files (" in said(status=2)
    hub.repositories["team/fields-dem-elev"]["branches"]["main"]["config.json"] = kept
    assert hub.files("team/fields-dem-elev") == before

    words = whole
    hub.refuse = 403
    assert "bocage: error: hf:team/fields-dem-elev cannot be written: " in said(status=2)
    hub.shutdown()
    asked.close()
    process.wait()
