from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.recipes.loader import parse_dataset
from bocage.shards.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    mode: Literal["fast", "exact"] = "fast"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"inner.rate={self.rate} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Pair:
    left: int = 0
    right: int = 0


@dataclass(frozen=True, kw_only=True)
class Outer:
    recipe: str = ""
    steps: int = 10
    names: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"recipe={path}"


def test_layers_override_each_other(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    write(base, "steps: 20\ninner: {rate: 0.5, mode: exact}\n")
    recipe = write(tmp_path / "small.yaml", f"base: {base}\ninner: {{rate: 0.25}}\n")
    config = recipes.resolve(Outer, [recipe, "names=[a,b]"])
    assert config.steps == 20
    assert config.inner == Inner(rate=0.25, mode="exact")
    assert config.names == ["a", "b"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepps=3", "unknown key 'stepps'; did you mean 'steps'?"),
        ("inner.ratte=3", "unknown key 'inner.ratte'; did you mean 'inner.rate'?"),
        ("inner.zzz=3", "valid keys here: rate, mode"),
        ("steps=many", "steps"),
        ("inner.mode=slow", "inner.mode"),
        ("inner.rate=-1", "inner.rate=-1.0 must not be negative"),
        ("steps", "not of the form key=value"),
        ("names.0=a", "names is a list: set all its items at once, as names=[...]"),
        ("pairs.0.left=1", "pairs is a list: set all its items at once, as pairs=[...]"),
        ("pairs=[{lefft: 1}]", "unknown key 'lefft'; valid keys there: left, right"),
        ("sources.a=b", "sources.a is a mapping, not a single value: set sources.a.NAME"),
        ("~sources.c", "there is no entry sources.c to remove"),
        ("~names.0", "there is no entry names.0 to remove"),
        ("~steps", "steps cannot be removed: set another value as steps=VALUE"),
        ("~inner.rate", "inner.rate cannot be removed"),
    ],
)
def test_wrong_arguments_raise_one_line_errors(tmp_path: Path, argument: str, message: str) -> None:
    recipe = write(tmp_path / "r.yaml", "steps: 1\n")
    with pytest.raises(InputError) as caught:
        recipes.resolve(Outer, [recipe, argument])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sensors: {X: {bands: [R, G, B]}}", "sensors.X.bands is a mapping, not a list: write it as {KEY: VALUE, ...}"),
        ("sensors: {X: {bands: RGB}}", "sensors.X.bands is a mapping, not a single value: set sensors.X.bands.NAME"),
        ("sensors: {X: {nodata: 0}}", "sensors.X.nodata is a list: write sensors.X.nodata=[0]"),
        ("sensors: {X: {files: x.tif, nodata: {a: 1}}}", "sensors.X.nodata is a list: set all its items at once"),
        ("sensors: [X]", "sensors is a mapping, not a list"),
        ("labels: {L: {classes: [a, b]}}", "labels.L.classes is a mapping, not a list"),
        ("labels: {L: {classes: {0: a}, ignore: 4}}", "labels.L.ignore is a list: write labels.L.ignore=[4]"),
        ("splits: [split_a]", "splits is a mapping, not a list"),
    ],
)
def test_lists_and_mappings_in_place_of_each_other_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_dataset(f"name: x\n{text}\n", [], "d.yaml")
    assert f"dataset d.yaml: {message}" in str(caught.value)


@pytest.mark.parametrize(("wavelength", "is_right"), [("650", True), ("0.65", False), ("12", False), ("10900", True)])
def test_wavelengths_in_micrometres_are_refused(wavelength: str, is_right: bool) -> None:
    text = f"name: x\nsensors: {{X: {{files: x.tif, bands: {{R: {wavelength}}}, dtype: uint8, pixel: 1}}}}\n"
    if is_right:
        assert parse_dataset(text, [], "d.yaml").sensors["X"].used_bands[0].wavelength == float(wavelength)
    else:
        with pytest.raises(InputError, match=rf"bands\.R={wavelength}: wavelengths are in nm"):
            parse_dataset(text, [], "d.yaml")


def test_entries_of_a_mapping_can_be_removed(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "sources: {a: {x: y}, b: {}}\n")
    assert recipes.resolve(Outer, [recipe, "~sources.a"]).sources == {"b": {}}
    # Removal happens before the overrides, so this replaces the entry instead of merging it.
    assert recipes.resolve(Outer, ["sources.a.z=w", recipe, "~sources.a"]).sources == {"a": {"z": "w"}, "b": {}}


