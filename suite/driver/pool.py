"""Engines, started ahead of the tests that need them, shared between those tests, and ended after the last one.

An engine that starts costs half a minute. The pool knows from the collected tests which ones will be needed, in which
order; a thread starts the next while tests run on the ones before.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from suite import models
from suite.actors.written import weights_path
from suite.driver import variables
from suite.driver.engines import EngineHandle, EngineKey, NoReference, PortTaken, actor_of, expect_on, options_of
from suite.driver.patience import Patience
from suite.driver.room import Room, engines_at_once
from suite.driver.spares import Spares
from suite.driver.variables import Variables
from suite.processes.launcher import Launcher
from suite.stages import Stage
from suite.stages.hardware import gpu_memory_bytes
from suite.subjects import Subject

START_DEADLINE_S = 300.0
PORT_TAKEN, LOG_LINES = ("eaddrinuse", "address already in use"), 400  # what a log says of it, in small letters
CORES_A_START = 2  # what an engine that starts keeps busy, most of the time
MIN_STARTS, MAX_STARTS = 2, 16  # engines that start at once
POLL_S, RETRY_S = 0.1, 1.0


class Pool:
    """Starts, lends and ends engines.

    Args:
        launcher: starts the processes.
        stages, subjects: by name.
        announce: called with a line of text when an engine starts, is ready, or fails.
        timeline: puts down how long a block takes, "starting", "moving" or "judging", and what.
        tolerances: gets how far cold engines are apart that answer differently, in words, by engine.
        ahead: so many processes are kept that wait for an engine on GPUs (suite.driver.spares).
    """

    def __init__(
        self,
        launcher: Launcher,
        stages: dict[str, Stage],
        subjects: dict[str, Subject],
        announce: Callable[[str], None],
        timeline: Callable[[str, str], AbstractContextManager[None]] = lambda what, name: nullcontext(),
        tolerances: dict[str, str] | None = None,
        ahead: int = 0,
    ) -> None:
        self.launcher, self._stages, self._subjects = launcher, stages, subjects
        self.announce, self.timeline = announce, timeline
        self._tolerances = {} if tolerances is None else tolerances
        self.room = Room(stages, gpu_memory_bytes(), {name for name, one in subjects.items() if one.compares})
        self._spares = Spares(launcher, variables.of_spare_engine(stages.values()), ahead, announce)
        self._starts = max(MIN_STARTS, min(MAX_STARTS, len(os.sched_getaffinity(0)) // CORES_A_START))
        self._needs: Counter[EngineKey] = Counter()
        self._by_test: dict[str, list[EngineKey]] = {}
        self._started: dict[EngineKey, EngineHandle] = {}
        self._records: set[EngineKey] = set()
        self._failed: dict[EngineKey, Exception] = {}
        self._starting: set[EngineKey] = set()
        self._stopping: list[EngineKey] = []
        self._wanted: tuple[EngineKey, ...] = ()  # what is waited for
        self._held: tuple[EngineKey, ...] = ()  # the engines of the last test: a trainer may hold the first one's model
        self._mistake: Exception | None = None  # what the pool itself raised when it last chose an engine to start
        self.patience = Patience()
        self._changed, self._writing = threading.Condition(), threading.Lock()
        self._quiet = False
        self._closed = False

    def plan(self, needs: dict[str, list[EngineKey]], references: dict[str, list[EngineKey]]) -> None:
        """Say which engines each test will update, in the tests' order, and begin to start them.

        `references` are those that a test's engines are compared with, which start right after them. A reference that
        no test updates is stopped as soon as it has written down what it computes with.
        """
        needs = {test: [] if self.room.too_large(keys) else keys for test, keys in needs.items()}
        references = {
            test: [key for key in keys if not self.room.too_large([key])] for test, keys in references.items()
        }
        self._by_test = needs
        updated = Counter(key for keys in needs.values() for key in keys)
        in_order = dict.fromkeys(key for test, keys in needs.items() for key in (*keys, *references.get(test, ())))
        self._records = set(in_order) - set(updated)
        self._needs = Counter({key: updated[key] or 1 for key in in_order})
        for index in range(self._starts):
            threading.Thread(target=self._work, name=f"engine-starter-{index}", daemon=True).start()

    def get_all(self, keys: Sequence[EngineKey]) -> list[EngineHandle]:
        """A test's engines, once they run and have room beside each other and their trainer.

        Engines that were started ahead give way to them; one that has ended by itself is started again. Raises what a
        start raised, RuntimeError for a mistake of the pool itself, and TimeoutError.
        """
        with self._changed:
            for key in keys:
                self._needs[key] = max(1, self._needs[key])
                self._records.discard(key)
            self._held = tuple(keys)
            self._wait_for(self._held, lambda: self._run_all(keys))
            return [self._started[key] for key in keys]

    def _run_all(self, keys: Sequence[EngineKey]) -> bool:
        """Whether engines run and have room. Raises what the start of one raised. Called with the lock held."""
        for key in keys:
            if key in self._failed:
                raise self._failed[key]
            if key in self._started and not self._started[key].process.alive:
                self.announce(f"engine {key}: has ended by itself, and is started again")
                self.discard(self._started[key])
        return all(key in self._started and self._fits(key) for key in keys)

    def _wait_for(self, keys: tuple[EngineKey, ...], there: Callable[[], bool]) -> None:
        """Have these engines come first, and wait until `there`. Called with the lock held."""
        limit_s = START_DEADLINE_S + 60
        deadline = time.monotonic() + limit_s
        self._wanted, self._mistake = keys, None  # an earlier mistake may be over
        self._changed.notify_all()
        try:
            while not there():
                if self._mistake:
                    raise RuntimeError(f"no engine can be started: {self._mistake!r}") from self._mistake
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self._missing()} after {limit_s:g} s: {self._why_not()}")
                self._make_room()
                self._changed.wait(POLL_S)
        finally:
            self._wanted = ()

    def _make_room(self) -> None:
        """Where what is waited for lacks room, end an engine that was started ahead: the one that is needed last.

        One at a time: only when it has ended is it known what is free. Called with the lock held.
        """
        lacking = {gpu for key in self._wanted for gpu in self._lacking(key)}
        stays = {*self._wanted, *self._held}
        ahead = [key for key in self._started if key not in stays and lacking.intersection(self.room.devices_of(key))]
        if ahead and not self._stopping:
            last = max(ahead, key=self._needed_at)
            self.announce(f"engine {last}: ended, since {self._wanted[0]} or its trainer needs its room")
            self.discard(self._started[last])

    def _needed_at(self, key: EngineKey) -> int:
        """How many tests come before the next one that updates an engine; where none does, how many are left."""
        tests = [*self._by_test.values()]
        return next((index for index, keys in enumerate(tests) if key in keys), len(tests))

    def _missing(self) -> str:
        missing = [key for key in self._wanted if key not in self._started]
        return f"no engine {missing[0]}" if missing else f"no room for the trainer of {self._wanted[0]}"

    def _why_not(self) -> str:
        if starting := [key for key in self._wanted if key in self._starting]:
            return f"it is still starting: {starting[0]}"
        return f"there is no room beside {', '.join(map(str, self._there())) or 'no other'}"

    def done(self, test: str) -> None:
        """A test has ended: the engines that no later one needs end too."""
        for key in self._by_test.pop(test, []):
            with self._changed:
                self._needs[key] -= 1
                over = self._started.get(key) if self._needs[key] <= 0 else None
            if over:
                self.discard(over)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No engine starts or ends meanwhile, and no spare process: what is measured has the machine to itself."""
        with self._changed:
            self._quiet = True
            deadline = time.monotonic() + START_DEADLINE_S
            while (self._starting or self._stopping or self._spares.importing) and time.monotonic() < deadline:
                self._changed.wait(POLL_S)
        try:
            yield
        finally:
            with self._changed:
                self._quiet = False
                self._changed.notify_all()

    def discard(self, handle: EngineHandle) -> None:
        """End an engine: nothing needs it any more, or a test has left it in a state that no other can start from."""
        with self._changed:
            if self._started.get(handle.key) is not handle:
                return
            self._stopping.append(self._started.pop(handle.key).key)  # until it is gone its memory is not free
        threading.Thread(target=self._stop, args=(handle,), name="engine-stopper", daemon=True).start()

    def _stop(self, handle: EngineHandle) -> None:
        try:
            handle.process.stop(grace_s=0)  # vLLM takes seconds to end by itself, and holds the GPU's memory until then
        finally:
            with self._changed:
                self._stopping.remove(handle.key)
                self._changed.notify_all()

    def reference(self, key: EngineKey, seed: int, among: Iterable[EngineKey]) -> EngineKey:
        """An engine that cold-loads the checkpoint of `seed` and computes as `key` does.

        It is one of `among` if any fits: another subject's engine will do, also on another stage, but no server.
        """
        wanted = (key.model, self._stages[key.stage].layout, key.options, seed, key.again)
        alike = (o for o in among if (o.model, self._stages[o.stage].layout, o.options, o.seed, o.again) == wanted)
        of_its_own = replace(key, seed=seed, visible="", copy=0, serves=False)
        return next((other for other in alike if not other.is_server(self._stages[other.stage])), of_its_own)

    def oracle(self, key: EngineKey, seed: int, again: bool = False) -> str:
        """Where an engine that cold-loaded this checkpoint (with `again`: a second one) wrote what it computes with."""
        key = replace(key, seed=seed, again=again)
        path = str(self.oracle_path(key))
        files = [weights_path(path, rank) for rank in range(self._stages[key.stage].engine_ranks)]
        reference = self.reference(key, seed, [*self._needs])

        def written() -> bool:
            if all(file.exists() for file in files):
                return True
            if reference in self._failed:
                raise NoReference(reference, self._failed[reference]) from self._failed[reference]
            if self._needs[reference] <= 0:  # no test will update it, so nobody would end it
                self._needs[reference] = 1
                self._records.add(reference)
            return False

        with self._changed:
            self._wait_for((reference,), written)
        return path

    def tolerate(self, key: EngineKey, how_far: str) -> None:
        """Tell how far cold engines that compute as `key` does are apart, once."""
        name = " ".join(self._computing(key))
        if self._tolerances.get(name) != how_far:
            self._tolerances[name] = how_far
            self.announce(f"cold engines of {name} answer differently, which is allowed: {how_far}")

    def checkpoint(self, model: str, seed: int, dtype: str = "bfloat16") -> str:
        """The directory of a model's checkpoint, written when first asked for."""
        directory = self.launcher.directory / "models" / f"{model}-{seed}-{dtype}"
        with self._writing:
            if not (directory / "model.safetensors").exists():
                models.write_checkpoint(models.MODELS[model], seed, directory, dtype)
        return str(directory)

    def config(self, model: str) -> str:
        """The directory of a model's config alone."""
        return str(models.write_config(models.MODELS[model], self.launcher.directory / "models" / model))

    def scratch(self) -> Path:
        """A path for a snapshot of an engine's weights, unused so far."""
        return self.launcher.scratch("snapshot")

    def close(self) -> None:
        """Stop starting. What runs is ended with the run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._spares.close()

    def oracle_path(self, key: EngineKey) -> Path:
        """Where engines that compute as `key` does write what they compute with after a cold load."""
        parts = [*self._computing(key), str(key.seed), *(["again"] if key.again else [])]
        return self.launcher.directory / "oracles" / "-".join(parts)

    def _computing(self, key: EngineKey) -> list[str]:
        return [*map(str, (key.model, *self._stages[key.stage].layout)), *(f"{n}={v}" for n, v in key.options)]

    def _work(self) -> None:
        """Start one engine after the other. An error in the pool itself does not end this: `_wait_for` raises it."""
        while not self._closed:
            try:
                if (key := self._next()) is not None:
                    self._attempt(key)
            except Exception as error:
                with self._changed:
                    self._mistake = error
                    self._changed.notify_all()
                    self._changed.wait(RETRY_S)

    def _attempt(self, key: EngineKey) -> None:
        """Start an engine, and put down how that ended before announcing it: announcing may fail."""
        try:
            handle = self._start_again_if_port_taken(key)
        except Exception as error:  # whatever it was, the test that needs the engine reports it
            self._ended_start(key, failed=error)
            self.announce(f"engine {key}: failed to start ({type(error).__name__})")
            return
        if self._ended_start(key, handle):
            self.discard(handle)

    def _ended_start(self, key: EngineKey, handle: EngineHandle | None = None, failed: Exception | None = None) -> bool:
        """Put down an engine that has started, or why it has not. Returns whether nothing needs it any more."""
        with self._changed:
            self._starting.discard(key)
            self._changed.notify_all()
            if failed is not None:
                self._failed[key] = failed
                return False
            self._started[key] = handle
            if key in self._records:
                self._needs[key] = 0
            return self._needs[key] <= 0  # also where the tests that needed it have ended meanwhile

    def _next(self) -> EngineKey | None:
        """The engine to start next: the one a test waits for, else the next in order while there is room."""
        with self._changed:
            while not self._closed:
                key = None if self._quiet else self._choose()
                if key is not None:
                    self._starting.add(key)
                    return key
                self._fill_spares()
                self._changed.wait(1.0)
            return None

    def _fill_spares(self) -> None:
        """Start a spare process, where that delays no engine that starts. Called with the lock held."""
        # An engine that is there counts as one to come where a later test needs it: the one before may lose it.
        if not self._quiet and len(self._starting) + self._spares.importing < self._starts:
            there = {*self._starting, *self._started}
            to_come = (key for key, n in self._needs.items() if n > (key in there) and key not in self._failed)
            self._spares.fill(map(self._environment, to_come))

    def _choose(self) -> EngineKey | None:
        """In order, but for engines on other devices than one that has to wait for room."""
        busy = {*self._started, *self._starting, *self._failed}
        waiting = [key for key, needs in self._needs.items() if needs > 0 and key not in busy]
        if wanted := [key for key in self._wanted if key in waiting]:
            return next(filter(self._fits, wanted), None)
        if len(self._started) + len(self._starting) >= engines_at_once(len(self._started)):
            return None
        taken: set[str] = set()
        for key in waiting:
            devices = self.room.devices_of(key)
            if taken.isdisjoint(devices) and self._fits(key):
                return key
            taken.update(devices)
        return None

    def _fits(self, key: EngineKey) -> bool:
        return not self._lacking(key)

    def _lacking(self, key: EngineKey) -> set[str]:
        """The GPUs without room for an engine beside the others and the last test's trainer, which holds a model."""
        return self.room.lacking(key, self._there(), trained=next(iter(self._held), None))

    def _there(self) -> tuple[EngineKey, ...]:
        return (*self._started, *self._starting, *self._stopping)

    def _start_again_if_port_taken(self, key: EngineKey) -> EngineHandle:
        """Start an engine, a second time where a port that vLLM had found free was taken before it listened there."""
        try:
            return self._start(key)
        except PortTaken as error:
            self.announce(f"engine {key}: {error}; it is started again")
            return self._start(key)

    def _start(self, key: EngineKey) -> EngineHandle:
        stage, subject, started = self._stages[key.stage], self._subjects[key.subject], time.monotonic()
        self.announce(f"engine {key}: starting")
        link_path, (actor, more) = self.launcher.link_path(), actor_of(key, stage, self.launcher)
        arguments = {
            "model": self.config(key.model) if key.seed is None else self.checkpoint(key.model, key.seed),
            "subject": subject.plain(),
            "link_path": link_path,
            "tensor_parallel_size": stage.tensor_parallel_size,
            "oracle_path": None if key.seed is None or key.is_server(stage) else str(self.oracle_path(key)),
            "options": options_of(key, stage),
            **more,
        }
        of_its_kind = ("-again" if key.again else "") + ("-serving" if key.serves else "")
        name = f"engine-{key.model}-{key.stage}-{key.subject}-{key.seed}{of_its_kind}"
        process = self._spares.start(name, actor, arguments, self._environment(key), START_DEADLINE_S)
        try:
            facts = process.ready(START_DEADLINE_S)
            if stage.kind == "gpu" and key.visible == "":
                expect_on(stage.devices_of_engine(key.copy), facts, name)
        except Exception as error:
            process.stop()
            if any(sign in process.tail(LOG_LINES).lower() for sign in PORT_TAKEN):
                raise PortTaken("a port that vLLM had found free was taken by another process") from error
            raise
        self.announce(f"engine {key}: ready after {time.monotonic() - started:.0f} s")
        return EngineHandle(key, process, link_path, stage.engine_ranks, subject.plain(), facts=facts)

    def _environment(self, key: EngineKey) -> Variables:
        stage, eager = self._stages[key.stage], options_of(key, self._stages[key.stage])["enforce_eager"]
        env = variables.of_engine(stage, key.copy, eager) | self._subjects[key.subject].engine_environment()
        return env if key.visible == "" else env | {"CUDA_VISIBLE_DEVICES": key.visible}
