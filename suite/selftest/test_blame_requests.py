"""Who is blamed where requests run: the engine that answers them, or what the suite drives and calls it by."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from suite.actors.in_flight import InFlight
from suite.actors.over_http import Remote
from suite.actors.server import Server
from suite.actors.serving import Served
from suite.processes.blame import Examined
from suite.selftest.blamed import planted, raised_by, verdict
from suite.session.verdicts import ERROR, FAIL

# ---- requests in flight


class Core:
    """Gives each request a token at a time, or raises."""

    def __init__(self) -> None:
        self.raises: Exception | None = None
        self.ends = False

    def get_output(self) -> SimpleNamespace:
        if self.raises:
            raise self.raises
        output = SimpleNamespace(request_id="0", new_token_ids=[7], finish_reason="length" if self.ends else None)
        return SimpleNamespace(outputs=[output], timestamp=1.0)

    def call_utility(self, method: str, *args: object) -> None:
        if self.raises:
            raise self.raises


@pytest.fixture
def flight() -> InFlight:
    core = Core()
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=core, abort_request=planted), enqueue=lambda *_, **__: ["0"]
    )
    return InFlight(Examined(llm))


def test_a_driver_of_requests_that_finds_them_over_or_late(flight: InFlight, monkeypatch: pytest.MonkeyPatch):
    flight.start([[1]], None, 2)
    assert verdict(raised_by(lambda: flight.go_on(0.0, 5.0))) == ERROR  # tokens came meanwhile
    flight._core.ends = True
    assert verdict(raised_by(lambda: flight.start([[1]], None, 2))) == ERROR
    monkeypatch.setattr("suite.actors.in_flight.WITHIN_S", 0.0)
    assert verdict(raised_by(lambda: flight.start([[1]], None, 2))) == ERROR
    monkeypatch.setattr(flight, "_times_s", None)
    flight._core.ends = False
    assert verdict(raised_by(flight._take)) == ERROR


def test_a_core_that_raises_under_requests(flight: InFlight):
    flight._core.raises = RuntimeError("the core is dead")
    assert verdict(raised_by(lambda: flight.start([[1]], None, 2))) == FAIL
    assert verdict(raised_by(flight.pause)) == FAIL


class Alone(Served):
    """A stand-in for an AsyncLLM."""

    async def _made(self, arguments: dict) -> Any:
        return SimpleNamespace(**arguments)


def failing_stream(*_: object) -> Any:
    async def stream() -> Any:
        raise RuntimeError("the engine is dead")
        yield

    return stream()


def given_stream(*_: object) -> Any:
    async def stream() -> Any:
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])

    return stream()


def test_an_async_engine_that_raises_and_what_follows_its_requests(monkeypatch: pytest.MonkeyPatch):
    async def dies() -> None:
        raise RuntimeError("the engine is dead")

    served = Alone({"generate": failing_stream, "sleep": dies})
    assert verdict(raised_by(lambda: served.generate([{}], None, use_tqdm=False))) == FAIL
    assert verdict(raised_by(served.sleep)) == FAIL
    served = Alone({"generate": given_stream})
    monkeypatch.setattr("suite.actors.serving.Request.take", planted)
    assert verdict(raised_by(lambda: served.generate([{}], None, use_tqdm=False))) == ERROR
    monkeypatch.setattr("suite.actors.serving.ASKED_FOR_S", 0.0)
    assert verdict(raised_by(lambda: served.wait_until(lambda: False, "each give a token"))) == ERROR


# ---- a server's client


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Remote:
    remote = Remote("http://server", "model", in_tokens=True)
    remote._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")
    return remote


class Behind(Server):
    """A server's stand-in, whose client is given."""

    def __init__(self, remote: Remote) -> None:
        Served.__init__(self, {"remote": remote})

    async def _made(self, arguments: dict) -> Remote:
        return arguments["remote"]


def refuses(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused", request=request)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda request: httpx.Response(500, text="the engine is dead"), FAIL),
        (lambda request: httpx.Response(200, text="no JSON"), FAIL),
        (refuses, FAIL),
        (lambda request: httpx.Response(404, text="Not Found"), ERROR),  # asked for what this vLLM does not have
        (lambda request: httpx.Response(422, text="field required"), ERROR),
        (lambda request: httpx.Response(200, json={"other": 1}), ERROR),  # not what the client looks for
    ],
)
def test_a_server_is_told_from_its_client(answer: Callable[[httpx.Request], httpx.Response], expected: str):
    served = Behind(client(answer))
    assert verdict(raised_by(lambda: served.collective_rpc("probe_call", ("probe_nothing", [])))) == expected


@pytest.mark.parametrize("planted_in", ["Said.more", "_choice"])
def test_a_client_that_fails_at_an_answer(monkeypatch: pytest.MonkeyPatch, planted_in: str):
    monkeypatch.setattr(f"suite.actors.over_http.{planted_in}", planted)
    served = Behind(client(lambda request: httpx.Response(200, text='data: {"choices": [{}]}\n\n')))
    asked = {"prompt_token_ids": [1]}
    assert verdict(raised_by(lambda: served.generate([asked], {}, use_tqdm=False))) == ERROR


def test_a_stream_that_breaks_off_is_the_servers():
    served = Behind(client(lambda request: httpx.Response(200, text='data: {"error": "dead"}\n\n')))
    asked = {"prompt_token_ids": [1]}
    assert verdict(raised_by(lambda: served.generate([asked], {}, use_tqdm=False))) == FAIL
