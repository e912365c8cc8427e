"""An end to waiting for workers that have died.

vLLM's `collective_rpc` waits for ever where the process that its workers run in was killed (seen in 0.24 and 0.33 on
GPUs). Nothing is added to a call: a thread looks after the processes, and a signal ends the wait.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from suite.processes.janitor import runs

POLL_S = 0.5
GRACE_S = 3.0  # in which vLLM may say itself, and better, what has happened
SIGNAL = signal.SIGUSR1  # SIGUSR2 asks for stacks


class WorkerDied(RuntimeError):
    """A worker's process has ended while its engine waited for it."""

    examined = True


class Watch:
    """Ends a block `waiting()` of the main thread with WorkerDied once one of the processes looked after has ended."""

    def __init__(self) -> None:
        self._pids: list[int] = []
        self._waiting = False
        self._over = threading.Event()
        self._dead: int | None = None
        signal.signal(SIGNAL, self._interrupt)
        threading.Thread(target=self._look, name="worker-watch", daemon=True).start()

    def look_after(self, pids: list[int]) -> None:
        """Have these processes watched, but for this one itself, where an engine runs in one process."""
        self._pids = [pid for pid in pids if pid != os.getpid()]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done here ends when a worker is gone."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def close(self) -> None:
        """Workers may end from now on."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(POLL_S):
            self._dead = next((pid for pid in self._pids if not runs(pid)), None)
            if self._dead is not None:
                break
        while not self._over.wait(GRACE_S):  # each later call would wait too
            if self._waiting:
                signal.pthread_kill(threading.main_thread().ident, SIGNAL)

    def _interrupt(self, number: int, frame: object) -> None:
        if self._waiting and not self._over.is_set():
            raise WorkerDied(f"the worker's process {self._dead} has ended; this engine is lost")
