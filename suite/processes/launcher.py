"""What starts processes, and what they need to find each other: the one place that knows on which hosts they are.

suite.processes.local starts them on this machine. A launcher for a cluster is another file beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.processes.call import Process


class Launcher(ABC):
    """Starts the processes of one run of the suite.

    address: where a rank listens for the others that are to join its group.
    directory: a folder that pytest and all processes see, for checkpoints and what they write for each other.
    processes: what was started, in order.
    """

    address: str
    directory: Path
    processes: Sequence[Process]

    @abstractmethod
    def ahead(self, name: str, target: str, env: dict[str, str | None] | None = None) -> Process:
        """Start a process that imports what an object needs, and waits for Process.begin; returns at once.

        Args:
            name: for messages and for the log, until it begins.
            target: the object's class, "pkg.module:Class". Its static import_ahead(), where it has one, is called.
            env: environment variables to set, or to remove (None), over pytest's own.
        """

    def start(
        self,
        name: str,
        target: str,
        kwargs: dict[str, Any] | None = None,
        env: dict[str, str | None] | None = None,
        deadline_s: float = 120,
    ) -> Process:
        """Start a process that builds one object and serves calls of its methods; returns at once.

        Args:
            name: for messages and for the log.
            target: the object's class, "pkg.module:Class".
            kwargs: the constructor's arguments, plain data (suite.processes.wire).
            env: environment variables to set, or to remove (None), over pytest's own.
            deadline_s: how long imports and constructor may take, from now.
        """
        process = self.ahead(name, target, env)
        try:
            process.begin(name, kwargs, deadline_s=deadline_s)
        except TypeError:
            process.stop(grace_s=0)
            raise
        return process

    def compile_ahead(self, packages: Sequence[str]) -> str:
        """Compile the bytecode that processes will import, where that is missing; nothing where it cannot be done.

        Else all that start at once compile the same files. Returns what went wrong, empty where nothing did: processes
        start without it too, only later.
        """
        return ""

    @abstractmethod
    def free_port(self) -> int:
        """A port at `address` that nothing listens on. Raises OSError where none is found."""

    @abstractmethod
    def link_path(self) -> str:
        """Where an engine can listen for trainers, unused so far; both get it as it is."""

    @abstractmethod
    def scratch(self, stem: str) -> Path:
        """A path below `directory` that nothing has used so far."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started and is left. Safe to repeat."""
