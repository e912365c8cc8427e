"""Processes that wait for an engine: they have imported vLLM, which is most of what the start of an engine takes."""

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from suite.driver import variables
from suite.driver.variables import Variables
from suite.processes.call import Process
from suite.processes.launcher import Launcher

ENGINE = "suite.actors.engine:Engine"
NAME = "spare-engine"


class Spares:
    """Starts the processes of engines, and keeps some started ahead of them. A waiting one holds no GPU memory.

    Args:
        launcher: starts the processes.
        env: what waiting processes have in their environment.
        ahead: so many are kept waiting at the most. One that ends by itself is not replaced.
        announce: called with a line of text when a waiting process is lost.
    """

    def __init__(self, launcher: Launcher, env: Variables, ahead: int, announce: Callable[[str], None]) -> None:
        self._launcher, self._env, self._ahead, self._announce = launcher, env, ahead, announce
        self._waiting: list[Process] = []
        self._lock = threading.Lock()

    @property
    def importing(self) -> int:
        """How many are still importing, and keep a core busy."""
        return sum(process.alive and not process.imported.done() for process in [*self._waiting])

    def fill(self, wanted: Iterable[Variables]) -> None:
        """Start one more, if fewer wait than are to be kept, and than engines to come can take.

        Args:
            wanted: the environments of the engines to come.
        """
        with self._lock:
            self._drop_lost()
            fitting = (env for env in wanted if variables.late_changes(self._env, env) is not None)
            if len(self._waiting) >= self._ahead or len(self._waiting) >= len([*islice(fitting, self._ahead)]):
                return
            try:
                self._waiting.append(self._launcher.ahead(NAME, ENGINE, self._env))
            except Exception as error:  # engines start without it
                self._ahead = 0
                self._announce(f"{NAME}: could not be started ({type(error).__name__}: {error})")

    def start(self, name: str, target: str, arguments: dict[str, Any], env: Variables, deadline_s: float) -> Process:
        """Start an engine, as Launcher.start: in a process that waits, where one has the class and takes `env`."""
        with self._lock:
            ready = next((process for process in self._waiting if process.imported.done() and not _lost(process)), None)
            changes = variables.late_changes(self._env, env)
            takes = target == ENGINE and ready is not None and changes is not None
            if takes:
                self._waiting.remove(ready)
        if not takes:
            return self._launcher.start(name, target, arguments, env, deadline_s)
        ready.begin(name, arguments, changes, deadline_s)
        return ready

    def close(self) -> None:
        """End those that wait, and start no more."""
        with self._lock:
            self._ahead, waiting, self._waiting = 0, self._waiting, []
        for process in waiting:
            process.stop(grace_s=0)

    def _drop_lost(self) -> None:
        for process, why in [(process, why) for process in self._waiting if (why := _lost(process))]:
            self._waiting.remove(process)
            self._ahead -= 1
            self._announce(f"{process.name}: dropped and not replaced, since it {why}; log: {process.log_path}")
            threading.Thread(target=process.stop, args=(0,), name="spare-stopper", daemon=True).start()


def _lost(process: Process) -> str:
    """Why no engine can be built in a waiting process; empty where one can, or may when its imports are over."""
    if not process.alive or process.imported.error():
        return "has ended by itself"
    if process.imported.done() and process.imported.result(0)["cuda_is_initialised"]:
        return "has initialised CUDA while it imported vLLM, and would see the wrong GPUs"
    return ""
