"""An engine that serves: its requests, its pauses, and a cache that is not reset, around a model that only counts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from suite.actors import serving
from suite.actors.engine import Engine, StaleCache
from suite.actors.serving import Served, ServingEngine
from suite.driver.engines import EngineKey, seed_of
from suite.driver.expected import Differs
from suite.driver.running import RUNNING_TOKENS, Running
from suite.models import TIED
from suite.session import needs
from suite.stages import STAGES
from suite.subjects import SUBJECTS
from suite.subjects.registry import NAMED

pytestmark = pytest.mark.selftest

TOKEN_S, TOKENS = 0.01, 20


class Counting:
    """Called as AsyncLLM is: a request's tokens are 0, 1, 2, ..., one every TOKEN_S."""

    def __init__(self) -> None:
        self.resets: list[dict] = []
        self.held = self.broken = self.aborts = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def generate(self, prompt: dict, limit: int, request_id: str) -> AsyncIterator[Any]:
        for count in range(1, limit + 1):
            await asyncio.sleep(TOKEN_S)
            await self.goes_on.wait()
            if self.broken:
                raise ValueError("the engine is dead")
            if self.aborts:
                yield output(count - 1, "abort")
                return
            yield output(count, "length" if count == limit else None)

    async def pause_generation(self, mode: str, clear_cache: bool = True) -> None:
        self.goes_on.clear()
        self.aborts = mode == "abort"
        if self.aborts:
            self.goes_on.set()

    async def resume_generation(self) -> None:
        self.goes_on.set()

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self.resets.append({"running": reset_running_requests})
        return reset_running_requests or not self.held


def output(count: int, reason: str | None) -> Any:
    logprobs = [{token: SimpleNamespace(logprob=-1.0)} for token in range(count)]
    made = SimpleNamespace(token_ids=[*range(count)], logprobs=logprobs, finish_reason=reason)
    return SimpleNamespace(outputs=[made])


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()

    async def _made(self: Served, arguments: dict) -> Counting:
        return made

    monkeypatch.setattr(Served, "_made", _made)
    monkeypatch.setattr(ServingEngine, "sampling", staticmethod(lambda max_tokens: max_tokens))
    return made


@pytest.fixture
def engine(counting: Counting) -> ServingEngine:
    made = ServingEngine.__new__(ServingEngine)
    made._llm, made._watch = Served({}), SimpleNamespace(waiting=contextlib.nullcontext)
    made._half = SimpleNamespace(state=lambda: [])
    return made


def updating(mode: str) -> dict:
    return {"prompts": [[1], [2]], "max_tokens": TOKENS, "mode": mode, "clear_cache": True, "version": ""}


def test_requests_that_are_kept_go_on_after_the_update(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Engine, "update", lambda self, *args: {"asked": args})
    half = engine.update_running(updating("keep"), 30.0, True)
    assert half["asked"] == (30.0, True)
    assert serving.STILL_S < half["pause_s"] < 5
    assert not half["cache_is_held"]
    for request in engine.requests():
        assert (request["tokens"], request["reason"]) == ([*range(TOKENS)], "length")
        assert 1 <= request["before"] < TOKENS


def test_requests_that_are_aborted_have_no_first_token_after(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Engine, "update", lambda self, *args: {})
    assert engine.update_running(updating("abort"))["pause_s"] is None
    assert {request["reason"] for request in engine.requests()} == {"abort"}


@pytest.mark.parametrize(("state", "reason"), [("ready", "length"), ("inconsistent", "abort")])
def test_after_a_failed_update_requests_go_on_unless_weights_are_inconsistent(
    engine: ServingEngine, monkeypatch: pytest.MonkeyPatch, state: str, reason: str
):
    def fails(self: Engine) -> None:
        raise ValueError("ghost")

    monkeypatch.setattr(Engine, "update", fails)
    engine._half = SimpleNamespace(state=lambda: [state])
    with pytest.raises(ValueError, match="ghost"):
        engine.update_running(updating("keep"))
    assert {request["reason"] for request in engine.requests()} == {reason}


def test_a_failed_update_is_told_where_the_engine_can_not_go_on(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Engine) -> None:
        raise ValueError("ghost")

    def dead() -> list[str]:
        raise OSError("gone")

    monkeypatch.setattr(Engine, "update", fails)
    engine._half = SimpleNamespace(state=dead)
    with pytest.raises(ValueError, match="ghost") as raised:
        engine.update_running(updating("keep"))
    assert raised.value.__notes__ == ["nor could generation be resumed: OSError: gone"]


