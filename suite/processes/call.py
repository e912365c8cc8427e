"""A call of a method in another process: on its way, answered, failed or late.

What a launcher starts is a Process. Every wait has a deadline.
"""

import re
import time
from abc import ABC, abstractmethod
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

_WAIT_S = 0.5
STALLED = 0.1  # of a wait: where the host was short of memory for longer, nobody can be blamed for being late
_IN_THE_LOG = "root cause above"  # what vLLM says in place of an error that a process of its own has written to the log
_WRITTEN = re.compile(
    r"^\(\w+ pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[\S+\] )?((?:\w+\.)*\w+(?:Error|Exception): .*)$", re.MULTILINE
)


class Process(ABC):
    """A started process and the one object in it, whose methods are called. Arguments and results are plain data."""

    name: str
    target: str  # the object's class, "pkg.module:Class"
    log_path: Path
    used_s: float  # when it was last called or answered, on the monotonic clock
    imported: "Call"  # its imports, on their way; the result is what the class's import_ahead() returned

    @abstractmethod
    def begin(
        self,
        name: str,
        kwargs: dict[str, Any] | None = None,
        env: dict[str, str | None] | None = None,
        deadline_s: float = 120,
    ) -> None:
        """Have the object built; returns at once. Called once, after Launcher.ahead. Raises TypeError as `submit` does.

        A process that has ended is no error here: ready() raises.

        Args:
            name: for messages and for the log from now on.
            kwargs: the constructor's arguments, plain data (suite.processes.wire).
            env: environment variables to set, or to remove (None), after the imports and before the object is built.
            deadline_s: how long what is left of the imports and the constructor may take, from now.
        """

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the process runs."""

    @abstractmethod
    def ready(self, deadline_s: float | None = None) -> Any:
        """Wait for the constructor and return the object's facts(), {} where it has none.

        Waits until `deadline_s` from now, at most until the deadline given at the start. Raises as Call.result does.
        """

    @abstractmethod
    def submit(self, method: str, *args: Any, **kwargs: Any) -> "Call":
        """Call a method without waiting. Raises TypeError at once for arguments that are not plain data.

        On a process that has ended the call fails at once: its result() raises.
        """

    @abstractmethod
    def prepare(self, method: str, *args: Any) -> "Call":
        """As `submit`, of a method that only makes the process ready: a call that waits behind it has not begun."""

    @abstractmethod
    def call(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a method and wait for its result. Raises as Call.result does."""

    @abstractmethod
    def preparing(self, call: "Call") -> str:
        """What this process has to do, to be ready, before it comes to a call; empty where it has come to it."""

    @abstractmethod
    def stop(self, grace_s: float = 5) -> None:
        """End the process, its descendants and what they leave behind. Safe to repeat.

        The object's close() is called first, where it has one; what is not gone after `grace_s` is killed. A process
        that has not answered its last call is killed without grace.
        """

    @abstractmethod
    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""

    def stalled_s(self) -> float:
        """Seconds until now in which the process's host ran nothing for want of memory; 0 where that is not known."""
        return 0.0

    @abstractmethod
    def write_stacks(self) -> None:
        """Have the process write the stacks of its threads to its log, to show where it is."""


class RemoteError(Exception):
    """What was called raised: `kind` (name of its class), `message`, `traceback` (text), `process` (its name).

    It is the suite's own: only of a SubjectFailed is that not so.
    cause: what it raised, without the process: the same for the same fault elsewhere.
    is_an_echo: whether it may only say that the other side of an update has failed, or hangs.
    """

    def __init__(self, process: Process, raised: dict[str, Any]) -> None:
        self.kind, self.message, self.traceback = raised["kind"], raised["message"], raised["traceback"]
        self.process = process.name
        self.is_an_echo = bool(raised.get("echo"))
        self.cause = f"{self.kind}: {self.message.partition(chr(10))[0]}"
        self.said = f"{self.kind} in process {self.process}: {self.message}"
        if _IN_THE_LOG in self.message and (written := _WRITTEN.findall(process.tail(400))):
            self.cause = written[-1]
            self.said += f"\nits log says: {self.cause}"
        super().__init__(f"{self.said}\n\n{self.traceback.rstrip()}\n\nlog of {self.process}: {process.log_path}")


class SubjectFailed(RemoteError):
    """What is examined raised it: the extension, the sender, or vLLM where one of both or a test has called it."""


def failure_of(process: Process, raised: dict[str, Any]) -> RemoteError:
    """The error of what a process says that it raised; see `told`."""
    return (SubjectFailed if raised.get("examined") else RemoteError)(process, raised)


