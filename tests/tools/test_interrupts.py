"""Signals in a command become an exception, at once or after a step that must be completed."""

import os
import signal

import pytest

from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts


def test_a_signal_waits_for_the_end_of_a_deferred_step() -> None:
    completed = False
    with Interrupts() as interrupts:
        with pytest.raises(InterruptedCommand) as stopped, interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            completed = True
        assert completed and stopped.value.exit_code == 143
    with pytest.raises(InterruptedCommand), Interrupts() as interrupts:
        with interrupts.deferred():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal was dropped")
