"""What runs in an engine process: it owns a `vllm.LLM` and does the engine's half of every update."""

import os
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from suite.actors import adapters, answers, drafting
from suite.actors.cuda import cuda_is_initialised
from suite.actors.dialogue import EngineSide
from suite.actors.following import Following
from suite.actors.in_flight import InFlight
from suite.actors.link import Link, Listener
from suite.actors.probe import EXTENSION, PROBED
from suite.actors.watch import Watch, WorkerDied
from suite.processes.blame import Examined, SuiteFault, examined
from suite.subjects import from_plain

LINK_WAIT_S = 60.0


class WorkerError(RuntimeError):
    """A worker method raised, on one rank or more."""

    examined = True


class StaleCache(RuntimeError):
    """vLLM has not reset its prefix cache: what old weights have computed would be used under the new ones."""

    examined = True


class Engine(adapters.Adapting):
    """A vLLM engine with a subject's extension in its workers.

    Args:
        model: directory of the checkpoint (or of its config, with `load_format="dummy"` in options).
        subject: `Subject.plain()` of the subject.
        link_path: Unix socket on which trainers are awaited.
        tensor_parallel_size: ranks of the engine.
        oracle_path: where to write what it computes with and answers now, for others to be compared with; None for
            nowhere.
        options: further arguments of vllm.LLM.
    """

    _doubtful = False  # whether a call of vllm.LLM has failed, and left replies perhaps
    _calls = 0  # to all workers, so far

    @staticmethod
    def sampling(max_tokens: int) -> Any:
        """How the suite samples: vLLM's SamplingParams, or what stands for them."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, detokenize=False)

    @staticmethod
    def import_ahead() -> dict[str, bool]:
        """Import what every engine needs, and say whether that initialised CUDA: {"cuda_is_initialised": ...}."""
        from vllm import LLM, SamplingParams  # noqa: F401

        return {"cuda_is_initialised": cuda_is_initialised()}

    def __init__(
        self,
        model: str,
        subject: dict,
        link_path: str,
        tensor_parallel_size: int,
        oracle_path: str | None,
        options: dict,
    ) -> None:
        os.environ[EXTENSION] = subject["extension"]  # before the workers are made: they inherit it
        self.takes_adapters = bool(options.get("enable_lora"))
        self._examine(subject)
        self._cold: list[list[dict]] = []
        self._listener = Listener(link_path)
        self._links: list[Link] = []
        self._llm = self._make(
            model=model,
            tensor_parallel_size=tensor_parallel_size,
            worker_extension_cls=PROBED,
            **self._subject.engine_arguments(),
            **drafting.arguments_of(options, model, tensor_parallel_size),
        )
        self._watch = Watch()
        self.devices = self.rpc("probe_device")
        self._watch.look_after([device["pid"] for device in self.devices])
        if oracle_path is not None:
            self._write_down(oracle_path)

    def _make(self, **arguments: Any) -> Any:
        """What computes: a vllm.LLM, or what is called as one is; it says itself what it raises for vLLM."""
        from vllm import LLM

        return Examined(LLM(**arguments))

    def facts(self) -> dict:
        """Which devices the workers are on."""
        return {"devices": self.devices}

    def become(self, subject: dict) -> None:
        """Exchange the workers' extension for another subject's. Trainers have to connect anew."""
        self.rpc("probe_become", subject["extension"])
        self._examine(subject)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a worker method on all ranks; returns their results in rank order.

        Raises WorkerError with what every rank raised, if any did, and WorkerDied where a worker has ended. SuiteFault
        where the suite's own part of a worker failed.
        """
        self._expect_in_step()
        self._calls += 1
        with self._watch.waiting():
            replies = self._llm.collective_rpc("probe_call", args=(method, args))
        if failed := {rank: reply for rank, reply in enumerate(replies) if "error" in reply}:
            print(*(reply["traceback"] for reply in failed.values()), sep="\n", flush=True)  # to the log
            raised = WorkerError if all(reply["examined"] for reply in failed.values()) else SuiteFault
            raise raised(f"{method}: " + "; ".join(f"rank {rank}: {r['error']}" for rank, r in failed.items()))
        return [reply["result"] for reply in replies]

    def call_llm(self, method: str, *args: Any) -> Any:
        """Call a method of vllm.LLM itself, as a training loop does. Raises what that raises."""
        self._calls += 1
        try:
            with self._watch.waiting():
                return getattr(self._llm, method)(*args)
        except Exception:
            traceback.print_exc()  # to the log
            self._doubtful = True
            raise

    def pace(self, manifest: list[dict], warm_ups: int, samples: int) -> dict[str, list[float]]:
        """Seconds of every call to all workers that does nothing: of an empty call, and of one that carries `manifest`.

        `warm_ups` calls of each kind come first and are left out.
        """
        taken: dict[str, list[float]] = {"empty_call_samples_s": [], "manifest_call_samples_s": []}
        for seconds, sent in zip(taken.values(), ((), (manifest,)), strict=True):
            for _ in range(warm_ups + samples):
                started = time.monotonic()
                self.rpc("probe_nothing", *sent)
                seconds.append(time.monotonic() - started)
        return {kind: seconds[warm_ups:] for kind, seconds in taken.items()}

    def generate(self, prompts: list[list[int]], max_tokens: int, adapter: str = "") -> list[dict]:
        """Greedy continuations: {"tokens": [...], "logprobs": [log-probability of each]} for each prompt.

        adapter: the directory of the LoRA adapter to use; empty for none.
        """
        more = {"lora_request": adapters.request(adapter)} if adapter else {}
        return self._generate([{"prompt_token_ids": prompt} for prompt in prompts], max_tokens, **more)

    def _generate(self, asked: list[dict], max_tokens: int, **more: Any) -> list[dict]:
        self._expect_in_step()
        with self._watch.waiting():
            outputs = self._llm.generate(asked, self.sampling(max_tokens), use_tqdm=False, **more)
        return [continuation(output.outputs[0]) for output in outputs]

    def answers(self) -> list[dict]:
        """As `generate`, of the prompts of `suite.actors.answers`, with no prefix cached; one may have a picture.

        Each prompt is a batch of its own: so every engine computes in the same steps, whenever requests reach it.
        """
        config = self._llm.llm_engine.model_config
        self.reset_prefix_cache()
        texts = answers.prompts(config.get_vocab_size(), config.max_model_len)
        asked = [*({"prompt_token_ids": prompt} for prompt in texts), *answers.pictured(config)]
        return [self._generate([prompt], answers.TOKENS)[0] for prompt in asked]

    def cold_answers(self) -> list[list[dict]]:
        """Both of this engine's `answers` after its cold load. Empty where it has written down nothing then."""
        return self._cold

    def tokens_per_s(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Generated tokens per second of one batch."""
        started = time.monotonic()
        continuations = self.generate(prompts, max_tokens)
        return sum(len(c["tokens"]) for c in continuations) / (time.monotonic() - started)

    def guesses(self) -> dict[str, int]:
        """How many tokens the draft model has guessed so far, and how many were accepted: {"guessed", "accepted"}."""
        return drafting.counted(self._llm)

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier prompts, which old weights have computed. Raises StaleCache."""
        self._expect_reset(self._llm.reset_prefix_cache())

    def reset_caches(self, following: Following | None = None) -> None:
        """Forget all that old weights have computed: prefixes, and what the encoders of a model made of pictures.

        following: has reset the prefix cache, where it was sent. Raises StaleCache.
        """
        if following is not None and following.sent:
            with self._watch.waiting():
                self._expect_reset(following.result())
        else:
            self.reset_prefix_cache()
        if getattr(self._llm.llm_engine.model_config, "is_multimodal_model", False):
            resets = self._llm if hasattr(self._llm, "reset_encoder_cache") else self._llm.llm_engine
            with examined():
                resets.reset_encoder_cache()

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Meet the trainer, in whatever way the subject does; see `EngineHalf.connect`."""
        self._half.connect(address, port, rank_offset, world_size)

    def half(self, step: str, *args: Any) -> Any:
        """Take a single step: "begin", "end", "abort", "state" or "forget" of the subject's `EngineHalf`."""
        return getattr(self._half, step)(*args)

    def accept(self, trainer_ranks: int) -> None:
        """Await this many trainer ranks; lines to earlier trainers are closed."""
        for link in self._links:
            link.close()
        self._links = [self._listener.accept(LINK_WAIT_S) for _ in range(trainer_ranks)]

    def sleep(self, level: int) -> None:
        """Release the GPU memory of the weights (level 1: kept on the host, level 2: dropped) and of the cache."""
        self._llm.sleep(level=level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory back: of "weights", of "kv_cache", or of all."""
        self._llm.wake_up(tags=tags)

    def pause(self, prompts: list[list[int]], max_tokens: int, tokens: int) -> None:
        """Start requests, and pause generation once each has given this many tokens; `update_paused` goes on."""
        self._in_flight = InFlight(self._llm)
        try:
            with self._watch.waiting():
                self._in_flight.start(prompts, self.sampling(max_tokens), tokens)
                self._in_flight.pause()
        except Exception as error:
            self._end_requests(error)
            raise

    def update_paused(self, *args: Any) -> dict:
        """As `update`, after `pause`: generation goes on right after it, and the requests are ended.

        Adds "pause_s" and "token_s", see `InFlight.go_on`.
        """
        try:
            half = self.update(*args)
            with self._watch.waiting():
                half |= self._in_flight.go_on(half["started_s"], half["ended_s"])
        except Exception as error:
            self._end_requests(error)
            raise
        with self._watch.waiting():
            self._in_flight.end()
        return half

    def update(self, deadline_s: float, reset_cache: bool = True, bracket: bool = True) -> dict:
        """The engine's half of one update. Returns when it started and ended (monotonic clock), its steps' seconds, and
        the number of calls to all workers.

        `reset_cache=False` leaves out what the extension asks of its caller, `bracket=False` the calls that say where
        the update begins and ends. Raises what the extension raised, after telling the trainer.
        """
        started, half, said = time.monotonic(), self._half, EngineSide(self._links, deadline_s)
        calls = self._calls
        try:
            announced = said.announced()
            arrived = time.monotonic()
            manifest = half.receive(announced)
            if bracket:
                half.begin(manifest)
        except Exception as error:
            said.refuse(error)
            if bracket and len(self.devices) > 1:  # ranks that hold other tensors have begun
                self._abort(error)
            raise
        try:
            said.expect_go()
            begun = time.monotonic()
            resets = reset_cache and not half.resets_cache
            with self._following(resets and half.ends_by_one_call) as following:
                half.transfer(manifest)
            transferred = time.monotonic()
            if bracket:
                half.end()
            if resets:
                self.reset_caches(following)
        except Exception as error:
            said.refuse(error)  # before aborting, which a dead worker may make impossible
            if bracket:
                self._abort(error)
            raise
        ended = time.monotonic()
        said.ended()
        steps_s = {"begin": begun - arrived, "transfer": transferred - begun, "end": ended - transferred}
        return {"started_s": started, "ended_s": ended, "steps_s": steps_s, "calls": self._calls - calls}

    def update_saved(self, path: str, *args: Any) -> dict:
        """As `update`; what the engine computes with right after it is written down at `path`, see `probe_save`."""
        half = self.update(*args)
        self.rpc("probe_save", path)
        return half

    def receive(self, nbytes: int) -> dict:
        """The engine's half of one roofline broadcast."""
        started = time.monotonic()
        self.rpc("probe_receive", nbytes)
        return {"started_s": started, "ended_s": time.monotonic()}

    def close(self) -> None:
        """End the engine's workers."""
        self._watch.close()
        self._listener.close()
        for link in self._links:
            link.close()
        shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()

    def _write_down(self, path: str) -> None:
        """Write what this engine computes with and answers after its cold load; see `suite.actors.recording`."""
        first = self.answers()
        self.rpc("probe_record")
        self._cold = [first, self.answers()]
        self.reset_prefix_cache()
        answers.write(path, *self._cold)
        self.rpc("probe_settle", path)  # last: once its files are there, so are the answers

    def _expect_reset(self, found: object) -> None:
        """Raise StaleCache where this is what reset_prefix_cache() says when it has reset nothing."""
        if found is False:
            raise StaleCache(
                "expected reset_prefix_cache() to answer True, found False: nothing was reset, since requests"
                " hold a part of the cache. Pause generation first, let them end, or pass reset_running_requests=True"
            )

    def _following(self, resets: bool) -> AbstractContextManager[Following | None]:
        """Has the prefix cache reset right behind the next call to the workers, where replies are in step."""
        return Following(self._llm, self._llm.reset_prefix_cache) if resets and not self._doubtful else nullcontext()

    def _examine(self, subject: dict) -> None:
        self._subject = from_plain(subject)
        self._half = self._subject.engine_half(self)

    def _expect_in_step(self) -> None:
        """Raise WorkerError where a call that failed has left replies unread, which would answer the calls to come.

        vLLM's executor reads the ranks' replies in turn, and stops at the first that is an error.
        """
        if not self._doubtful:
            return
        expected = [{"result": None}] * len(self.devices)
        try:
            with self._watch.waiting():
                found: Any = self._llm.collective_rpc("probe_call", args=("probe_nothing", []))
        except WorkerDied:
            raise
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found != expected:
            raise WorkerError(
                "a call of vllm.LLM has failed, and the next one is answered by what that left unread: expected"
                f" {expected}, found {found!r:.300}"
            )
        self._doubtful = False

    def _end_requests(self, cause: Exception) -> None:
        try:
            with self._watch.waiting():
                self._in_flight.end()
        except Exception as error:
            cause.add_note(f"nor could the requests be ended: {type(error).__name__}: {error}")

    def _abort(self, cause: Exception) -> None:
        try:
            self._half.abort()
        except Exception as error:
            cause.add_note(f"nor could the update be aborted: {type(error).__name__}: {error}")


def continuation(output: Any) -> dict:
    """A vLLM CompletionOutput as plain data; see `Engine.generate`."""
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}
