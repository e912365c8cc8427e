"""A process of this machine: started, called over a socket pair, logged and ended.

What runs in it is suite.processes.child; what is said is plain data, see suite.processes.wire.
"""

import contextlib
import itertools
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite import ROOT
from suite.processes import janitor, pressure, wire
from suite.processes.call import Call, Process, ProcessDied, RemoteError, failure_of
from suite.processes.child import IMPORTED, READY, STACKS_SIGNAL

if TYPE_CHECKING:
    from suite.processes.local import LocalLauncher

_TAIL_BYTES = 1 << 16


class LocalProcess(Process):
    """A process that LocalLauncher started."""

    def __init__(self, launcher: "LocalLauncher", name: str, target: str) -> None:
        self.launcher, self.name, self.target = launcher, name, target
        self.mark = launcher.label(name)  # /proc shows the environment that it was started with: it keeps this mark
        self.log_path = launcher.logs / f"{self.mark}.log"
        self.pid = 0
        self.used_s = 0.0  # when it was last called or answered, on the monotonic clock; its imports do not count
        self._lock = threading.Lock()
        self._stopped = False
        self._gone = threading.Event()  # once it has been stopped, and what it left has been removed
        self._ended: str | None = None  # how, once it has
        self._seen: set[int] = set()  # the ids of its processes, as far as they were seen
        self._memory: set[Path] = set()  # the shared memory that they held: a killed owner leaves no other trace
        self._listening = False  # whether it has said so, and knows STACKS_SIGNAL
        self.imported = Call(self, f"importing {target}")
        self._constructed: Call | None = None  # once it has begun
        self._start_deadline_s = 0.0
        self._pending = {IMPORTED: self.imported}
        self._numbers = itertools.count(READY + 1)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self, env: dict[str, str | None]) -> None:
        """Start the process and have it import what its object needs. Called once, by its launcher."""
        self._sock, theirs = socket.socketpair()
        log = _open_log(self.log_path)
        command = [sys.executable, "-m", "suite.processes.child", str(theirs.fileno())]
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    command, cwd=ROOT, env=environment(self.launcher, self.mark, env), pass_fds=[theirs.fileno()],
                    start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
            finally:
                os.close(log)
        self.pid = self._popen.pid
        self._outgoing.put(wire.encode({"target": self.target}))
        self._sender = threading.Thread(target=self._send, name=f"send-{self.mark}", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name=f"receive-{self.mark}", daemon=True).start()

    def begin(
        self,
        name: str,
        kwargs: dict[str, Any] | None = None,
        env: dict[str, str | None] | None = None,
        deadline_s: float = 120,
    ) -> None:
        task = wire.encode({"kwargs": kwargs or {}, "env": env or {}})
        if name != self.name:
            self.name = name
            with contextlib.suppress(OSError):  # without a log there is nothing to rename
                self.log_path = self.log_path.rename(self.launcher.logs / f"{self.launcher.label(name)}.log")
        self._constructed = Call(self, f"starting {self.target}", prepares=True)
        self._start_deadline_s = deadline_s
        self._send_call(READY, self._constructed, task)

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ready(self, deadline_s: float | None = None) -> Any:
        self.used_s = time.monotonic()
        left_s = self._constructed.started_at + self._start_deadline_s - time.monotonic()
        return self._constructed.result(max(0, left_s if deadline_s is None else min(left_s, deadline_s)))

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        return self._submit(Call(self, f"{method}()"), method, args, kwargs)

    def prepare(self, method: str, *args: Any) -> Call:
        return self._submit(Call(self, f"{method}()", prepares=True), method, args, {})

    def preparing(self, call: Call) -> str:
        with self._lock:
            pending = [*self._pending.values()]
        before = pending[: pending.index(call)] if call in pending else []
        return next((earlier.what for earlier in before if earlier.prepares), "")

    def _submit(self, call: Call, method: str, args: tuple, kwargs: dict[str, Any]) -> Call:
        number = next(self._numbers)
        self._send_call(number, call, wire.encode({"call": number, "method": method, "args": args, "kwargs": kwargs}))
        return call

    def _send_call(self, number: int, call: Call, request: bytes) -> None:
        self.used_s = call.started_at
        with self._lock:
            if self._ended is None:
                self._pending[number] = call
                self._outgoing.put(request)
                return
        call.finish(error=self._died(call))

    def call(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        return self.submit(method, *args, **kwargs).result(deadline_s)

    def stop(self, grace_s: float = 5) -> None:
        with self._lock:
            stopped, self._stopped = self._stopped, True
        if stopped:  # by another thread, which must not be left behind when the run ends
            self._gone.wait(grace_s + 2 * janitor.END_DEADLINE_S)
            return
        try:
            self._end(grace_s)
        finally:
            self._gone.set()

    def _end(self, grace_s: float) -> None:
        self._look()
        self._outgoing.put(wire.encode({"method": None}))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(0 if self._pending else grace_s)
        deadline = time.monotonic() + min(grace_s, 1)
        while not self.alive and self._members() and time.monotonic() < deadline:
            time.sleep(0.1)  # its descendants clean up after it
        janitor.end_process(self.launcher.id, self.mark, self.pid, self._seen, self._memory, self.launcher.kept)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(janitor.END_DEADLINE_S)
        self._fail_pending()

    def tail(self, lines: int = 40) -> str:
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                text = log.read(_TAIL_BYTES).decode(errors="replace")
        except OSError as error:
            return f"(the log cannot be read: {error})"
        return "\n".join(text.splitlines()[-lines:])

    def stalled_s(self) -> float:
        return pressure.stalled_s()

    def write_stacks(self) -> None:
        if self._listening and self.alive:
            os.kill(self.pid, STACKS_SIGNAL)
            time.sleep(0.3)

    def _look(self) -> None:
        """Remember what it consists of and has now."""
        members = self._members()
        self._seen |= members
        self._memory |= janitor.shared_memory_of(members)

    def _members(self) -> set[int]:
        return janitor.members(self.launcher.id, self.mark, [self.pid])

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the receiving side notices too, and says so
            while (payload := self._outgoing.get()) is not None:
                wire.send_encoded(self._sock, payload)

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError, wire.WireError):
            while True:
                self._take(wire.receive(self._sock, self._wait_for_data))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(5)  # the connection ends a moment before the process does
        self._fail_pending()
        self._outgoing.put(None)
        self._sender.join()
        self._sock.close()

    def _wait_for_data(self) -> None:
        """Wait until there is something to read. The process's end counts: a descendant may hold the connection."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while not poll.poll(500):
            if not self.alive and not poll.poll(0):
                raise EOFError(f"process {self.name} ended")

    def _take(self, answer: dict[str, Any]) -> None:
        self._listening = True
        self.used_s = time.monotonic() if self._constructed else 0.0
        with self._lock:
            call = self._pending.pop(answer["call"], None)
        if call is None:
            return
        starts = call in (self.imported, self._constructed)
        if starts:
            self._look()
        if "error" not in answer:
            call.finish(answer["result"])
        else:
            error = failure_of(self, answer["error"])
            if starts:
                error.add_note(f"The log ends with:\n{self.tail()}")
            call.finish(error=error)
        self.launcher.answered(call)

    def _fail_pending(self) -> None:
        """The process has ended: so have the calls that it was to answer, now and later."""
        with self._lock:
            self._ended = self._ended or self._ending()
            pending, self._pending = self._pending, {}
        for call in pending.values():
            call.finish(error=self._died(call))

    def _ending(self) -> str:
        code = self._popen.poll()
        if self._stopped:
            return "was stopped"
        if code is None:
            return "closed its connection"
        return f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def _died(self, call: Call) -> Exception:
        for start in filter(None, (self.imported, self._constructed)):
            if isinstance(start.error(), RemoteError):
                return start.error()
        after = f"{call.elapsed_s():.1f} s after the call"
        said = f"process {self.name} {self._ended}; no answer to {call.what}, {after}"
        return ProcessDied(said, self, f"{self._ended}; no answer to {call.what}")


def environment(launcher: "LocalLauncher", label: str, changes: dict[str, str | None]) -> dict[str, str]:
    """The environment of a process: pytest's own with the run's marks, a place for temporary files and `changes`."""
    search = [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    own: dict[str, str | None] = {
        janitor.RUN_VARIABLE: launcher.id,
        janitor.PROCESS_VARIABLE: label,
        "SPT_NOENV": "1",  # setproctitle (vLLM's workers) would overwrite the environment that the marks are read from
        "TMPDIR": str(launcher.temporary),
        "VLLM_RPC_BASE_PATH": str(launcher.temporary),  # of vLLM's sockets, which stay where it is killed
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        ),  # would be below TMPDIR, and lost with it
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in search if path)),
        "PYTHONUNBUFFERED": "1",
        **_bytecode(launcher),
        "PYTHONFAULTHANDLER": "1",
        "PYTEST_CURRENT_TEST": None,
    }
    wanted = {**os.environ, **own, **changes}
    return {name: value for name, value in wanted.items() if value is not None}


def _bytecode(launcher: "LocalLauncher") -> dict[str, str | None]:
    """Where bytecode goes, where none may be written beside the sources: else every process compiles all it imports.

    Seen on a GPU host with PYTHONDONTWRITEBYTECODE=1, where every import of vLLM took 24 s.
    """
    if not sys.dont_write_bytecode:
        return {}
    return {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(launcher.directory / "bytecode")}


def _open_log(path: Path) -> int:
    """A descriptor to append to; where the disk takes no new file, the output is lost rather than the run."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
