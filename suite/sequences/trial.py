"""Sequences played one after the other until one fails, and the failing one made shorter, in bounded time."""

import time
from collections.abc import Callable

from reports.units import counted
from suite.processes.call import DeadlineExceeded, ProcessDied
from suite.sequences.player import Player, Sequence, Step, text
from suite.session.verdicts import FAILURES

SAID_CHARACTERS, PLAYED_CHARACTERS = 300, 800  # that a failure's message has of what was raised, and of the sequence
REPLAYS = 3  # attempts to reproduce a failure: its cause may alternate between runs


class Trial:
    """Plays sequences as they are drawn, until one fails or the time is over; steps after that do nothing.

    Args:
        budget_s: after so many seconds no sequence begins any more.
    """

    def __init__(self, player: Player, budget_s: float) -> None:
        self._player, self._deadline = player, time.monotonic() + budget_s
        self._sequence: Sequence = ()
        self._idle = True
        self.error: Exception | None = None
        self.played = self.left_out = 0

    def begin(self) -> None:
        """A sequence begins. It starts from a whole update, so that it can be played without the ones before."""
        late = time.monotonic() > self._deadline
        self.left_out += late
        self._idle = late or self.error is not None
        if not self._idle:
            self.played += 1
            before, self._sequence = self._sequence, ()
            self.take(self._player.start)
            if self.error and before:
                self._sequence = (*before, *self._sequence)

    def take(self, step: Step) -> None:
        """Take a step, unless one has failed before."""
        if self._idle:
            return
        self._sequence += (step,)
        try:
            self._player.take(step)
        except Exception as error:  # hypothesis must not see it: it would play the sequence on what has become of it
            self.error, self._idle = error, True

    def __str__(self) -> str:
        cut = f"; {self.left_out} more left out since the time was over" if self.left_out else ""
        return (
            f"{counted(self.played, 'sequence')} of {counted(self._player.steps, 'step')} in all,"
            f" {'failed' if self.error else 'passed'}{cut}"
        )

    def counts(self) -> dict[str, int]:
        """How many sequences and steps were played, and how many steps of every kind ended how."""
        player = self._player
        counts = dict(sorted(player.counts.items()))
        return {"sequences": self.played, "left out": self.left_out, "steps": player.steps, **counts}

    def failure(self, shrinking_s: float) -> Exception | None:
        """What has failed, if anything, with the shortest sequence that fails again, sought for so many seconds."""
        if self.error is None or not isinstance(self.error, FAILURES):
            return self.error
        print(f"failed first: {text(self._sequence)}")
        if isinstance(self.error, DeadlineExceeded | ProcessDied):
            return _failed(self.error, self._sequence, "not played again: a process hangs or has died")
        again = Again(self._player, time.monotonic() + shrinking_s)
        steps = self._sequence[1:]
        try:
            shorter = next(filter(None, (again.fails(steps) for _ in range(REPLAYS))), None)
            if shorter is None:
                came_before = f"{counted(self.played - 1, 'sequence')}, {counted(self._player.steps, 'step')} in all"
                how = f"played again {REPLAYS} times, it passed: what the engine had seen before counts ({came_before})"
                return _failed(self.error, self._sequence, how)
            shorter = shrink(again.fails, shorter)
        except Unrecoverable as error:
            shorter, how = again.shortest or steps, str(error)
        else:
            how = f"the shortest of {again.tried} that were tried"
        how += f"; it failed first after {counted(len(self._sequence), 'step')} of sequence {self.played}"
        return _failed(again.error or self.error, (self._player.start, *shorter), how)


class Unrecoverable(Exception):
    """No further sequence can be tried."""


class Again:
    """Plays sequences again on an engine where one has failed.

    shortest, error: the last sequence that failed, up to the step that did, and what that raised.
    """

    def __init__(self, player: Player, deadline: float) -> None:
        self._player, self._deadline = player, deadline
        self.tried = 0
        self.shortest: Sequence = ()
        self.error: Exception | None = None

    def fails(self, steps: Sequence) -> Sequence | None:
        """The steps up to the one that fails; None where none does. Raises Unrecoverable where they can't be tried."""
        if time.monotonic() > self._deadline:
            raise Unrecoverable(f"the shortest of {self.tried} that were tried before the time was over")
        try:
            self._player.recover()
        except Exception as error:
            raise Unrecoverable(f"no more were tried: the engine could not be brought back: {_said(error)}") from error
        self.tried += 1
        for index, step in enumerate(steps):
            try:
                self._player.take(step)
            except FAILURES as error:
                self.shortest, self.error = steps[: index + 1], error
                return self.shortest
        return None


def shrink(fails: Callable[[Sequence], Sequence | None], steps: Sequence) -> Sequence:
    """Leave out steps, many at first and then one by one, as long as what is left fails; `fails` may shorten it too."""
    size = len(steps) // 2
    while size:
        start = 0
        while start < len(steps):
            shorter = fails(steps[:start] + steps[start + size :])
            if shorter is None:
                start += size
            else:
                steps = shorter
        size //= 2
    return steps


def _failed(error: Exception, sequence: Sequence, how: str) -> AssertionError:
    """A message that is bounded, with the last of the steps where there are too many; its cause says it all."""
    played = text(sequence)
    played = played if len(played) <= PLAYED_CHARACTERS else f"... {played[-PLAYED_CHARACTERS:]}"
    failure = AssertionError(f"{_said(error)}\nafter: {played}\n({how})")
    failure.__cause__ = error
    return failure


def _said(error: Exception) -> str:
    said = str(getattr(error, "said", error))
    return said if len(said) <= SAID_CHARACTERS else f"{said[:SAID_CHARACTERS]} ..."
