"""An engine process whose engine is a `vllm serve`: it starts the server and calls it over HTTP, as a trainer would."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from suite.actors.over_http import Remote
from suite.actors.serving import Served, ServingEngine
from suite.subjects.native_versions import installed

READY_S, POLL_S = 280.0, 0.1  # for the server to answer; between two looks
END_S = 3.0  # for it to end by itself when told to
COMMAND = (sys.executable, "-m", "suite.actors.vllm_command", "serve")


class ServerEngine(ServingEngine):
    """As `ServingEngine`, of a server of its own, which listens at `address` and `port` only."""

    @staticmethod
    def import_ahead() -> dict[str, bool]:
        """Nothing: what imports vLLM is the server."""
        return {"cuda_is_initialised": False}

    @staticmethod
    def sampling(max_tokens: int) -> dict:
        """What the server takes for vLLM's SamplingParams."""
        return {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "ignore_eos": True, "detokenize": False}

    def __init__(self, address: str, port: int, **engine: Any) -> None:
        self._address, self._port = address, port
        super().__init__(**engine)

    def _make(self, **arguments: Any) -> "Server":
        return Server(arguments, self._address, self._port)

    def set_version(self, version: str) -> bool:
        """As `ServingEngine.set_version`."""
        if installed().labels_tokens:
            with self._watch.waiting():
                self._llm.update_weight_version(version)
        return installed().labels_tokens

    def check_weights(self, **asked: Any) -> dict | None:
        """What the server's /weight_checker answers; None where this vLLM has none, which came with 0.32."""
        if not installed().checks_weights:
            return None
        with self._watch.waiting():
            return self._llm.weight_checker(asked)


class Server(Served):
    """A `vllm serve`, called as a `vllm.LLM` is. `arguments` are vllm.LLM's."""

    def __init__(self, arguments: dict, address: str, port: int) -> None:
        self._address, self._port = address, port
        super().__init__(arguments)

    def generate(self, prompts: list[dict], params: Any, use_tqdm: bool) -> list:
        """As vllm.LLM's, one prompt after the other: else what is computed together changes from time to time."""
        return [output for prompt in prompts for output in super(Server, self).generate([prompt], params, use_tqdm)]

    def _blames(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: what is awaited is the suite's own, and says itself what the server has answered."""
        return contextlib.nullcontext()

    def init_weight_transfer_engine(self, request: dict) -> None:
        """As vllm.LLM's."""
        self._called(self.llm_engine.init_weight_transfer_engine(request))

    def update_weights(self, request: dict) -> None:
        """As vllm.LLM's."""
        self._called(self.llm_engine.update_weights(request))

    async def _made(self, arguments: dict) -> Remote:
        name = f"served-{uuid.uuid4().hex}"  # tells it from another server, if the port was taken meanwhile
        remote = Remote(f"http://{self._address}:{self._port}", name, installed().labels_tokens)
        remote.model_config = limits(arguments)
        place = {"host": self._address, "port": self._port, "served_model_name": name}
        remote.engine_core = ServerProcess(command(arguments | place))
        try:
            await _answering(remote)
        except BaseException:
            remote.engine_core.shutdown()
            raise
        return remote


async def _answering(remote: Remote) -> None:
    """Wait until a server answers. Raises RuntimeError where it has ended, TimeoutError where it stays silent."""
    deadline = time.monotonic() + READY_S
    while not await remote.is_up():
        remote.engine_core.expect_running()
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected `vllm serve` to answer within {READY_S:g} s, found it silent; see the log")
        await asyncio.sleep(POLL_S)


class ServerProcess:
    """The server's own process. It writes to this process's log, and ends with it: it bears the marks of its run."""

    def __init__(self, command: list[str]) -> None:
        print("starting", *command, flush=True)  # to the log
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def expect_running(self) -> None:
        """Raise RuntimeError where it has ended."""
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"expected `vllm serve` to run, found that it has ended with {code}; see the log above")

    def shutdown(self) -> None:
        """End the server and its engine; what is left then is ended with this process."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def command(arguments: dict) -> list[str]:
    """`vllm serve` with these arguments of vllm.LLM."""
    options = dict(arguments)
    model = options.pop("model")
    if installed().labels_tokens:
        options["enable_scale_out"] = True  # brings /inference/v1/generate
    options["uvicorn_log_level"] = "warning"  # not a line for every request
    return [*COMMAND, model, *(flag(name, value) for name, value in options.items())]


def flag(name: str, value: Any) -> str:
    """An argument of vllm.LLM as the command line has it."""
    written = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{written}" if value else f"--no-{written}"
    return f"--{written}={json.dumps(value) if isinstance(value, dict) else value}"


def limits(arguments: dict) -> SimpleNamespace:
    """What the suite asks of an engine's model_config."""
    config = json.loads(Path(arguments["model"], "config.json").read_text())
    vocabulary = (config.get("text_config") or {}).get("vocab_size") or config["vocab_size"]
    return SimpleNamespace(
        get_vocab_size=lambda: vocabulary,
        max_model_len=arguments["max_model_len"],
        hf_config=SimpleNamespace(**config),
    )
