"""Read weight files of training scripts, with other objects beside the tensors, and compare their tensors."""

from __future__ import annotations

import argparse
import collections
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch

from bocage.shards.errors import InputError
from bocage.ssl.encoders.weights import compare_weights, read_tensors

WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)}


def scores() -> collections.defaultdict[str, list[float]]:
    values = collections.defaultdict(list)
    values["miou"].append(0.5)
    return values


IGNORED: dict[str, Any] = {
    "numpy float": np.float64(0.71),
    "numpy integer": np.int32(7),
    "numpy bool": np.bool_(True),
    "path": Path("/runs/checkpoint.ckpt"),
    "path of another system": PureWindowsPath("C:/runs"),
    "defaultdict": scores(),
    "nested defaultdict": collections.defaultdict(dict, {"a": collections.defaultdict(int, {"b": 1})}),
    "OrderedDict": collections.OrderedDict(best=np.float32(1.5)),
    "Counter": collections.Counter("aab"),
    "set": {1, 2},
    "lists": [Path("a"), (np.float64(1.0), None, True, 1e300, 10**40)],
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", list(IGNORED))
def test_objects_that_trainers_store_are_ignored(case: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content = {"epoch": 3, "callbacks": {"best": IGNORED[case]}, "state_dict": WEIGHTS, "loops": IGNORED[case]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    allowed = set(torch.serialization.get_safe_globals())
    found = read_tensors(path)
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())


def test_weights_in_ordered_dict_or_defaultdict(tmp_path: Path) -> None:
    values: dict[str, Any] = WEIGHTS
    for container in (collections.OrderedDict(values), collections.defaultdict(list, values)):
        torch.save({"state_dict": container}, tmp_path / "last.ckpt")
        assert torch.equal(read_tensors(tmp_path / "last.ckpt")["layer.weight"], WEIGHTS["layer.weight"])


def test_recompressed_archive(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert torch.equal(read_tensors(tmp_path / "packed.pth")["layer.weight"], WEIGHTS["layer.weight"])


class Call:
    """Calls a function when unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Built(Call):
    """Calls a function when unpickled, and sets the state of its result."""

    def __reduce__(self) -> Any:
        return *self.call, (3, "|", None, None, None, -1, -1, 0)


FORBIDDEN: dict[str, Callable[[Path], object]] = {
    "method of a path": lambda executed: Call(Path.touch, executed),
    "eval": lambda executed: Call(eval, f"open({str(executed)!r}, 'w')"),
    "attribute": lambda executed: Call(getattr, executed, "touch"),
    "function for absent keys": lambda executed: collections.defaultdict(eval),  # type: ignore[arg-type]
    "subprocess": lambda executed: Call(subprocess.call, ["touch", str(executed)]),
    "array": lambda executed: np.zeros(3),
    "options of a script": lambda executed: argparse.Namespace(lr=1.0),
    "module": lambda executed: torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("case", list(FORBIDDEN))
def test_other_objects_raise_input_error_and_are_not_executed(case: str, tmp_path: Path) -> None:
    path, executed = tmp_path / "last.ckpt", tmp_path / "executed"
    torch.save({"state_dict": WEIGHTS, "more": FORBIDDEN[case](executed)}, path)
    with pytest.raises(InputError, match=r"last.ckpt is damaged or holds more than tensors, which is never executed"):
        read_tensors(path)
    path.write_bytes(pickle.dumps({"state_dict": WEIGHTS, "more": Call(Path.touch, executed)}))
    with pytest.raises(InputError, match="never executed"):
        read_tensors(path)
    assert not executed.exists()


def test_numpy_dtypes_are_not_constructed(tmp_path: Path) -> None:
    """A forged copy of numpy's object dtype would read bytes of the file as addresses."""
    torch.save({"state_dict": WEIGHTS, "more": Built(np.dtype, "O", False, True)}, tmp_path / "last.ckpt")
    assert list(read_tensors(tmp_path / "last.ckpt")) == list(WEIGHTS)


@pytest.mark.parametrize(
    "value",
    [torch.empty(2, device="meta"), torch.eye(2).to_sparse(), torch.nested.nested_tensor([torch.ones(1)]), 1, None],
)
def test_tensors_without_dense_data_raise_input_error(value: object, tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "more": value}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="does not hold named tensors"):
        read_tensors(tmp_path / "weights.pth")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a process is read from /proc")
def test_optimizer_states_are_not_read_into_memory(tmp_path: Path) -> None:
    """Takes seconds, because a new interpreter imports torch."""
    states = [torch.zeros(1 << 24) for _ in range(4)]  # 256 MB
    torch.save({"state_dict": WEIGHTS, "optimizer_states": states}, tmp_path / "last.ckpt")
    script = (
        "import sys; from pathlib import Path; from bocage.ssl.encoders.weights import read_tensors;"
        "peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]);"
        "before = peak(); read_tensors(Path(sys.argv[1])); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "last.ckpt")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # kB
    assert grown < 100_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_accepts_another_precision(dtype: torch.dtype) -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(2)}
    stored = {"a": torch.ones(2), "b": torch.ones(2, dtype=dtype)}
    name = str(dtype).removeprefix("torch.")
    assert compare_weights(expected, stored).mismatched == {"b": f"{name} instead of float32"}
    report = compare_weights(expected, stored, cast=True)
    assert report.complete
    assert (report.loaded, report.adapted) == (("a",), {"b": f"{name} to float32"})
    both = compare_weights(expected, stored, adapted={"b": "table resized"}, cast=True)
    assert both.adapted == {"b": f"table resized, {name} to float32"}


def test_lossy_casts_are_mismatches() -> None:
    expected = {"a": torch.zeros(2), "count": torch.tensor(0)}
    for stored in (
        {"a": torch.full((2,), 1e300, dtype=torch.float64), "count": torch.tensor(0)},
        {"a": torch.ones(2, dtype=torch.int64), "count": torch.tensor(0)},
        {"a": torch.ones(2, dtype=torch.complex64), "count": torch.tensor(0)},
        {"a": torch.ones(2).to(torch.float8_e4m3fn), "count": torch.tensor(0)},
        {"a": torch.ones(2), "count": torch.tensor(0.0)},
    ):
        report = compare_weights(expected, stored, cast=True)
        assert len(report.mismatched) == 1


def test_report_of_zero_dimensional_tensors() -> None:
    expected = {"a": torch.zeros(2), "b": torch.tensor(0.0)}
    report = compare_weights(
        expected, {"a": torch.tensor(1.0), "b": torch.tensor(1.0), "c": torch.tensor(1)}, cast=True
    )
    assert report.mismatched == {"a": "shape [] instead of [2]"}
    assert (report.loaded, report.unexpected) == (("b",), ("c",))
