"""Signals that end a run, also where what they raise is lost: torch's import and weakref callbacks swallow it."""

import signal
import threading

import pytest

_heard: list[str] = []


def listen() -> None:
    """Have SIGTERM and SIGHUP end the run as Ctrl-C does, and remember each of the three."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def end_if_told() -> None:
    """End the run where a signal has come and the run goes on."""
    if _heard:
        pytest.exit(f"ended by {_heard[0]}", returncode=pytest.ExitCode.INTERRUPTED)


def _end(number: int, _: object) -> None:
    _heard.append(signal.Signals(number).name)
    end_if_told()


def _interrupt(number: int, _: object) -> None:
    _heard.append(signal.Signals(number).name)
    raise KeyboardInterrupt