class NoAnswer(Exception):
    """A process gave no answer: `said` says which and why, the message shows the end of its log too.

    cause: what it did not answer, without the process and the time.
    """

    def __init__(self, said: str, process: Process, what: str) -> None:
        self.said, self.cause = said, f"{type(self).__name__}: {what}"
        log = f"log of {process.name}: {process.log_path}"
        super().__init__(f"{said}. The log ends with:\n{process.tail()}\n\n{log}")


class DeadlineExceeded(NoAnswer):
    """A process did not answer in time."""


class ProcessDied(NoAnswer):
    """A process ended, or was ended, before it answered."""


class NotBegun(NoAnswer):
    """A call was not begun in time: the process was still preparing. That says nothing of what was to be called."""


class Starved(NoAnswer):
    """A call was not answered in time by a host that was short of memory. That says nothing of what was called."""


class Call:
    """A call on its way: its result, or what went wrong, some time later."""

    def __init__(self, process: Process, what: str, prepares: bool = False) -> None:
        """`prepares` says that the call only makes the process ready: it calls nothing that is examined."""
        self.process, self.what, self.prepares = process, what, prepares
        self.started_at = time.monotonic()
        self._stalled_s: float | None = None  # when somebody began to wait for it
        self.finished_at: float | None = None
        self.future: Future[Any] = Future()

    def __str__(self) -> str:
        return f"{self.what} in process {self.process.name}"

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.future.done()

    def result(self, deadline_s: float) -> Any:
        """Wait for the result. Raises RemoteError or NoAnswer: DeadlineExceeded, `deadline_s` from now, and others."""
        self.awaited()
        if _unfinished([self.future], deadline_s):
            self.process.write_stacks()
            raise self.overdue()
        return self.future.result()

    def awaited(self) -> None:
        """Note how its host stands. Called by who waits, and so not before the call is on its way, which is timed."""
        if self._stalled_s is None:
            self._stalled_s = self.process.stalled_s()

    def error(self) -> BaseException | None:
        """What the call raised; None while it runs and after it succeeded."""
        return self.future.exception() if self.done() else None

    def overdue(self) -> NoAnswer:
        """The error that says that this call is late, that the process has not come to it, or that the host starves."""
        if preparing := self.process.preparing(self):
            said = f"{self} has not begun after {self.elapsed_s():.1f} s: the process is still busy with {preparing}"
            return NotBegun(said, self.process, self.what)
        said = f"{self} has not answered after {self.elapsed_s():.1f} s"
        self.awaited()
        stalled_s = self.process.stalled_s() - self._stalled_s
        if stalled_s > STALLED * self.elapsed_s():
            short = f"{said}, and for {stalled_s:.1f} s the host ran nothing, for want of memory"
            return Starved(f"{short}. Try next: less beside it, or fewer engines by --stage", self.process, self.what)
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

    Once one has failed, the others get `after_failure_s` more. Raises one of the failures, with the state of the others
    as notes; DeadlineExceeded for the first unfinished call if none failed. Before either comes NotBegun, for a call
    that its process has not come to: the others may have failed for want of it. See `_by_cause` for their order.
    """
    futures = [call.future for call in calls]
    deadline = time.monotonic() + deadline_s
    for call in calls:
        call.awaited()
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
    first = (not_begun + _by_cause(failed, late))[0]
    error = first.error() or first.overdue()
    for other in calls:
        if other is not first:
            error.add_note(f"meanwhile: {_state(other)}")
    raise error


def _by_cause(failed: list[Call], late: list[Call]) -> list[Call]:
    """By time, and last those that may only say that another has failed or is late.

    What the suite itself has raised comes before what is examined, which may have failed for want of it; before both
    comes a process that has died, which the suite may have missed.
    """

    def rank(call: Call) -> int:
        error = call.error()
        if error is None or getattr(error, "is_an_echo", False):
            return 3 if error else 2
        if isinstance(error, ProcessDied):
            return 0 if own else 1
        return 1

    in_time = sorted(failed, key=lambda call: call.finished_at)
    own = [call for call in in_time if is_the_suites(call.error()) and not call.error().is_an_echo]
    if own:
        in_time.sort(key=lambda call: call not in own)
    return sorted(in_time + late, key=rank)


def is_the_suites(error: BaseException | None) -> bool:
    """Whether it says that the suite itself has failed, or the host, and nothing of what is examined."""
    return isinstance(error, Starved) or (isinstance(error, RemoteError) and not isinstance(error, SubjectFailed))


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
