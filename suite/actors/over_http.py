"""What a trainer asks of a `vllm serve`, over HTTP: requests, pauses, updates, and calls of worker methods.

All but requests for tokens needs vLLM's development mode. Bodies and answers are JSON.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx

from suite.processes import wire

CONNECT_S, ANSWER_S = 5.0, 300.0  # as vLLM's own client has it
SHOWN = 2000  # characters of an answer that is an error
COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
DATA, DONE = "data: ", "data: [DONE]"


class HttpError(RuntimeError):
    """A server has answered with an error, or not as it should."""

    examined = True  # but for what was asked wrongly


@dataclass(frozen=True)
class Said:
    """What a request has given so far, as vLLM's CompletionOutput has it."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, SimpleNamespace], ...] = ()
    finish_reason: str | None = None
    weight_versions: tuple[SimpleNamespace, ...] = ()

    def more(self, choice: dict) -> "Said":
        """With a chunk of the stream, of either path."""
        tokens = choice.get("token_ids") or []
        spans = [SimpleNamespace(**span) for span in choice.get("weight_versions") or []]
        steps = [{token: SimpleNamespace(logprob=p)} for token, p in zip(tokens, _logprobs(choice), strict=True)]
        reason = choice.get("finish_reason")
        return Said((*self.token_ids, *tokens), (*self.logprobs, *steps), reason, tuple(spans))


def _logprobs(choice: dict) -> list[float]:
    given = choice.get("logprobs") or {}
    if "content" in given:
        return [token["logprob"] for token in given["content"] or []]
    return given.get("token_logprobs") or []


class Remote:
    """A server, called as AsyncLLM is. Raises HttpError where the server does not answer with 200.

    Args:
        url: where it listens.
        model: the name under which it serves its model.
        in_tokens: whether tokens are asked for at /inference/v1/generate, which says of which version of the weights
            each is; else at /v1/completions.
    """

    engine_core: Any
    model_config: Any

    def __init__(self, url: str, model: str, in_tokens: bool) -> None:
        self._model, self._in_tokens = model, in_tokens
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        once = httpx.Limits(max_keepalive_connections=0)  # after a 500 the server closes a connection unannounced
        self._client = httpx.AsyncClient(base_url=url, timeout=timeout, limits=once, trust_env=False)

    async def is_up(self) -> bool:
        """Whether it answers, is the one that serves under this name, and its engine is well."""
        try:
            well, models = await self._client.get("/health"), await self._client.get("/v1/models")
        except httpx.TransportError:
            return False
        return well.status_code == models.status_code == httpx.codes.OK and self._model in models.text

    async def generate(self, prompt: dict, params: dict, request_id: str) -> AsyncIterator[SimpleNamespace]:
        """As AsyncLLM's: what the request has given so far, whenever there is more."""
        said, path = Said(), GENERATE if self._in_tokens else COMPLETIONS
        asked = self._asked(prompt["prompt_token_ids"], params) | {"request_id": request_id}
        with _of_the_server():
            async with self._client.stream("POST", path, json=asked) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    raise _error(path, response)
                async for line in response.aiter_lines():
                    if line.startswith(DATA) and line != DONE:
                        said = said.more(_choice(path, line))
                        yield SimpleNamespace(outputs=[said])
        if said.finish_reason is None:
            raise HttpError(f"POST {path}: expected a finish_reason, found that the stream has ended without one")

    def _asked(self, tokens: list[int], params: dict) -> dict:
        if self._in_tokens:
            return {"model": self._model, "token_ids": tokens, "sampling_params": params, "stream": True}
        params = {name: value for name, value in params.items() if name != "detokenize"}
        asked = {"model": self._model, "prompt": tokens, "stream": True}
        return asked | params | {"return_token_ids": True, "return_tokens_as_token_ids": True}

    async def collective_rpc(self, method: str, args: tuple = ()) -> list[dict]:
        """As AsyncLLM's, of `probe_call` only: arguments and results are texts, see `Probe.probe_call_encoded`."""
        if method != "probe_call":
            raise ValueError(f"expected probe_call, found {method}: other methods take what HTTP cannot carry")
        text = wire.encode(list(args)).decode()
        answer = await self._post("/collective_rpc", {"method": "probe_call_encoded", "args": [text]})
        return [wire.decode(result["encoded"].encode()) for result in answer["results"]]

    async def pause_generation(self, mode: str, clear_cache: bool = True) -> None:
        """As AsyncLLM's."""
        await self._post("/pause", mode=mode, clear_cache=clear_cache)

    async def resume_generation(self) -> None:
        """As AsyncLLM's."""
        await self._post("/resume")

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool | None:
        """As AsyncLLM's; None where the server does not say."""
        return (await self._post("/reset_prefix_cache", reset_running_requests=reset_running_requests)).get("success")

    async def sleep(self, level: int) -> None:
        """As AsyncLLM's."""
        await self._post("/sleep", level=level)

    async def wake_up(self) -> None:
        """As AsyncLLM's."""
        await self._post("/wake_up")

    async def init_weight_transfer_engine(self, request: dict) -> None:
        """As vllm.LLM's, {"init_info": {...}}."""
        await self._post("/init_weight_transfer_engine", request)

    async def start_weight_update(self) -> None:
        """As AsyncLLM's."""
        await self._post("/start_weight_update", {})

    async def update_weights(self, request: dict) -> None:
        """As vllm.LLM's, {"update_info": {...}}."""
        await self._post("/update_weights", request)

    async def finish_weight_update(self) -> None:
        """As AsyncLLM's."""
        await self._post("/finish_weight_update", {})

    async def update_weight_version(self, new_version: str) -> None:
        """As AsyncLLM's."""
        await self._post("/update_weight_version", {"new_version": new_version})

    async def weight_checker(self, asked: dict) -> dict:
        """What vLLM's own check of the weights says, of {"action": "checksum"}, or "compare" with a "baseline"."""
        return await self._post("/weight_checker", asked)

    async def _post(self, path: str, body: dict | None = None, **query: object) -> dict:
        """The answer's JSON; {} where it is empty."""
        params = {name: str(value).lower() for name, value in query.items()}
        with _of_the_server():
            response = await self._client.post(path, json=body, params=params)
        if response.status_code != httpx.codes.OK:
            raise _error(path, response)
        try:
            return response.json() if response.content else {}
        except ValueError as error:
            raise HttpError(f"POST {path}: expected JSON, found {response.text:.{SHOWN}}") from error


def _choice(path: str, line: str) -> dict:
    chunk = json.loads(line.removeprefix(DATA))
    if "error" in chunk:
        raise HttpError(f"POST {path}: expected tokens, found {chunk['error']!r:.{SHOWN}}")
    return chunk["choices"][0]


def _error(path: str, response: httpx.Response) -> HttpError:
    error = HttpError(f"POST {path}: expected 200, found {response.status_code}: {response.text:.{SHOWN}}")
    error.examined = not response.is_client_error
    return error


@contextlib.contextmanager
def _of_the_server() -> Iterator[None]:
    """A server that is gone, or silent, is what is examined."""
    try:
        yield
    except httpx.TransportError as error:
        error.examined = True
        raise
