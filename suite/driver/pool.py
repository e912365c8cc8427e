"""Engines, started ahead of the tests that need them, shared between those tests, and ended after the last one.

An engine that starts costs half a minute. The pool knows from the collected tests which ones will be needed, in which
order; a thread starts the next while tests run on the ones before.
"""

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from suite import models
from suite.driver.patience import Patience
from suite.processes.process import Process, Run, launch
from suite.session import environment
from suite.stages import UPDATE_TIMEOUT_S, Stage
from suite.subjects import Subject

START_DEADLINE_S = 300.0
BECOME_DEADLINE_S = 15.0
CORES_A_START = 4  # an engine that starts keeps one to three cores busy, more where it compiles bytecode
MIN_STARTS, MAX_STARTS = 2, 16  # engines that start at once
ENGINE_BYTES = 2.0e9  # of a GPU, for an engine without its weights: CUDA's context, cache, graphs, buffers
GPU_FRACTION = 0.9  # of a GPU's memory may be planned for
GB = 1e9
HOST_BYTES = 4e9  # of host memory, for an engine and what it loads
POLL_S = 0.1


@dataclass(frozen=True)
class EngineKey:
    """What makes two engines the same.

    seed: of the checkpoint that it cold-loads, None for dummy weights. options: further arguments of vllm.LLM.
    visible: its CUDA_VISIBLE_DEVICES where that is not its stage's; None for unset. copy: counts engines of a stage.
    """

    model: str
    stage: str
    subject: str
    seed: int | None
    options: tuple[tuple[str, object], ...] = ()
    visible: str | None = ""
    copy: int = 0

    def __str__(self) -> str:
        extra = [f"{name}={value}" for name, value in self.options]
        extra += [] if self.visible == "" else [f"CUDA_VISIBLE_DEVICES={self.visible}"]
        extra += [f"#{self.copy}"] if self.copy else []
        return " ".join([self.model, self.stage, self.subject, f"seed={self.seed}", *extra])


@dataclass
class EngineHandle:
    """A started engine as pytest sees it."""

    key: EngineKey
    process: Process
    link_path: str
    ranks: int
    extension: str  # what its workers have now
    connection: object = None  # which trainer and group it last joined
    facts: dict = field(default_factory=dict)

    def become(self, subject: Subject) -> None:
        """Have the workers exchange their extension for this subject's, unless they have it."""
        if self.extension != subject.extension:
            self.extension, self.connection = "", None
            self.process.call("become", subject.plain(), deadline_s=BECOME_DEADLINE_S)
            self.extension = subject.extension


