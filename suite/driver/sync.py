"""One trainer, one or more engines and the steps that move weights between them, as tests use them."""

import contextlib
import random
import time
from dataclasses import dataclass

from suite import models
from suite.driver.engines import EngineHandle
from suite.driver.pool import Pool
from suite.driver.trainers import CALL_DEADLINE_S, TrainerGroup
from suite.processes.call import Call, NoAnswer, NotBegun, ProcessDied, RemoteError, gather
from suite.stages import Stage
from suite.subjects import Subject

CALL_MARGIN_S = 5.0  # for an answer to arrive that was given just in time
JOIN_DEADLINE_S = 130.0  # for a group to come up: extensions and senders give up by themselves after 120 s
TRAINER_END_S, ENGINE_END_S = 3.0, 5.0  # for a half to end by itself when the other has failed, until it is ended
UPDATE_DEADLINE_S, SLOWEST_BYTES_PER_S = 30.0, 0.5e9  # for an update: a constant, and what its bytes take on top

# Two right computations in bfloat16 differ in a log-probability by less than this, and choose the same token where the
# best logit leads by more than twice that. Measured on the tiny models: see suite/selftest/test_trainer.py.
LOGPROB_TOLERANCE = 0.35
CLEAR_GAP = 2 * LOGPROB_TOLERANCE
PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 16, 12, 6
MIN_CLEAR_TOKENS = 24


@dataclass(frozen=True)
class Moved:
    """One update as it was measured: from the earliest start to the latest end, on the machine's monotonic clock."""

    elapsed_s: float
    bytes_sent: int
    tensors: int
    steps_s: dict[str, float]
    pause_s: float | None = None  # from the last token before to the first after, where that was asked for


@dataclass(frozen=True)
class Outcome:
    """How an update with a fault ended on both sides: what each raised, or nothing where it succeeded."""

    engine_error: str
    trainer_error: str


