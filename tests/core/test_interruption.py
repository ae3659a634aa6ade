"""Ctrl-C as a KeyboardInterrupt, at once or when a block has ended."""

import os
import signal
import threading

import pytest

from mindvlm.core.interruption import SIGNALS, interruptible, uninterrupted
from mindvlm.tools import cli


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Those before a test are those behind it."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_both_signals_interrupt(number):
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(number)


def library_that_loses_the_interrupt():
    try:
        send()
    except KeyboardInterrupt:
        raise RuntimeError("something was wrong") from None


def test_what_a_library_makes_of_an_interrupt_is_one():
    with pytest.raises(KeyboardInterrupt), interruptible():
        library_that_loses_the_interrupt()


def test_an_error_after_an_interrupt_that_was_dealt_with_is_an_error():
    with pytest.raises(RuntimeError), interruptible():
        with pytest.raises(KeyboardInterrupt), interruptible():
            send()
        raise RuntimeError


def test_tools_leave_with_130(capsys):
    assert cli.run(lambda argv: library_that_loses_the_interrupt()) == 130
    assert cli.run(lambda argv: send(signal.SIGTERM)) == 130
    assert capsys.readouterr() == ("", "interrupted\ninterrupted\n")


def test_a_rank_of_a_job_ends_at_once(monkeypatch, handlers):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    assert cli.run(lambda argv: [signal.getsignal(number) for number in SIGNALS] != handlers) == 0


def test_ctrl_c_that_a_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            send()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_first_one_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        with uninterrupted():
            send()
            done.append("block")
        done.append("behind it")
    assert done == ["block"]


def test_the_second_one_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), interruptible(), uninterrupted():
        send()
        done.append("first")
        send()
        done.append("second")
    assert done == ["first"]


def test_an_error_of_the_block_is_not_hidden():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        send()
        _ = 1 / 0


def test_other_threads_have_no_handlers():
    failures = []

    def work():
        try:
            with interruptible(), uninterrupted():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