def test_errors_for_unknown_recipes_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        recipes.resolve(Outer, ["recipe=quikstart"])
    with pytest.raises(InputError, match="give one recipe"):
        recipes.resolve(Outer, [])
    with pytest.raises(InputError, match="no such file"):
        recipes.resolve(Outer, [f"recipe={tmp_path}/none.yaml"])


def test_a_recipe_of_another_command_is_rejected() -> None:
    with pytest.raises(InputError) as caught:
        recipes.resolve(FinetuneConfig, ["recipe=quickstart"])
    text = str(caught.value)
    assert text.startswith(
        "recipe=quickstart belongs to another command: it sets weights through its base mae_multimodal"
    )
    assert "finetune_quickstart" in text
    assert "label_efficiency" not in text


def test_cyclic_bases_are_rejected(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    second = write(tmp_path / "second.yaml", f"base: {first}\n")
    write(first, f"base: {tmp_path / 'second.yaml'}\n")
    with pytest.raises(InputError, match="cycle"):
        recipes.resolve(Outer, [second])


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid YAML"):
        recipes.resolve(Outer, [write(tmp_path / "r.yaml", "steps: [1\n")])
    with pytest.raises(InputError, match="unknown key 'stepps'"):
        recipes.resolve(Outer, [write(tmp_path / "r.yaml", "stepps: 1\n")])


def test_a_base_path_is_relative_to_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "common.yaml", "steps: 20\n")
    write(tmp_path / "mine" / "first.yaml", "base: ../common.yaml\ninner: {rate: 0.5}\n")
    recipe = write(tmp_path / "mine" / "second.yaml", "base: first.yaml\nnames: [a]\n")
    monkeypatch.chdir("/")
    config = recipes.resolve(Outer, [recipe])
    assert (config.steps, config.inner.rate, config.names) == (20, 0.5, ["a"])


def test_later_bases_override_earlier_ones_and_shared_bases_come_first(tmp_path: Path) -> None:
    write(tmp_path / "common.yaml", "steps: 20\ninner: {rate: 0.5, mode: exact}\n")
    write(tmp_path / "task.yaml", "base: common.yaml\ninner: {rate: 0.25}\n")
    write(tmp_path / "size.yaml", "base: common.yaml\nsteps: 2\n")
    recipe = write(tmp_path / "both.yaml", "base: [task.yaml, size.yaml]\nnames: [a]\n")
    config = recipes.resolve(Outer, [recipe])
    assert (config.steps, config.inner, config.names) == (2, Inner(rate=0.25, mode="exact"), ["a"])


def test_a_base_with_two_spellings_of_its_path_is_loaded_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write(tmp_path / "common.yaml", "inner: {rate: 0.5}\n")
    write(tmp_path / "a" / "task.yaml", "base: ../common.yaml\ninner: {rate: 0.25}\n")
    write(tmp_path / "b" / "size.yaml", "base: ../common.yaml\nsteps: 2\n")
    config = recipes.resolve(Outer, [write(tmp_path / "both.yaml", "base: [a/task.yaml, b/size.yaml]\n")])
    assert (config.steps, config.inner.rate) == (2, 0.25)


def test_an_empty_value_is_the_empty_string(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "names: [a]\n")
    assert recipes.resolve(Outer, [recipe, "names=[]"]).names == []

    @dataclass(frozen=True, kw_only=True)
    class Texts:
        recipe: str = ""
        label: str = "something"

    assert recipes.resolve(Texts, [write(tmp_path / "t.yaml", "label: other\n"), "label="]).label == ""


def test_an_empty_base_is_none(tmp_path: Path) -> None:
    assert recipes.resolve(Outer, [write(tmp_path / "r.yaml", "base:\nsteps: 3\n")]).steps == 3


@pytest.mark.parametrize("base", ["3", "[3]", "{a: 1}", "true", "${nothing}", "['${nothing}']", "['???']"])
def test_a_base_that_is_not_a_name_is_rejected(tmp_path: Path, base: str) -> None:
    with pytest.raises(InputError, match="base: "):
        recipes.resolve(Outer, [write(tmp_path / "r.yaml", f"base: {base}\n")])


def test_a_recipe_that_is_not_utf_8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("steps: 3  # \u00e9".encode("latin-1"))
    with pytest.raises(InputError, match=r"r\.yaml: not UTF-8 text"):
        recipes.resolve(Outer, [f"recipe={path}"])