def test_a_cache_that_requests_hold_is_reset_with_them(engine: ServingEngine, counting: Counting):
    engine.reset_prefix_cache()
    assert counting.resets == [{"running": False}]
    counting.held = True
    engine.reset_prefix_cache()
    assert counting.resets[1:] == [{"running": False}, {"running": True}]


@pytest.mark.parametrize(("held", "clear_cache"), [(True, False), (False, False), (True, True)])
def test_whether_requests_hold_the_cache_is_told(
    engine: ServingEngine, counting: Counting, monkeypatch: pytest.MonkeyPatch, held: bool, clear_cache: bool
):
    monkeypatch.setattr(Engine, "update", lambda self, *args: {})
    counting.held = held
    half = engine.update_running(updating("keep") | {"clear_cache": clear_cache})
    assert half["cache_is_held"] == (held and not clear_cache)


def test_a_reset_that_answers_false_is_refused():
    idle = Engine.__new__(Engine)
    idle._llm = SimpleNamespace(reset_prefix_cache=lambda: False)
    with pytest.raises(StaleCache, match=r"expected reset_prefix_cache\(\) to answer True, found False: nothing was"):
        idle.reset_prefix_cache()


def test_a_request_that_raises_ends_with_what_it_raised(engine: ServingEngine, counting: Counting):
    counting.broken = True
    engine._llm.start([[1]], TOKENS)
    (request,) = engine.requests()
    assert request["reason"] == "ValueError: the engine is dead"
    with pytest.raises(RuntimeError, match="1 of 1 requests gave no answer: ValueError: the engine is dead"):
        engine._llm.generate([{"prompt_token_ids": [1]}], TOKENS, use_tqdm=False)


def test_requests_that_hang_are_told(engine: ServingEngine, counting: Counting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "ASKED_FOR_S", 0.1)
    counting.goes_on.clear()
    engine._llm.start([[1]], TOKENS)
    with pytest.raises(TimeoutError, match=r"expected the requests to end within 0.1 s, found \['0 tokens'\]"):
        engine.requests()
    counting.goes_on.set()


# ---- whose engine it is


def owner(name: str, examined: list[str]) -> EngineKey:
    """The engine of a subject's case that needs one that serves."""
    every, (stage,) = SUBJECTS | NAMED, [stage for stage in STAGES if stage.name == "cpu-tp1"]
    selection = SimpleNamespace(subjects={other: every[other] for other in examined})
    key = EngineKey(TIED, stage.name, name, seed_of(examined.index(name)))
    return needs._serving(key, every[name], stage, selection)


@pytest.mark.parametrize(
    ("name", "examined", "owned_by", "seed"),
    [
        ("broadcast", ["broadcast", "colocate"], "broadcast", 0),
        ("colocate", ["broadcast", "colocate"], "broadcast", 0),
        ("colocate", ["colocate"], "colocate", 0),
        ("native-gloo", ["broadcast", "native-gloo"], "native-gloo", 1),
    ],
)
def test_subjects_whose_engines_start_alike_share_one(name: str, examined: list[str], owned_by: str, seed: int):
    assert owner(name, examined) == EngineKey(TIED, "cpu-tp1", owned_by, seed, serves=True)


# ---- what a test expects of them


def ended(reason: str, tokens: int, before: int) -> dict:
    return {"reason": reason, "tokens": [1] * tokens, "before": before}


@pytest.mark.parametrize(
    ("mode", "request_", "said"),
    [
        ("abort", ended("abort", 5, 5), ""),
        ("abort", ended("length", RUNNING_TOKENS, 5), "a request that ends with 'abort'"),
        ("abort", ended("abort", 6, 5), "expected: 5 tokens of a request, paused by 'abort'"),
        ("wait", ended("length", RUNNING_TOKENS, RUNNING_TOKENS), ""),
        ("wait", ended("length", RUNNING_TOKENS, 5), "every token to come before the update"),
        ("keep", ended("length", RUNNING_TOKENS, 5), ""),
        ("keep", ended("length", 9, 5), f"expected: {RUNNING_TOKENS} tokens of a request, paused by 'keep'"),
        ("keep", ended("EngineDeadError: gone", 5, 5), "EngineDeadError: gone"),
    ],
)
def test_how_requests_have_to_end(mode: str, request_: dict, said: str):
    judging = SimpleNamespace(where="after update 1")
    if not said:
        Running.expect_ended(judging, [request_], mode)
        return
    with pytest.raises(Differs, match=said):
        Running.expect_ended(judging, [request_], mode)


def test_a_request_that_was_over_before_the_pause_tells_nothing():
    over = ended("length", RUNNING_TOKENS, RUNNING_TOKENS)
    with pytest.raises(RuntimeError, match="a request was over before the pause"):
        Running.expect_ended(SimpleNamespace(where="here"), [over], "keep")
