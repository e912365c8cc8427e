"""Faults for selftests to plant, and the verdict on what a process raises, as a test of the suite would get it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from suite.processes import wire
from suite.processes.blame import told
from suite.processes.call import failure_of
from suite.session.verdicts import judge

PROCESS = SimpleNamespace(name="engine-1", log_path="")


def verdict(error: BaseException) -> str:
    """Of a test in whose call a process has raised this."""
    arrived = wire.decode(wire.encode(told(error)))
    return judge("call", failure_of(PROCESS, arrived)).verdict


def raised_by(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever it is)
        call()
    return caught.value


def planted(*_: object, **__: object) -> Any:
    """The suite's own fault."""
    raise KeyError("planted")


def in_torch(*_: object, **__: object) -> Any:
    """The subject's: raised by torch, for it."""
    return torch.ones(2) + torch.ones(3)
