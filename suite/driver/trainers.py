"""The ranks of trainers, as pytest's process sees them: one trainer kept for each place, and spare ones."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from suite.driver import variables
from suite.processes.call import Call, NoAnswer, Process, RemoteError, gather
from suite.processes.launcher import Launcher
from suite.stages import Stage

CALL_DEADLINE_S = 120.0
POLL_S = 0.05
TRAINER = "suite.actors.trainer:Trainer"
Place = tuple[str, tuple[str, ...], bool, int]


class TrainerFailed(Exception):
    """A trainer could not do what the suite asks of it beside updates: nothing can be said of the subject."""

    def __init__(self, what: str, error: NoAnswer | RemoteError) -> None:
        self.said = f"the trainer could not {what}: {error.said}"
        super().__init__(f"the trainer could not {what}: {error}")


class TrainerGroup:
    """The ranks of one trainer. Every call goes to all of them; one that fails raises TrainerFailed."""

    def __init__(
        self,
        launcher: Launcher,
        name: str,
        world_size: int,
        device: str,
        visible: list[str | None],
        stage: Stage | None = None,
        joins: bool = True,
        more: variables.Variables | None = None,
    ) -> None:
        """Start the ranks, and return at once.

        Args:
            device: "cpu" or, as the ranks call it, a GPU.
            visible: CUDA_VISIBLE_DEVICES of every rank, None for unset; empty on a CPU.
            stage: has more to say of the environment.
            joins: whether it is to join groups: then what that needs is imported before anyone waits for it.
            more: environment variables of its own.
        """
        port = launcher.free_port()
        self.world_size = world_size
        self.processes: list[Process] = []
        for rank in range(world_size):
            arguments = {
                "rank": rank, "world_size": world_size, "device": device, "master_address": launcher.address,
                "master_port": port,
            }  # fmt: skip
            env = variables.of_trainer(device, visible[rank] if visible else "", rank, stage) | (more or {})
            process = launcher.start(f"{name}-rank{rank}", TRAINER, arguments, env, CALL_DEADLINE_S)
            self.processes.append(process)
        self._warmed = [process.prepare("warm_up") for process in self.processes if joins]
        self._computed: list[Call] = []
        self.connected: tuple[int, ...] = ()
        self.replacement: Callable[[], TrainerGroup] | None = None  # gives the trainer that `renew` goes on with
        self._holds: list[tuple[str, tuple]] = []  # the calls that have brought the weights to what they are
        self._to_restore: list[tuple[str, tuple]] = []  # the same calls, where new ranks have not made them yet

    @classmethod
    def of_stage(cls, launcher: Launcher, name: str, stage: Stage, world_size: int = 1) -> "TrainerGroup":
        """A trainer on the devices that its stage has for it."""
        device = "cpu" if stage.kind == "cpu" else "cuda"
        return cls(launcher, f"{name}-{stage.name}", world_size, device, list(stage.trainer_visible), stage)

    def expect_computing(self) -> None:
        """Have the ranks import what `load` needs and compute once, which takes seconds, before anyone waits for it."""
        self._computed = [process.prepare("warm_up_computing") for process in self.processes]

    def ready(self) -> None:
        """Wait until all ranks are up and have imported what updates need."""
        try:
            for process in self.processes:
                process.ready(CALL_DEADLINE_S)
            gather(self._warmed, CALL_DEADLINE_S)
        except (NoAnswer, RemoteError) as error:
            raise TrainerFailed("start", error) from error

    @property
    def is_quiet(self) -> bool:
        """Whether all ranks have done what they do before anyone waits for it."""
        return all(call.done() for call in [*self._warmed, *self._computed])

    def call(self, method: str, *args: object, deadline_s: float = CALL_DEADLINE_S, **kwargs: object) -> list:
        """Call a method on all ranks; their results by rank."""
        self.restore()
        try:
            return gather([p.submit(method, *args, **kwargs) for p in self.processes], deadline_s)
        except (NoAnswer, RemoteError) as error:
            raise TrainerFailed(f"{method}()", error) from error

    def load(self, path: str, dtype: str = "bfloat16") -> None:
        """Load a checkpoint, unless it is what the trainer holds unchanged."""
        wanted = [("load", (path, dtype))]
        if wanted not in (self._holds, self._to_restore):
            self._to_restore = wanted
        self.restore()

    def hold_random(self, config: str, seed: int | None, dtype: str = "bfloat16") -> None:
        """Hold seeded tensors of a model's names and shapes, or zeros, without the model."""
        self._to_restore = [("load_random", (config, dtype, seed))]
        self.restore()

    def fill(self, seed: int | None) -> None:
        """Give every weight its value of the seed, or zero."""
        self._change("fill", seed)
        self._holds = [self._holds[0], self._holds[-1]]

    def negate(self) -> None:
        """Give every weight the opposite sign."""
        self._change("negate")

    def turn_bits(self, one_in: int, seed: int, names: list[str] | None = None) -> int:
        """Turn a bit in one of so many elements of all weights, or of those; how many. Done again, it is undone."""
        return sum(self._change("turn_bits", one_in, seed, names))

    def step(self, count: int, seed: int, learning_rate: float) -> list[dict]:
        """Take optimiser steps on random tokens."""
        return self._change("step", count, seed, learning_rate)

    def restore(self) -> None:
        """Bring the weights to what they should be, where new ranks do not hold them yet."""
        calls, self._to_restore, self._holds = self._to_restore, [], [] if self._to_restore else self._holds
        try:
            for method, args in calls:
                self._change(method, *args)
        except TrainerFailed:
            self._to_restore, self._holds = calls, []
            raise

    def let_go(self) -> None:
        """Free the memory of the weights; they are restored when they are needed again."""
        if self._holds and self.alive:
            self.call("forget")
            self._to_restore, self._holds = self._holds, []

    @property
    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.alive for process in self.processes)

    def renew(self) -> None:
        """End these ranks; go on with those of the replacement, where there is one, which come to hold the same."""
        self.stop()
        self.connected = ()
        if self.replacement is None:
            return
        other = self.replacement()
        self.processes, self._warmed = other.processes, other._warmed
        self._to_restore, self._holds = self._to_restore or self._holds, []

    def stop(self) -> None:
        """End all ranks."""
        for process in self.processes:
            process.stop()

    def stop_soon(self) -> None:
        """Begin to end all ranks, and return at once: a rank that ends its CUDA context takes seconds."""
        threading.Thread(target=self.stop, name="trainer-stopper", daemon=True).start()

    def _change(self, method: str, *args: object) -> list:
        """Make a call that changes the weights. Where it fails, nobody knows what they are."""
        self.restore()
        held, self._holds = self._holds, []
        answers = self.call(method, *args)
        self._holds = [*held, (method, args)]
        return answers


