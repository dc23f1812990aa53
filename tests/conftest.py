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
    items.sort(key=_minutes, reverse=True)  # so that every part gets its share of the longest
    part = config.getoption("--part")
    if part is not None:
        number, _, count = part.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise pytest.UsageError(f"--part {part}: give K/N with 1 <= K <= N, e.g. 1/3")
        kept = items[int(number) - 1 :: int(count)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    if any(map(_minutes, items)):
        # pytest-xdist gives each worker a contiguous part, which then begins with the longest tests.
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        items[:] = [item for worker in range(workers) for item in items[worker::workers]]


def _minutes(item: pytest.Item) -> float:
    """Minutes of a test by its ``slow`` marks, 0 for less than one."""
    return sum(mark.kwargs.get("minutes", 0) for mark in item.iter_markers("slow"))
