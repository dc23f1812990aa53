"""Job files of recipes/slurm and recipes/accelerate on one machine, with small stand-ins for srun and scontrol."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_recipes import PRETRAIN

from bocage.shards.format.manifest import Manifest
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

pytestmark = pytest.mark.slow  # a minute: six launches that import torch

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "recipes" / "slurm"
SRUN = """#!{python}
import os, signal, subprocess, sys
assert os.environ["SRUN_CPUS_PER_TASK"] == "8"  # otherwise each task would have one core
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!{python}
import sys
if sys.argv[1] == "show":
    print("127.0.0.1")
else:
    open("requeued", "a").write(sys.argv[2] + "\\n")
"""


def free_port() -> int:
    """Free port from 29500 to 30499: job files choose theirs by the job number."""
    for port in range(29500, 30500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no port is free")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job with two tasks on one machine."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)
    (tmp_path / "pretrain.py").symlink_to(ROOT / "pretrain.py")
    search_path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_port() - 29500), "SLURM_JOB_NODELIST": "localhost"}
    job |= {"SLURM_CPUS_PER_TASK": "8"}
    return {**os.environ, **job, "PATH": search_path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["pretrain_1x8.sbatch", "pretrain_8x8.sbatch"])
def test_a_job_saves_before_its_time_limit_and_resumes_when_requeued(
    name: str, cluster: dict[str, str], tmp_path: Path
) -> None:
    write_tree(tmp_path / "tree", patches=6, seed=3, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards").path
    arguments = [
        *PRETRAIN,
        f"shards={shards}",
        "output=run",
        "split=all",
        "window=51.2",
        "reconstructions=0",
        "batch_size=1",
    ]
    arguments += ["modalities=[DEM_ELEV,SPOT_RGBI]", "engine.steps=400", "engine.log_every=1"]
    line = ["bash", str(JOBS / name), *arguments]
    job = subprocess.Popen(line, cwd=tmp_path, env=cluster, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)
    time.sleep(1.0)
    (step,) = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(step), signal.SIGUSR1)  # as SLURM does, to the tasks
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 138, errors
    assert "on 2 ranks" in errors and "saved; the same command resumes" in errors
    assert (tmp_path / "requeued").read_text() == cluster["SLURM_JOB_ID"] + "\n"
    again = [*line, f"engine.steps={int(errors.partition('stopped at step ')[2].split()[0]) + 2}"]
    again.remove("engine.steps=400")
    done = subprocess.run(again, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert (tmp_path / "requeued").read_text().count("\n") == 1


def test_the_array_job_writes_the_same_shards_as_one_process(cluster: dict[str, str], tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", patches=6, seed=3, dates=(3, 4))
    whole = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "whole", shard_bytes=4_000_000)
    for task in ("1", "2"):
        job = {"SLURM_ARRAY_TASK_ID": task, "SLICES": "2", "SLURM_CPUS_PER_TASK": "1"}
        arguments = ["tree", "out", "--shard-mb", "4"]
        subprocess.run(["bash", str(JOBS / "shard.sbatch"), *arguments], cwd=tmp_path, env=cluster | job, check=True)
    merge = [sys.executable, "-m", "bocage", "shard", "tree", "out", "--shard-mb", "4", "--merge"]
    subprocess.run(merge, cwd=tmp_path, check=True)
    assert Manifest.open(tmp_path / "out").digest == whole.digest


@pytest.mark.parametrize("name", ["pretrain_1x8.sbatch", "pretrain_8x8.sbatch", "shard.sbatch"])
def test_a_job_without_arguments_prints_its_usage(name: str, cluster: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(JOBS / name)], cwd=tmp_path, env=cluster, capture_output=True, text=True)
    assert done.returncode and f"sbatch recipes/slurm/{name}" in done.stderr


@pytest.mark.parametrize(("name", "parallel"), [("gpus_1x8.yaml", "ddp"), ("gpus_8x8.yaml", "fsdp")])
def test_accelerate_launches_ranks_with_its_configuration(name: str, parallel: str, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", patches=4, seed=3, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards").path
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
    launcher += [str(ROOT / "recipes" / "accelerate" / name), "--num_processes", "2", "--num_machines", "1"]
    arguments = [
        *PRETRAIN,
        f"shards={shards}",
        "output=run",
        "split=all",
        "window=51.2",
        "reconstructions=0",
        "batch_size=1",
    ]
    arguments += ["modalities=[DEM_ELEV,SPOT_RGBI]", "engine.steps=2", f"engine.parallel={parallel}"]
    line = [*launcher, "--main_process_port", str(free_port()), str(ROOT / "pretrain.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks" in done.stderr
