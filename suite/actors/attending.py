"""A trainer sends while it listens to the engines: where one fails, the sending ends too."""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from suite.actors.dialogue import REFUSED, TOLD_S, Line, Refused, TrainerSide, hear_called
from suite.actors.link import LinkError, Silent


class Sends(Protocol):
    """What is attended to: the trainer's half of a subject.

    only_waits: whether send() does nothing but wait for the engines, so that nothing else has to listen to them.
    """

    only_waits: bool

    def send(self, tensors: Any, acknowledged: Callable[[], None]) -> int:
        """Send all tensors; `acknowledged()` waits until all engines have ended. Returns the bytes sent."""

    def abort(self, reason: str) -> None:
        """End a send() in another thread, where that can be done."""


def send_attended(sender: Sends, tensors: Any, trainer: TrainerSide, sent_all: Callable[[], None]) -> int:
    """Have `sender` send, call `sent_all`, and wait until all engines have acknowledged. Returns the bytes sent.

    Where an engine refuses meanwhile or is gone, or where all have ended and the sender still sends `TOLD_S` later, the
    sender's `abort(reason)` is called, and Refused says why. A sender that can't be aborted may never come back:
    whoever started this process ends it then. What the sender itself raises is raised, after its `abort`.
    """
    attending = _Attending(sender, trainer)
    try:
        sent = sender.send(tensors, attending.expect_ended)
    except Exception as error:
        if attending.reason and not isinstance(error, Refused):
            raise Refused(attending.reason) from error
        attending.abort(f"the trainer's sender raised {type(error).__name__}: {error}")
        raise
    attending.expect_whole()
    sent_all()
    attending.expect_ended()
    return sent


class _Attending:
    """Takes every engine's last message of an update while another thread sends.

    reason: why the sending was aborted; empty as long as it was not.
    """

    def __init__(self, sender: Sends, trainer: TrainerSide) -> None:
        self._sender, self._deadline_s = sender, trainer.deadline_s
        self._changed = threading.Condition()
        self._said: dict[int, tuple[str, Any] | LinkError] = {}
        self._engines = len(trainer.lines)
        self._sent = threading.Event()
        self.reason = ""
        self._lines = trainer.lines
        for index, line in enumerate(() if sender.only_waits else trainer.lines):
            threading.Thread(target=self._listen, args=(index, line), daemon=True).start()

    def expect_ended(self) -> None:
        """Wait for all engines. Raises Refused where one refuses, LinkError for one that is gone or silent."""
        said = self._all_said()
        if gone := next((heard for heard in said if isinstance(heard, LinkError)), None):
            raise gone
        if refusals := [why for what, why in said if what == REFUSED]:
            raise Refused("; ".join(refusals))

    def expect_whole(self) -> None:
        """Put down that all was sent: nothing is aborted from here on. Raises Refused where an abort has begun."""
        with self._changed:
            if self.reason:
                raise Refused(self.reason)
            self._sent.set()

    def abort(self, reason: str) -> None:
        """End the sending, where the sender can be made to."""
        with self._changed:
            self.reason = self.reason or reason
        self._sender.abort(reason)

    def _all_said(self) -> list[tuple[str, Any] | LinkError]:
        if self._sender.only_waits and not self._said:
            deadline = time.monotonic() + self._deadline_s
            heard = [self._heard(line, deadline - time.monotonic()) for line in self._lines]
            self._said = dict(enumerate(heard))
        wait_s = self._deadline_s + TOLD_S
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._said) == self._engines, wait_s):
                silent = self._engines - len(self._said)
                late = Silent(
                    f"engines that have not answered within {self._deadline_s:g} s: {silent} of {self._engines}"
                )
                late.examined = True
                raise late
        return [self._said[index] for index in range(self._engines)]

    def _listen(self, index: int, line: Line) -> None:
        said = self._heard(line, self._deadline_s)
        reason = _trouble(said)
        with self._changed:
            aborts = self._gives_up(reason)  # before anyone hears of it who would raise
            self._said[index] = said
            self._changed.notify_all()
            all_said = len(self._said) == self._engines
        if not reason and all_said and not self._sent.wait(TOLD_S):
            reason = f"all engines ended the update, and {TOLD_S:g} s later it was still being sent"
            with self._changed:
                aborts = self._gives_up(reason)
        if aborts:
            self._sender.abort(reason)

    def _heard(self, line: Line, deadline_s: float) -> tuple[str, Any] | LinkError:
        try:
            return hear_called(line, deadline_s)
        except LinkError as error:
            return error

    def _gives_up(self, reason: str) -> bool:
        """Whether the sending is aborted for a reason: not when all was sent. Called with the lock held."""
        if not reason or self._sent.is_set():
            return False
        self.reason = self.reason or reason
        return True


def _trouble(said: tuple[str, Any] | LinkError) -> str:
    """Why the sending is of no use any more; empty where an engine has ended."""
    if isinstance(said, LinkError):
        return f"an engine was lost during the transfer: {said}"
    return said[1] if said[0] == REFUSED else ""
