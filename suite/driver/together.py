"""A trainer and the engines of one subject, side by side: what moving, expecting and measuring have in common."""

import random

from suite import models
from suite.driver.engines import EngineHandle
from suite.driver.pool import Pool
from suite.driver.trainers import CALL_DEADLINE_S, TrainerGroup
from suite.processes.call import gather
from suite.stages import Stage
from suite.subjects import Subject

UPDATE_DEADLINE_S, SLOWEST_BYTES_PER_S = 30.0, 0.5e9  # for an update: a constant, and what its bytes take on top
PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 16, 12, 6

UNFUSED = ("down_proj.weight", "out_proj.weight", "c_proj.weight")  # matrices that no layer of vLLM joins with others


class Together:
    """A trainer and engines of one subject.

    Args:
        engines: at least one; all get every update.
    """

    call_deadline_s = CALL_DEADLINE_S  # for whatever is asked of an engine beside updates

    def __init__(
        self, pool: Pool, trainer: TrainerGroup, engines: list[EngineHandle], subject: Subject, stage: Stage, model: str
    ) -> None:
        self.pool, self.trainer, self.engines, self.subject = pool, trainer, engines, subject
        self.stage, self.model = stage, model
        self.spec = models.MODELS[model]
        self.seed = engines[0].key.seed
        self.updates = 0
        self.held: int | None = None  # the seed of the checkpoint that the trainer was last given

    @property
    def where(self) -> str:
        """What the line of a failure says that tells where."""
        return f"after update {self.updates} [subject={self.subject.name} stage={self.stage.name} model={self.model}]"

    @property
    def deadline_s(self) -> float:
        """How long an update of this model may take."""
        return UPDATE_DEADLINE_S + 4 * self.spec.elements / SLOWEST_BYTES_PER_S

    @property
    def weight(self) -> str:
        """The name of a matrix of the model, for a test that alters one; not one that vLLM fuses, where known."""
        matrices = [name for name, shape in models.tensors(self.spec) if len(shape) == 2 and "emb" not in name]
        unfused = [name for name in matrices if name.endswith(UNFUSED)]
        return unfused[-1] if unfused else matrices[len(matrices) // 2]

    @property
    def manifest(self) -> list[dict]:
        """What announces a whole update in bfloat16, for a worker's begin_update()."""
        return models.manifest(self.spec)

    def load(self, seed: int, dtype: str = "bfloat16") -> None:
        """Have the trainer hold the checkpoint of a seed, or its tensors alone where it does not compute with them."""
        self.held = seed
        if not self.spec.computed:
            self.trainer.hold_random(self.pool.config(self.model), seed, dtype)
            return
        self.trainer.load(self.pool.checkpoint(self.model, seed, dtype), dtype)

    def call_engines(self, method: str, *args: object) -> list[list]:
        """Call a worker method; its results by engine and rank."""
        return self.all_engines("rpc", method, *args)

    def all_engines(self, method: str, *args: object) -> list:
        """Call a method of every `Engine` at once; what each returns."""
        return gather([engine.process.submit(method, *args) for engine in self.engines], self.call_deadline_s)

    def half(self, step: str, *args: object) -> list:
        """Have every engine take a single step of an update, see `Engine.half`; what each returns."""
        return self.all_engines("half", step, *args)

    def generate(self, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> list[list[dict]]:
        """Greedy continuations, for each engine."""
        return self.all_engines("generate", prompts, max_tokens)

    def prompts(self, count: int = PROMPTS, length: int = PROMPT_TOKENS) -> list[list[int]]:
        """Random prompts in the model's vocabulary, the same ones every time."""
        draw = random.Random(length)
        vocabulary = self.spec.config["vocab_size"]
        return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]

    def reset_cache(self) -> None:
        """Have the engines forget the prefixes that they have cached."""
        self.all_engines("reset_prefix_cache")

    def reset_caches(self) -> None:
        """Have the engines forget all that they have cached, of pictures too."""
        self.all_engines("reset_caches")

    def sleep(self, level: int) -> None:
        """Have the engines give up their GPU memory."""
        for engine in self.engines:
            engine.process.call("sleep", level, deadline_s=self.call_deadline_s)

    def wake_up(self, *tags: str) -> None:
        """Have the engines take their GPU memory back: of "weights", of "kv_cache", or all of it."""
        for engine in self.engines:
            engine.process.call("wake_up", [*tags] or None, deadline_s=self.call_deadline_s)

    def sleep_and_wake(self, level: int) -> None:
        """Have the engines give up their GPU memory and take it back."""
        self.sleep(level)
        self.wake_up()

    def resources(self) -> dict[str, dict[str, int]]:
        """What every engine and trainer rank's process holds, by a name for it."""
        ranks = self.call_engines("probe_resources")
        held = {f"engine {e} rank {r}": found for e, results in enumerate(ranks) for r, found in enumerate(results)}
        return held | {f"trainer rank {r}": found for r, found in enumerate(self.trainer.call("resources"))}

    def _call(self, engine: EngineHandle, method: str, *args: object) -> list:
        """Call a worker method of one engine; its results by rank."""
        return engine.process.call("rpc", method, *args, deadline_s=self.call_deadline_s)