class Sync:
    """A trainer connected to engines of one subject.

    Args:
        engines: at least one; all get every update.
        where: what assertion messages end with.
    """

    def __init__(
        self, pool: Pool, trainer: TrainerGroup, engines: list[EngineHandle], subject: Subject, stage: Stage, model: str
    ) -> None:
        self.pool, self.trainer, self.engines, self.subject = pool, trainer, engines, subject
        self.stage, self.model = stage, model
        self.spec = models.MODELS[model]
        self.seed = engines[0].key.seed
        self.where = f"[subject={subject.name} stage={stage.name} model={model}]"
        self.updates = 0

    @property
    def deadline_s(self) -> float:
        """How long an update of this model may take."""
        return UPDATE_DEADLINE_S + 4 * self.spec.elements / SLOWEST_BYTES_PER_S

    @property
    def manifest(self) -> list[dict]:
        """What announces a whole update in bfloat16, for a worker's begin_update()."""
        return [{"name": n, "dtype": "bfloat16", "shape": list(shape)} for n, shape in models.tensors(self.spec)]

    def load(self, seed: int, dtype: str = "bfloat16") -> None:
        """Have the trainer hold the checkpoint of a seed."""
        self.trainer.load(self.pool.checkpoint(self.model, seed, dtype), dtype)

    def connect(self) -> None:
        """Connect the trainer with the engines, unless they still are."""
        self.trainer.restore()
        wanted = tuple(id(engine) for engine in self.engines)
        if self.trainer.connected == wanted and all(e.connection == id(self.trainer) for e in self.engines):
            return
        self.trainer.connected = ()
        by_broadcast = self.subject.transport == "broadcast"
        ranks = self.trainer.processes[:1] if by_broadcast else self.trainer.processes
        paths = [engine.link_path for engine in self.engines]
        calls = [engine.process.submit("accept", len(ranks)) for engine in self.engines]
        calls += [rank.submit("connect", paths, CALL_DEADLINE_S, self.subject.sender) for rank in ranks]
        gather(calls, CALL_DEADLINE_S)
        if by_broadcast:
            self._open_group()
        self.trainer.connected = wanted
        for engine in self.engines:
            engine.connection = id(self.trainer)

    def _open_group(self) -> None:
        port, offset = self.pool.launcher.free_port(), 1
        world_size = 1 + sum(engine.ranks for engine in self.engines)
        calls = [self.trainer.processes[0].submit("open_group", self.pool.launcher.address, port, world_size)]
        for engine in self.engines:
            calls.append(engine.process.submit("join_group", self.pool.launcher.address, port, offset, world_size))
            offset += engine.ranks
        self._gathered(calls, JOIN_DEADLINE_S)

    def update(
        self,
        deadline_s: float | None = None,
        reset_cache: bool = True,
        pause: bool = False,
        bracket: bool = True,
        **how: object,
    ) -> Moved:
        """One update of all engines; `how` is order=, alter=, relabel= and call_off= of the trainer's update.

        `pause=True` has the engines generate a token right before and after; `bracket=False` leaves out begin_update
        and end_update. Raises the first failure of either side, and GivenUp where earlier ones leave no hope.
        """
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        self.pool.patience.expect_hope(self.subject.name)
        self.connect()
        self.updates += 1
        with self.pool.timeline("moving", str(self.engines[0].key)):
            if pause:
                calls = [e.process.submit("pause", self.prompts(1)[0], deadline_s) for e in self.engines]
            else:
                calls = [e.process.submit("update", deadline_s, reset_cache, bracket) for e in self.engines]
            ranks = self.trainer.processes
            calls += [rank.submit("update", self.subject.transport, deadline_s, **how) for rank in ranks]
            halves = self._gathered(calls, deadline_s + CALL_MARGIN_S)
        self.pool.patience.succeeded(self.subject.name)
        started = min(half["started_s"] for half in halves)
        ended = max(half["ended_s"] for half in halves)
        sent = max((half for half in halves if "bytes_sent" in half), key=lambda half: half["bytes_sent"])
        return Moved(
            ended - started, sent["bytes_sent"], sent["tensors"], halves[0]["steps_s"], halves[0].get("pause_s")
        )

    def _gathered(self, calls: list[Call], deadline_s: float) -> list[dict]:
        """What trainer and engines answer. Where one fails, the processes of the others are ended if they go on."""
        began_s = time.monotonic()
        try:
            return gather(calls, deadline_s, TRAINER_END_S)
        except NotBegun:
            self.disconnect()
            raise
        except (NoAnswer, RemoteError) as error:
            self.disconnect()
            if lost := self._end_late(calls):
                error.add_note(f"ended, since they did not come back: {', '.join(lost)}")
            if lost or isinstance(error, ProcessDied):
                self.pool.patience.lost(self.subject.name, time.monotonic() - began_s, error.cause)
            raise

    def _end_late(self, calls: list[Call]) -> list[str]:
        """End what has not answered: the trainer first, which may be all that an engine waits for. Returns names."""
        late = [call for call in calls if not call.done()]
        names = [call.process.name for call in late if call.process in self.trainer.processes]
        if names or not self.trainer.alive:
            self.trainer.renew()
        engines = [call for call in late if call.process not in self.trainer.processes and not call.done()]
        deadline = time.monotonic() + ENGINE_END_S
        for call in engines:
            with contextlib.suppress(NoAnswer, RemoteError):
                call.result(max(0.0, deadline - time.monotonic()))
            if not call.done():
                names.append(call.process.name)
                call.process.stop()
        return names

    def roofline(self, nbytes: int, samples: int) -> tuple[str, list[float]]:
        """What this run's hardware takes to move `nbytes` once: (how, seconds of every sample).

        For a broadcast, one broadcast of one tensor in a group like the update's; for handles, one copy on the
        engine's device, on all ranks at once, of which the slowest counts.
        """
        on_gpu, engine = self.stage.kind == "gpu", self.engines[0].process
        if self.subject.transport == "broadcast":
            self._join_roofline()
            return "NCCL broadcast" if on_gpu else "gloo broadcast", self._broadcasts(nbytes, samples)
        copies = [engine.call("rpc", "probe_copy", nbytes, deadline_s=CALL_DEADLINE_S) for _ in range(samples + 1)][1:]
        engine.call("rpc", "probe_forget", deadline_s=CALL_DEADLINE_S)
        return "device copy" if on_gpu else "memory copy", [max(ranks) for ranks in copies]

    def _join_roofline(self) -> None:
        launcher = self.pool.launcher
        port, world_size = launcher.free_port(), 1 + self.engines[0].ranks
        calls = [self.trainer.processes[0].submit("join_roofline", self.pool.launcher.address, port, world_size)]
        calls.append(
            self.engines[0].process.submit("rpc", "probe_join", self.pool.launcher.address, port, 1, world_size)
        )
        gather(calls, CALL_DEADLINE_S)

    def _broadcasts(self, nbytes: int, samples: int) -> list[float]:
        """Each sample from the earliest start to the latest end; the first, which allocates, is left out."""
        seconds = []
        for _ in range(samples + 1):
            calls = [self.trainer.processes[0].submit("send_roofline", nbytes)]
            calls.append(self.engines[0].process.submit("receive", nbytes))
            halves = gather(calls, CALL_DEADLINE_S)
            seconds.append(max(half["ended_s"] for half in halves) - min(half["started_s"] for half in halves))
        self.engines[0].process.call("rpc", "probe_forget", deadline_s=CALL_DEADLINE_S)
        return seconds[1:]

    def peak_memory(self) -> tuple[int, int]:
        """Bytes that engine and trainer take at the most above what they had before one update, over all ranks."""
        engine = self.engines[0].process
        engine.call("rpc", "probe_memory_mark", deadline_s=CALL_DEADLINE_S)
        self.trainer.call("memory_mark")
        self.update()
        peaks = engine.call("rpc", "probe_memory_peak", deadline_s=CALL_DEADLINE_S)
        return sum(peaks), sum(self.trainer.call("memory_peak"))

    def disconnect(self) -> None:
        """Have the next update make new connections: after a failure the old ones may be out of step."""
        self.trainer.connected = ()

    def refusal(self, deadline_s: float, **how: object) -> str:
        """Attempt an update that has to be refused and return the error; fails if it succeeds."""
        try:
            self.update(deadline_s, **how)
        except RemoteError as error:  # one that runs into its deadline is not refused: that goes to the test
            return "\n".join([error.said, *getattr(error, "__notes__", [])])
        raise AssertionError(f"expected an error for an update with {how}, found success {self.where}")

    def update_until(self, deadline_s: float, fault: dict) -> Outcome:
        """One update with a fault, see `Sending.update`, of one engine; fails where the engine does not answer in time.

        A trainer that has been stopped is not waited for.
        """
        self.pool.patience.expect_hope(self.subject.name)
        self.connect()
        self.updates += 1
        (engine,), (rank,) = self.engines, self.trainer.processes
        with self.pool.timeline("moving", str(engine.key)):
            updating = engine.process.submit("update", deadline_s)
            sending = rank.submit("update", self.subject.transport, deadline_s, fault=fault)
            engine_error = _raised(updating, deadline_s + CALL_MARGIN_S)
            stopped = fault["signal"] == "STOP"
            trainer_error = "stopped" if stopped else _raised(sending, deadline_s + CALL_MARGIN_S)
        self.disconnect()
        return Outcome(engine_error, trainer_error)

    def says_inconsistent(self) -> bool:
        """Whether the extension says of itself, by `update_state()`, that its weights are not to be used."""
        if not hasattr(self.subject.load(), "update_state"):
            return False
        return all("inconsistent" in states for states in self.call_engines("update_state"))

    def generate(self, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> list[list[dict]]:
        """Greedy continuations, for each engine."""
        calls = [engine.process.submit("generate", prompts, max_tokens) for engine in self.engines]
        return gather(calls, CALL_DEADLINE_S)

    def prompts(self, count: int = PROMPTS, length: int = PROMPT_TOKENS) -> list[list[int]]:
        """Random prompts in the model's vocabulary, the same ones every time."""
        draw = random.Random(length)
        vocabulary = self.spec.config["vocab_size"]
        return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]

    def call_engines(self, method: str, *args: object) -> list[list]:
        """Call a worker method; its results by engine and rank."""
        calls = [engine.process.submit("rpc", method, *args) for engine in self.engines]
        return gather(calls, CALL_DEADLINE_S)

    def tokens_per_s(self, max_tokens: int) -> float:
        """Generated tokens per second of the first engine, of one batch of prompts, the second time it sees them."""
        engine = self.engines[0].process
        rates = [engine.call("tokens_per_s", self.prompts(), max_tokens, deadline_s=CALL_DEADLINE_S) for _ in range(2)]
        return rates[1]

    def reset_cache(self) -> None:
        """Have the engines forget the prefixes that they have cached."""
        gather([engine.process.submit("reset_prefix_cache") for engine in self.engines], CALL_DEADLINE_S)

    def sleep_and_wake(self, level: int) -> None:
        """Have the engines give up their GPU memory and take it back."""
        for engine in self.engines:
            engine.process.call("sleep", level, deadline_s=CALL_DEADLINE_S)
            engine.process.call("wake_up", deadline_s=CALL_DEADLINE_S)

    def resources(self) -> dict[str, dict[str, int]]:
        """What every engine and trainer rank's process holds, by a name for it."""
        ranks = self.call_engines("probe_resources")
        held = {f"engine {e} rank {r}": found for e, results in enumerate(ranks) for r, found in enumerate(results)}
        return held | {f"trainer rank {r}": found for r, found in enumerate(self.trainer.call("resources"))}

    def compared(self, seed: int) -> list[dict]:
        """Every engine rank compared with that of an engine of its stage, cold-loaded from the checkpoint of `seed`."""
        results = []
        for engine in self.engines:
            path = self.pool.oracle(engine.key, seed)
            results += self._probe(engine, "probe_compare", path)
        return results

    def expect_exact(self, seed: int) -> None:
        """Every effective weight of every rank is bit-equal to the cold-loaded engine's."""
        self._expect_none(self.compared(seed), f"the weights of an engine cold-loaded from checkpoint {seed}")

    def expect_zero(self) -> None:
        """Every effective weight element of every rank is zero, and there are some."""
        results = [result for ranks in self.call_engines("probe_zero") for result in ranks]
        self._expect_none(results, "zero in every element")

    def expect_all_different(self, seed: int) -> None:
        """Not one weight is the checkpoint's yet: else finding it there after an update would prove nothing."""
        for result in self.compared(seed):
            same = result["weights"] - result["differing"]
            assert same == 0, f"expected every weight to differ from checkpoint {seed}, found {same} equal {self.where}"

    def snapshot(self) -> str:
        """Have all ranks write what they compute with now; returns where."""
        path = str(self.pool.scratch())
        for index, engine in enumerate(self.engines):
            self._probe(engine, "probe_save", f"{path}-{index}")
        return path

    def expect_equal_to(self, snapshot: str, what: str) -> None:
        """Every effective weight is bit-equal to a snapshot of the same engines."""
        results = [
            result
            for index, engine in enumerate(self.engines)
            for result in self._probe(engine, "probe_compare", f"{snapshot}-{index}")
        ]
        self._expect_none(results, what)

    def expect_moved_from(self, seed: int) -> None:
        """Hardly a weight is the checkpoint's any more, and none is zero."""
        for result in self.compared(seed):
            assert result["differing"] == result["weights"], (
                f"expected every weight to have moved from checkpoint {seed}, found"
                f" {result['weights'] - result['differing']} of {result['weights']} as before {self.where}"
            )

    def differing_from_zero(self) -> int:
        """How many weights have an element that is not zero."""
        return sum(result["differing"] for ranks in self.call_engines("probe_zero") for result in ranks)

    def expect_no_zero(self) -> None:
        """Not one effective weight element is zero, and there are some."""
        for result in (result for ranks in self.call_engines("probe_nonzero") for result in ranks):
            assert result["nonzero"] == result["elements"] > 0, (
                f"expected no zero among the weights of rank {result['rank']}, found {result['nonzero']} elements of"
                f" {result['elements']} that aren't {self.where}"
            )

    def expect_reported_zero(self, expected: bool) -> None:
        """The extension's own check_weights_changed() says on every rank whether all weights are zero."""
        for engine, found in zip(self.engines, self.call_engines("check_weights_changed"), strict=True):
            assert found == [expected] * engine.ranks, (
                f"expected check_weights_changed() to say {expected} on every rank, found {found}"
                f" after update {self.updates} {self.where}"
            )

    def expect_same_behaviour(self, prompts: list[list[int]] | None = None) -> None:
        """Greedy tokens and log-probabilities are those of the trainer's own forward pass."""
        prompts = prompts or self.prompts()
        self.expect_answers(prompts, self.trainer.call("greedy", prompts, MAX_TOKENS)[0])

    def expect_answers(self, prompts: list[list[int]], oracle: list[dict]) -> None:
        """Greedy tokens and log-probabilities are those of an oracle, as `oracles.greedy` gives them.

        A prompt is followed up to the first token whose lead is so small that another right computation may choose
        otherwise. Raises RuntimeError where that leaves too little to tell anything.
        """
        clear = [next((i for i, gap in enumerate(a["gaps"]) if gap <= CLEAR_GAP), MAX_TOKENS) for a in oracle]
        if sum(clear) < MIN_CLEAR_TOKENS:
            raise RuntimeError(f"only {sum(clear)} tokens of {len(prompts)} prompts are clear-cut {self.where}")
        for answers in self.generate(prompts):
            for prompt, expected, found, count in zip(prompts, oracle, answers, clear, strict=True):
                self._expect_answer(expected, found, prompt, count)

    def _expect_answer(self, expected: dict, found: dict, prompt: list[int], count: int) -> None:
        tokens, reference = found["tokens"][:count], expected["tokens"][:count]
        assert tokens == reference, (
            f"greedy tokens after {prompt}: expected the trainer's {reference}, found {tokens}"
            f" after update {self.updates} {self.where}"
        )
        pairs = zip(found["logprobs"][:count], expected["logprobs"][:count], strict=True)
        apart = max((abs(a - b) for a, b in pairs), default=0.0)
        assert apart <= LOGPROB_TOLERANCE, (
            f"log-probabilities after {prompt}: expected the trainer's within {LOGPROB_TOLERANCE}, found {apart:.3f}"
            f" apart after update {self.updates} {self.where}"
        )

    def _expect_none(self, results: list[dict], expected: str) -> None:
        for result in results:
            assert result["elements"] > 0, (
                f"expected weights on rank {result['rank']}, found none to look at {self.where}"
            )
            assert result["differing"] == 0, (
                f"expected {expected}, found {result['differing']} weights that differ on rank {result['rank']}:"
                f" {'; '.join(result['first'])} after update {self.updates} {self.where}"
            )

    def _probe(self, engine: EngineHandle, method: str, *args: object) -> list[dict]:
        return engine.process.call("rpc", method, *args, deadline_s=CALL_DEADLINE_S)


def _raised(call: Call, deadline_s: float) -> str:
    """What a call raised, empty where it succeeded; a process that has ended counts as having said so."""
    try:
        call.result(deadline_s)
    except (RemoteError, ProcessDied) as error:
        return error.said
    return ""
