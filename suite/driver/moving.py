"""Updates: the trainer is connected with the engines, both move the weights, and what hangs is ended."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from suite.actors.dialogue import NotStarted
from suite.driver import parts, wrong
from suite.driver.engines import EngineHandle
from suite.driver.expected import Differs
from suite.driver.together import Together
from suite.driver.trainers import TrainerFailed
from suite.processes.call import (
    Call,
    NoAnswer,
    NotBegun,
    ProcessDied,
    RemoteError,
    SubjectFailed,
    gather,
    is_the_suites,
)

CALL_MARGIN_S = 5.0  # for an answer to arrive that was given just in time
JOIN_DEADLINE_S = 130.0  # for a group to come up: extensions and senders give up by themselves after 120 s
TRAINER_END_S, ENGINE_END_S = 3.0, 5.0  # for a half to end by itself when the other has failed, until it is ended


@dataclass(frozen=True)
class Moved:
    """One update as it was measured: from the earliest start to the latest end, on the machine's monotonic clock."""

    elapsed_s: float
    bytes_sent: int
    tensors: int
    steps_s: dict[str, float]
    calls: int  # that the first engine made to all its workers
    announce_s: float = 0.0  # for which the trainer's half prepared what it announced
    over_s: dict[str, float] = field(default_factory=dict)  # when each part was over, of one engine; see `parts`
    pause_s: float | None = None  # from the last token before to the first after, where requests were in flight
    token_s: float | None = None  # between two tokens before, likewise
    cache_is_held: bool = False  # whether requests that ran kept reset_prefix_cache() from resetting at first


@dataclass(frozen=True)
class Outcome:
    """How an update with a fault ended on both sides: what each raised, or nothing where it succeeded."""

    engine_error: str
    trainer_error: str


