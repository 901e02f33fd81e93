"""Signals become one exception, where it does no harm."""

import os
import signal

import pytest

from sweeps.interrupts import Interrupted, Interrupts


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_raised_and_later_ones_are_not(number: int):
    with Interrupts().watching() as interrupts:
        with pytest.raises(Interrupted, match=str(int(number))):
            send(number)
        assert interrupts.signal == number
        interrupts.check()
        send(signal.SIGINT)
        assert interrupts.signal == number
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a third one kills"


def test_handlers_that_somebody_replaced_are_put_back_by_rearm():
    with Interrupts().watching() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as `ray.init` does with one of its own
        interrupts.rearm()
        with pytest.raises(Interrupted, match="15"):
            send(signal.SIGTERM)


def test_a_held_signal_waits_for_check():
    with Interrupts().watching() as interrupts:
        with interrupts.held():
            send(signal.SIGINT)
            with interrupts.held():
                pass
        with pytest.raises(Interrupted, match="2"):
            interrupts.check()


def test_within_a_held_stretch_ours_can_be_interrupted_again():
    with Interrupts().watching() as interrupts, interrupts.held():
        with pytest.raises(Interrupted, match="2"), interrupts.held(False):
            send(signal.SIGINT)
        with Interrupts().watching() as inner, inner.held():
            send(signal.SIGINT)
            with pytest.raises(Interrupted, match="2"), inner.held(False):
                raise AssertionError("a signal that waited is raised on entering")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts().watching():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
