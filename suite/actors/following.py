"""A call to vLLM's engine that is sent while another one is under way.

The engine's core, in its process, takes up one call after the other. To send the second one only when the first has
been answered takes the time of a way there and back, in which the core does nothing. AsyncLLM's callers send both at
once, by asyncio.gather(). A vllm.LLM waits for each call, so here a thread makes the second one.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Self

from suite.processes.blame import of_the_suite

SENDS = "_send_input"  # how vLLM's client sends a call to the core
ANSWER_S = 0.5  # for the answer to the second call, where the first has failed


class Following:
    """Inside of this, `call` is made in a thread once the next call to vLLM's core is on its way.

    It is not made where the core has no process of its own, or is called in another way.
    """

    def __init__(self, llm: Any, call: Callable[[], Any]) -> None:
        self._core, self._call = getattr(getattr(llm, "llm_engine", None), "engine_core", None), call
        self._answer: Future[Any] = Future()
        self.sent = False  # whether the call was made

    def __enter__(self) -> Self:
        if hasattr(self._core, "call_utility") and hasattr(self._core, SENDS):
            sends = getattr(self._core, SENDS)

            def send(*args: Any) -> None:  # called by vLLM
                with of_the_suite("have the next call followed"):
                    self._disarm()  # first: what the thread sends goes the usual way
                sends(*args)
                self.sent = True
                with of_the_suite("send a call behind another"):
                    threading.Thread(target=self._follow, name="following", daemon=True).start()

            setattr(self._core, SENDS, send)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._disarm()
        if self.sent and error is not None:  # nothing else is to be sent meanwhile
            wait([self._answer], ANSWER_S)

    def result(self) -> Any:
        """What the call has returned, which is waited for. Raises what it raised."""
        return self._answer.result()

    def _disarm(self) -> None:
        if hasattr(self._core, "__dict__"):
            vars(self._core).pop(SENDS, None)

    def _follow(self) -> None:
        try:
            self._answer.set_result(self._call())
        except BaseException as error:
            self._answer.set_exception(error)
