"""Mutants that are right in every weight, and leave the worker's process otherwise than it was: memory.settings."""

import os

import torch

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import BROADCAST, mutant

VARIABLE = "NCCL_P2P_DISABLE"


class Undo:
    """Removes a variable from the environment when the worker gets another extension."""

    def __del__(self) -> None:
        os.environ.pop(VARIABLE, None)


@mutant("memory.settings", rf"the variable {VARIABLE}: unset became 1", **BROADCAST)
class SetsAVariable(WorkerExtension):
    """Sets a variable of the environment for its own group, which every later group of the engine reads too."""

    _mutant_undo: Undo | None = None

    def end_update(self) -> int:
        os.environ[VARIABLE] = "1"
        self._mutant_undo = self._mutant_undo or Undo()
        return super().end_update()


@mutant("memory.settings", r"random numbers to go on", **BROADCAST)
class SeedsEveryUpdate(WorkerExtension):
    """Seeds torch's generator in each update, so that what is sampled after it is the same every time."""

    def end_update(self) -> int:
        torch.manual_seed(0)
        return super().end_update()
