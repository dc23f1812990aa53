"""Wording of messages."""

import pytest

from bocage.shards.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "name", "1 name"),
        (0, "name", "0 names"),
        (2000, "empty file", "2,000 empty files"),
        (2, "patch", "2 patches"),
        (3, "class", "3 classes"),
        (2, "key", "2 keys"),
        (2, "summary", "2 summaries"),
        (5, "series", "5 series"),
    ],
)
def test_nouns_follow_their_number(number: int, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected
