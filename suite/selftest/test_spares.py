"""Engines on GPUs start in processes that were started ahead; what is measured has the machine to itself even so."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from suite import fixtures
from suite.actors import cuda
from suite.driver import pool as module
from suite.driver import variables
from suite.driver.engines import EngineKey
from suite.driver.pool import Pool
from suite.driver.spares import ENGINE, Spares
from suite.models import TIED
from suite.processes.call import Call
from suite.selftest.test_pool import A_WHILE_S, SOON_S, Asked, Engine, Started, eventually, get, plan
from suite.stages import Stage
from suite.stages.hardware import Device, Machine
from suite.subjects import known_subjects

STAGES = {
    "gpu": Stage("gpu", "gpu", 1, 1, True, ("GPU-1",), ("GPU-1",), engine_visible=("1",), trainer_visible=("1",)),
    "other": Stage(
        "other", "gpu", 1, 1, True, ("GPU-2",), ("GPU-2",), engine_visible=("2",), trainer_visible=("2",),
        hosts_apart=True,
    ),
    "cpu-tp1": Stage("cpu-tp1", "cpu", 1, 1, True),
}  # fmt: skip
A, B, C = (EngineKey(TIED, "gpu", subject, None) for subject in ("broadcast", "colocate", "native-ipc"))
ELSEWHERE = EngineKey(TIED, "other", "native-ipc", None)
WITH_GRAPHS = replace(A, options=(("enforce_eager", False),))
ON_CPU = EngineKey(TIED, "cpu-tp1", "broadcast", None)
AT_WORK = variables.of_spare_engine(STAGES.values())


class Spare(Engine):
    """A process that was started ahead, and imports until it is told that it has."""

    def __init__(self, env: dict) -> None:
        super().__init__("spare-engine", {})
        self.env, self.changes = env, None
        self.name, self.log_path = self.label, Path("spare-engine.log")
        self.imported = Call(self, "importing")

    def stalled_s(self) -> float:
        return 0.0

    def import_all(self, cuda_is_initialised: bool = False) -> None:
        self.imported.finish({"cuda_is_initialised": cuda_is_initialised})

    def begin(self, name: str, arguments: dict, changes: dict, deadline_s: float) -> None:
        assert not self.stopped.is_set(), "expected no process to be used once it was ended"
        self.label, self.arguments, self.changes = name, arguments, changes

    def stop(self, grace_s: float = 5) -> None:
        self.alive = False
        super().stop()


class Launched(Started):
    """What has been launched in the ordinary way, and `spares` ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.spares: list[Spare] = []
        self.fails: Exception | None = None

    def ahead(self, name: str, target: str, env: dict) -> Spare:
        assert (name, target) == ("spare-engine", ENGINE)
        if self.fails:
            raise self.fails
        self.spares.append(Spare(env))
        return self.spares[-1]

    def spare(self, index: int) -> Spare:
        eventually(lambda: len(self.spares) > index, f"{index + 1} processes started ahead")
        return self.spares[index]

    def no_more_than(self, count: int) -> bool:
        threading.Event().wait(1 + A_WHILE_S)  # the pool looks again each second
        return len(self.spares) == count


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    monkeypatch.setattr(module, "expect_on", lambda *_: None)
    monkeypatch.setattr(module, "MIN_STARTS", 2)
    monkeypatch.setattr(module, "MAX_STARTS", 2)
    return Launched()


@pytest.fixture
def make(launched: Launched, tmp_path: Path) -> Iterator[Callable[[int], Pool]]:
    """A pool that keeps so many processes waiting."""
    numbers, pools = itertools.count(), []

    def of(ahead: int) -> Pool:
        launcher = SimpleNamespace(
            directory=tmp_path, start=launched.start, ahead=launched.ahead,
            link_path=lambda: str(tmp_path / f"link.{next(numbers)}"),
        )  # fmt: skip
        pools.append(Pool(launcher, STAGES, known_subjects(), launched.said.append, ahead=ahead))
        return pools[-1]

    yield of
    for pool in pools:
        pool.close()
    for engine in [*launched.engines, *launched.spares]:
        engine.let()
    assert all(spare.stopped.is_set() or spare.changes is not None for spare in launched.spares), "expected none left"


def start_first(pool: Pool, launched: Launched, key: EngineKey = A) -> None:
    launched.of(key).let()
    get(pool, key)


def test_the_next_engine_takes_a_process_that_waits_and_another_follows(make: Callable, launched: Launched):
    pool = make(1)
    plan(pool, [A], [A], [A])
    start_first(pool, launched)
    launched.spare(0).import_all()
    pool.discard(get(pool, A))
    spare = launched.spare(0)
    eventually(lambda: spare.changes is not None, "the waiting process to be taken")
    assert (spare.label, spare.arguments["link_path"][-6:]) == (f"engine-{TIED}-gpu-broadcast-None", "link.1")
    spare.let()
    assert get(pool, A).process is spare
    assert launched.spare(1).env == AT_WORK
    assert len(launched.engines) == 1


def test_as_many_wait_as_engines_are_to_come(make: Callable, launched: Launched):
    pool = make(3)
    plan(pool, [A], [A])
    start_first(pool, launched)
    assert launched.spare(0).env["CUDA_VISIBLE_DEVICES"] == "1"
    launched.spare(0).import_all()
    assert launched.no_more_than(1), "expected one: only one engine is to come, where this one is lost"


def test_none_waits_where_no_engine_is_to_come(make: Callable, launched: Launched):
    pool = make(1)
    plan(pool, [A], [B])
    start_first(pool, launched)
    start_first(pool, launched, B)
    assert launched.no_more_than(0)


def test_engines_that_start_come_first(make: Callable, launched: Launched):
    pool = make(1)
    plan(pool, [A], [B], [C], [C])
    launched.of(A)
    launched.of(B)
    assert launched.no_more_than(0), "expected no process ahead while as many engines start as may at once"
    launched.of(A).let()
    launched.of(C)
    launched.of(B).let()
    launched.spare(0)


def test_what_imports_counts_as_one_that_starts(make: Callable, launched: Launched):
    pool = make(2)
    plan(pool, [A], [A], [B], [B])
    start_first(pool, launched)
    launched.spare(0)
    assert launched.no_more_than(1), "expected no second one beside an engine that starts and one that imports"
    launched.spare(0).import_all()
    launched.spare(1)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (A, {}),
        (ELSEWHERE, {"CUDA_VISIBLE_DEVICES": "2", "NCCL_HOSTID": "engine-0", "NCCL_NET": "Socket",
                     "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}),
        (replace(A, visible="2,1"), {"CUDA_VISIBLE_DEVICES": "2,1"}),
        (replace(A, visible=None), {"CUDA_VISIBLE_DEVICES": None}),
        (WITH_GRAPHS, None),
        (ON_CPU, None),
    ],
)  # fmt: skip
def test_only_what_is_read_late_is_changed(make: Callable, launched: Launched, key: EngineKey, changes: dict | None):
    found = variables.late_changes(AT_WORK, make(0)._environment(key))
    assert found == changes


def test_a_variable_that_a_process_has_and_an_engine_lacks_is_pytests_own(monkeypatch: pytest.MonkeyPatch):
    for name in ("NCCL_NET", "NCCL_HOSTID", "NCCL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NET", "IB")
    had = {"NCCL_NET": "Socket", "NCCL_HOSTID": "engine-0", "NCCL_DEBUG": None}
    assert variables.late_changes(had, {}) == {"NCCL_NET": "IB", "NCCL_HOSTID": None}


def test_an_engine_of_other_variables_starts_in_the_ordinary_way(make: Callable, launched: Launched):
    pool = make(1)
    plan(pool, [A], [A])
    start_first(pool, launched)
    launched.spare(0).import_all()
    asked = Asked(get, pool, WITH_GRAPHS)
    eventually(lambda: len(launched.engines) == 2, "another process")
    launched.engines[1].let()
    assert asked().process is launched.engines[1]
    assert launched.spare(0).changes is None


