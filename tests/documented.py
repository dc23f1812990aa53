"""Runs the commands and the Python of the README and of docs/ as they stand, in a fresh clone and environment.

python tests/documented.py NEWFOLDER [PAGE ...]

What needs a GPU's size runs at CPU size: of a command ``recipe=NAME`` becomes a recipe that puts the quickstart's sizes
and a few steps above NAME, and words of SIZES change; nothing else does. What needs a cluster, an account, or data that
cannot be simulated is not run, and is listed with the reason. Ends with 1 where something that was run failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("data", "objectives", "training", "finetuning", "label-studies")),
]
PAGES += [f"docs/{name}.md" for name in ("publishing", "cluster", "adding-a-sensor", "adding-an-objective")]

# A command that one of these matches is not run.
LEFT_OUT = {
    r"^make (demo|test|slow|docs)|^python tests/(bench|documented)": "run by itself: see the README",
    r"^pip install|^python -m venv": "done before",
    r"^srun|^sbatch|^array=|--merge": "needs SLURM: pytest -m slow tests/faults/test_slurm.py runs the job files",
    r"\$NODE": "needs several machines: pytest -m slow tests/faults/test_slurm.py runs the launcher's files",
    r"--scheduler tcp://head": "needs that Dask cluster: tests/shards/test_write_dask.py starts one",
    r"--split-csv": "needs the official code's lists: tests/shards/test_catalogue.py",
    r"^export HF_TOKEN": "needs an account: tests/finetune/test_publishing.py",
    r"^bocage replay": "needs a step that went wrong: tests/tools/test_replay.py",
    r"^from (torchgeo|terratorch)": "needs that library: pytest -m slow tests/finetune/test_publishing_round_trip.py",
}
# Words that stand for a machine larger than two cores, or for a dataset larger than 60 patches.
SIZES = {
    r"--workers \d+": "--workers 2",
    r"--nproc_per_node 8": "--nproc_per_node 2",
    r"gpus_1x8.yaml": "gpus_1x8.yaml --num_processes 2",
    r"engine\.steps=20\b": "engine.steps=3",
    r"--fraction 0\.01": "--fraction 0.5",
    r"train_fraction=0\.05": "train_fraction=0.5",
    r"test=D004-2021,D031-2019 train=rest": "test=DOMAIN train=rest",
    r"(recipe=official/\S+ .*)": r"\1 --print-config",
    r"(study (?:run|report) recipe=label_efficiency .*?)( --|$)": r"\1 ~initializations.imagenet\2",  # it would be downloaded
}
SMALL = {
    "mae_multimodal": "quickstart",
    "mae_sentinel": "mae_sentinel_quickstart",
    "contrastive_crossmodal": "contrastive_crossmodal_quickstart",
    "jepa_multimodal": "jepa_multimodal_quickstart",
    "quickstart": "quickstart",
    "finetune_cosia": "finetune_quickstart",
    "finetune_lpis": "finetune_quickstart",
    "finetune_quickstart": "finetune_quickstart",
}
ENGINE = "engine: {steps: 3, log_every: 1, save_every: 0, optimizer: {warmup_steps: 0}}\nbatch_size: 2\nworkers: 0\n"
STUDY = """\
base: {base}
finetune: small/finetune_cosia.yaml
overrides: ["modalities=[AERIAL_RGBI]", predictions=0, pictures=0]
fractions: [{{fraction: 0.5, draws: 1, seeds: 1}}]
learning_rates: []
"""
# What stands before the Python of a page: names that its text speaks of.
BEFORE = """
import torch
generator = torch.Generator().manual_seed(0)
images = torch.randn(1, 4, 256, 256, generator=generator)
values = torch.randn(1, 5, 10, 10, 10, generator=generator)
dates, padding = torch.arange(5)[None] * 30, torch.zeros(1, 5, dtype=torch.bool)
inputs = {"AERIAL_RGBI": torch.randn(2, 3, 512, 512), "SENTINEL2_TS": torch.randn(2, 5, 10, 10, 10)}
pad_masks = {"SENTINEL2_TS": padding.repeat(2, 1)}
"""
# The same for one block, which a text within it tells.
BEFORE_BLOCK = {"build_official(": 'dates = {"SENTINEL2_TS": dates.repeat(2, 1)}\n'}
# What is set aside while a page runs, because other pages left it in its way, and put back afterwards.
ASIDE = {
    "docs/data.md": ["data"],
    "docs/cluster.md": ["runs/label_efficiency"],
    "docs/finetuning.md": ["runs/cosia", "scores", "maps", "zone"],
}
OFFICIAL = """
from pathlib import Path
from bocage.finetune.official.convert import save_official
from bocage.finetune.official.official_model import build_official
arch = "swin_tiny_patch4_window7_224-upernet"
model = build_official(["AERIAL_RGBI", "SENTINEL2_TS"], ["AERIAL_LABEL-COSIA"], arch, {"AERIAL_RGBI": 512})
save_official(model, Path("FLAIR-HUB_LC-L.safetensors"))
"""
ZONE = """
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


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each command and each block of Python of a page, in order."""
    found = []
    for kind, code in re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = [code] if kind == "python" else re.sub(r"\\\n\s*", "", code).splitlines()
        found += [(kind, re.sub(r"\s+# .*$", "", line) if kind == "bash" else line) for line in lines if line.strip()]
    return found


def at_cpu_size(command: str, domain: str) -> str:
    """A command with the words of SIZES and small recipes."""
    for pattern, words in SIZES.items():
        command = re.sub(pattern, words, command)
    known = "|".join([*SMALL, "label_efficiency"])
    command = re.sub(rf"recipe=({known})(?=\s|$)", r"recipe=small/\1.yaml", command)
    return command.replace("DOMAIN", domain)


class Place:
    """A working folder with what the page takes for granted, and what was done there."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.done: list[tuple[str, str, str, float]] = []
        self.log = (folder / "documented.log").open("w")

    def run(self, words: list[str] | str) -> int:
        print(f"$ {words}", file=self.log, flush=True)
        shell = isinstance(words, str)
        done = subprocess.run(
            words, shell=shell, cwd=self.folder, env=self.environment, stdout=self.log, stderr=self.log
        )
        return done.returncode

    def prepare(self) -> None:
        """Simulated patches, small recipes, a stand-in for IGN's checkpoint, rasters of a zone."""
        (self.folder / "small").mkdir()
        for name, small in SMALL.items():
            (self.folder / "small" / f"{name}.yaml").write_text(
                f"base: [{name}, {small}]\noutput: runs/{name}\n{ENGINE}"
            )
        (self.folder / "small" / "label_efficiency.yaml").write_text(STUDY.format(base="label_efficiency"))
        steps = ["bocage sample FLAIR-HUB --patches 60 --seed 0", f"python -c '{OFFICIAL}'", f"python -c '{ZONE}'"]
        for step in steps:
            if self.run(step):
                raise SystemExit(f"preparing failed: see {self.log.name}")

    def page(self, name: str) -> None:
        """Run a page; files that it says are yours to write come from its own YAML."""
        aside = [path for left in ASIDE.get(name, []) if (path := self.folder / left).exists()]
        for path in aside:
            path.rename(f"{path}.aside")
        text = (self.folder / name).read_text(encoding="utf-8")
        for file, recipe in re.findall(r"```yaml\n# (\w+\.yaml)(.*?)```", text, re.DOTALL):
            (self.folder / file).write_text(f"# {recipe}")
        domain = next(iter(sorted(self.folder.glob("FLAIR-HUB/*_AERIAL_RGBI")))).name.removesuffix("_AERIAL_RGBI")
        python = ""
        for kind, code in blocks(self.folder / name):
            shown = f"{name}: {code.splitlines()[0][:110]}"
            reason = next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, code)), "")
            if reason:
                self.done.append(("not run", shown, reason, 0.0))
                continue
            began = time.monotonic()
            small = at_cpu_size(code, domain) if kind == "bash" else code
            if kind == "python":
                python += "".join(text for part, text in BEFORE_BLOCK.items() if part in code) + code + "\n"
                status = self.run(["python", "-c", BEFORE + python])
            else:
                status = self.run(small)
            how = "as it stands" if small == code else "at CPU size"
            self.done.append((f"FAILED ({status})" if status else how, shown, "", time.monotonic() - began))
            print(f"{self.done[-1][0]:14} {time.monotonic() - began:6.1f} s  {shown}", flush=True)
        for path in aside:
            shutil.rmtree(path, ignore_errors=True)
            Path(f"{path}.aside").rename(path)


def main(folder: Path, pages: list[str]) -> int:
    """Clone, install, run the pages; the exit status."""
    folder.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "bocage")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    bin_folder = folder / "venv" / "bin"
    install = [str(bin_folder / "python"), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    install += ["-e", ".[losses]"]
    subprocess.run(install, cwd=folder / "bocage", check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_", "PYTHON"))}
    environment = {**kept, "PATH": f"{bin_folder}:{kept['PATH']}", "VIRTUAL_ENV": str(folder / "venv")}
    place = Place(folder / "bocage", environment | {"HF_HUB_OFFLINE": "1"})
    place.prepare()
    for page in pages:
        place.page(page)
    print("\nnot run:")
    for how, shown, reason, _ in place.done:
        if how == "not run":
            print(f"  {shown}\n      {reason}")
    counts = {how: sum(item[0] == how for item in place.done) for how, *_ in place.done}
    print(", ".join(f"{count} {how}" for how, count in counts.items()), f"; log: {place.log.name}")
    return int(any(how.startswith("FAILED") for how, *_ in place.done))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:] or PAGES))
