"""Progress: plain lines in logs, whatever asks for colours; bars on a real terminal."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bocage.tools.cli import progress
from bocage.tools.cli.progress import ProgressBars, format_duration

SAMPLE = [sys.executable, "-m", "bocage", "sample"]
WORDS = ["--patches", "3", "--modalities", "SPOT_RGBI"]
CURSOR = re.compile(r"\x1b\[[?\d;]*[A-KSThl]|\r(?!\n)")


def test_logs_have_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with ProgressBars() as bars:
        bar = bars.add("sharding", "patches", 4000)
        bar.update(1000)  # by an earlier run
        bar.update(1600, note="3 broken")
        bars.say("a line")
    first, second, said, last = capsys.readouterr().err.splitlines()
    assert first == "sharding: 1,000 of 4,000 patches"
    assert re.fullmatch(r"sharding: 1,600 of 4,000 patches, [\d.]+ patches/s, \d+ (s|min) left, 3 broken", second)
    assert said == "a line"
    assert last.startswith("sharding: 1,600 of 4,000 patches")


def test_titles_and_notes_are_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBars() as bars:
        bars.add("a [/y] title", "patches", 0).update(0, note="[/x] broken")


def test_ranks_that_keep_quiet_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars(active=False) as bars:
        bars.add("tiles", "tiles", 2).update(2)
        bars.say("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1 s"), (60, "60 s"), (61, "2 min"), (7201, "2 h 1 min")])
def test_durations_are_rounded_up(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


def test_a_command_moves_no_cursor_in_a_log_but_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    log = subprocess.run(
        [*SAMPLE, str(tmp_path / "log"), *WORDS], env=environment, capture_output=True, text=True, check=True
    )
    assert not CURSOR.search(log.stderr + log.stdout)
    assert re.search(r"^sample: 3 of 3 patches", log.stderr, re.MULTILINE)
    ours, theirs = pty.openpty()
    words = [*SAMPLE, str(tmp_path / "terminal"), *WORDS]
    child = subprocess.Popen(words, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            drawn += (part := os.read(ours, 4096))
        except OSError:  # the other end is closed
            break
        if not part:
            break
    os.close(ours)
    assert child.wait() == 0
    assert CURSOR.search(drawn.decode()) and "3 of 3 patches" in re.sub(r"\x1b\[[\d;]*m", "", drawn.decode())
