"""The rules of the layout: import direction, packaging, and no shadow over the standard library."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bocage
from bocage.shards.modality import FLAIR_HUB

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "recipes", "ssl", "finetune", "tools")
ALLOWED = {
    "shards": {"shards"},
    "recipes": {"shards", "recipes"},
    "ssl": {"shards", "recipes", "ssl"},
    "finetune": {"shards", "recipes", "ssl", "finetune"},
    "tools": set(PACKAGES),
}
# Subpackages in the order of imports: each imports those before it. The empty one is the package itself.
SUBPACKAGES = {
    "shards": ("", "preprocess", "format", "source", "draft", "write", "read", "inspect", "simulate"),
    "recipes": ("",),
    "ssl": ("engine", "encoders", "objectives", "evaluation", ""),
    "finetune": ("models", "subsets", "official", "evaluation", "mapping", "", "probes", "study", "publishing"),
    "tools": ("cli", ""),
}
# Modules and folders of the training engine, in the order of imports.
ENGINE = ("rng", "signals", "optim", "parallel", "ema", "logging", "engine_config", "checkpoint", "health", "trainer")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def dotted(path: Path) -> str:
    """``shards.format.codec`` for ``shards/format/codec.py``, ``shards.format`` for its ``__init__.py``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """The modules of bocage that each module imports, by dotted name without ``bocage.``."""
    known = {dotted(path) for package in PACKAGES for path in modules(package)}
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in modules(package):
            names = {name.removeprefix("bocage.") for name in imported(path) if name.startswith("bocage.")}
            parents = {name.rpartition(".")[0] for name in names} - known.intersection(names)
            found[dotted(path)] = known & (names | parents) - {dotted(path)}
    return found


def subpackage_of(module: str) -> tuple[str, str]:
    """Package and subpackage of a module; the subpackage is empty for modules directly in the package."""
    package, *rest = module.split(".")
    return package, rest[0] if rest and rest[0] in SUBPACKAGES[package] else ""


def test_imports_follow_the_order_of_packages() -> None:
    wrong = []
    for module, below in imports().items():
        for other in below:
            (package, here), (other_package, there) = subpackage_of(module), subpackage_of(other)
            order = SUBPACKAGES[package]
            if other_package not in ALLOWED[package] or (
                package == other_package and order.index(there) > order.index(here)
            ):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_the_engine_imports_downwards_only() -> None:
    prefix = "ssl.engine."
    wrong = []
    for module, below in imports().items():
        if module.startswith(prefix):
            for other in below:
                if other.startswith(prefix):
                    part, other_part = (name.removeprefix(prefix).split(".")[0] for name in (module, other))
                    if ENGINE.index(other_part) > ENGINE.index(part):
                        wrong.append(f"{module} imports {other}")
    assert not wrong


def test_every_chamber_is_in_the_table() -> None:
    for package in PACKAGES:
        folders = {path.parent.name for path in modules(package) if path.parent.parent == ROOT / package}
        assert folders == set(SUBPACKAGES[package]) - {""}


def test_no_circle_of_imports() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", PACKAGES)
def test_own_modules_are_imported_as_bocage(package: str) -> None:
    for path in modules(package):
        for name in imported(path):
            top = name.partition(".")[0]
            if top in PACKAGES and top != "ssl":
                pytest.fail(f"{path.relative_to(ROOT)} imports {name}: write bocage.{name}")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path in modules(package):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path}: no docstring"


def test_sensors_are_listed_in_the_registry_alone() -> None:
    registry = ROOT / "shards" / "modality.py"
    names = {modality.name for modality in (*FLAIR_HUB.inputs, *FLAIR_HUB.by_role("mask"))}
    assert len(names) == 8
    for package in PACKAGES:
        for path in modules(package):
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
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in modules(package)}
    expected = {"bocage." + ".".join(folder.parts): folder.as_posix() for folder in folders} | {"bocage": "bocage"}
    assert set(listed["packages"]) == set(expected)
    assert listed["package-dir"] == expected


def test_the_wheel_holds_every_module_and_recipe(tmp_path: Path) -> None:
    # From a copy, because setuptools leaves a build folder behind; without isolation, because that needs a network.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in (*PACKAGES, "bocage"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for package in PACKAGES:
        for path in [*modules(package), *(ROOT / package).rglob("*.yaml"), ROOT / package / "py.typed"]:
            assert f"bocage/{path.relative_to(ROOT).as_posix()}" in held
    # The installed wheel works without the clone; -P keeps the current folder out of the path.
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    code = "import bocage, bocage.ssl.encoders.export as e; assert bocage.load_encoder; print(bocage.list_recipes(), e)"
    run = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        run, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True
    )
    assert "quickstart" in done.stdout and str(installed) in done.stdout


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_the_public_names_load_lazily_from_any_folder(where: str, tmp_path: Path) -> None:
    code = (
        "import sys, ssl, bocage; bocage.list_recipes(); assert 'torch' not in sys.modules; "
        "assert all(getattr(bocage, name) for name in bocage.__all__); assert ssl.create_default_context"
    )
    folder = ROOT if where == "root" else tmp_path
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    done = subprocess.run([sys.executable, "-m", "bocage", "--version"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == bocage.__version__


# A sharding worker is to stay under 400 MB, of which torch alone would take most.
@pytest.mark.parametrize(
    "module",
    [
        "format.codec",
        "format.manifest",
        "preprocess.normalize",
        "source.described.tiles",
        "source.flair_hub.tree",
        "write.writer",
    ],
)
def test_sharding_imports_no_torch(module: str) -> None:
    code = f"import bocage.shards.{module}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
