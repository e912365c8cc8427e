"""update.sequence: whatever happens, in whatever order, the engine computes with the last acknowledged weights."""

import itertools
from collections.abc import Callable
from functools import partial

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from suite.conformance.requirements import MUST, requirement
from suite.driver.sync import Sync
from suite.driver.trainers import Trainers
from suite.models import TIED
from suite.sequences.player import MALFORMED, UNKNOWN_DEVICE, Player, Step, parse
from suite.sequences.trial import Trial
from suite.session.options import SEQUENCES
from suite.session.record import TRIED
from suite.stages import GPU_OF_ONE_RANK

SECONDS_A_STEP = 0.25  # of the budget; about twice what a step takes on 2 quiet cores
SHRINKING_S = 60.0
ORDERS = ("checkpoint", "reversed", "shuffled:1", "shuffled:2")
WHOLE = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")
FUSED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight")


class Machine(RuleBasedStateMachine):
    """Draws the steps of one sequence."""

    def __init__(self, trial: Trial, player: Player) -> None:
        super().__init__()
        self.trial, self.player = trial, player

    def take(self, step: str, **arguments: object) -> None:
        self.trial.take(Step(step, arguments))

    @property
    def other(self) -> int:
        """The seed that the engine has not."""
        return next(seed for seed in self.player.seeds if seed != self.player.state.seed)

    @rule(order=st.sampled_from(ORDERS), reset_cache=st.sampled_from([True, False]))
    def update(self, order: str, reset_cache: bool) -> None:
        self.take("update", seed=self.other, order=order, reset_cache=reset_cache)

    @rule(zeros=st.booleans())
    def update_again(self, zeros: bool) -> None:
        self.take("update", seed=None if zeros else self.player.state.seed)

    @rule(name=st.sampled_from(WHOLE))
    def alone(self, name: str) -> None:
        self.take("alone", name=name, seed=self.other)

    @rule(how=st.sampled_from([*MALFORMED]), name=st.sampled_from(WHOLE + FUSED))
    def malformed(self, how: str, name: str) -> None:
        self.take("malformed", how=how, name=name, seed=self.other)

    @precondition(lambda self: "devices.wrong_handle" not in self.player.sync.subject.lacks)
    @rule(label=st.sampled_from(["", UNKNOWN_DEVICE]))
    def wrong_device(self, label: str) -> None:
        self.take("wrong_device", label=label, seed=self.other)

    @rule()
    def called_off(self) -> None:
        self.take("called_off", seed=self.other)

    @precondition(lambda self: "errors.nested" not in self.player.sync.subject.lacks)
    @rule(ending=st.sampled_from(["abort_update", "end_update"]))
    def nested(self, ending: str) -> None:
        self.take("nested", seed=self.other, ending=ending)

    @rule()
    def generate(self) -> None:
        self.take("generate")

    @rule()
    def reset_cache(self) -> None:
        self.take("reset_cache")

    @precondition(lambda self: dict(self.player.sync.engines[0].key.options).get("enable_sleep_mode"))
    @rule(level=st.sampled_from([1, 2]))
    def sleep(self, level: int) -> None:
        self.take("sleep", level=level)

    @rule(moment=st.sampled_from(["between", "before", "during", "after"]))
    def lose_trainer(self, moment: str) -> None:
        self.take("lose_trainer", moment=moment)


@pytest.fixture
def playing(trainers: Trainers, sync: Sync, target: int, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Plays what the command line asks for on the case's engine."""

    def play() -> None:
        player = Player(sync, (sync.seed, target), partial(trainers.spare, sync.stage))
        try:
            trial = _played(player, request.config)
            request.node.stash[TRIED] = trial.counts()
            if failure := trial.failure(SHRINKING_S):
                sync.pool.done(request.node.nodeid)
                for engine in sync.engines if not sync.subject.host else ():
                    sync.pool.discard(engine)  # nobody knows what it has become: the next test gets another one
                raise failure
        finally:
            player.close()

    return play


@requirement(
    "update.sequence",
    MUST,
    text="After any sequence of whole updates, tensors sent alone, updates that are refused, called off, nested or "
    "lost with their trainer, generations, cache resets and sleeps, the engine computes with the last "
    "acknowledged weights, or has said that it is inconsistent.",
    because="What an update leaves behind meets the next one: each may be right on its own.",
    seen_in=("vllm#42821", "vllm#57853", "vllm#57854", "vllm#48284"),
    models={"cpu-tp1": [TIED]},
)
def test_sequence(playing: Callable[[], None]) -> None:
    playing()


@pytest.mark.engine(enable_sleep_mode=True)
@pytest.mark.requirement("update.sequence", models=dict.fromkeys(GPU_OF_ONE_RANK, (TIED,)))
def test_sequence_with_sleep(playing: Callable[[], None]) -> None:
    playing()


def _played(player: Player, config: pytest.Config) -> Trial:
    """The sequence that the command line gives, or as many as it asks for: the same ones for the same seed."""
    count, steps = config.getoption("sequences"), config.getoption("sequence_steps")
    count = SEQUENCES[player.sync.stage.kind] if count is None else count
    trial = Trial(player, budget_s=count * steps * SECONDS_A_STEP)
    if given := config.getoption("play"):
        trial.begin()
        for step in parse(given):
            trial.take(step)
    else:
        _draw(trial, player, count, steps, config.getoption("--hypothesis-seed", None) or 0)
    player.sync.pool.announce(f"{player.sync.subject.name} {player.sync.stage.name}: {trial}")
    return trial


def _draw(trial: Trial, player: Player, count: int, steps: int, seed: object) -> None:
    drawn = itertools.count()

    @hypothesis.seed(seed)
    def machine() -> Machine:
        if next(drawn):  # the first that hypothesis draws is the simplest, one step over and over: it is not played
            trial.begin()
        return Machine(trial, player)

    settings = hypothesis.settings(
        max_examples=1 + count,
        stateful_step_count=steps,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(machine, settings=settings)
