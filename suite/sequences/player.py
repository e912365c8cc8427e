"""Sequences of what a trainer and an engine do: the steps, and what the engine has to compute with after each.

A sequence is text that can be played again: `update(seed=1); lose_trainer(moment='during'); generate()`.
"""

import ast
import contextlib
import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from suite import models
from suite.actors.dialogue import CALLED_OFF
from suite.actors.written import weights_path, write_whole
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.driver.together import MAX_TOKENS
from suite.driver.trainers import TrainerGroup
from suite.processes.call import RemoteError, SubjectFailed

DEADLINE_S = 60.0
LONG_PROMPT = 200  # tokens: more than one block of the prefix cache on every backend
UNKNOWN_DEVICE = "GPU-00000000-0000-0000-0000-000000000000"
GHOST = "model.layers.0.mlp.ghost_proj.weight"
# By requirement of errors.*: how a tensor of this name is altered, and the name that the refusal has to tell.
MALFORMED: dict[str, Callable[[str], tuple[dict, str]]] = {
    "unknown_name": lambda name: ({"add": {name: GHOST}}, GHOST),
    "missing_name": lambda name: ({"drop": [name]}, name),
    "shape": lambda name: ({"truncate": [name]}, name),
    "dtype": lambda name: ({"cast": {name: "int32"}}, name),
}


@dataclass(frozen=True)
class Step:
    """A call of one of the Player's steps, with plain arguments."""

    name: str
    arguments: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


Sequence = tuple[Step, ...]
STEPS = (
    "update", "alone", "malformed", "wrong_device", "called_off", "nested", "generate", "reset_cache", "sleep",
    "lose_trainer",
)  # fmt: skip


def text(sequence: Sequence) -> str:
    """The sequence in one line, as `parse` reads it."""
    return "; ".join(map(str, sequence))


def parse(line: str) -> Sequence:
    """A sequence from its text. Raises ValueError for malformed text."""
    try:
        calls = [statement.value for statement in ast.parse(line.strip()).body]
        steps = [
            Step(call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords}) for call in calls
        ]
    except (AttributeError, SyntaxError, ValueError) as error:
        raise ValueError(f"expected steps like update(seed=1); generate(), found {line!r}") from error
    if unknown := [step.name for step in steps if step.name not in STEPS]:
        raise ValueError(f"expected the steps {', '.join(STEPS)}, found {unknown[0]}")
    if not steps or any(call.args or None in step.arguments for call, step in zip(calls, steps, strict=True)):
        raise ValueError(f"expected steps with arguments by name, like update(seed=1), found {line!r}")
    return tuple(steps)


@dataclass(frozen=True)
class State:
    """What the engine has to compute with.

    known: False once a step may rightly have lost the weights, until the next whole update. seed: of the checkpoint
    that was acknowledged last, None for zeros. alone: seeds by name of the tensors that were acknowledged alone since.
    stale: whether the prefix cache may hold what older weights have computed.
    """

    known: bool
    seed: int | None = None
    alone: dict[str, int] = field(default_factory=dict)
    stale: bool = False