class Moving(Together):
    """Updates of all engines."""

    def connect(self) -> None:
        """Connect the trainer with the engines, unless they still are."""
        self.trainer.restore()
        wanted = tuple(id(engine) for engine in self.engines)
        if self.trainer.connected == wanted and all(e.connection == id(self.trainer) for e in self.engines):
            return
        self.trainer.connected = ()
        subject, paths = self.subject.plain(), [engine.link_path for engine in self.engines]
        speakers = self.subject.speakers(self.trainer.world_size)
        calls = [engine.process.submit("accept", speakers) for engine in self.engines]
        calls += [rank.submit("connect", subject, paths, self.call_deadline_s) for rank in self.trainer.processes]
        gather(calls, self.call_deadline_s)
        self._meet()
        self.trainer.connected = wanted
        for engine in self.engines:
            engine.connection = id(self.trainer)

    @property
    def group_size(self) -> int:
        """The ranks of a group of one rank of the trainer and all workers of the engines."""
        return 1 + sum(engine.ranks for engine in self.engines)

    def offsets(self) -> Iterator[tuple[EngineHandle, int]]:
        """Each engine, and the rank of its first worker in such a group, where the trainer's is 0."""
        offset = 1
        for engine in self.engines:
            yield engine, offset
            offset += engine.ranks

    def _meet(self) -> None:
        address, port, world_size = self.pool.launcher.address, self.pool.launcher.free_port(), self.group_size
        calls = [rank.submit("invite", address, port, world_size) for rank in self.trainer.processes]
        for engine, offset in self.offsets():
            calls.append(engine.process.submit("connect", address, port, offset, world_size))
        self._gathered(calls, JOIN_DEADLINE_S)

    def update(
        self,
        deadline_s: float | None = None,
        reset_cache: bool = True,
        paused: bool = False,
        bracket: bool = True,
        running: dict | None = None,
        saved: str = "",
        **how: object,
    ) -> Moved:
        """One update of all engines; `how` is order=, alter=, relabel=, withhold=, call_off= of the trainer's update.

        `paused=True` has engines that were paused go on right after it, see `Engine.update_paused`; `bracket=False`
        leaves out begin_update and end_update; `running` are requests during the update, see
        `ServingEngine.update_running`; `saved` is where to write what is there right after it, as `snapshot` does,
        of an update without these two.
        Raises the first failure of either side, and GivenUp where earlier ones leave no hope.
        """
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        self.pool.patience.expect_hope(self.subject.name)
        self.connect()
        self.updates += 1
        with self.pool.timeline("moving", str(self.engines[0].key)):
            method, first = ("update_running", [running]) if running else ("update_paused" if paused else "update", [])
            method = "update_saved" if saved else method
            asked, calls = [*first, deadline_s, reset_cache, bracket], []
            # First the trainer: engines wait for what it announces.
            sending = [rank.submit("update", deadline_s, **how) for rank in self.trainer.processes]
            for index, engine in enumerate(self.engines):
                where = [f"{saved}-{index}"] if saved else []
                calls.append(engine.process.submit(method, *where, *asked))
            halves = self._gathered([*calls, *sending], deadline_s + CALL_MARGIN_S)
        self.pool.patience.succeeded(self.subject.name)
        started = min(half["started_s"] for half in halves)
        ended = max(half["ended_s"] for half in halves)
        sent = max((half for half in halves if "bytes_sent" in half), key=lambda half: half["bytes_sent"])
        first = halves[0]
        given = {name: first[name] for name in ("pause_s", "token_s", "cache_is_held") if name in first}
        over_s = parts.moments(first, sent, started, ended) if len(self.engines) == 1 else {}
        told = (sent["bytes_sent"], sent["tensors"], first["steps_s"], first["calls"], sent["announce_s"], over_s)
        return Moved(ended - started, *told, **given)

    def refusal(self, deadline_s: float, **how: object) -> str:
        """Attempt an update that has to be refused and return the error; fails if it succeeds."""
        try:
            self.update(deadline_s, **how)
        except SubjectFailed as error:  # one that runs into its deadline is not refused: that goes to the test
            return "\n".join([error.said, *getattr(error, "__notes__", [])])
        raise Differs(f"an error for an update{wrong.in_words(**how)}", "success", self.where)

    def update_until(self, deadline_s: float, fault: dict) -> Outcome:
        """One update of one engine with a fault, see suite.actors.sending.Fault.

        Fails where the engine does not answer in time. A trainer that has been stopped is not waited for.
        """
        self.pool.patience.expect_hope(self.subject.name)
        self.connect()
        self.updates += 1
        (engine,), (rank,) = self.engines, self.trainer.processes
        with self.pool.timeline("moving", str(engine.key)):
            updating = engine.process.submit("update", deadline_s)
            sending = rank.submit("update", deadline_s, fault=fault)
            engine_error = _raised(updating, deadline_s + CALL_MARGIN_S)
            stopped = fault["signal"] == "STOP"
            trainer_error = "stopped" if stopped else _raised(sending, deadline_s + CALL_MARGIN_S)
        self.disconnect()
        return Outcome(engine_error, trainer_error)

    def disconnect(self) -> None:
        """Have the next update make new connections: after a failure the old ones may be out of step."""
        self.trainer.connected = ()

    def _gathered(self, calls: list[Call], deadline_s: float) -> list[dict]:
        """What trainer and engines answer. Where one fails, the processes of the others are ended if they go on."""
        began_s = time.monotonic()
        try:
            return gather(calls, deadline_s, TRAINER_END_S)
        except NotBegun:
            self.disconnect()
            raise
        except (NoAnswer, RemoteError) as error:
            if not self._not_started(calls):
                self.disconnect()
            if lost := self._end_late(calls):
                error.add_note(f"ended, since they did not come back: {', '.join(lost)}")
            if (lost or isinstance(error, ProcessDied)) and not is_the_suites(error):
                self.pool.patience.lost(self.subject.name, time.monotonic() - began_s, error.cause)
            raise

    def _not_started(self, calls: list[Call]) -> bool:
        """Whether an engine refused the update before anything was sent, and all have heard of it."""
        ours = [call for call in calls if call.process in self.trainer.processes]
        heard = [call for call in ours if getattr(call.error(), "kind", "") == NotStarted.__name__]
        return heard == ours and all(call.done() for call in calls)

    def _end_late(self, calls: list[Call]) -> list[str]:
        """End what has not answered: the trainer first, which may be all that an engine waits for. Returns names."""
        late = [call for call in calls if not call.done()]
        names = [call.process.name for call in late if call.process in self.trainer.processes]
        if names or not self.trainer.alive:
            with contextlib.suppress(TrainerFailed):  # the next update says so; now the failure itself is told
                self.trainer.renew()
        engines = [call for call in late if call.process not in self.trainer.processes and not call.done()]
        deadline = time.monotonic() + ENGINE_END_S
        for call in engines:
            with contextlib.suppress(NoAnswer, RemoteError):
                call.result(max(0.0, deadline - time.monotonic()))
            if not call.done():
                names.append(call.process.name)
                call.process.stop()
        return names


def _raised(call: Call, deadline_s: float) -> str:
    """What a call raised, empty where it succeeded; a process that has ended counts as having said so.

    Raises what the suite itself has raised, unless that only says that the other side is gone.
    """
    try:
        call.result(deadline_s)
    except (RemoteError, ProcessDied) as error:
        if is_the_suites(error) and not error.is_an_echo:
            raise
        return error.said
    return ""
