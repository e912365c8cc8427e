"""What the player expects after each step, with an engine and trainers that are a few lines each."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from suite.models import MODELS, TIED, tensors
from suite.processes.call import SubjectFailed
from suite.sequences import player as sequences
from suite.sequences.player import Player, Step

pytestmark = pytest.mark.selftest

SPEC = MODELS[TIED]
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
EFFECTIVE = (EMBEDDING, "lm_head.weight (applied)", "model.layers.1.mlp.down_proj.weight", NORM)
ROW = torch.tensor([1.0, -1.0])
INCONSISTENT = -1


class Trainer:
    """Holds the seed of what it would send."""

    made = 0

    def __init__(self) -> None:
        self.held: int | None = None
        self.processes = [SimpleNamespace(pid=0)]
        self.stopped = False
        Trainer.made += 1

    def ready(self) -> None: ...

    def hold_random(self, config: str, seed: int) -> None:
        self.held = seed

    def fill(self, seed: int | None) -> None:
        self.held = seed

    def call(self, method: str, prompts: list, max_tokens: int) -> list:
        return [[{"tokens": [self.held]}]]

    def stop(self) -> None:
        self.stopped = True


class Engine:
    """Seeds by effective weight; `accepts` says whether tensors are taken alone."""

    def __init__(self, directory: Path, accepts: bool) -> None:
        self.directory, self.accepts = directory, accepts
        self.weights: dict[str, int | None] = {}
        self.cached = self.generated = None
        self.fault_ends = "new"
        for seed in (0, 1):
            save_file(
                {name: ROW.clone() * (seed + 1) for name in EFFECTIVE}, directory / f"oracle-{seed}.rank0.safetensors"
            )


class Sync:
    """As suite.driver.sync.Sync, for the Engine of the test."""

    engine: Engine

    def __init__(self, pool, trainer, engines, subject, stage, model) -> None:
        self.pool, self.trainer, self.engines, self.subject = pool, trainer, engines, subject
        self.stage, self.model, self.spec, self.where = stage, model, SPEC, "[here]"

    def prompts(self, length: int) -> list:
        return [[1]]

    def load(self, seed: int) -> None:
        self.trainer.fill(seed)

    def update(self, deadline_s, reset_cache=True, bracket=True, order="checkpoint", alter=None) -> None:
        sent = {name for name, _ in tensors(SPEC)} - set((alter or {}).get("drop", []))
        if not bracket and not self.engine.accepts:
            raise SubjectFailed(
                SimpleNamespace(name="engine", log_path=""), {"kind": "UpdateError", "message": "no", "traceback": ""}
            )
        for name in EFFECTIVE:
            if name in sent or (name.startswith("lm_head") and EMBEDDING in sent):
                self.engine.weights[name] = self.trainer.held

    def update_until(self, deadline_s, fault):
        if self.engine.fault_ends == "new":
            self.update(deadline_s)
        elif self.engine.fault_ends == "inconsistent":
            self.engine.weights[NORM] = INCONSISTENT
        return SimpleNamespace(engine_error="" if self.engine.fault_ends == "new" else "lost")

    def says_inconsistent(self) -> bool:
        return INCONSISTENT in self.engine.weights.values()

    def expect_consistent(self) -> None:
        assert not self.says_inconsistent()

    def sleep_and_wake(self, level: int) -> None:
        if level == 2:
            self.engine.weights = dict.fromkeys(EFFECTIVE, INCONSISTENT)

    def reset_cache(self) -> None: ...

    def generate(self, prompts) -> None:
        self.engine.generated = "not judged"

    def expect_answers(self, prompts, oracle) -> None:
        self.engine.generated = oracle[0]["tokens"][0]

    def expect_exact(self, seed: int) -> None:
        assert set(self.engine.weights.values()) == {seed}, f"not {seed}"

    def expect_zero(self) -> None:
        self.expect_exact(None)

    def expect_equal_to(self, path: str, what: str, in_common: tuple[int, int]) -> None:
        expected = load_file(f"{path}-0.rank0.safetensors")
        for name, seed in self.engine.weights.items():
            wanted = torch.zeros(2) if seed is None else ROW * (seed + 1)
            assert expected[name].numpy().tobytes() == wanted.numpy().tobytes(), f"{name} is not {what}"


@pytest.fixture(params=[True, False], ids=["takes tensors alone", "refuses tensors alone"])
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Player:
    engine = Engine(tmp_path, accepts=request.param)
    monkeypatch.setattr(Sync, "engine", engine, raising=False)
    monkeypatch.setattr(sequences, "Sync", Sync)
    monkeypatch.setattr(sequences.os, "kill", lambda pid, number: None)
    pool = SimpleNamespace(
        config=lambda model: "",
        scratch=lambda: tmp_path / "scratch",
        oracle=lambda key, seed: str(tmp_path / f"oracle-{seed}"),
    )
    handle = SimpleNamespace(key=None, ranks=1)
    subject = SimpleNamespace(lacks={})
    return Player(Sync(pool, Trainer(), [handle], subject, None, TIED), (0, 1), Trainer)


def take(player: Player, *steps: Step) -> None:
    for step in steps:
        player.take(step)


def test_after_an_update_its_checkpoint_is_expected(player):
    take(player, Step("update", {"seed": 1}), Step("update", {"seed": None}), Step("update", {"seed": 0}))
    player.sync.engine.weights[NORM] = 1
    with pytest.raises(AssertionError, match="not 0"):
        take(player, Step("reset_cache"))


@pytest.mark.parametrize("base", [0, None])
def test_after_tensors_alone_a_mixture_is_expected(player, base):
    taken = "acknowledged" if player.sync.engine.accepts else "refused"
    take(player, Step("update", {"seed": base}))
    take(player, Step("alone", {"name": EMBEDDING, "seed": 1}), Step("alone", {"name": NORM, "seed": 1}))
    assert player.counts[f"alone, {taken}"] == 2
    take(player, Step("generate"))
    player.sync.engine.weights["lm_head.weight (applied)"] = 0 if player.sync.engine.accepts else 1
    wrong = r"lm_head.weight \(applied\) is not checkpoint" if player.sync.engine.accepts else f"^not {base}"
    with pytest.raises(AssertionError, match=wrong):
        take(player, Step("reset_cache"))


def test_a_sleep_that_discards_the_weights_leaves_nothing_to_expect_until_the_next_update(player):
    take(player, player.start, Step("sleep", {"level": 1}))
    take(player, Step("sleep", {"level": 2}), Step("generate"))
    assert player.sync.engine.generated is None, "expected nothing to be asked of an engine without weights"
    take(player, Step("update", {"seed": 1}))
    player.sync.engine.weights[NORM] = 0
    with pytest.raises(AssertionError, match="not 1"):
        take(player, Step("sleep", {"level": 1}))


@pytest.mark.parametrize(("ends", "known", "seed"), [("new", True, 1), ("old", True, 0), ("inconsistent", False, None)])
def test_after_a_lost_trainer_the_engine_has_the_new_weights_or_the_old_or_says_that_it_has_neither(
    player, ends, known, seed
):
    player.sync.engine.fault_ends = ends
    before, made = player.sync.trainer, Trainer.made
    take(player, player.start, Step("lose_trainer", {"moment": "during"}))
    assert (player.state.known, player.state.seed) == (known, seed)
    assert before.stopped
    assert player.sync.trainer is not before
    assert Trainer.made == made + 1, "expected a spare to be started for the next time"


def test_answers_are_judged_where_the_cache_is_of_the_same_weights(player):
    take(player, Step("update", {"seed": 1}), Step("generate"))
    assert player.sync.engine.generated == 1
    take(player, Step("update", {"seed": 0, "reset_cache": False}), Step("generate"))
    assert player.sync.engine.generated == "not judged"
    take(player, Step("reset_cache"), Step("generate"))
    assert player.sync.engine.generated == 0


def test_an_update_that_should_be_refused_has_to_be(player):
    def accepts(deadline_s, **how):
        raise AssertionError("expected an error, found success")

    take(player, player.start)
    player.sync.refusal = accepts
    for step in (Step("called_off", {"seed": 1}), Step("malformed", {"how": "shape", "name": NORM, "seed": 1})):
        with pytest.raises(AssertionError, match="found success"):
            take(player, step)
    player.sync.refusal = lambda deadline_s, **how: "no reason"
    with pytest.raises(AssertionError, match=f"names {NORM}\nfound: no reason"):
        take(player, Step("malformed", {"how": "shape", "name": NORM, "seed": 1}))


def test_close_ends_the_trainer(player):
    player.close()
    assert player.sync.trainer.stopped
