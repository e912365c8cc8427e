"""The time for which an engine cannot generate, measured of a core that only counts, and what is not believed of it."""

import contextlib
import queue
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from suite.actors import in_flight
from suite.actors.engine import Engine
from suite.actors.in_flight import InFlight
from suite.benchmarks import test_throughput
from suite.driver.measuring import REQUESTS, TOKENS_BEFORE, Measuring
from suite.driver.moving import Moved, Moving

pytestmark = pytest.mark.selftest

STEP_S, UPDATE_S, LATE_S = 0.005, 0.1, 0.2
PROMPTS = [[1, 2], [3, 4]]


class Core:
    """Steps of an engine core: each gives every request a token. late_s: how long it stands still once it may go on."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        self.paused, self.late_s, self.heeds_pauses = False, 0.0, True
        self.told: list[tuple] = []

    def step(self) -> SimpleNamespace:
        time.sleep(STEP_S)
        for name in self.requests:
            self.requests[name] += 1
        outputs = [SimpleNamespace(request_id=name, new_token_ids=[7], finish_reason=None) for name in self.requests]
        return SimpleNamespace(outputs=outputs, timestamp=time.monotonic())

    def pause_scheduler(self, mode: str, clear_cache: bool) -> None:
        self.told.append(("pause", mode, clear_cache))
        self.paused = self.heeds_pauses

    def resume_scheduler(self) -> None:
        self.told.append(("resume",))
        self.paused = False


class Here(Core):
    """A core in the engine's process, as vLLM's InprocClient has it: it steps when asked, one step ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_queue: deque = deque()
        self.engine_core = self

    def get_output(self) -> SimpleNamespace:
        if not self.paused:
            time.sleep(self.late_s if self.told else 0)
            self.late_s = 0.0 if self.told else self.late_s
            self.batch_queue.appendleft(self.step())
            if len(self.batch_queue) < 2:
                return SimpleNamespace(outputs=[], timestamp=time.monotonic())
        nothing = SimpleNamespace(outputs=[], timestamp=time.monotonic())
        return self.batch_queue.pop() if self.batch_queue else nothing