class Pool:
    """Starts, lends and ends engines.

    Args:
        run: owns the processes.
        stages, subjects: by name.
        announce: called with a line of text when an engine starts, is ready, or fails.
        timeline: puts down how long a block takes, "starting", "moving" or "judging", and what.
    """

    def __init__(
        self,
        run: Run,
        stages: dict[str, Stage],
        subjects: dict[str, Subject],
        announce: Callable[[str], None],
        timeline: Callable[[str, str], AbstractContextManager[None]] = lambda what, name: nullcontext(),
    ) -> None:
        self._run, self._stages, self._subjects = run, stages, subjects
        self.announce, self.timeline = announce, timeline
        self._gpu_memory = environment.gpu_memory_bytes()
        self._needs: Counter[EngineKey] = Counter()
        self._by_test: dict[str, list[EngineKey]] = {}
        self._started: dict[EngineKey, EngineHandle] = {}
        self._records: set[EngineKey] = set()
        self._failed: dict[EngineKey, Exception] = {}
        self._starting: set[EngineKey] = set()
        self._stopping: list[EngineKey] = []
        self._wanted: EngineKey | None = None
        self._served: EngineKey | None = None  # the one that a test got last: its stage's trainer may hold its model
        self.patience = Patience()
        self._changed = threading.Condition()
        self._quiet = False
        self._closed = False

    def plan(self, needs: dict[str, list[EngineKey]], references: dict[str, list[EngineKey]]) -> None:
        """Say which engines each test will update, in the tests' order, and begin to start them.

        `references` are those that a test's engines are compared with, which start right after them. One that no test
        updates ends once it has written down what it computes with.
        """
        needs = {test: [key for key in keys if not self.too_large(key)] for test, keys in needs.items()}
        references = {test: [key for key in keys if not self.too_large(key)] for test, keys in references.items()}
        self._by_test = needs
        updated = Counter(key for keys in needs.values() for key in keys)
        in_order = dict.fromkeys(key for test, keys in needs.items() for key in (*keys, *references.get(test, ())))
        self._records = set(in_order) - set(updated)
        self._needs = Counter({key: updated[key] or 1 for key in in_order})
        starts = max(MIN_STARTS, min(MAX_STARTS, len(os.sched_getaffinity(0)) // CORES_A_START))
        for index in range(starts):
            threading.Thread(target=self._work, name=f"engine-starter-{index}", daemon=True).start()

    def too_large(self, key: EngineKey) -> str:
        """Why an engine and the trainer of its stage have no room even alone; empty where they have."""
        for device in {*self._devices_of(key), *self._stages[key.stage].trainer_devices}:
            wanted, found = self._wanted_bytes(device, [key], key), self._gpu_memory.get(device, math.inf)
            if wanted > GPU_FRACTION * found:
                share = f"the GPU has {found / GB:.1f} GB, of which {GPU_FRACTION:.0%} may be planned for"
                return f"{key.model} on {key.stage}: {self._sum(device, key)}; {share}"
        return ""

    def get(self, key: EngineKey) -> EngineHandle:
        """The engine, waiting for it to start and for room for its trainer. Raises what its start raised."""
        deadline = time.monotonic() + START_DEADLINE_S + 60
        with self._changed:
            self._needs[key] = max(1, self._needs[key])
            self._records.discard(key)
            self._wanted = key
            self._changed.notify_all()
            while key not in self._started and key not in self._failed:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no engine {key} after {START_DEADLINE_S + 60:g} s: {self._why_not(key)}")
                self._changed.wait(POLL_S)
            if key in self._failed:
                self._wanted = None
                raise self._failed[key]
            self._make_room(key, deadline)
            self._wanted, self._served = None, key
            return self._started[key]

    def _make_room(self, key: EngineKey, deadline: float) -> None:
        """Have a trainer's model fit beside the engines on its GPUs: those started ahead give way, the last one first.

        Called with the lock held.
        """
        while not self._fits(key):
            ahead = [other for other in self._started if other != key and self._shares_a_gpu(other, key)]
            if ahead and not self._stopping:
                self.announce(f"engine {ahead[-1]}: ended, since the trainer of {key} needs its room")
                self.discard(self._started[ahead[-1]])
            if time.monotonic() > deadline:
                raise TimeoutError(f"no room for the trainer of {key} beside {', '.join(map(str, self._started))}")
            self._changed.wait(POLL_S)

    def _shares_a_gpu(self, one: EngineKey, other: EngineKey) -> bool:
        taken = {*self._devices_of(other), *self._stages[other.stage].trainer_devices}
        return not taken.isdisjoint(self._devices_of(one))

    def _why_not(self, key: EngineKey) -> str:
        others = ", ".join(map(str, [*self._started, *self._starting, *self._stopping])) or "no other"
        return "it is still starting" if key in self._starting else f"it found no room beside what is there: {others}"

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
        """No engine starts or ends meanwhile: what is measured has the machine to itself."""
        with self._changed:
            self._quiet = True
            deadline = time.monotonic() + START_DEADLINE_S
            while (self._starting or self._stopping) and time.monotonic() < deadline:
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
        handle.process.stop()
        with self._changed:
            self._stopping.remove(handle.key)
            self._changed.notify_all()

    def reference(self, key: EngineKey, seed: int, among: Iterable[EngineKey]) -> EngineKey:
        """An engine that cold-loads the checkpoint of `seed` and computes as `key` does.

        One of `among` where there is such: another subject's engine will do, on another stage of the same layout too.
        """
        wanted = (key.model, self._layout(key.stage), key.options, seed)
        for other in among:
            if (other.model, self._layout(other.stage), other.options, other.seed) == wanted:
                return other
        return replace(key, seed=seed, visible="", copy=0)

    def oracle(self, key: EngineKey, seed: int) -> str:
        """Where an engine that cold-loaded this checkpoint has written what it computes with, once it has."""
        path = self._oracle_path(replace(key, seed=seed))
        ranks = range(self._stages[key.stage].engine_ranks)
        files = [path.with_name(f"{path.name}.rank{rank}.safetensors") for rank in ranks]
        reference = self.reference(key, seed, [*self._needs])
        deadline = time.monotonic() + START_DEADLINE_S + 60
        with self._changed:
            while not all(file.exists() for file in files):
                if self._needs[reference] <= 0:  # no test will update it, so nobody would end it
                    self._needs[reference] = 1
                    self._records.add(reference)
                self._wanted = reference
                if reference in self._failed:
                    raise self._failed[reference]
                if time.monotonic() > deadline:
                    raise TimeoutError(f"engine {reference} has not written what it computes with: {path}")
                self._changed.wait(POLL_S)
            self._wanted = None
        return str(path)

    def checkpoint(self, model: str, seed: int, dtype: str = "bfloat16") -> str:
        """The directory of a model's checkpoint, written when first asked for."""
        directory = self._run.directory / "models" / f"{model}-{seed}-{dtype}"
        with self._changed:
            if not (directory / "model.safetensors").exists():
                models.write_checkpoint(models.MODELS[model], seed, directory, dtype)
        return str(directory)

    def config(self, model: str) -> str:
        """The directory of a model's config alone."""
        return str(models.write_config(models.MODELS[model], self._run.directory / "models" / model))

    def scratch(self) -> Path:
        """A path for a snapshot of an engine's weights, unused so far."""
        return self._run.directory / "snapshots" / self._run.label("snapshot")

    def close(self) -> None:
        """Stop starting. What runs is ended with the run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _layout(self, stage: str) -> tuple[str, int, int]:
        found = self._stages[stage]
        return found.kind, found.tensor_parallel_size, found.pipeline_parallel_size

    def _oracle_path(self, key: EngineKey) -> Path:
        parts = [key.model, *self._layout(key.stage), *(f"{n}={v}" for n, v in key.options), key.seed]
        return self._run.directory / "oracles" / "-".join(map(str, parts))

    def _work(self) -> None:
        while (key := self._next()) is not None:
            try:
                handle = self._start(key)
            except Exception as error:  # whatever it was, the test that needs the engine reports it
                self.announce(f"engine {key}: failed to start ({type(error).__name__})")
                with self._changed:
                    self._failed[key] = error
            else:
                with self._changed:
                    self._started[key] = handle
                    if key in self._records:
                        self._needs[key] = 0
                    over = self._needs[key] <= 0  # also where the tests that needed it have ended meanwhile
                if over:
                    self.discard(handle)
            with self._changed:
                self._starting.discard(key)
                self._changed.notify_all()

    def _next(self) -> EngineKey | None:
        """The engine to start next: the one a test waits for, else the next in order while there is room."""
        with self._changed:
            while not self._closed:
                key = None if self._quiet else self._choose()
                if key is not None:
                    self._starting.add(key)
                    return key
                self._changed.wait(1.0)
            return None

    def _choose(self) -> EngineKey | None:
        """In order, but for engines on other devices than one that has to wait for room."""
        busy = {*self._started, *self._starting, *self._failed}
        waiting = [key for key, needs in self._needs.items() if needs > 0 and key not in busy]
        if self._wanted in waiting:
            return self._wanted if self._fits(self._wanted) else None
        if len(self._started) + len(self._starting) >= self._room():
            return None
        taken: set[str] = set()
        for key in waiting:
            devices = self._devices_of(key)
            if taken.isdisjoint(devices) and self._fits(key):
                return key
            taken.update(devices)
        return None

    def _room(self) -> int:
        """How many engines may be there at once: one that starts ahead must not crowd out those in use."""
        return max(3, int(psutil.virtual_memory().available / HOST_BYTES) + len(self._started))

    def _fits(self, key: EngineKey) -> bool:
        """Whether the GPUs of an engine have room beside the engines that are there, and those of a trainer at work.

        Engines add up. A trainer is one process for all engines and holds one model at a time: that of the engine which
        a test waits for, or else got last.
        """
        there = [other for other in (*self._started, *self._starting, *self._stopping) if other != key]
        for device in {*self._devices_of(key), *self._stages[key.stage].trainer_devices}:
            wanted = self._wanted_bytes(device, [key, *there], trained=self._wanted or self._served)
            if there and wanted > GPU_FRACTION * self._gpu_memory.get(device, math.inf):
                return False
        return True

    def _wanted_bytes(self, device: str, keys: list[EngineKey], trained: EngineKey | None) -> float:
        engines = [key for key in keys if device in self._devices_of(key)]
        wanted = sum(ENGINE_BYTES + self._bytes(k, self._stages[k.stage].engine_ranks) for k in engines)
        if trained is None or device not in self._stages[trained.stage].trainer_devices:
            return wanted
        return wanted + self._bytes(trained, self._stages[trained.stage].trainer_world_size)

    def _sum(self, device: str, key: EngineKey) -> str:
        """What makes up `_wanted_bytes` of one engine, in words."""
        stage, parts = self._stages[key.stage], []
        if device in self._devices_of(key):
            weights = self._bytes(key, stage.engine_ranks)
            parts += [f"{weights / GB:.1f} GB of the engine's weights", f"{ENGINE_BYTES / GB:.1f} GB beside them"]
        if device in stage.trainer_devices:
            parts.append(f"{self._bytes(key, stage.trainer_world_size) / GB:.1f} GB of the trainer's weights")
        return f"{' + '.join(parts)} = {self._wanted_bytes(device, [key], key) / GB:.1f} GB on one GPU"

    def _bytes(self, key: EngineKey, ranks: int) -> float:
        """The weights of an engine's model in bfloat16, on one of so many ranks."""
        return 2 * models.MODELS[key.model].elements / ranks

    def _devices_of(self, key: EngineKey) -> tuple[str, ...]:
        return self._stages[key.stage].devices_of_engine(key.copy)

    def _start(self, key: EngineKey) -> EngineHandle:
        stage, subject = self._stages[key.stage], self._subjects[key.subject]
        started = time.monotonic()
        self.announce(f"engine {key}: starting")
        link_path = str(self._run.directory / f"{self._run.label('link')}.sock")
        options = engine_options(stage) | ({"load_format": "dummy"} if key.seed is None else {}) | dict(key.options)
        arguments = {
            "model": self.config(key.model) if key.seed is None else self.checkpoint(key.model, key.seed),
            "subject": subject.plain(),
            "link_path": link_path,
            "tensor_parallel_size": stage.tensor_parallel_size,
            "oracle_path": str(self._oracle_path(key)) if key.seed is not None else None,
            "options": options,
        }
        variables = engine_environment(stage, key.copy, eager=options["enforce_eager"])
        if key.visible != "":
            variables["CUDA_VISIBLE_DEVICES"] = key.visible
        name = f"engine-{key.model}-{key.stage}-{key.subject}-{key.seed}"
        process = launch(self._run, name, "suite.actors.engine:Engine", arguments, variables, START_DEADLINE_S)
        try:
            facts = process.ready(START_DEADLINE_S)
            if stage.kind == "gpu" and key.visible == "":
                _expect_on(stage.devices_of_engine(key.copy), facts, name)
        except Exception:
            process.stop()
            raise
        self.announce(f"engine {key}: ready after {time.monotonic() - started:.0f} s")
        return EngineHandle(key, process, link_path, stage.engine_ranks, subject.extension, facts=facts)


def _expect_on(devices: tuple[str, ...], facts: dict, name: str) -> None:
    """Ordinals name devices to the engine; UUIDs decide whether they are the right ones."""
    found = tuple(device["id"] for device in facts["devices"])
    if found != devices:
        raise RuntimeError(f"expected {name} on {devices}, found it on {found}: do NVML and CUDA agree on the order?")


def seed_of(subject_index: int) -> int:
    """The checkpoint that a subject's engines start from: two subjects are each other's cold-loaded reference."""
    return 0 if subject_index == 0 else 1


def engine_options(stage: Stage) -> dict:
    """Arguments of vllm.LLM that every engine of a stage gets."""
    options = {"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 16, "seed": 0, "enforce_eager": True}
    options["kv_cache_memory_bytes"] = (64 if stage.kind == "cpu" else 512) * 2**20
    if stage.kind == "gpu":
        options["gpu_memory_utilization"] = 0.05  # the cache's size is given; this is only what has to be free
    if stage.pipeline_parallel_size > 1:
        options["pipeline_parallel_size"] = stage.pipeline_parallel_size
    return options


def engine_environment(stage: Stage, copy: int, eager: bool) -> dict[str, str | None]:
    """What an engine's process has in its environment. `copy` counts the engines of a stage that has several."""
    common: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "WEIGHT_UPDATE_TIMEOUT_S": str(UPDATE_TIMEOUT_S[stage.kind]),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # The sampler compiles a helper for log-probabilities even in an eager engine: 15 s for nothing examined here.
        "TORCHDYNAMO_DISABLE": "1" if eager else None,
    }
    if stage.kind == "gpu":
        named = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": stage.visible_to_engine(copy)}
        return common | named | stage.nccl_environment(f"engine-{copy}")
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(stage.tensor_parallel_size))
    return common | {
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "OMP_NUM_THREADS": "1",
        # One process less to start; workers and what they compute are the same.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
