"""The rules of the layout: import direction, packaging, and no shadow over the standard library."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from bocage.shards.modality import FLAIR_HUB

ROOT = Path(__file__).parents[1]
ROOMS = ("shards", "recipes", "ssl", "finetune", "tools")
ALLOWED = {
    "shards": {"shards"},
    "recipes": {"shards", "recipes"},
    "ssl": {"shards", "recipes", "ssl"},
    "finetune": {"shards", "recipes", "ssl", "finetune"},
    "tools": set(ROOMS),
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room: str) -> None:
    for path in modules(room):
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top == "bocage":
                assert rest.split(".")[0] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"
            if top in ROOMS and top != "ssl":
                pytest.fail(f"{path.relative_to(ROOT)} imports {name}: write bocage.{name}")


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_says_what_it_is_for(room: str) -> None:
    for path in modules(room):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path}: no docstring"


def test_sensors_are_listed_in_the_registry_alone() -> None:
    registry = ROOT / "shards" / "modality.py"
    names = {modality.name for modality in (*FLAIR_HUB.inputs, *FLAIR_HUB.by_role("mask"))}
    assert len(names) == 8
    for room in ROOMS:
        for path in modules(room):
            if path == registry:
                continue
            strings = {
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not strings & names, f"{path.relative_to(ROOT)} names a sensor"


def test_the_standard_library_keeps_its_ssl() -> None:
    assert not (ROOT / "ssl" / "__init__.py").exists()
    code = "import ssl, asyncio, urllib.request; assert 'site-packages' not in ssl.__file__; print(ssl.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.startswith(str(ROOT / "ssl"))
    assert done.stdout.strip().endswith("ssl.py")


def test_every_folder_with_modules_is_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in modules(room)}
    expected = {"bocage." + ".".join(folder.parts): folder.as_posix() for folder in folders}
    assert set(listed["packages"]) == set(expected)
    assert listed["package-dir"] == expected


def test_the_wheel_holds_every_module_and_recipe(tmp_path: Path) -> None:
    # From a copy, because setuptools leaves a build folder behind; without isolation, because that needs a network.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for room in ROOMS:
        for path in [*modules(room), *(ROOT / room).rglob("*.yaml"), ROOT / room / "py.typed"]:
            assert f"bocage/{path.relative_to(ROOT).as_posix()}" in held


# A sharding worker is to stay under 400 MB, of which torch alone would take most.
@pytest.mark.parametrize("module", ["modality", "flairhub", "rasters", "codec", "normalize", "packing", "writer"])
def test_sharding_imports_no_torch(module: str) -> None:
    code = f"import bocage.shards.{module}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
