"""A second call is sent while the first is under way, and after it; or not, where that can't be."""

import contextlib
import queue
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from suite.actors import engine as module
from suite.actors.engine import Engine, StaleCache
from suite.actors.following import Following

WAIT_S = 5.0


class Core:
    """vLLM's client: calls are sent to a core that answers them in turn once it is let."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.sent: queue.SimpleQueue[tuple[str, Future]] = queue.SimpleQueue()
        self.names: list[str] = []
        self._answers, self.may_answer = answers, threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _send_input(self, name: str, future: Future) -> None:
        self.names.append(name)
        self.sent.put((name, future))

    def call_utility(self, name: str) -> Any:
        future: Future = Future()
        self._send_input(name, future)
        return future.result(WAIT_S)

    def _serve(self) -> None:
        while True:
            name, future = self.sent.get()
            self.may_answer.wait(WAIT_S)
            answer = self._answers[name]
            future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)


class Llm:
    """A vllm.LLM."""

    def __init__(self, **answers: Any) -> None:
        self.core = Core({"copy": "copied", "reset": True} | answers)
        self.llm_engine = SimpleNamespace(engine_core=self.core)

    def copy(self) -> Any:
        return self.core.call_utility("copy")

    def reset_prefix_cache(self) -> Any:
        return self.core.call_utility("reset")


def test_the_second_call_is_sent_before_the_first_is_answered():
    llm = Llm()
    sends = llm.core._send_input
    following = Following(llm, llm.reset_prefix_cache)
    with following:
        threading.Timer(0.1, lambda: (llm.core.names == ["copy", "reset"]) and llm.core.may_answer.set()).start()
        assert llm.copy() == "copied"
    assert (following.sent, following.result()) == (True, True)
    assert llm.core._send_input == sends, "expected calls to be sent as before"


def test_only_one_call_is_followed():
    llm = Llm()
    llm.core.may_answer.set()
    with Following(llm, llm.reset_prefix_cache) as following:
        llm.copy()
        llm.copy()
    following.result()
    assert sorted(llm.core.names) == ["copy", "copy", "reset"]


def test_where_the_first_call_fails_the_second_is_over_before_anything_else_is_sent():
    llm = Llm(copy=ValueError("no such plan"))
    llm.core.may_answer.set()
    following = Following(llm, llm.reset_prefix_cache)
    with pytest.raises(ValueError, match="no such plan"), following:
        llm.copy()
    assert following._answer.done()


@pytest.mark.parametrize("lacks", ["process", "core", "way of sending"])
def test_nothing_is_sent_where_the_core_is_called_in_another_way(lacks: str):
    called = SimpleNamespace(call_utility=None) if lacks == "way of sending" else SimpleNamespace(_send_input=None)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(**({} if lacks == "core" else {"engine_core": called})))
    with Following(llm, lambda: pytest.fail("expected no call")) as following:
        pass
    assert not following.sent


class Said:
    """The engine's side of a dialogue in which all goes well."""

    def __init__(self, *_: Any) -> None:
        self.said: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.said.append(name) or [{"manifest": []}]


@pytest.mark.parametrize(("ends_by_one_call", "doubtful"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("was_reset", [True, False])
def test_an_engine_has_its_cache_reset_behind_an_update_of_one_call(
    monkeypatch: pytest.MonkeyPatch, ends_by_one_call: bool, doubtful: bool, was_reset: bool
):
    monkeypatch.setattr(module, "EngineSide", Said)
    llm, engine = Llm(reset=was_reset), Engine.__new__(Engine)
    llm.llm_engine.model_config = SimpleNamespace(is_multimodal_model=False)
    engine._links, engine.devices, engine._llm, engine._doubtful = [], [{}], llm, doubtful
    engine._watch = SimpleNamespace(waiting=contextlib.nullcontext)
    followed: list[list[str]] = []

    def transfer(manifest: list[dict]) -> None:
        threading.Timer(0.1, lambda: (followed.append([*llm.core.names]), llm.core.may_answer.set())).start()
        llm.copy()

    nothing = lambda *args: []  # noqa: E731
    engine._half = SimpleNamespace(
        receive=nothing, begin=nothing, transfer=transfer, end=nothing, abort=nothing, resets_cache=False,
        ends_by_one_call=ends_by_one_call,
    )  # fmt: skip
    if was_reset:
        engine.update(1.0)
    else:
        with pytest.raises(StaleCache):
            engine.update(1.0)
    assert followed == [["copy", "reset"] if ends_by_one_call and not doubtful else ["copy"]]
    assert llm.core.names == ["copy", "reset"]


def test_an_update_that_is_to_leave_the_cache_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "EngineSide", Said)
    llm, engine = Llm(), Engine.__new__(Engine)
    engine._links, engine.devices, engine._llm = [], [{}], llm
    llm.core.may_answer.set()
    nothing = lambda *args: []  # noqa: E731
    engine._half = SimpleNamespace(
        receive=nothing, begin=nothing, transfer=lambda manifest: llm.copy(), end=nothing, resets_cache=False,
        ends_by_one_call=True,
    )  # fmt: skip
    engine.update(1.0, reset_cache=False)
    assert llm.core.names == ["copy"]
