"""Signals in a command become an exception, at once or after a step that must be completed."""

import os
import signal

import pytest

from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts


def run_steps(number: int, done: list[str]) -> None:
    """Send this process a signal in a deferred step."""
    with Interrupts() as interrupts:
        with interrupts.deferred():
            done.append("first")
        with interrupts.deferred():
            os.kill(os.getpid(), number)
            done.append("second")
        done.append("third")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_end_of_a_deferred_step(number: int, code: int) -> None:
    done: list[str] = []
    with pytest.raises(InterruptedCommand) as stopped:
        run_steps(number, done)
    assert stopped.value.exit_code == code
    assert done == ["first", "second"]
