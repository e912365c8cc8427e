"""Starting, calling, timing out, logging and ending engine and trainer processes.

Every process holds one object whose methods are called over a socket pair (suite.processes.wire,
suite.processes.child). Every wait has a deadline. Whatever ends pytest, a janitor (suite.processes.janitor) that
outlives it ends the processes and their descendants.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

from suite.processes import janitor, wire
from suite.processes.child import READY, STACKS_SIGNAL

ROOT = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 1 << 16
_WAIT_S = 0.5


class RemoteError(Exception):
    """What was called raised: `kind` (name of its class), `message`, `traceback` (text), `process` (its name).

    cause: what it raised, without the process: the same for the same fault elsewhere.
    """

    def __init__(self, process: "Process", raised: dict[str, str]) -> None:
        self.kind, self.message, self.traceback = raised["kind"], raised["message"], raised["traceback"]
        self.process = process.name
        self.cause = f"{self.kind}: {self.message.partition(chr(10))[0]}"
        self.said = f"{self.kind} in process {self.process}: {self.message}"
        super().__init__(f"{self.said}\n\n{self.traceback.rstrip()}\n\nlog of {self.process}: {process.log_path}")


class NoAnswer(Exception):
    """A process gave no answer: `said` says which and why, the message shows the end of its log too.

    cause: what it did not answer, without the process and the time.
    """

    def __init__(self, said: str, process: "Process", what: str) -> None:
        self.said, self.cause = said, f"{type(self).__name__}: {what}"
        log = f"log of {process.name}: {process.log_path}"
        super().__init__(f"{said}. The log ends with:\n{process.tail()}\n\n{log}")


class DeadlineExceeded(NoAnswer):
    """A process did not answer in time."""


class ProcessDied(NoAnswer):
    """A process ended, or was ended, before it answered."""


class NotBegun(NoAnswer):
    """A call was not begun in time: the process was still preparing. That says nothing of what was to be called."""


class Run:
    """The processes of one run of the suite, and what has to be gone after it.

    Args:
        logs: directory for one log file a process; created if missing.
    """

    def __init__(self, logs: Path) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.logs = Path(logs).resolve()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix=f"ws-{self.id}-"))
        self.kept = sorted(os.listdir(janitor.SHARED_MEMORY)) if janitor.SHARED_MEMORY.is_dir() else []
        self.processes: list[Process] = []
        self.janitor = self._start_janitor()
        self._labels: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, grace_s: float = 5) -> None:
        """End everything that is left: processes side by side, then whatever the janitor finds. Safe to repeat."""
        if self.janitor.stdin is None or self.janitor.stdin.closed:
            return
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
            janitor.sweep(self.id, self.directory, self.kept, [process.pid for process in self.processes])

    def register(self, process: "Process") -> None:
        """Have a started process ended with the run."""
        self.processes.append(process)
        with contextlib.suppress(OSError):  # without a janitor, close() does its work
            self.janitor.stdin.write(f"{process.pid}\n".encode())

    def label(self, name: str) -> str:
        """A name for files and marks, unused so far in this run: `engine`, then `engine.2`, ..."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
        with self._lock:
            candidates = itertools.chain([stem], (f"{stem}.{count}" for count in itertools.count(2)))
            label = next(candidate for candidate in candidates if candidate not in self._labels)
            self._labels.add(label)
        return label

    def _start_janitor(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "suite.processes.janitor"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        task = {"run_id": self.id, "directory": str(self.directory), "kept": self.kept}
        process.stdin.write(json.dumps(task).encode() + b"\n")
        return process


class Call:
    """A call on its way: its result, or what went wrong, some time later."""

    def __init__(self, process: "Process", what: str, prepares: bool = False) -> None:
        """`prepares` says that the call only makes the process ready: it calls nothing that is examined."""
        self.process, self.what, self.prepares = process, what, prepares
        self.started_at = time.monotonic()
        self.finished_at: float | None = None
        self.future: Future[Any] = Future()

    def __str__(self) -> str:
        return f"{self.what} in process {self.process.name}"

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.future.done()

    def result(self, deadline_s: float) -> Any:
        """Wait for the result. Raises RemoteError, ProcessDied or DeadlineExceeded (`deadline_s` from now)."""
        if _unfinished([self.future], deadline_s):
            self.process.write_stacks()
            raise self.overdue()
        return self.future.result()

    def error(self) -> BaseException | None:
        """What the call raised; None while it runs and after it succeeded."""
        return self.future.exception() if self.done() else None

    def overdue(self) -> NoAnswer:
        """The error that says that this call is late, or that the process has not come to it."""
        if preparing := self.process.preparing(self):
            said = f"{self} has not begun after {self.elapsed_s():.1f} s: the process is still busy with {preparing}"
            return NotBegun(said, self.process, self.what)
        said = f"{self} has not answered after {self.elapsed_s():.1f} s"
        return DeadlineExceeded(said, self.process, self.what)

    def elapsed_s(self) -> float:
        """Seconds from the call to its answer, or until now."""
        return (self.finished_at or time.monotonic()) - self.started_at

    def finish(self, result: Any = None, error: Exception | None = None) -> None:
        """Take the answer. Called once, by the process."""
        self.finished_at = time.monotonic()
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


def gather(calls: list[Call], deadline_s: float, after_failure_s: float = 10) -> list[Any]:
    """Wait for all calls and return their results in order.

    Once one has failed, the others get `after_failure_s` more. Raises the first failure by time, with the state of
    the others as notes; DeadlineExceeded for the first unfinished call if none failed. Before either comes NotBegun,
    for a call that its process has not come to: the others may have failed for want of it.
    """
    futures = [call.future for call in calls]
    deadline = time.monotonic() + deadline_s
    _unfinished(futures, deadline_s, FIRST_EXCEPTION)
    if any(call.error() for call in calls):
        _unfinished(futures, min(after_failure_s, deadline - time.monotonic()))
    failed = [call for call in calls if call.error()]
    late = [call for call in calls if not call.done()]
    if not failed and not late:
        return [future.result() for future in futures]
    for call in late:
        call.process.write_stacks()
    not_begun = [call for call in late if call.process.preparing(call)]
    first = (not_begun or sorted(failed, key=lambda call: call.finished_at) or late)[0]
    error = first.error() or first.overdue()
    for other in calls:
        if other is not first:
            error.add_note(f"meanwhile: {_state(other)}")
    raise error


def _unfinished(futures: list[Future[Any]], limit_s: float, until: str = ALL_COMPLETED) -> set[Future[Any]]:
    """Wait until `until` holds or the limit is over; the futures that are not done then.

    In short waits: a signal that arrives after Python last looked for one and before the thread blocks does not
    interrupt it, and Ctrl-C would only be heard when the whole wait is over.
    """
    deadline = time.monotonic() + limit_s
    while True:
        left_s = max(0, deadline - time.monotonic())
        done, not_done = wait(futures, min(left_s, _WAIT_S), return_when=until)
        if not not_done or not left_s or (until == FIRST_EXCEPTION and any(future.exception() for future in done)):
            return not_done


def _state(call: Call) -> str:
    if not call.done():
        return f"{call} has not answered after {call.elapsed_s():.1f} s"
    ending = f"failed: {getattr(call.error(), 'said', call.error())}" if call.error() else "finished"
    return f"{call} took {call.elapsed_s():.1f} s and {ending}"


class Process:
    """A started process and the object in it. Made by launch()."""

    def __init__(self, run: Run, name: str, target: str, deadline_s: float) -> None:
        self.run, self.name, self.start_deadline_s = run, name, deadline_s
        self.label = run.label(name)
        self.log_path = run.logs / f"{self.label}.log"
        self.pid = 0
        self.used_s = time.monotonic()  # when it was last called or answered, on the monotonic clock
        self._lock = threading.Lock()
        self._stopped = False
        self._gone = threading.Event()  # once it has been stopped, and what it left has been removed
        self._ended: str | None = None  # how, once it has
        self._seen: set[int] = set()  # the processes it was seen to consist of, and below the shared memory that they
        self._memory: set[Path] = set()  # had: who has it may die without a trace
        self._listening = False  # whether it has said so, and knows STACKS_SIGNAL
        self._constructed = Call(self, f"starting {target}", prepares=True)
        self._pending = {READY: self._constructed}
        self._numbers = itertools.count(READY + 1)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self, task: bytes, env: dict[str, str | None]) -> None:
        """Start the process and send it its encoded task. Called once, by launch()."""
        self._sock, theirs = socket.socketpair()
        log = _open_log(self.log_path)
        command = [sys.executable, "-m", "suite.processes.child", str(theirs.fileno())]
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    command, cwd=ROOT, env=_environment(self.run, self.label, env), pass_fds=[theirs.fileno()],
                    start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
            finally:
                os.close(log)
        self.pid = self._popen.pid
        self._outgoing.put(task)
        self._sender = threading.Thread(target=self._send, name=f"send-{self.label}", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name=f"receive-{self.label}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._popen.poll() is None

    def ready(self, deadline_s: float | None = None) -> Any:
        """Wait for the constructor and return the object's facts(), {} where it has none.

        Waits until `deadline_s` from now, at most until the deadline given to launch(). Raises as Call.result does.
        """
        self.used_s = time.monotonic()
        left_s = self._constructed.started_at + self.start_deadline_s - time.monotonic()
        return self._constructed.result(max(0, left_s if deadline_s is None else min(left_s, deadline_s)))

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        """Call a method without waiting. Raises TypeError at once for arguments that are not plain data.

        On a process that has ended the call fails at once: its result() raises.
        """
        return self._submit(Call(self, f"{method}()"), method, args, kwargs)

    def prepare(self, method: str, *args: Any) -> Call:
        """As `submit`, of a method that only makes the process ready: a call that waits behind it has not begun."""
        return self._submit(Call(self, f"{method}()", prepares=True), method, args, {})

    def preparing(self, call: Call) -> str:
        """What this process has to do, to be ready, before it comes to a call; empty where it has come to it."""
        with self._lock:
            pending = [*self._pending.values()]
        before = pending[: pending.index(call)] if call in pending else []
        return next((earlier.what for earlier in before if earlier.prepares), "")

    def _submit(self, call: Call, method: str, args: tuple, kwargs: dict[str, Any]) -> Call:
        self.used_s = call.started_at
        number = next(self._numbers)
        request = wire.encode({"call": number, "method": method, "args": args, "kwargs": kwargs})
        with self._lock:
            if self._ended is None:
                self._pending[number] = call
                self._outgoing.put(request)
                return call
        call.finish(error=self._died(call))
        return call

    def call(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a method and wait for its result. Raises as Call.result does."""
        return self.submit(method, *args, **kwargs).result(deadline_s)

    def stop(self, grace_s: float = 5) -> None:
        """End the process and its descendants, and unlink the shared memory that only they had. Safe to repeat.

        The object's close() is called first, where it has one; what is not gone after `grace_s` is killed. A process
        that has not answered its last call is killed without grace.
        """
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
        janitor.end_process(self.run.id, self.label, self.pid, self._seen, self._memory, self.run.kept)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(janitor.END_DEADLINE_S)
        self._fail_pending()

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                text = log.read(_TAIL_BYTES).decode(errors="replace")
        except OSError as error:
            return f"(the log cannot be read: {error})"
        return "\n".join(text.splitlines()[-lines:])

    def write_stacks(self) -> None:
        """Have the process write the stacks of its threads to its log, to show where it is."""
        if self._listening and self.alive:
            os.kill(self.pid, STACKS_SIGNAL)
            time.sleep(0.3)

    def _look(self) -> None:
        """Remember what it consists of and has now."""
        members = self._members()
        self._seen |= members
        self._memory |= janitor.shared_memory_of(members)

    def _members(self) -> set[int]:
        return janitor.members(self.run.id, self.label, [self.pid])

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
        self.used_s = time.monotonic()
        with self._lock:
            call = self._pending.pop(answer["call"], None)
        if call is None:
            return
        if call is self._constructed:
            self._look()
        if "error" not in answer:
            call.finish(answer["result"])
            return
        error = RemoteError(self, answer["error"])
        if call is self._constructed:
            error.add_note(f"The log ends with:\n{self.tail()}")
        call.finish(error=error)

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
        if isinstance(self._constructed.error(), RemoteError):
            return self._constructed.error()
        after = f"{call.elapsed_s():.1f} s after the call"
        said = f"process {self.name} {self._ended}; no answer to {call.what}, {after}"
        return ProcessDied(said, self, f"{self._ended}; no answer to {call.what}")


def launch(
    run: Run,
    name: str,
    target: str,
    kwargs: dict[str, Any] | None = None,
    env: dict[str, str | None] | None = None,
    deadline_s: float = 120,
) -> Process:
    """Start a process that builds one object and serves calls of its methods; returns at once.

    Args:
        run: the run it belongs to.
        name: for messages and the log file `<run.logs>/<name>.log`.
        target: the object's class, "pkg.module:Class".
        kwargs: the constructor's arguments, plain data (suite.processes.wire).
        env: environment variables to set, or to remove (None), over pytest's own.
        deadline_s: how long the constructor may take, from now.
    """
    task = wire.encode({"target": target, "kwargs": kwargs or {}})
    process = Process(run, name, target, deadline_s)
    process.start(task, env or {})
    run.register(process)
    return process


def _environment(run: Run, label: str, changes: dict[str, str | None]) -> dict[str, str]:
    """The environment of a process: pytest's own with the run's marks, a place for temporary files and `changes`."""
    search = [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    own: dict[str, str | None] = {
        janitor.RUN_VARIABLE: run.id,
        janitor.PROCESS_VARIABLE: label,
        "SPT_NOENV": "1",  # setproctitle (vLLM's workers) would overwrite the environment that the marks are read from
        "TMPDIR": str(run.directory),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        ),  # would be below TMPDIR, and lost with it
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in search if path)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTEST_CURRENT_TEST": None,
    }
    wanted = {**os.environ, **own, **changes}
    return {name: value for name, value in wanted.items() if value is not None}


def _open_log(path: Path) -> int:
    """A descriptor to append to; where the disk takes no new file, the output is lost rather than the run."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
