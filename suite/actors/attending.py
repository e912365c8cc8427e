"""A trainer sends while it listens to the engines: where one fails, the sending ends too."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from suite.actors.link import Link, LinkError

TOLD_S = 2.0  # how long a side that was told of the other's failure has to end its own half


class Refused(RuntimeError):
    """An engine refused the update; nothing, or not all, was sent."""


def send_attended(
    sender: Any,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    engines: tuple[Link, ...],
    deadline_s: float,
    sent_all: Callable[[], None],
) -> int:
    """Have `sender` send, call `sent_all`, and wait until all engines have acknowledged. Returns the bytes sent.

    Where an engine refuses meanwhile or is gone, or where all have ended and the sender still sends `TOLD_S` later, the
    sender's `abort(reason)` is called, if it has one, and Refused says why. A sender without `abort` may never come
    back: whoever started this process ends it then. What the sender itself raises is raised, after its `abort`.
    """
    attending = _Attending(sender, engines, deadline_s)
    try:
        sent = sender.send(named_tensors)
    except Exception as error:
        if attending.reason:
            raise Refused(attending.reason) from error
        attending.abort(f"the trainer's sender raised {type(error).__name__}: {error}")
        raise
    attending.sent.set()
    sent_all()
    expect_ended(attending.answers(deadline_s))
    return sent


def expect_ended(answers: list[dict[str, Any]]) -> None:
    """Raises Refused where an engine says that it has refused."""
    if refusals := [answer["refused"] for answer in answers if "refused" in answer]:
        raise Refused("; ".join(refusals))


class _Attending:
    """Takes every engine's last message of an update while another thread sends.

    reason: why the sending was aborted; empty as long as it was not.
    """

    def __init__(self, sender: Any, engines: tuple[Link, ...], deadline_s: float) -> None:
        self._sender, self._deadline = sender, time.monotonic() + deadline_s
        self._changed = threading.Condition()
        self._said: dict[int, dict[str, Any] | LinkError] = {}
        self._engines = len(engines)
        self.sent = threading.Event()
        self.reason = ""
        for index, engine in enumerate(engines):
            threading.Thread(target=self._listen, args=(index, engine, deadline_s), daemon=True).start()

    def answers(self, deadline_s: float) -> list[dict[str, Any]]:
        """What the engines said, once all have; raises LinkError for one that is gone or silent."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._said) == self._engines, deadline_s + TOLD_S):
                raise LinkError(f"{self._engines - len(self._said)} engines have not answered within {deadline_s:g} s")
        answers = [self._said[index] for index in range(self._engines)]
        if gone := next((answer for answer in answers if isinstance(answer, LinkError)), None):
            raise gone
        return answers

    def abort(self, reason: str) -> None:
        """End the sending, where the sender can be made to."""
        self.reason = self.reason or reason
        if hasattr(self._sender, "abort"):
            self._sender.abort(reason)

    def _listen(self, index: int, engine: Link, deadline_s: float) -> None:
        try:
            said: dict[str, Any] | LinkError = engine.receive(deadline_s)
        except LinkError as error:
            said = error
        with self._changed:
            self._said[index] = said
            self._changed.notify_all()
            all_said = len(self._said) == self._engines
        if isinstance(said, LinkError):
            self._abort_sending(f"an engine was lost during the transfer: {said}")
        elif "refused" in said:
            self._abort_sending(said["refused"])
        elif all_said and not self.sent.wait(TOLD_S):
            self._abort_sending(f"all engines ended the update, and {TOLD_S:g} s later it was still being sent")

    def _abort_sending(self, reason: str) -> None:
        if not self.sent.is_set():
            self.abort(reason)