class Apart(Core):
    """A core in a process of its own, as vLLM's SyncMPClient has it: it steps whether it is asked or not."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: queue.Queue = queue.Queue()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self.requests and not self.paused:
                    self._outputs.put(self.step())
            time.sleep(0.001)

    def call_utility(self, method: str, *args: Any) -> None:
        with self._lock:
            getattr(self, method)(*args)
            time.sleep(self.late_s if method == "resume_scheduler" else 0)

    def get_output(self) -> SimpleNamespace:
        return self._outputs.get(timeout=5)


class Llm:
    """Called as vllm.LLM is."""

    def __init__(self, core: Core) -> None:
        self.core, self.llm_engine = core, SimpleNamespace(engine_core=core, abort_request=self._abort)

    def enqueue(self, prompts: list[dict], params: Any, use_tqdm: bool) -> list[str]:
        names = [f"{number}" for number in range(len(prompts))]
        self.core.requests.update(dict.fromkeys(names, 0))
        return names

    def _abort(self, names: list[str], internal: bool) -> None:
        for name in names:
            del self.core.requests[name]


@pytest.fixture(params=[Here, Apart])
def core(request: pytest.FixtureRequest) -> Core:
    return request.param()


@pytest.fixture
def flight(core: Core) -> InFlight:
    return InFlight(Llm(core))


def updated(flight: InFlight) -> dict[str, float]:
    """What is measured of an update that takes UPDATE_S."""
    flight.start(PROMPTS, None, 8)
    flight.pause()
    began_s = time.monotonic()
    time.sleep(UPDATE_S)
    return flight.go_on(began_s, time.monotonic())


def test_a_pause_is_the_update_and_a_step(flight: InFlight):
    found = updated(flight)
    assert UPDATE_S + STEP_S <= found["pause_s"] < UPDATE_S + LATE_S
    assert STEP_S <= found["token_s"] < LATE_S


def test_the_first_steps_do_not_count_between_two_tokens(flight: InFlight):
    """In them requests had still to begin."""
    assert flight._token_s([0.0, 0.5, 1.0, 1.5, 1.51, 1.52, 1.54]) == pytest.approx(0.01)


def test_an_engine_that_stands_still_after_the_update_is_seen(flight: InFlight, core: Core):
    core.late_s = LATE_S
    assert updated(flight)["pause_s"] >= UPDATE_S + LATE_S + STEP_S


def test_an_engine_that_generates_during_the_update_is_not_measured():
    core = Apart()
    core.heeds_pauses = False
    with pytest.raises(RuntimeError, match=r"no token during the update, .*: generation was not paused"):
        updated(InFlight(Llm(core)))


def test_a_token_that_came_before_the_update_ended_is_not_taken_for_the_first_after(flight: InFlight):
    flight.start(PROMPTS, None, 8)
    flight.pause()
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the next one -"):
        flight.go_on(began_s, began_s + 60)


def test_steps_that_are_under_way_end_before_the_update(core: Core):
    flight = InFlight(Llm(core))
    flight.start(PROMPTS, None, 8)
    flight.pause()
    given = dict(core.requests)
    time.sleep(10 * STEP_S)
    assert core.requests == given
    assert core.told[-1] == ("pause", "keep", True)
    assert not getattr(core, "batch_queue", None)


def test_a_request_that_ends_too_early_is_told(flight: InFlight, core: Core):
    step = core.step

    def last() -> SimpleNamespace:
        made = step()
        made.outputs[0].finish_reason = "length"
        return made

    core.step = last
    with pytest.raises(RuntimeError, match="a request ended by length that was to run on: nothing is told"):
        updated(flight)


def test_requests_that_get_no_token_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_flight, "WITHIN_S", 0.1)
    core = Here()
    core.paused = True
    with pytest.raises(TimeoutError, match=r"the requests to give 8 tokens each within 0.1 s, found \[0, 0\]"):
        InFlight(Llm(core)).start(PROMPTS, None, 8)


def test_what_was_left_of_earlier_requests_does_not_count(flight: InFlight, core: Core):
    step = core.step

    def with_another() -> SimpleNamespace:
        made = step()
        made.outputs = [SimpleNamespace(request_id="earlier", new_token_ids=[7], finish_reason="abort")]
        core.step = step
        return made

    core.step = with_another
    assert updated(flight)["pause_s"] >= UPDATE_S


# ---- in an engine


@pytest.fixture
def engine(core: Core, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("suite.actors.engine.Engine.sampling", lambda self, max_tokens: None)
    made = Engine.__new__(Engine)
    made._llm, made._watch = Llm(core), SimpleNamespace(waiting=contextlib.nullcontext)
    return made


def expect_idle(core: Core) -> None:
    assert core.requests == {}
    assert core.told[-2:] == [("pause", "keep", True), ("resume",)], "expected an engine with no prefix, not paused"
    assert not core.paused


def test_after_the_update_the_requests_are_ended(engine: Engine, core: Core, monkeypatch: pytest.MonkeyPatch):
    def update(self: Engine, *args: object) -> dict:
        started_s = time.monotonic()
        time.sleep(UPDATE_S)
        return {"asked": args, "started_s": started_s, "ended_s": time.monotonic()}

    monkeypatch.setattr(Engine, "update", update)
    engine.pause(PROMPTS, 400, 8)
    half = engine.update_paused(30.0, True)
    assert half["asked"] == (30.0, True)
    assert half["pause_s"] > half["ended_s"] - half["started_s"] >= UPDATE_S
    expect_idle(core)


def test_after_a_failed_update_the_requests_are_ended(engine: Engine, core: Core, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Engine) -> None:
        raise ValueError("ghost")

    monkeypatch.setattr(Engine, "update", fails)
    engine.pause(PROMPTS, 400, 8)
    with pytest.raises(ValueError, match="ghost"):
        engine.update_paused()
    expect_idle(core)


def test_requests_that_do_not_begin_are_ended(engine: Engine, core: Core, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_flight, "WITHIN_S", 0.0)
    with pytest.raises(TimeoutError):
        engine.pause(PROMPTS, 400, 8)
    expect_idle(core)


def test_a_failed_update_is_told_where_requests_can_not_be_ended(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Engine) -> None:
        raise ValueError("ghost")

    def dead(self: InFlight) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Engine, "update", fails)
    engine.pause(PROMPTS, 400, 8)
    monkeypatch.setattr(InFlight, "end", dead)
    with pytest.raises(ValueError, match="ghost") as raised:
        engine.update_paused()
    assert raised.value.__notes__ == ["nor could the requests be ended: OSError: gone"]


# ---- beside the time of an update


def test_each_update_has_requests_of_its_own_and_a_connection_before_them(monkeypatch: pytest.MonkeyPatch):
    done: list[object] = []
    process = SimpleNamespace(call=lambda *args, deadline_s: done.append((args[0], len(args[1]), args[-1])))
    measuring = Measuring.__new__(Measuring)
    measuring.engines, measuring.spec = [SimpleNamespace(process=process)], SimpleNamespace(config={"vocab_size": 9})
    measuring.subject = SimpleNamespace(compares=False)
    monkeypatch.setattr(Moving, "connect", lambda self: done.append("connect"))
    monkeypatch.setattr(Moving, "update", lambda self, paused: done.append(("update", paused)) or len(done))
    assert measuring.with_requests(2) == [3, 6]
    assert done == ["connect", ("pause", REQUESTS, TOKENS_BEFORE), ("update", True)] * 2


@pytest.mark.parametrize(
    ("model", "named", "measured"),
    [("qwen3-8b", (), True), ("qwen3-14b", (), False), ("qwen3-14b", ("qwen3-14b",), True)],
)
def test_two_sizes_are_measured_where_nobody_names_one(
    monkeypatch: pytest.MonkeyPatch, model: str, named: tuple[str, ...], measured: bool
):
    monkeypatch.setattr(test_throughput, "selection_of", lambda config: SimpleNamespace(models=named))
    moved = [Moved(0.5, 8, 1, {}, 3, pause_s=0.6, token_s=0.01), Moved(0.4, 8, 1, {}, 3, pause_s=0.7, token_s=0.02)]
    sync = SimpleNamespace(model=model, with_requests=lambda updates: moved, engines=["one"])
    found = test_throughput._in_flight(sync, None)
    samples = {
        "pause_samples_s": [0.6, 0.7],
        "update_samples_s": [0.5, 0.4],
        "token_samples_s": [0.01, 0.02],
    }
    assert found == ({"in_flight": {"requests": REQUESTS, **samples}} if measured else {})
    sync.engines = ["one", "another"]
    assert test_throughput._in_flight(sync, None) == {}, "requests are in flight in one engine only"


def test_a_size_of_each_kind_of_machine_is_small_and_one_is_not():
    for ladder in (test_throughput.LADDER, test_throughput.PUBLISHED):
        assert len([model for model in ladder if model in test_throughput.IN_FLIGHT]) == 2
