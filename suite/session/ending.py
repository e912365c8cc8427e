"""Signals that end a run, also where what they raise is lost: torch's import and weakref callbacks swallow it."""

import signal
import threading

import pytest

_heard: list[str] = []


def hold() -> None:
    """Until `listen`, remember a signal and interrupt nothing: an import may lose what is raised, or be left half done.

    A second one interrupts.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _remember)


def listen() -> None:
    """Have SIGTERM and SIGHUP end the run as Ctrl-C does, and remember each of the three.

    Ends the run where one was held.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _remember):
        signal.signal(signal.SIGINT, _interrupt)
    end_if_told()


def is_told() -> bool:
    """Whether a signal has come that ends the run."""
    return bool(_heard)


def end_if_told() -> None:
    """End the run where a signal has come and the run goes on."""
    if _heard:
        pytest.exit(f"ended by {_heard[0]}", returncode=pytest.ExitCode.INTERRUPTED)


def _remember(number: int, _: object) -> None:
    _heard.append(signal.Signals(number).name)
    if len(_heard) > 1:
        raise KeyboardInterrupt


def _end(number: int, _: object) -> None:
    _heard.append(signal.Signals(number).name)
    end_if_told()


def _interrupt(number: int, _: object) -> None:
    _heard.append(signal.Signals(number).name)
    raise KeyboardInterrupt