class Player:
    """Takes steps on a live engine, and after each compares what it computes with to what was acknowledged last.

    Args:
        sync: brings the engine. Its trainer gives the answers that the checkpoints' are compared with.
        seeds: of two checkpoints that there are cold-loaded engines of; the first one starts every sequence.
        new_trainer: brings a trainer, ready, which the player ends.
    """

    def __init__(self, sync: Sync, seeds: tuple[int, int], new_trainer: Callable[[], TrainerGroup]) -> None:
        self.prompts = sync.prompts(length=LONG_PROMPT)
        self._config, self._scratch = sync.pool.config(sync.model), sync.pool.scratch()
        uniform = -math.log(sync.spec.config["vocab_size"])
        zeros = {"tokens": [0] * MAX_TOKENS, "logprobs": [uniform] * MAX_TOKENS, "gaps": [math.inf] * MAX_TOKENS}
        self.answers: dict[int | None, list[dict]] = {None: [zeros] * len(self.prompts)}
        for seed in seeds:
            sync.load(seed)
            self.answers[seed] = sync.trainer.call("greedy", self.prompts, MAX_TOKENS)[0]
        self.seeds, self.start = seeds, Step("update", {"seed": seeds[0]})
        self.state = State(known=False)
        self.steps, self.counts = 0, Counter[str]()
        self._new_trainer = new_trainer
        self.sync = Sync(sync.pool, self._next_trainer(), sync.engines, sync.subject, sync.stage, sync.model)

    def close(self) -> None:
        """End the trainer."""
        self.sync.trainer.stop()

    def take(self, step: Step) -> None:
        """Take a step; raises what an engine or trainer raises that should not, or AssertionError for wrong weights."""
        self.steps += 1
        outcome = getattr(self, step.name)(**step.arguments)
        self.counts[f"{step.name}, {outcome}" if outcome else step.name] += 1
        state = self.state
        if not state.known:
            return
        if state.alone:
            self.sync.expect_equal_to(self._mixture(), f"checkpoint {state.seed} with {state.alone}", self.seeds)
        elif state.seed is None:
            self.sync.expect_zero()
        else:
            self.sync.expect_exact(state.seed)

    def recover(self) -> None:
        """Bring the engine where a sequence starts, at the second attempt at the latest. Raises as `take`."""
        self.sync.disconnect()
        if not self.sync.trainer.alive:
            self.sync.trainer = self._next_trainer()
        with contextlib.suppress(RemoteError):
            self.sync.half("abort")
        try:
            self.take(self.start)
        except (AssertionError, RemoteError):  # it may have met what the failure left behind
            self.take(self.start)

    # ---- steps

    def update(self, seed: int | None, order: str = "checkpoint", reset_cache: bool = True) -> None:
        """A whole update."""
        self.sync.trainer.fill(seed)
        self.sync.update(DEADLINE_S, order=order, reset_cache=reset_cache)
        self.sync.expect_consistent()
        self.state = State(known=True, seed=seed, stale=not reset_cache)

    def alone(self, name: str, seed: int) -> str:
        """One tensor outside of begin_update and end_update; an extension that can't take it refuses it."""
        self.sync.trainer.fill(seed)
        others = [other for other, _ in models.tensors(self.sync.spec) if other != name]
        try:
            self.sync.update(DEADLINE_S, bracket=False, alter={"drop": others})
        except SubjectFailed:
            return "refused"
        self.state = replace(self.state, alone={**self.state.alone, name: seed}, stale=False)
        return "acknowledged"

    def malformed(self, how: str, name: str, seed: int) -> str:
        """An update that has to be refused for one of its tensors."""
        self.sync.trainer.fill(seed)
        alter, named = MALFORMED[how](name)
        self._refused(named, alter=alter)
        return how

    def wrong_device(self, label: str, seed: int) -> None:
        """An update by handles for another device, or for none."""
        self.sync.trainer.fill(seed)
        self._refused(self.sync.engines[0].facts["devices"][0]["id"].removeprefix("GPU-"), relabel=label)

    def called_off(self, seed: int) -> None:
        """An update that the trainer ends when the engine has begun it."""
        self.sync.trainer.fill(seed)
        self._refused(CALLED_OFF, call_off=True)

    def nested(self, seed: int, ending: str) -> None:
        """An update within another, of which nothing arrives: ended by abort_update, or by end_update, which raises."""
        self.sync.half("begin", self.sync.manifest)
        self.sync.trainer.fill(seed)
        self.sync.refusal(DEADLINE_S)
        try:
            self.sync.half(ending.removesuffix("_update"))
        except SubjectFailed:
            if ending != "end_update":
                raise
        else:
            wrong = ending == "end_update"
            expect(not wrong, "an error from end_update() without tensors", "success", self.sync.where)

    def generate(self) -> None:
        """Prompts that are cached; judged where the cache and the weights are of the same checkpoint."""
        state = self.state
        if state.known and (state.stale or state.alone):
            self.sync.generate(self.prompts)
        elif state.known:
            self.sync.expect_answers(self.prompts, self.answers[state.seed])

    def reset_cache(self) -> None:
        """Forget cached prefixes."""
        self.sync.reset_cache()
        self.state = replace(self.state, stale=False)

    def sleep(self, level: int) -> None:
        """Sleep and wake; at level 2 the weights are lost."""
        self.sync.sleep_and_wake(level)
        self.state = self.state if level == 1 else State(known=False)

    def lose_trainer(self, moment: str) -> str:
        """Kill the trainer, "between" updates or before, during or after a transfer, and go on with another one."""
        (rank,) = self.sync.trainer.processes
        if moment == "between":
            os.kill(rank.pid, signal.SIGKILL)
        else:
            self._strike(moment)
        self.sync.trainer.stop()
        self.sync.trainer = self._next_trainer()
        return moment

    def _refused(self, named: str, **how: object) -> None:
        error = self.sync.refusal(DEADLINE_S, **how)
        expect(named in error, f"an error that names {named}", error, self.sync.where)

    def _strike(self, moment: str) -> None:
        """The engine has the new weights, or raises and has the old ones, or says that it is inconsistent."""
        seed = next(seed for seed in self.answers if seed not in (None, self.state.seed))
        self.sync.trainer.fill(seed)
        found = self.sync.update_until(DEADLINE_S, {"moment": moment, "signal": "KILL"})
        if not found.engine_error:
            self.state = State(known=True, seed=seed)
        elif self.sync.says_inconsistent():
            self.state = State(known=False)

    def _next_trainer(self) -> TrainerGroup:
        """Another trainer, with the weights that a sequence starts from."""
        trainer = self._new_trainer()
        trainer.hold_random(self._config, self.start.arguments["seed"])
        return trainer

    def _mixture(self) -> str:
        """Where what is to be expected is written down, put together from what cold-loaded engines compute with."""
        import torch
        from safetensors.torch import load_file, save_file

        for index, engine in enumerate(self.sync.engines):
            oracles = {seed: self.sync.pool.oracle(engine.key, seed) for seed in self.answers if seed is not None}
            for rank in range(engine.ranks):
                found = {seed: load_file(weights_path(path, rank)) for seed, path in oracles.items()}
                names = next(iter(found.values()))
                found[None] = {name: torch.zeros_like(weight) for name, weight in names.items()}
                mixture = {name: found[self._source(name)][name] for name in names}
                write_whole(weights_path(f"{self._scratch}-{index}", rank), partial(save_file, mixture))
        return str(self._scratch)

    def _source(self, effective: str) -> int | None:
        """The seed that an effective weight is of: a tied output layer goes with the embedding."""
        for name, seed in self.state.alone.items():
            tied = self.sync.spec.tied and name == "model.embed_tokens.weight"
            if effective.startswith((name, "lm_head.weight") if tied else name):
                return seed
        return self.state.seed
