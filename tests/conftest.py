"""Options and settings of all tests."""

from __future__ import annotations

import os

import pytest

# pytest-xdist already uses every core, and more threads per process double the time. Child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="run every N-th of the selected tests, starting with the K-th")


@pytest.hookimpl(trylast=True)  # after -m and -k have deselected tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest come first: no process is left alone with one at the end, and every part gets its share of them.
    items.sort(key=lambda item: sum(mark.kwargs.get("minutes", 0) for mark in item.iter_markers("slow")), reverse=True)
    part = config.getoption("--part")
    if part is None:
        return
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--part {part}: give K/N with 1 <= K <= N, e.g. 1/3")
    kept = items[int(number) - 1 :: int(count)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