class Trainers:
    """The trainers of a run.

    Args:
        launcher: starts the processes.
        ahead: so many spare trainers are kept ready, once one may be needed, so that nobody waits for one to start.
    """

    def __init__(self, launcher: Launcher, ahead: int) -> None:
        self._launcher, self._ahead = launcher, ahead
        self._kept: dict[Place, TrainerGroup] = {}
        self._spare: dict[Place, list[TrainerGroup]] = {}
        self._seeing: dict[tuple[str | None, str], list[TrainerGroup]] = {}
        self._lock = threading.Lock()

    def start(self, stage: Stage, world_size: int) -> TrainerGroup:
        """The trainer that is kept for a stage; started, not waited for."""
        place = _place(stage, world_size)
        with self._lock:
            if place not in self._kept:
                group = TrainerGroup.of_stage(self._launcher, f"trainer-of-{world_size}", stage, world_size)
                group.expect_computing()
                group.replacement = partial(self.spare, stage, world_size)
                self._kept[place] = group
            return self._kept[place]

    def of(self, stage: Stage, world_size: int) -> TrainerGroup:
        """The trainer that is kept for a stage, ready; a spare one takes the place of one that has ended.

        On GPUs the trainers of other stages let go of their weights, which take the room of this one's.
        """
        group = self.start(stage, world_size)
        if stage.kind == "gpu":
            for other in self._kept.values():
                if other is not group:
                    other.let_go()
        if not group.alive:
            group.renew()
        group.ready()
        with self._lock:
            self._fill(stage, world_size)
        return group

    def spare(self, stage: Stage, world_size: int = 1) -> TrainerGroup:
        """A trainer for whoever asks, who ends it; another begins to start."""
        place = _place(stage, world_size)
        with self._lock:
            waiting = self._spare.setdefault(place, [])
            group = waiting.pop(0) if waiting else self._start_spare(stage, world_size)
            self._fill(stage, world_size)
        group.ready()
        return group

    def start_seeing(self, visible: str | None, device: str) -> None:
        """Start a trainer ahead of the `seeing` that asks for it."""
        name = f"trainer-seeing-{'all' if visible is None else visible}"
        group = TrainerGroup(self._launcher, name, 1, device, [visible], joins=False)
        group.expect_computing()
        with self._lock:
            self._seeing.setdefault((visible, device), []).append(group)

    def seeing(self, visible: str | None, device: str) -> TrainerGroup:
        """A trainer of one rank that sees GPUs in a way of its own, for whoever asks, who ends it. It joins no group.

        Args:
            visible: its CUDA_VISIBLE_DEVICES; None for unset.
            device: what it calls its own GPU, such as "cuda:1".
        """
        if not self._seeing.get((visible, device)):
            self.start_seeing(visible, device)
        with self._lock:
            return self._seeing[visible, device].pop(0)

    def expanding(self, stage: Stage) -> TrainerGroup:
        """A trainer of one rank, ready, whose GPU memory is in expandable segments, for whoever asks, who ends it."""
        visible = list(stage.trainer_visible)
        group = TrainerGroup(self._launcher, "trainer-expanding", 1, "cuda", visible, stage, more=variables.EXPANDING)
        group.ready()
        return group

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Wait until no spare trainer is starting: what is measured has the machine to itself."""
        deadline = time.monotonic() + CALL_DEADLINE_S
        while time.monotonic() < deadline and not all(g.is_quiet for groups in self._spare.values() for g in groups):
            time.sleep(POLL_S)
        yield

    def close(self) -> None:
        """End all of them."""
        waiting = (group for groups in [*self._spare.values(), *self._seeing.values()] for group in groups)
        for group in [*self._kept.values(), *waiting]:
            group.stop()

    def _fill(self, stage: Stage, world_size: int) -> None:
        """Trainers of several ranks are never lost on purpose: none is kept ready for them."""
        spare = self._spare.setdefault(_place(stage, world_size), [])
        while world_size == 1 and len(spare) < self._ahead:
            spare.append(self._start_spare(stage, world_size))

    def _start_spare(self, stage: Stage, world_size: int) -> TrainerGroup:
        """On a CPU it imports nothing for computing, which it may never do: that would take the cores of others."""
        group = TrainerGroup.of_stage(self._launcher, "spare", stage, world_size)
        if stage.kind == "gpu":
            group.expect_computing()
        return group


def _place(stage: Stage, world_size: int) -> Place:
    return stage.kind, stage.trainer_visible, stage.hosts_apart, world_size
