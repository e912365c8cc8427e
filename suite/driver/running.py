"""Requests that run while their engine is updated, and how they have ended. For one engine that serves."""

from suite.driver.expected import expect
from suite.driver.expecting import Expecting
from suite.driver.moving import Moved, Moving
from suite.driver.together import MAX_TOKENS

RUNNING_TOKENS = 150  # that each request asks for: it runs for longer than it takes to pause
REQUESTS_DEADLINE_S = 40.0  # for all of them to end
CLEAR_AFTER_A_PAUSE = 8  # tokens: how far requests had come varies, and so do these, from 20 on with 16 requests
ENDS_BY = {"abort": "abort", "wait": "length", "keep": "length"}  # what a request says, by the mode of the pause


class Running(Moving, Expecting):
    """Updates with requests in flight."""

    def update_running(self, mode: str, prompts: list[list[int]], clear_cache: bool = True, version: str = "") -> Moved:
        """An update with these prompts running, which are paused as `mode` says; see `ServingEngine.update_running`."""
        return self.update(running=self.running(mode, prompts, clear_cache, version))

    def running(self, mode: str, prompts: list[list[int]], clear_cache: bool = True, version: str = "") -> dict:
        """What `update(running=)` takes."""
        asked = {"prompts": prompts, "max_tokens": RUNNING_TOKENS}
        return asked | {"mode": mode, "clear_cache": clear_cache, "version": version}

    def set_version(self, version: str) -> bool:
        """Have the engine say of the tokens to come that they are of this version; False where vLLM does not say it."""
        return self.engines[0].process.call("set_version", version, deadline_s=self.call_deadline_s)

    def requests(self) -> list[dict]:
        """How the requests of the last update have ended; see `ServingEngine.requests`."""
        return self.engines[0].process.call("requests", deadline_s=REQUESTS_DEADLINE_S)

    def expect_ended(self, requests: list[dict], mode: str) -> None:
        """Requests have ended as a pause of this mode has them end."""
        for request in requests:
            reason, tokens, before = request["reason"], len(request["tokens"]), request["before"]
            expect(reason == ENDS_BY[mode], f"a request that ends with {ENDS_BY[mode]!r}", repr(reason), self.where)
            count = before if mode == "abort" else RUNNING_TOKENS
            expect(tokens == count, f"{count} tokens of a request, paused by {mode!r}", tokens, self.where)
            if mode == "wait":
                expect(before == tokens, "every token to come before the update", before, self.where)
            elif before >= RUNNING_TOKENS:
                raise RuntimeError(f"a request was over before the pause: nothing is told {self.where}")

    def expect_continued(self, prompts: list[list[int]], requests: list[dict]) -> None:
        """What came after the pause is what the weights that the trainer holds make of all that came before."""
        context = [
            prompt + request["tokens"][: request["before"]] for prompt, request in zip(prompts, requests, strict=True)
        ]
        after = [{what: request[what][request["before"] :] for what in ("tokens", "logprobs")} for request in requests]
        oracle = self.trainer.call("greedy", context, MAX_TOKENS)[0]
        self.expect_said(context, oracle, after, CLEAR_AFTER_A_PAUSE)
