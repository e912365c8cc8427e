"""inflight.*: an update of an engine that has requests running: what becomes of them, and of those that follow."""

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.conformance.test_errors import UNKNOWN
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED
from suite.sequences.player import LONG_PROMPT
from suite.session import verdicts

DEADLINE_S = 30.0
REQUESTS = 16
STAGES = ("cpu-tp1", "cpu-serve", "gpu-split", "gpu-shared", "gpu-colocate-tp1", "gpu-serve")
MODELS = {stage: [TIED] for stage in STAGES}  # an engine each

pytestmark = pytest.mark.needs(serving=True)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
@requirement(
    "inflight.update",
    MUST,
    text="An update with requests running, which pause_generation() has paused in any of its modes, ends within its "
    "deadline; the requests end as that mode says, and every token after the update is the new weights'.",
    because="Asynchronous training updates engines that are never idle; a request that is lost or that mixes weights "
    "unseen spoils what is learnt from it.",
    seen_in=("vllm#32103", "vllm#34992", "torchforge#251", "miles#2589"),
    models=MODELS,
)
def test_paused(sync: Sync, mode: str) -> None:
    target, prompts = _from_its_own(sync), sync.prompts(REQUESTS)
    sync.update_running(mode, prompts)
    requests = sync.requests()
    sync.expect_exact(target)
    sync.expect_ended(requests, mode)
    if mode == "keep":
        sync.expect_continued(prompts, requests)
    sync.expect_cold_answers(target)


@requirement(
    "inflight.prefix",
    MUST,
    text="After an update with requests running that hold cached prefixes, so that a plain reset_prefix_cache() "
    "answers False, and the reset that the extension documents, no prefix of the old weights is used.",
    because="A reset that answers False has reset nothing, and goes on as if it had.",
    seen_in=("SkyRL#1824", "vllm#28827", "nemo-rl#3839"),
    models=MODELS,
)
def test_held_prefix(sync: Sync) -> None:
    _from_its_own(sync)
    prompts = sync.prompts(REQUESTS, LONG_PROMPT)
    moved = sync.update_running("keep", prompts, clear_cache=False)
    if not moved.cache_is_held:
        raise RuntimeError(
            f"reset_prefix_cache() did not answer False: a reset that is refused was not met {sync.where}"
        )
    requests = sync.requests()
    sync.expect_ended(requests, "keep")
    sync.expect_same_behaviour(prompts)
    sync.expect_continued(prompts, requests)


@requirement(
    "inflight.refused",
    MUST,
    text="An update that is refused with requests running leaves them, and those that follow, to the old weights, or "
    "the extension says that its weights are inconsistent.",
    because="Whoever asked is waiting: a request that goes on with half an update ends as if nothing had happened.",
    seen_in=("vllm#57854", "torchforge#251"),
    models=MODELS,
)
def test_refused_while_running(sync: Sync) -> None:
    target, prompts = _from_its_own(sync), sync.prompts(REQUESTS)
    one_more = {"add": {sync.weight: UNKNOWN}}  # which no subject takes; whether it takes one less, errors.* judge
    sync.refusal(DEADLINE_S, alter=one_more, running=sync.running("keep", prompts))
    requests = sync.requests()
    if not sync.says_inconsistent():
        sync.load(sync.seed)
        sync.expect_ended(requests, "keep")
        sync.expect_continued(prompts, requests)
        sync.expect_exact(sync.seed)
        sync.expect_cold_answers(sync.seed)
    sync.load(target)
    sync.update()
    sync.expect_exact(target)


@requirement(
    "inflight.versions",
    MUST,
    text="Where vLLM says which version of the weights each token of a request is of, that is the version that was "
    "set when the token was computed.",
    because="Who learns from a request corrects for the age of the weights, by the version that is said.",
    seen_in=("vllm#54443", "vllm#49040"),
    models=MODELS,
)
def test_versions_of_tokens(sync: Sync) -> None:
    _from_its_own(sync)
    old, new = (f"{which} {sync.updates}" for which in ("old", "new"))
    if not sync.set_version(old):
        verdicts.not_applicable("this vLLM does not say of which version of the weights a token is")
    sync.update_running("keep", sync.prompts(REQUESTS), version=new)
    for request in sync.requests():
        before, tokens = request["before"], len(request["tokens"])
        spans = [[0, before, old], [before, tokens, new]]
        expect(request["versions"] == spans, f"tokens of the versions {spans}", request["versions"], sync.where)


def _from_its_own(sync: Sync) -> int:
    """Have the engine compute with its own checkpoint, and the trainer hold the other one, whose seed is returned."""
    target = 1 - sync.seed
    sync.load(sync.seed)
    sync.update()
    sync.load(target)
    return target
