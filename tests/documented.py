"""Run the commands and the Python of the README and of docs/ in a fresh clone and environment.

    python tests/documented.py NEWFOLDER [PAGE ...]

The README runs first, then the tutorials and the guides, in one working folder: later pages use what earlier ones
wrote. On each page commands run in their order, then the Python blocks. Two things are changed: ``recipe=NAME`` becomes
a recipe that sets the quickstart's sizes and a few steps on top of NAME, and the replacements of SIZES apply. Commands
that need a cluster, an account or data that cannot be simulated are skipped and listed with the reason. The exit status
is 1 if a command failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Guides whose runs and files later guides use come first.
FIRST_GUIDES = ("shard", "pretrain", "cluster", "finetune", "map", "official-models", "label-studies", "publish")

# Commands that are not run, by pattern, with the reason.
SKIPPED = {
    r"^make |^python tests/(bench|documented)|^jupyter": "run separately: docs/how-to/run-benchmarks.md",
    r"^pip install|^python -m venv": "the environment is installed already",
    r"^srun|^sbatch|^array=|--merge": "needs SLURM: pytest -m slow tests/faults/test_slurm.py runs the job files",
    r"\$NODE": "needs several machines: pytest -m slow tests/faults/test_slurm.py runs the launcher's files",
    r"--scheduler tcp://head": "needs that Dask cluster: tests/shards/test_write_dask.py starts one",
    r"--split-csv": "needs the official code's lists: tests/shards/test_catalogue.py",
    r"^export HF_TOKEN": "needs an account: tests/finetune/test_publishing.py",
    r"^bocage get": "needs the Hugging Face hub: tests/tools/test_get.py",
    r"^bocage replay": "needs a step with a non-finite loss: tests/tools/test_replay.py",
    r"^from (torchgeo|terratorch)": "needs that library: pytest -m slow tests/finetune/test_publishing_round_trip.py",
}
# Replacements for two CPU cores and 60 patches.
SIZES = {
    r"--patches 200": "--patches 60",
    r"--workers \d+": "--workers 2",
    r"--nproc_per_node 8": "--nproc_per_node 2",
    r"gpus_1x8.yaml": "gpus_1x8.yaml --num_processes 2",
    r"engine\.steps=20\b": "engine.steps=3",
    r"warmup_steps=5\b": "warmup_steps=1",
    r"--fraction 0\.01": "--fraction 0.5",
    r"train_fraction=0\.05": "train_fraction=0.5",
    r"test=D004-2021,D031-2019 train=rest": "test=DOMAIN train=rest",
    r"(recipe=official/\S+ .*)": r"\1 --print-config",
    # ImageNet weights would be downloaded.
    r"(study (?:run|report) recipe=label_efficiency .*?)( --|$)": r"\1 ~initializations.imagenet\2",
}
# Recipe with the sizes for each recipe of the pages.
SMALL_RECIPES = {
    "mae_multimodal": "quickstart",
    "mae_sentinel": "mae_sentinel_quickstart",
    "contrastive_crossmodal": "contrastive_crossmodal_quickstart",
    "jepa_multimodal": "jepa_multimodal_quickstart",
    "quickstart": "quickstart",
    "finetune_cosia": "finetune_quickstart",
    "finetune_lpis": "finetune_quickstart",
    "finetune_quickstart": "finetune_quickstart",
}
SMALL_ENGINE = (
    "engine: {steps: 3, log_every: 1, save_every: 0, optimizer: {warmup_steps: 0}}\nbatch_size: 2\nworkers: 0\n"
)
SMALL_STUDY = """\
base: label_efficiency
finetune: small/finetune_cosia.yaml
overrides: ["modalities=[AERIAL_RGBI]", predictions=0, pictures=0]
fractions: [{fraction: 0.5, draws: 1, seeds: 1}]
learning_rates: []
"""
# Variables that the Python of the pages takes for granted.
VARIABLES = """
import torch
generator = torch.Generator().manual_seed(0)
images = torch.randn(1, 4, 256, 256, generator=generator)
values = torch.randn(1, 5, 10, 10, 10, generator=generator)
dates, padding = torch.arange(5)[None] * 30, torch.zeros(1, 5, dtype=torch.bool)
inputs = {"AERIAL_RGBI": torch.randn(2, 3, 512, 512), "SENTINEL2_TS": torch.randn(2, 5, 10, 10, 10)}
pad_masks = {"SENTINEL2_TS": padding.repeat(2, 1)}
"""
# Variables of single blocks, by text that the block contains.
BLOCK_VARIABLES = {"build_official(": 'dates = {"SENTINEL2_TS": dates.repeat(2, 1)}\n'}
OFFICIAL_CHECKPOINT = """
from pathlib import Path
from bocage.finetune.official.convert import save_official
from bocage.finetune.official.official_model import build_official
arch = "swin_tiny_patch4_window7_224-upernet"
model = build_official(["AERIAL_RGBI", "SENTINEL2_TS"], ["AERIAL_LABEL-COSIA"], arch, {"AERIAL_RGBI": 512})
save_official(model, Path("FLAIR-HUB_LC-L.safetensors"))
"""
MAP_RASTERS = """
import numpy as np, rasterio
from pathlib import Path
from rasterio.shutil import copy
image = sorted(Path("FLAIR-HUB").glob("*_AERIAL_RGBI/*/*.tif"))[0]
copy(image, "ortho.vrt", driver="VRT")
series = Path(str(image).replace("AERIAL_RGBI", "SENTINEL2_TS"))
copy(series, "s2.tif", driver="GTiff")
copy(Path(str(series).replace("SENTINEL2_TS", "SENTINEL2_MSK-SC")), "clouds.tif", driver="GTiff")
with rasterio.open(series) as source:
    days = range(source.count // 10)
Path("dates.txt").write_text("".join(f"2021-{1 + day // 28:02d}-{1 + day % 28:02d}\\n" for day in days))
"""


class Step(NamedTuple):
    """A ``command``, a ``python`` block or the content of a YAML ``file`` of a page."""

    kind: str
    text: str


class Result(NamedTuple):
    """Outcome of a step: ``as documented``, ``at CPU size``, ``skipped`` with the reason, or ``FAILED``."""

    outcome: str
    step: str
    reason: str = ""


def pages() -> list[str]:
    """The README and the pages of docs/, in the order in which they run."""
    docs = ROOT / "docs"
    guides = [docs / "how-to" / f"{name}.md" for name in FIRST_GUIDES]
    ordered = [ROOT / "README.md", *sorted((docs / "tutorials").glob("*.md")), *guides]
    ordered += [path for path in sorted(docs.rglob("*.md")) if path not in ordered]
    return [path.relative_to(ROOT).as_posix() for path in ordered]


def steps(text: str) -> list[Step]:
    """The commands and the YAML files of a page in their order, then its Python blocks."""
    commands, blocks = [], []
    for language, code in re.findall(r"^ *```(bash|python|yaml)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            blocks.append(Step("python", code))
            continue
        if language == "yaml":
            commands += [Step("file", code)] if re.match(r"# \w+\.yaml\n", code) else []
            continue
        joined = re.sub(r"\\\n\s*", "", code)
        lines = [re.sub(r"\s+# .*$", "", line).strip() for line in joined.splitlines()]
        commands += [Step("command", line) for line in lines if line and not line.startswith("#")]
    return commands + blocks


def at_cpu_size(command: str, domain: str) -> str:
    """Apply SIZES and small recipes to a command; ``domain`` is a domain of the simulated patches."""
    for pattern, replacement in SIZES.items():
        command = re.sub(pattern, replacement, command)
    known = "|".join([*SMALL_RECIPES, "label_efficiency"])
    command = re.sub(rf"recipe=({known})(?=\s|$)", r"recipe=small/\1.yaml", command)
    return command.replace("DOMAIN", domain)


class Workspace:
    """Working folder in which the pages run.

    Args:
        folder: clone of the repository.
        environment: environment variables of all commands.

    Attributes:
        results: outcome of every step so far.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.results: list[Result] = []
        self.log = (folder / "documented.log").open("w")
        self._environment = environment

    def run(self, command: list[str] | str) -> int:
        """Run a command with its output in the log, and return the exit status."""
        print(f"$ {command}", file=self.log, flush=True)
        return subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=self.folder,
            env=self._environment,
            stdout=self.log,
            stderr=self.log,
        ).returncode

    def prepare(self) -> None:
        """Write what the pages take for granted: patches, small recipes, an official checkpoint, rasters to map."""
        (self.folder / "small").mkdir()
        (self.folder / "data").mkdir(exist_ok=True)
        for name, small in SMALL_RECIPES.items():
            recipe = f"base: [{name}, {small}]\noutput: runs/{name}\n{SMALL_ENGINE}"
            (self.folder / "small" / f"{name}.yaml").write_text(recipe)
        (self.folder / "small" / "label_efficiency.yaml").write_text(SMALL_STUDY)
        sample = "bocage sample FLAIR-HUB --patches 60 --seed 0"
        for command in (sample, ["python", "-c", OFFICIAL_CHECKPOINT], ["python", "-c", MAP_RASTERS]):
            if self.run(command):
                raise SystemExit(f"preparation failed: see {self.log.name}")

    def run_page(self, page: str) -> None:
        """Run the steps of a page, and write its YAML files, whose first line names them."""
        text = (self.folder / page).read_text(encoding="utf-8")
        domain = min(self.folder.glob("FLAIR-HUB/*_AERIAL_RGBI")).name.removesuffix("_AERIAL_RGBI")
        python = VARIABLES  # with the blocks so far, on which the next one builds
        for step in steps(text):
            if step.kind == "file":
                (self.folder / step.text.split()[1]).write_text(step.text)
                continue
            shown = f"{page}: {step.text.splitlines()[0][:110]}"
            reason = next((reason for pattern, reason in SKIPPED.items() if re.search(pattern, step.text)), "")
            if reason:
                self.results.append(Result("skipped", shown, reason))
                continue
            start = time.monotonic()
            if step.kind == "python":
                python += "".join(code for part, code in BLOCK_VARIABLES.items() if part in step.text) + step.text
                status, outcome = self.run(["python", "-c", python]), "as documented"
            else:
                command = at_cpu_size(step.text, domain)
                status, outcome = self.run(command), "as documented" if command == step.text else "at CPU size"
            self.results.append(Result(f"FAILED ({status})" if status else outcome, shown))
            print(f"{self.results[-1].outcome:14} {time.monotonic() - start:6.1f} s  {shown}", flush=True)


def summarize(results: list[Result]) -> int:
    """Print the skipped steps and the counts of outcomes; return the exit status."""
    print("\nskipped:")
    for result in results:
        if result.outcome == "skipped":
            print(f"  {result.step}\n      {result.reason}")
    outcomes = [result.outcome for result in results]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes))


def main(folder: Path, chosen: list[str]) -> int:
    """Clone, install and run the pages; return the exit status.

    Args:
        folder: new folder for the clone and its environment.
        chosen: pages to run after the README; all by default.
    """
    folder.mkdir(parents=True)
    clone, bin_folder = folder / "bocage", folder / "venv" / "bin"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    install = [str(bin_folder / "python"), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    subprocess.run([*install, "-e", ".[losses]"], cwd=clone, check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_", "PYTHON"))}
    path = f"{bin_folder}:{kept['PATH']}"
    environment = {**kept, "PATH": path, "VIRTUAL_ENV": str(folder / "venv"), "HF_HUB_OFFLINE": "1"}
    workspace = Workspace(clone, environment)
    workspace.prepare()
    every = pages()
    for page in [every[0], *(page for page in every[1:] if page in chosen or not chosen)]:
        workspace.run_page(page)
    print(f"log: {workspace.log.name}")
    return summarize(workspace.results)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
