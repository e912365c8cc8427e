"""What a trainer and an engine say to each other in one update, on the line between them.

    trainer                          engine
    begun                     ->
    announce {manifest, ...}  ->
                              <-     ready | refused (why)
    go | call off             ->
             ... both transfer ...
                              <-     ended | refused (why)

`begun` says that the trainer's half of the subject is called now: silence after it is the subject's, not the suite's.
The trainer may say `failed` (why) at any time. A message is plain data of one key: what is said. Both sides keep to the
table below, each with a state of its own for every line: what a side says can cross what the other says.
"""

import contextlib
import time
from typing import Any

from suite.actors.link import Link, LinkError, Silent
from suite.processes.blame import SuiteFault, is_examined

BEGUN, ANNOUNCE, GO, CALL_OFF, FAILED = "begun", "announce", "go", "call off", "failed"
READY, REFUSED, ENDED = "ready", "refused", "ended"

# {state: {what may be said in it: the state after that}}
TRAINER_SAYS = {
    "new": {BEGUN: "begun", FAILED: "over"},
    "begun": {ANNOUNCE: "announced", FAILED: "over"},
    "announced": {FAILED: "over"},
    "ready": {GO: "moving", CALL_OFF: "over", FAILED: "over"},
    "moving": {FAILED: "over"},
    "over": {},
}
ENGINE_SAYS = {
    "new": {REFUSED: "over"},
    "begun": {REFUSED: "over"},
    "announced": {READY: "ready", REFUSED: "over"},
    "ready": {REFUSED: "over"},  # the decision has not come
    "moving": {ENDED: "over", REFUSED: "over"},
    "over": {},
}
CARRIES = {ANNOUNCE: dict, REFUSED: str, FAILED: str}  # all others: True

CALLED_OFF = "the trainer called the update off"
THE_SUITES = "the suite's own fault: "  # before what is said of an error that is
TOLD_S = 2.0  # how long a side that was told of the other's failure has to end its own half


class Cancelled(RuntimeError):
    """The trainer called the update off: another engine has refused it, say."""

    examined = True


class NotAnnounced(RuntimeError):
    """The trainer's half of the subject was called, and has not come back with what is to be announced."""

    examined = True


class OtherSide(RuntimeError):
    """What the other side has said of its error: it is the suite's own, or says something of what is examined."""

    def __init__(self, said: str) -> None:
        self.examined = THE_SUITES not in said
        super().__init__(said)


class TrainersHalfFailed(OtherSide):
    """The trainer's half of the update has failed before the transfer."""


class Refused(OtherSide):
    """An engine refused the update, or the trainer called it off; nothing, or not all, was sent."""


class NotStarted(Refused):
    """Nothing was sent, and both sides know it: the connections serve the next update."""


class Line:
    """One side of the dialogue of one update, on one link.

    says, hears: the tables of this side and of the other.
    """

    def __init__(self, link: Link, says: dict[str, dict[str, str]], hears: dict[str, dict[str, str]]) -> None:
        self._link, self._says, self._hears = link, says, hears
        self.state = "new"

    def may_say(self, what: str) -> bool:
        """Whether the table has it in this state."""
        return what in self._says[self.state]

    def say(self, what: str, deadline_s: float, carried: Any = True) -> None:
        """Raises LinkError where the other side is gone, KeyError for what the table does not have in this state."""
        self.state = self._says[self.state][what]
        self._link.send({what: carried}, deadline_s)

    def hear(self, deadline_s: float) -> tuple[str, Any]:
        """What the other side says, and what that carries. Raises LinkError for what it may not say now."""
        message, expected = self._link.receive(deadline_s), self._hears[self.state]
        what, carried = next(iter(message.items()), ("", None))
        if len(message) != 1 or what not in expected:
            raise LinkError(f"{self._link.peer} sent {sorted(message)!r:.120}, expected one of {', '.join(expected)}")
        if not (isinstance(carried, CARRIES[what]) if what in CARRIES else carried is True):
            raise LinkError(f"{self._link.peer} sent {what!r} with {carried!r:.120}")
        self.state = expected[what]
        return what, carried


