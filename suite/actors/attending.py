"""A trainer sends while it listens to the engines: where one fails, the sending ends too."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from suite.actors.dialogue import REFUSED, TOLD_S, Line, Refused, TrainerSide
from suite.actors.link import LinkError


class Sends(Protocol):
    """What is attended to: the trainer's half of a subject."""

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
    attending.sent.set()
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
        self.sent = threading.Event()
        self.reason = ""
        for index, line in enumerate(trainer.lines):
            threading.Thread(target=self._listen, args=(index, line), daemon=True).start()

    def expect_ended(self) -> None:
        """Wait for all engines. Raises Refused where one refuses, LinkError for one that is gone or silent."""
        said = self._all_said()
        if gone := next((heard for heard in said if isinstance(heard, LinkError)), None):
            raise gone
        if refusals := [why for what, why in said if what == REFUSED]:
            raise Refused("; ".join(refusals))

    def abort(self, reason: str) -> None:
        """End the sending, where the sender can be made to."""
        self.reason = self.reason or reason
        self._sender.abort(reason)

    def _all_said(self) -> list[tuple[str, Any] | LinkError]:
        wait_s = self._deadline_s + TOLD_S
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._said) == self._engines, wait_s):
                silent = self._engines - len(self._said)
                raise LinkError(f"{silent} engines have not answered within {self._deadline_s:g} s")
        return [self._said[index] for index in range(self._engines)]

    def _listen(self, index: int, line: Line) -> None:
        try:
            said: tuple[str, Any] | LinkError = line.hear(self._deadline_s)
        except LinkError as error:
            said = error
        with self._changed:
            self._said[index] = said
            self._changed.notify_all()
            all_said = len(self._said) == self._engines
        if isinstance(said, LinkError):
            self._abort_sending(f"an engine was lost during the transfer: {said}")
        elif said[0] == REFUSED:
            self._abort_sending(said[1])
        elif all_said and not self.sent.wait(TOLD_S):
            self._abort_sending(f"all engines ended the update, and {TOLD_S:g} s later it was still being sent")

    def _abort_sending(self, reason: str) -> None:
        if not self.sent.is_set():
            self.abort(reason)
