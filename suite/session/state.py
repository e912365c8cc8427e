"""What one session of pytest holds, kept in its config: hooks, fixtures and tests take it from there."""

import contextlib
import threading
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pytest

from suite.processes.call import Call
from suite.processes.launcher import Launcher
from suite.session.record import Record
from suite.session.selection import Selection
from suite.session.verdicts import Judgement
from suite.session.waivers import Ledger, Waiver

_started_s = time.monotonic()
_speaking = threading.Lock()


@dataclass
class Progress:
    """How a test is doing."""

    began_s: float = field(default_factory=time.monotonic)
    duration_s: float = 0.0
    judgement: Judgement = field(default_factory=Judgement)
    waiver: Waiver | None = None


@dataclass
class State:
    """What one session of pytest holds; `examining` says whether anything but selftests may run."""

    config: pytest.Config
    examining: bool
    record: Record | None = None
    launcher: Launcher | None = None
    selection: Selection | None = None
    waivers: Ledger | None = None
    progress: dict[str, Progress] = field(default_factory=dict)
    chosen: int = 0  # tests that examine something, of those that this run was to have
    verdicts: Counter[tuple[bool, str]] = field(default_factory=Counter)  # (whether on a stage, verdict)

    def announce(self, text: str) -> None:
        """Write a line to the terminal at once, whatever is being captured; from any thread."""
        if terminal := self.config.pluginmanager.get_plugin("terminalreporter"):
            with _speaking:
                terminal.write_line(f"{time.monotonic() - _started_s:7.1f} s  {text}")
                terminal.flush()

    def answered(self, call: Call) -> None:
        """Put down in run.json what a call of a process took."""
        if self.record:
            self.record.answered(call)

    def timeline(self, what: str, name: str) -> AbstractContextManager[None]:
        """Put down in run.json how long the block takes: "starting", "moving" or "judging", and what."""
        return self.record.span(what, name) if self.record else contextlib.nullcontext()


_STATE = pytest.StashKey[State]()


def keep(state: State) -> State:
    """Keep the state of a session in its config."""
    state.config.stash[_STATE] = state
    return state


def state_of(config: pytest.Config) -> State:
    """The state of the session that has this config."""
    return config.stash[_STATE]


def selection_of(config: pytest.Config) -> Selection:
    """The subjects, stages and models of a session. Raises RuntimeError where nothing is examined."""
    if (selection := state_of(config).selection) is None:
        raise RuntimeError("there is no selection: this session of pytest runs nothing but selftests")
    return selection
