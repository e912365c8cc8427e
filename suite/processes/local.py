"""Processes on this machine: the folder, the ports and the sockets that they share, and the janitor who ends them."""

import contextlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from suite import ROOT
from suite.processes import bytecode, janitor
from suite.processes.call import Call
from suite.processes.launcher import Launcher
from suite.processes.process import LocalProcess, environment

ADDRESS = "127.0.0.1"
PORTS = (15000, 32000)  # below those that Linux hands out: from 32768 on, see ip_local_port_range
SOCKET_BYTES, NAME_BYTES = 107, 37  # what Linux takes of a Unix socket's path; of a name of vLLM's, with the slash
SHORT = "/tmp"  # where folders have short paths


def free_port() -> int:
    """A free port below Linux's ephemeral range, so that nobody who asks for any port (NCCL does) takes it first."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((ADDRESS, port))
            return port
    raise OSError(f"no port of {PORTS[0]}..{PORTS[1]} could be bound at {ADDRESS}, in 1000 tries")


class LocalLauncher(Launcher):
    """Starts the processes of one run of the suite on this machine, and ends what is left of them.

    Whatever ends pytest, a janitor (suite.processes.janitor) that outlives it ends the processes and their descendants.

    temporary: the folder that processes have for temporary files and for sockets, whose paths have to be short.

    Args:
        logs: directory for one log file a process; created if missing.
        answered: is told of every call that was answered, from the thread that hears of it.
    """

    address = ADDRESS

    def __init__(self, logs: Path, answered: Callable[[Call], None] = lambda call: None) -> None:
        self.answered = answered
        self.id = uuid.uuid4().hex[:8]
        self.logs = Path(logs).resolve()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix=f"ws-{self.id}-"))
        self.temporary = self._short_directory()
        self.kept = sorted(os.listdir(janitor.SHARED_MEMORY)) if janitor.SHARED_MEMORY.is_dir() else []
        self.processes: list[LocalProcess] = []
        self.janitor = self._start_janitor()
        self._labels: set[str] = set()
        self._lock = threading.Lock()
        self._starting = threading.Lock()  # held while a process is started: close() leaves none behind
        self._closed = False

    def __enter__(self) -> "LocalLauncher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ahead(self, name: str, target: str, env: dict[str, str | None] | None = None) -> LocalProcess:
        with self._starting:
            if self._closed:
                raise RuntimeError(f"{name} is not started: this launcher was closed, and ends what it has started")
            process = LocalProcess(self, name, target)
            process.start(env or {})
            self.processes.append(process)
        with contextlib.suppress(OSError):  # without a janitor, close() does its work
            self.janitor.stdin.write(f"{process.pid}\n".encode())
        return process

    def compile_ahead(self, packages: Sequence[str]) -> str:
        return bytecode.compile_packages(packages, environment(self, self.label("bytecode"), {}))

    def free_port(self) -> int:
        return free_port()

    def link_path(self) -> str:
        return str(self.temporary / f"{self.label('link')}.sock")

    def scratch(self, stem: str) -> Path:
        return self.directory / self.label(stem)

    def close(self, grace_s: float = 5) -> None:
        """End processes side by side, then whatever the janitor finds."""
        if self.janitor.stdin is None or self.janitor.stdin.closed:
            return
        with self._starting:
            self._closed = True
        # Daemons, or the interpreter would wait for one that a signal's exception has left without its lock.
        stopping = [threading.Thread(target=process.stop, args=(grace_s,), daemon=True) for process in self.processes]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join(grace_s + janitor.END_DEADLINE_S + 5)
        self.janitor.stdin.close()
        try:
            self.janitor.wait(janitor.END_DEADLINE_S + 5)
        except subprocess.TimeoutExpired:
            self.janitor.kill()
        if self.janitor.returncode != 0:  # it was killed: do its work here
            janitor.sweep(self.id, self._directories, self.kept, [process.pid for process in self.processes])

    def label(self, name: str) -> str:
        """A name for files and marks, unused so far in this run: `engine`, then `engine.2`, ..."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
        with self._lock:
            candidates = itertools.chain([stem], (f"{stem}.{count}" for count in itertools.count(2)))
            label = next(candidate for candidate in candidates if candidate not in self._labels)
            self._labels.add(label)
        return label

    @property
    def _directories(self) -> list[Path]:
        """What the run has made, to be removed with it."""
        return [*dict.fromkeys((self.directory, self.temporary))]

    def _short_directory(self) -> Path:
        """Where processes put temporary files and sockets: `directory`, or another one where its path is too long."""
        if len(os.fsencode(self.directory)) <= SOCKET_BYTES - NAME_BYTES:
            return self.directory
        return Path(tempfile.mkdtemp(prefix=f"ws-{self.id}-", dir=SHORT))

    def _start_janitor(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "suite.processes.janitor"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        task = {"run_id": self.id, "directories": [*map(str, self._directories)], "kept": self.kept}
        process.stdin.write(json.dumps(task).encode() + b"\n")
        return process
