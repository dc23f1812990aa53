"""Public functions list the exceptions they raise in their docstring."""

import ast
import builtins
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "ssl", "finetune")
# Methods that a reader knows by their class: its docstring may speak for them.
OF_THE_CLASS = ("__init__", "__post_init__", "__call__", "__iter__", "__getitem__", "forward")
# A broken invariant or what a subclass has to write is a fault in code, not something that callers handle.
FAULTS = {"AssertionError", "NotImplementedError"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Public(NamedTuple):
    """A function or method, or a class of fields, and the text that documents it."""

    name: str
    node: Function | ast.ClassDef
    text: str  # its docstring
    around: str  # that of its class


def is_public(name: str) -> bool:
    return not name.startswith("_")


def publics(tree: ast.Module) -> Iterator[Public]:
    for node in tree.body:
        if isinstance(node, Function) and is_public(node.name):
            yield Public(node.name, node, ast.get_docstring(node) or "", "")
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            around = ast.get_docstring(node) or ""
            yield Public(node.name, node, around, around)
            for method in node.body:
                if isinstance(method, Function) and (is_public(method.name) or method.name in OF_THE_CLASS):
                    yield Public(f"{node.name}.{method.name}", method, ast.get_docstring(method) or "", around)


@cache
def modules() -> dict[Path, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def ancestors(name: str, bases: dict[str, list[str]]) -> set[str]:
    """An exception and everything that it is also caught as."""
    built_in = getattr(builtins, name, None)
    if isinstance(built_in, type):
        return {kind.__name__ for kind in built_in.__mro__}
    return {name}.union(*(ancestors(base, bases) for base in bases.get(name, [])))


def bases_of(trees: list[ast.Module]) -> dict[str, list[str]]:
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name: [last_name(base) for base in node.bases] for node in classes}


def last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_bare_raise(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and node.exc is None


def raised(node: ast.AST, bases: dict[str, list[str]], caught: frozenset[str] = frozenset()) -> Iterator[str]:
    """Names of the exceptions that leave a function by one of its own ``raise`` statements."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        name = last_name(node.exc)
        # A lower-case name is a caught exception, or a function that makes one.
        if name[:1].isupper() and not caught & ancestors(name, bases):
            yield name
    if isinstance(node, ast.Try):
        # A handler with a bare ``raise`` lets go of what it caught.
        kinds = [handler.type for handler in node.handlers if not any(map(is_bare_raise, ast.walk(handler)))]
        listed = [kind for each in kinds for kind in (each.elts if isinstance(each, ast.Tuple) else [each])]
        here = {"BaseException" if kind is None else last_name(kind) for kind in listed}
        for inner in node.body:
            yield from raised(inner, bases, caught | here)
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            yield from raised(part, bases, caught)
        return
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield from raised(child, bases, caught)


def documented(docstring: str) -> set[str]:
    """The exceptions that the ``Raises:`` section of a docstring names."""
    section = re.search(r"^Raises:\n((?:(?:    .*)?(?:\n|$))+)", docstring, re.MULTILINE)
    heads = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name for head in heads for name in re.split(r",\s*", head)}


@cache
def bases_here() -> dict[str, list[str]]:
    return bases_of(list(modules().values()))


def lacking_errors(tree: ast.Module) -> Iterator[tuple[Public, str]]:
    for item in publics(tree):
        if isinstance(item.node, Function):
            known = documented(item.text) | (documented(item.around) if item.node.name in OF_THE_CLASS else set())
            for name in sorted({*raised(ast.Module(item.node.body, []), bases_here())} - known - FAULTS):
                yield item, f"raises {name}, and no Raises section says so"


Check = Callable[[ast.Module], Iterator[tuple[Public, str]]]


def lacks(package: str, check: Check) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{item.node.lineno} {item.name} {what}"
        for path, tree in modules().items()
        if path.is_relative_to(ROOT / package)
        for item, what in check(tree)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_errors_are_documented(package: str) -> None:
    found = lacks(package, lacking_errors)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("docstring", "body", "lacking"),
    [
        ("A.", "raise InputError(x)", ["InputError"]),
        ("A.\n\n    Raises:\n        InputError: b.\n", "raise InputError(x)", []),
        ("A.\n\n    Raises:\n        InputError: b.\n", "raise KeyError(x)", ["KeyError"]),
        ("A; raises InputError.", "raise InputError(x)", ["InputError"]),
        ("A.", "try:\n        raise RasterError(x)\n    except InputError:\n        pass", []),
        ("A.", "try:\n        raise KeyError(x)\n    except InputError:\n        raise", ["KeyError"]),
        ("A.", "try:\n        raise InputError(x)\n    except InputError:\n        raise", ["InputError"]),
        ("A.", "def inner():\n        raise InputError(x)", []),
        ("A.", "raise NotImplementedError", []),
    ],
)
def test_an_error_that_is_not_told_is_found(docstring: str, body: str, lacking: list[str]) -> None:
    tree = ast.parse(f'def f(x):\n    """{docstring}"""\n    {body}\n')
    assert [what.split()[1].rstrip(",") for _, what in lacking_errors(tree)] == lacking
