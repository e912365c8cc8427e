"""Requests of a vllm.LLM that are in flight while it is updated, and for how long they get no token.

The engine's core computes in steps. Where it has a process of its own, as on GPUs, it takes one step after the other;
where it is in this process, as on CPUs, it takes one each time that an output is asked for. In both it is told to pause
and to resume as AsyncLLM's pause_generation(mode="keep") and resume_generation() tell it, which vllm.LLM does not
offer. That resets the prefix cache: the requests go on with keys and values that the new weights have computed.
AsyncLLM itself then sleeps for 20 ms before it returns (0.20 to 0.33), which is the same for all and left out here.
"""

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

from suite.processes.blame import examined

WITHIN_S = 20.0  # for requests to give tokens


class InFlight:
    """Requests of one vllm.LLM. When a token came is what the core says, on the machine's monotonic clock."""

    def __init__(self, llm: Any) -> None:
        self._llm, self._core = llm, llm.llm_engine.engine_core
        self._names: list[str] = []
        self._given: Counter[str] = Counter()  # tokens by request
        self._times_s: list[float] = []  # of steps that gave tokens
        self._resumed_s = 0.0

    def start(self, prompts: list[list[int]], params: Any, tokens: int) -> None:
        """Begin requests, and return once each has given this many tokens. Raises as `go_on`."""
        asked: list[dict] = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._given, self._times_s = Counter(), []
        self._names = self._llm.enqueue(asked, params, use_tqdm=False)
        self._take_until(lambda: all(self._given[name] >= tokens for name in self._names), f"give {tokens} tokens each")

    def pause(self) -> None:
        """Return once no step is under way, and none will be until `go_on`."""
        if not self._is_apart:  # or this waits for it by itself
            self._tell("pause_scheduler", "keep", False)
            while self._core.engine_core.batch_queue:
                self._take()
        self._tell("pause_scheduler", "keep", True)

    def go_on(self, began_s: float, ended_s: float) -> dict[str, float]:
        """Resume, wait for a token, and return how long there was none around an update, from `began_s` to `ended_s`.

        Returns "pause_s": from the last token before it to the first after it, and "token_s": the median between two
        tokens before it. Raises RuntimeError where that is not known, and TimeoutError.
        """
        self._resumed_s = time.monotonic()
        self._tell("resume_scheduler")
        self._take_until(lambda: bool(self._times_s) and self._times_s[-1] > self._resumed_s, "go on")
        before = [at for at in self._times_s if at <= self._resumed_s]
        last, first = before[-1], min(at for at in self._times_s if at > self._resumed_s)
        if not last <= began_s <= ended_s <= first:
            raise RuntimeError(
                f"expected no token during the update, found the last one {last - began_s:.4f} s after its beginning"
                f" and the next one {first - ended_s:.4f} s after its end: generation was not paused"
            )
        return {"pause_s": first - last, "token_s": self._token_s(before)}

    def end(self) -> None:
        """Abort the requests, and leave an engine that is idle, not paused, with no prefix cached."""
        self.pause()
        with examined():
            self._llm.llm_engine.abort_request(self._names, internal=True)
        self._names = []
        self._tell("resume_scheduler")

    def _token_s(self, times_s: list[float]) -> float:
        """The median between two steps, of the later half: in the first ones requests had still to begin."""
        late = times_s[len(times_s) // 2 :]
        return median(after - before for before, after in pairwise(late))

    def _take_until(self, there: Callable[[], bool], doing: str) -> None:
        """Take what the core gives. A core that is silent in a process of its own is waited for without a deadline:
        the caller of the engine has one."""
        deadline = time.monotonic() + WITHIN_S
        while not there():
            if time.monotonic() > deadline:
                given = [self._given[name] for name in self._names]
                raise TimeoutError(f"expected the requests to {doing} within {WITHIN_S:g} s, found {given} tokens")
            self._take()

    def _take(self) -> None:
        with examined():
            taken = self._core.get_output()
        ours = [output for output in taken.outputs if output.request_id in self._names]
        for output in ours:
            self._given[output.request_id] += len(output.new_token_ids)
            if output.finish_reason is not None:
                raise RuntimeError(f"a request ended by {output.finish_reason!s} that was to run on: nothing is told")
        if any(output.new_token_ids for output in ours):
            self._times_s.append(taken.timestamp)

    def _tell(self, method: str, *args: Any) -> Any:
        """Call a method of the core, in its process or in this one."""
        with examined():
            if self._is_apart:
                return self._core.call_utility(method, *args)
            return getattr(self._core.engine_core, method)(*args)

    @property
    def _is_apart(self) -> bool:
        """Whether the core has a process of its own."""
        return hasattr(self._core, "call_utility")
