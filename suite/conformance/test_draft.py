"""draft.*: an engine that guesses ahead with a draft model goes on accepting its guesses, or says that it is stale."""

import pytest

from suite.actors.drafting import GUESSES
from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED
from suite.stages import GPU_OF_ONE_RANK

MODELS = dict.fromkeys(("cpu-tp1", *GPU_OF_ONE_RANK), (TIED,))


@pytest.mark.engine(**{GUESSES: 4})
@requirement(
    "draft.stale",
    MUST,
    text="After an update of the model alone, an engine with a draft model computes with exactly the new weights."
    " Unless the engine goes on accepting what the draft model guesses, `update_state()` does not say `ready`.",
    because="The draft model keeps its old weights: hardly a guess is accepted, every answer takes longer, and nothing"
    " says why.",
    seen_in=("vllm#46725", "vllm-ascend#13209", "sglang#27718"),
    models=MODELS,
)
def test_stale(sync: Sync, target: int) -> None:
    _update_both(sync, sync.seed)
    sync.expect_guesses_accepted()
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    sync.expect_same_behaviour()
    guesses = sync.guesses()
    if not guesses.are_accepted:
        (states,) = sync.half("state")
        told = states and "ready" not in states
        expect(told, f"update_state() not to say ready, where {guesses} are accepted", states, sync.where)


@pytest.mark.engine(**{GUESSES: 4})
@requirement(
    "draft.updated",
    MUST,
    text="An update of the draft model leaves exactly its tensors there, and the model as it was. Where it follows an"
    " update of the model to the same weights, the engine accepts guesses as after a cold load, and `update_state()`,"
    " where there is one, says `ready`.",
    because="Trainers that train the draft model too have to get it into the engine. What loads its tensors may reach"
    " for the model's.",
    seen_in=("vllm#46725", "vllm-ascend#13209", "miles#1926"),
    models=MODELS,
)
def test_updated(sync: Sync, target: int) -> None:
    _update_both(sync, target)
    sync.expect_exact(target)
    sync.expect_drafter(target)
    sync.expect_guesses_accepted()
    (states,) = sync.half("state")
    expect({*states} <= {"ready"}, "update_state() to say ready", states, sync.where)
    sync.load(sync.seed)
    sync.update_drafter()
    sync.expect_drafter(sync.seed)
    sync.expect_exact(target)


def _update_both(sync: Sync, seed: int) -> None:
    """Update the model, and the draft model where the subject can: else it has the weights that it started with."""
    sync.load(seed)
    sync.update()
    if sync.subject.draft_prefix():
        sync.update_drafter()
