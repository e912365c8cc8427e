"""What runs in an engine process: it owns a `vllm.LLM` and does the engine's half of every update."""

import os
import time
from typing import Any

from suite.actors.link import CALLED_OFF, Link, LinkError, Listener, Silent
from suite.actors.probe import EXTENSION, PROBED
from suite.actors.watch import Watch
from suite.subjects import Subject, load

LINK_WAIT_S = 60.0


class Cancelled(RuntimeError):
    """The trainer called the update off: another engine has refused it, say."""


class NotAnnounced(RuntimeError):
    """The trainer announced nothing in time: the subject has not been called, neither here nor there."""


class TrainerFailed(RuntimeError):
    """The trainer's half of the update has failed before the transfer."""


class WorkerError(RuntimeError):
    """A worker method raised, on one rank or more."""


class Engine:
    """A vLLM engine with a subject's extension in its workers.

    Args:
        model: directory of the checkpoint (or of its config, with `load_format="dummy"` in options).
        subject: {"name", "extension", "transport"} of the subject.
        link_path: Unix socket on which trainers are awaited.
        tensor_parallel_size: ranks of the engine.
        oracle_path: where to write the weights it starts with, for others to be compared with; None for nowhere.
        options: further arguments of vllm.LLM.
    """

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
        from vllm import LLM

        self._examine(subject)
        self._listener = Listener(link_path)
        self._links: list[Link] = []
        self._llm = LLM(
            model=model,
            tensor_parallel_size=tensor_parallel_size,
            worker_extension_cls=PROBED,
            skip_tokenizer_init=True,
            **options,
        )
        self._watch = Watch()
        self._devices = self.rpc("probe_device")
        self._watch.look_after([device["pid"] for device in self._devices])
        if oracle_path is not None:
            self.rpc("probe_save", oracle_path)

    def facts(self) -> dict:
        """Which devices the workers are on."""
        return {"devices": self._devices}

    def become(self, subject: dict) -> None:
        """Exchange the workers' extension for another subject's. Trainers have to connect anew."""
        self.rpc("probe_become", subject["extension"])
        self._examine(subject)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a worker method on all ranks; returns their results in rank order.

        Raises WorkerError with what every rank raised, if any did, and WorkerDied where a worker has ended.
        """
        with self._watch.waiting():
            answers = self._llm.collective_rpc("probe_call", args=(method, args))
        if failed := {rank: answer for rank, answer in enumerate(answers) if "error" in answer}:
            print(*(answer["traceback"] for answer in failed.values()), sep="\n", flush=True)  # to the log
            raise WorkerError(f"{method}: " + "; ".join(f"rank {rank}: {a['error']}" for rank, a in failed.items()))
        return [answer["result"] for answer in answers]

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

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[dict]:
        """Greedy continuations: {"tokens": [...], "logprobs": [log-probability of each]} for each prompt."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, detokenize=False)
        with self._watch.waiting():
            outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
        return [_continuation(output.outputs[0]) for output in outputs]

    def tokens_per_s(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Generated tokens per second of one batch."""
        started = time.monotonic()
        continuations = self.generate(prompts, max_tokens)
        return sum(len(c["tokens"]) for c in continuations) / (time.monotonic() - started)

    def reset_prefix_cache(self) -> bool:
        """Forget keys and values of earlier prompts, which old weights have computed."""
        return bool(self._llm.reset_prefix_cache())

    def join_group(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Have the workers join the trainer's group."""
        self.rpc("init_weight_update_group", address, port, rank_offset, world_size)

    def accept(self, trainer_ranks: int) -> None:
        """Await this many trainer ranks; lines to earlier trainers are closed."""
        for link in self._links:
            link.close()
        self._links = [self._listener.accept(LINK_WAIT_S) for _ in range(trainer_ranks)]

    def sleep(self, level: int) -> None:
        """Release the GPU memory of the weights (level 1: kept on the host, level 2: dropped) and of the cache."""
        self._llm.sleep(level=level)

    def wake_up(self) -> None:
        """Take the memory back."""
        self._llm.wake_up()

    def pause(self, prompt: list[int], deadline_s: float) -> dict:
        """As `update`, between two generated tokens; `pause_s` is from the end of the one to the end of the other."""
        self.generate([prompt], 1)
        before = time.monotonic()
        half = self.update(deadline_s)
        self.generate([prompt], 1)
        return half | {"pause_s": time.monotonic() - before}

    def update(self, deadline_s: float, reset_cache: bool = True, bracket: bool = True) -> dict:
        """The engine's half of one update. Returns when it started and ended (monotonic clock), and its steps' seconds.

        `reset_cache=False` leaves out what the extension asks of its caller, `bracket=False` the calls that say where
        the update begins and ends. Raises what the extension raised, after telling the trainer.
        """
        started, brackets = time.monotonic(), self._brackets and bracket
        try:
            announced = [self._announcement(link, deadline_s) for link in self._links]
            manifest = announced[0]["manifest"]
            arrived = time.monotonic()
            if brackets:
                self.rpc("begin_update", manifest)
        except Exception as error:
            self._answer({"refused": f"{type(error).__name__}: {error}"}, deadline_s)
            raise
        self._answer({"ready": True}, deadline_s)
        try:
            decisions = [_expect_well(link.receive(deadline_s)) for link in self._links]
            if any(decision != {"go": True} for decision in decisions):
                raise Cancelled(CALLED_OFF)
            begun = time.monotonic()
            self._transfer(manifest, announced)
            transferred = time.monotonic()
            if brackets:
                self.rpc("end_update")
            if reset_cache and not self._resets_cache:
                self.reset_prefix_cache()
        except Exception as error:
            if not isinstance(
                error, Cancelled | TrainerFailed
            ):  # before aborting, which a dead worker may make impossible
                self._answer({"refused": f"{type(error).__name__}: {error}"}, deadline_s)
            if brackets:
                self._abort(error)
            raise
        ended = time.monotonic()
        self._answer({"ended": True}, deadline_s)
        steps_s = {"begin": begun - arrived, "transfer": transferred - begun, "end": ended - transferred}
        return {"started_s": started, "ended_s": ended, "steps_s": steps_s}

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

    def _examine(self, subject: dict) -> None:
        self._subject = Subject(**subject)
        extension = load(self._subject.extension)
        self._brackets = hasattr(extension, "begin_update")
        self._resets_cache = getattr(extension, "weight_sync_resets_cache", False)

    def _transfer(self, manifest: list[dict], announced: list[dict]) -> None:
        if self._subject.transport == "broadcast":
            for entry in manifest:
                self.rpc("update_weight", entry["name"], entry["dtype"], entry["shape"])
            return
        handles: dict[str, dict] = {}
        for message in announced:
            for device, named in message["handles"].items():
                handles.setdefault(device, {}).update(named)  # ranks that share a device, as on CPUs, send the same
        self.rpc("update_weights_from_ipc_handles", handles)

    def _announcement(self, link: Link, deadline_s: float) -> dict:
        """What a trainer's rank announces, where it is an announcement."""
        try:
            message = _expect_well(link.receive(deadline_s))
        except Silent as error:
            raise NotAnnounced(f"expected a trainer's rank to announce the update: {error}") from error
        expected = {"manifest", "handles"} if self._subject.transport == "handles" else {"manifest"}
        if message.keys() != expected:
            raise LinkError(f"the trainer sent {sorted(message)!r:.120}, expected {sorted(expected)}")
        handles = message.get("handles", {})
        if not isinstance(handles, dict) or not all(isinstance(named, dict) for named in handles.values()):
            raise LinkError(f"the trainer sent no {{device: {{name: handle}}}}, but {handles!r:.120}")
        return message

    def _abort(self, cause: Exception) -> None:
        try:
            self.rpc("abort_update")
        except Exception as error:
            cause.add_note(f"nor could the update be aborted: {type(error).__name__}: {error}")

    def _answer(self, message: dict, deadline_s: float) -> None:
        for link in self._links:
            try:
                link.send(message, deadline_s)
            except LinkError as error:
                print(f"the trainer was not told {message}: {error}")  # goes to the log; the call itself says why


def _expect_well(message: dict) -> dict:
    """A trainer's message, unless it says that the trainer's half has failed."""
    if "failed" in message:
        raise TrainerFailed(f"the trainer's half of the update failed: {message['failed']}")
    return message


def _continuation(output: Any) -> dict:
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}
