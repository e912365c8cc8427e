"""An engine process that answers requests while it is updated: it owns an `AsyncLLM` in place of a `vllm.LLM`."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from suite.actors.engine import Engine, continuation
from suite.processes.blame import examined, is_examined

ASKED_FOR_S, POLL_S = 20.0, 0.002  # for requests to give tokens; between two looks at them
STILL_S = 0.03  # without a token: then a paused engine has none on its way; an update takes longer


class ServingEngine(Engine):
    """As `Engine`, with requests that run while other calls are made. Arguments are the same."""

    def _make(self, **arguments: Any) -> "Served":
        return Served(arguments)

    def reset_prefix_cache(self) -> None:
        """As `Engine.reset_prefix_cache`; requests that are running or paused are preempted and computed anew."""
        with self._watch.waiting():
            reset = self._llm.reset_prefix_cache()
            if reset is False:
                reset = self._llm.reset_prefix_cache(reset_running_requests=True)
        self._expect_reset(reset)

    def update_running(self, running: dict, *args: Any) -> dict:
        """As `update`, with requests running: they are started, generation is paused, and resumed after the update.

        `running` is {"prompts", "max_tokens", "mode": of pause_generation(), "clear_cache": by pause_generation(),
        "version": that the weights get before generation is resumed, empty for none}.
        Adds "pause_s": from the last token before to the first after, where requests go on; and "cache_is_held":
        whether a plain reset_prefix_cache() answers False before the update, which is tried where the pause has not
        cleared the cache. `requests()` says how they have ended.
        """
        served = self._llm
        served.start(running["prompts"], self.sampling(running["max_tokens"]))
        with self._watch.waiting():
            served.wait_until(lambda: all(request.times_s for request in served.requests), "each give a token")
            served.pause_generation(mode=running["mode"], clear_cache=running["clear_cache"])
            held = not running["clear_cache"] and served.reset_prefix_cache() is False
        try:
            half = self.update(*args)
            if running["version"]:
                self.set_version(running["version"])
        except Exception as error:
            self._go_on_after(error)
            raise
        with self._watch.waiting():
            served.resume_generation()
            return half | {"pause_s": served.pause_s(), "cache_is_held": held}

    def set_version(self, version: str) -> bool:
        """Say which version the weights are; False where this vLLM does not say it of tokens."""
        from vllm.outputs import CompletionOutput

        says = hasattr(CompletionOutput, "weight_versions") and hasattr(self._llm.llm_engine, "update_weight_version")
        if says:
            with self._watch.waiting():
                self._llm.update_weight_version(version)
        return says

    def requests(self) -> list[dict]:
        """How the requests of the last update_running() have ended, which is waited for.

        As `generate`, with "reason": why it ended, as vLLM says; "before": how many tokens it had at the pause;
        "versions": [first token, token after the last, version] of each run of tokens, where vLLM says it.
        """
        served = self._llm
        with self._watch.waiting(), examined():  # that they end is what is asked of them
            served.wait_until(lambda: all(request.ended for request in served.requests), "end")
        return [request.plain() for request in served.requests]

    def _go_on_after(self, failure: Exception) -> None:
        """Resume what was paused, without the requests where the extension says that its weights are inconsistent."""
        try:
            if "inconsistent" in self._half.state():
                self._llm.pause_generation(mode="abort")
            with self._watch.waiting():
                self._llm.resume_generation()
        except Exception as error:
            failure.add_note(f"nor could generation be resumed: {type(error).__name__}: {error}")


class Unanswered(RuntimeError):
    """Requests have raised something in place of an answer."""

    def __init__(self, message: str, failed: "list[Request]") -> None:
        self.examined = all(is_examined(request.failure) for request in failed)
        super().__init__(message)


@dataclass
class Request:
    """A request on its way: what it has given so far, and when each of its outputs came (monotonic clock)."""

    output: Any = None
    times_s: list[float] = field(default_factory=list)
    before: int = 0
    ended: bool = False
    failure: Exception | None = None

    @property
    def error(self) -> str:
        """What it has raised, if anything."""
        return f"{type(self.failure).__name__}: {self.failure}" if self.failure else ""

    @property
    def tokens(self) -> int:
        """How many it has given."""
        return len(self.output.outputs[0].token_ids) if self.output else 0

    def take(self, output: Any) -> None:
        """Put down the next output; one without a new token has no time."""
        more = len(output.outputs[0].token_ids) > self.tokens
        self.output = output
        if more:
            self.times_s.append(time.monotonic())

    def plain(self) -> dict:
        """As plain data; see `ServingEngine.requests`."""
        said = {"reason": self.error or "no output", "before": self.before, "versions": []}
        if self.output is None:
            return said | {"tokens": [], "logprobs": []}
        last = self.output.outputs[0]
        spans = getattr(last, "weight_versions", None) or []
        said["versions"] = [[span.start, span.end, span.version] for span in spans]
        return said | continuation(last) | {"reason": self.error or str(last.finish_reason)}


class Served:
    """An AsyncLLM on an event loop in a thread of its own, called as a `vllm.LLM` is. `arguments` are vllm.LLM's."""

    def __init__(self, arguments: dict) -> None:
        self.requests: list[Request] = []
        self._numbers, self._resumed_s, self._paused_s = itertools.count(), 0.0, 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="serving", daemon=True).start()
        self.llm_engine = self._wait(self._made(arguments))  # has what the suite asks of an LLM's

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """A method of AsyncLLM that is waited for."""
        if method.startswith("_"):
            raise AttributeError(method)
        called = getattr(self.llm_engine, method)
        return lambda *args, **kwargs: self._called(called(*args, **kwargs))

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        """As vllm.LLM's."""
        return self._called(self.llm_engine.collective_rpc(method, args=args))

    def generate(self, prompts: list[dict], params: Any, use_tqdm: bool) -> list:
        """As vllm.LLM's; raises RuntimeError where a request gives no answer."""
        asked = [Request() for _ in prompts]
        self._wait(self._all([self._follow(r, p, params) for r, p in zip(asked, prompts, strict=True)]))
        if failed := [request for request in asked if request.failure]:
            raise Unanswered(f"{len(failed)} of {len(asked)} requests gave no answer: {failed[0].error}", failed)
        return [request.output for request in asked]

    def init_weight_transfer_engine(self, request: dict) -> None:
        """As vllm.LLM's, which takes plain data where AsyncLLM takes a request."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._called(self.llm_engine.init_weight_transfer_engine(WeightTransferInitRequest(**request)))

    def update_weights(self, request: dict) -> None:
        """As vllm.LLM's, which takes plain data where AsyncLLM takes a request."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._called(self.llm_engine.update_weights(WeightTransferUpdateRequest(**request)))

    def start(self, prompts: list[list[int]], params: Any) -> None:
        """Begin requests, and wait for nothing. They are `requests` from now on."""
        self.requests = [Request() for _ in prompts]
        for request, prompt in zip(self.requests, prompts, strict=True):
            follow = self._follow(request, {"prompt_token_ids": prompt}, params)
            asyncio.run_coroutine_threadsafe(follow, self._loop)

    def resume_generation(self) -> None:
        """As AsyncLLM's. Puts down first how many tokens each request has, once no more are on their way."""
        while time.monotonic() - self._last_s() < STILL_S:
            time.sleep(POLL_S)
        for request in self.requests:
            request.before = request.tokens
        self._paused_s, self._resumed_s = self._last_s(), time.monotonic()
        self._called(self.llm_engine.resume_generation())

    def pause_s(self) -> float | None:
        """Seconds from the last token before the pause to the first after it; None where all requests had ended."""
        if all(request.ended for request in self.requests):
            return None
        self.wait_until(lambda: bool(self._times_after()) or all(r.ended for r in self.requests), "go on")
        return min(self._times_after()) - self._paused_s if self._times_after() else None

    def wait_until(self, there: Callable[[], bool], doing: str) -> None:
        """Wait for something of the requests. Raises TimeoutError."""
        deadline = time.monotonic() + ASKED_FOR_S
        while not there():
            if time.monotonic() > deadline:
                states = [f"{r.tokens} tokens{', ended' if r.ended else ''}" for r in self.requests]
                raise TimeoutError(f"expected the requests to {doing} within {ASKED_FOR_S:g} s, found {states}")
            time.sleep(POLL_S)

    def _last_s(self) -> float:
        return max((request.times_s[-1] for request in self.requests if request.times_s), default=0.0)

    def _times_after(self) -> list[float]:
        return [at for request in self.requests for at in request.times_s if at > self._resumed_s]

    async def _made(self, arguments: dict) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def _outputs(self, prompt: dict, params: Any, number: int) -> AsyncIterator[Any]:
        """The outputs of one request, as `generated` gives them; see `_blames`."""
        with self._blames():
            async for output in self._generated(prompt, params, number):
                yield output

    def _blames(self) -> contextlib.AbstractContextManager[None]:
        """What says of an error that vLLM has raised it, not the suite: all that is awaited is AsyncLLM's."""
        return examined()

    async def _follow(self, request: Request, prompt: dict, params: Any) -> None:
        """Take what a request gives until it ends; whatever it raises is its end too."""
        try:
            async for output in self._outputs(prompt, params, next(self._numbers)):
                request.take(output)
        except Exception as error:
            request.failure = error
        finally:
            request.ended = True

    def _generated(self, prompt: dict, params: Any, number: int) -> AsyncIterator[Any]:
        """The outputs of one request; `number` counts them."""
        return self.llm_engine.generate(prompt, params, f"request-{number}")

    async def _all(self, awaited: list[Coroutine]) -> None:
        await asyncio.gather(*awaited)

    def _wait(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _called(self, coroutine: Coroutine) -> Any:
        """As `_wait`, of a coroutine that is vLLM's own."""
        with self._blames():
            return self._wait(coroutine)