def hear_called(line: Line, deadline_s: float) -> tuple[str, Any]:
    """As `Line.hear`, where the other side has called what is examined: its silence is of that."""
    try:
        return line.hear(deadline_s)
    except Silent as error:
        error.examined = True
        raise


class EngineSide:
    """The engine's side: one line to each rank of the trainer that speaks. Every answer goes to all of them."""

    def __init__(self, links: list[Link], deadline_s: float) -> None:
        self._lines = [Line(link, ENGINE_SAYS, TRAINER_SAYS) for link in links]
        self._deadline_s = deadline_s

    def announced(self) -> list[dict[str, Any]]:
        """What every rank announces. Raises TrainersHalfFailed where one says that it can't.

        Where a rank is silent, raises NotAnnounced if the subject had half of the time or more, and SuiteFault if less.
        """
        deadline = time.monotonic() + self._deadline_s
        for line in self._lines:
            try:
                self._heard(line, deadline - time.monotonic())
            except Silent as error:
                raise SuiteFault(f"the subject was not called in time: {error}") from error
        begun = time.monotonic()
        try:
            return [self._heard(line, deadline - time.monotonic()) for line in self._lines]
        except Silent as error:
            called_s = time.monotonic() - begun
            if called_s < self._deadline_s / 2:
                raise SuiteFault(f"the subject was called {called_s:.1f} s before the deadline: {error}") from error
            raise NotAnnounced(f"the trainer's half was called and announced nothing for {called_s:.1f} s") from error

    def expect_go(self) -> None:
        """Say that the update may begin, and hear that it does. Raises Cancelled where it is called off."""
        self._answer(READY)
        for line in self._lines:
            self._heard(line, self._deadline_s)

    def ended(self) -> None:
        """Say that the engine has the new weights."""
        self._answer(ENDED)

    def refuse(self, error: Exception) -> None:
        """Say why not, to every rank that still waits for a word."""
        self._answer(REFUSED, _said(error))

    def _heard(self, line: Line, deadline_s: float) -> Any:
        what, carried = line.hear(deadline_s)
        if what == FAILED:
            raise TrainersHalfFailed(f"the trainer's half of the update failed: {carried}")
        if what == CALL_OFF:
            raise Cancelled(CALLED_OFF)
        return carried

    def _answer(self, what: str, carried: Any = True) -> None:
        for line in self._lines:
            if not line.may_say(what):
                continue
            try:
                line.say(what, self._deadline_s, carried)
            except LinkError as error:
                print(f"the trainer was not told {what}: {error}")  # goes to the log; the call itself says why


class TrainerSide:
    """The side of one rank of the trainer: one line to each engine; of a rank that does not speak, none."""

    def __init__(self, links: tuple[Link, ...], deadline_s: float) -> None:
        self.lines = [Line(link, TRAINER_SAYS, ENGINE_SAYS) for link in links]
        self.deadline_s = deadline_s

    def begin(self) -> None:
        """Tell all engines that the subject is called now."""
        for line in self.lines:
            line.say(BEGUN, self.deadline_s)

    def announce(self, announcement: dict[str, Any]) -> list[str]:
        """Announce the update to all engines. Returns why those refuse it that do.

        An announcement that is no plain data has come from what is examined, and so does an engine's silence.
        """
        for line in self.lines:
            try:
                line.say(ANNOUNCE, self.deadline_s, announcement)
            except TypeError as error:
                error.examined = True
                raise
        heard = [hear_called(line, self.deadline_s) for line in self.lines]
        return [why for what, why in heard if what == REFUSED]

    def decide(self, go: bool) -> None:
        """Have all engines that are ready start the update, or none."""
        for line in self.lines:
            if line.state == "ready":
                line.say(GO if go else CALL_OFF, self.deadline_s)

    def failed(self, error: Exception) -> None:
        """Tell the engines, which may wait for what now never comes."""
        for line in self.lines:
            if line.may_say(FAILED):
                with contextlib.suppress(LinkError, KeyError):  # the engine may end the dialogue at this moment
                    line.say(FAILED, TOLD_S, _said(error))


def _said(error: Exception) -> str:
    """What the other side is told of an error."""
    return f"{'' if is_examined(error) else THE_SUITES}{type(error).__name__}: {error}"
