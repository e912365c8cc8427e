"""An engine process whose engine has data-parallel replicas: a vllm.LLM takes none, so it owns an `AsyncLLM`."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from suite.actors.serving import Served, ServingEngine
from suite.processes.blame import examined


class ParallelEngine(ServingEngine):
    """As `ServingEngine`. The workers of all replicas are its ranks, those of the first replica first."""

    def _make(self, **arguments: Any) -> "Parallel":
        return Parallel(arguments)


class Parallel(Served):
    """An AsyncLLM of several replicas. AsyncLLM itself would return what the first one replies."""

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        """As vllm.LLM's, of the workers of all replicas."""
        return self._wait(self._of_all(method, args))

    async def _of_all(self, method: str, args: tuple) -> list:
        core = self.llm_engine.engine_core  # vLLM has no public call that tells the replicas' replies apart
        calls = [
            core._call_utility_async("collective_rpc", method, None, args, None, engine=replica)
            for replica in core.core_engines
        ]
        with examined():
            replied = await asyncio.gather(*calls)
        return [reply for replies in replied for reply in replies]

    def _generated(self, prompt: dict, params: Any, number: int) -> AsyncIterator[Any]:
        """The replicas answer in turn."""
        replica = number % len(self.llm_engine.engine_core.core_engines)
        return self.llm_engine.generate(prompt, params, f"request-{number}", data_parallel_rank=replica)