def test_one_that_still_imports_is_not_taken(make: Callable, launched: Launched):
    pool = make(1)
    plan(pool, [A], [A])
    start_first(pool, launched)
    launched.spare(0)
    pool.discard(get(pool, A))
    assert launched.of(A, again=1) is launched.engines[1]
    assert launched.spare(0).changes is None


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (lambda spare: setattr(spare, "alive", False), "has ended by itself"),
        (lambda spare: spare.imported.finish(error=ImportError("no vllm")), "has ended by itself"),
        (lambda spare: spare.import_all(cuda_is_initialised=True), "has initialised CUDA"),
    ],
)
def test_one_that_can_not_be_used_is_dropped_and_not_replaced(
    make: Callable, launched: Launched, lose: Callable, why: str
):
    pool = make(1)
    plan(pool, [A], [A])
    start_first(pool, launched)
    lose(launched.spare(0))
    pool.discard(get(pool, A))
    launched.of(A, again=1).let()
    assert launched.no_more_than(1)
    assert launched.spare(0).stopped.wait(SOON_S)
    assert launched.spare(0).changes is None
    assert (
        [line for line in launched.said if line.startswith("spare-engine: dropped")]
        == [line for line in launched.said if why in line and "log: spare-engine.log" in line]
        != []
    )


def test_engines_start_where_no_process_can_be_started_ahead(make: Callable, launched: Launched):
    launched.fails = OSError("no more processes")
    pool = make(2)
    plan(pool, [A], [A])
    start_first(pool, launched)
    eventually(lambda: len(launched.said) > 2, "a line that says so")
    assert [line for line in launched.said if "spare" in line] == [
        "spare-engine: could not be started (OSError: no more processes)"
    ]


def test_what_is_measured_waits_until_nothing_imports_and_has_the_machine_to_itself(make: Callable, launched: Launched):
    pool = make(2)
    plan(pool, [A], [A], [B])
    start_first(pool, launched)
    start_first(pool, launched, B)
    entered, leave = threading.Event(), threading.Event()

    def measure() -> None:
        with pool.quiet():
            entered.set()
            leave.wait(SOON_S)

    launched.spare(0)
    measuring = Asked(measure)
    assert measuring.waits()
    assert not entered.is_set(), "expected imports under way to be waited for"
    launched.spare(0).import_all()
    assert entered.wait(SOON_S)
    pool.discard(get(pool, B))
    assert launched.no_more_than(1), "expected no process to be started ahead meanwhile: two engines are to come"
    leave.set()
    measuring()
    eventually(lambda: launched.spare(0).changes is not None, "the waiting process to be taken")
    launched.spare(0).let()
    launched.spare(1)


def test_none_is_left_and_none_is_started_once_the_pool_is_closed(make: Callable, launched: Launched):
    pool = make(1)
    plan(pool, [A], [A])
    start_first(pool, launched)
    launched.spare(0).import_all()
    pool.close()
    assert launched.spare(0).stopped.is_set()
    spares: Spares = pool._spares
    spares.fill([AT_WORK])
    assert launched.no_more_than(1)


def test_none_waits_for_engines_on_cpus(make: Callable, launched: Launched):
    pool = make(2)
    plan(pool, [ON_CPU], [ON_CPU])
    start_first(pool, launched, ON_CPU)
    assert launched.no_more_than(0)


@pytest.mark.parametrize(
    ("names", "cores", "count"),
    [(["H100", "H100"], 32, 2), (["H100"], 9, 1), (["H100"], 4, 0), (["H100", "L4"], 32, 0), ([], 32, 0)],
)
def test_so_many_wait_on_a_machine(monkeypatch: pytest.MonkeyPatch, names: list[str], cores: int, count: int):
    devices = tuple(Device(f"GPU-{index}", name, index) for index, name in enumerate(names))
    monkeypatch.setattr(fixtures, "machine", lambda: Machine(devices, cores))
    assert fixtures._spare_engines() == count


# ---- CUDA


@pytest.mark.parametrize(("answer", "found"), [(0, True), (3, False), (100, True)])
def test_the_driver_says_whether_it_was_initialised(monkeypatch: pytest.MonkeyPatch, answer: int, found: bool):
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _: SimpleNamespace(cuDeviceGetCount=lambda _: answer))
    assert cuda.cuda_is_initialised() == found


def test_where_there_is_no_driver_cuda_is_not_initialised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-of-another-machine.so")
    assert not cuda.cuda_is_initialised()
