"""The engine's half of updates around one worker, without vLLM: what selftests speak with as a trainer does."""

import contextlib
from types import SimpleNamespace

from suite.actors.engine import Engine
from suite.actors.link import Listener
from suite.actors.probe import Probe
from suite.processes.blame import Examined
from suite.selftest.fakes import Worker
from suite.subjects import SUBJECTS


class ProbedWorker(Probe, Worker):
    """What the engine calls."""


class Engined(Engine):
    """What `Engine` is but for its vllm.LLM, of which there is as much as updates touch."""

    def __init__(self, worker: ProbedWorker, path: str, subject: str = "colocate") -> None:
        calling = lambda method, args: [getattr(worker, method)(*args)]  # noqa: E731
        model = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=False))
        llm = SimpleNamespace(collective_rpc=calling, reset_prefix_cache=lambda: True, llm_engine=model)
        self.llm, self._llm = llm, Examined(llm)  # the first one for tests to change
        self.devices = [{"rank": 0}]
        self._watch = SimpleNamespace(waiting=contextlib.nullcontext)
        self._examine(SUBJECTS[subject].plain())
        self._listener, self._links = Listener(path), []

    def close(self) -> None:
        for closing in (self._listener, *self._links):
            closing.close()
