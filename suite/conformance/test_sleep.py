"""sleep.*: an engine that gave its GPU memory up and took it back is updated as if it had not."""

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.sync import Sync
from suite.models import ALIBI, TIED
from suite.stages import GPU_OF_ONE_RANK

MODELS = dict.fromkeys(GPU_OF_ONE_RANK, (TIED,))
DISCARDED = dict.fromkeys(GPU_OF_ONE_RANK, (TIED, ALIBI))  # the second computes with what is no parameter and no buffer


@pytest.mark.engine(enable_sleep_mode=True)
@requirement(
    "sleep.level1",
    MUST,
    text="An engine that slept at level 1 and woke is updated exactly.",
    because="Weights return to memory that may be mapped anew, under addresses and handles taken before.",
    seen_in=("trl#5312", "vllm#57853", "vllm#52950"),
    on="gpu",
    models=MODELS,
)
def test_level1(sync: Sync, target: int) -> None:
    _exact_after_sleep(sync, target, level=1)


@pytest.mark.engine(enable_sleep_mode=True)
@requirement(
    "sleep.level2",
    MUST,
    text="An engine that slept at level 2, which discards the weights, is exact after it woke and was updated: buffers"
    " too, and what is neither parameter nor buffer.",
    because="What no update sends, such as rotary tables, scales of attention or the slopes of ALiBi, is not restored"
    " by one.",
    seen_in=("vllm#16564", "vllm#29341", "vllm#53343", "vllm#54941", "nemo-rl#2631", "trl#5312", "vllm#57853"),
    on="gpu",
    models=DISCARDED,
)
def test_level2(sync: Sync, target: int) -> None:
    _exact_after_sleep(sync, target, level=2)


@pytest.mark.engine(enable_sleep_mode=True)
@requirement(
    "sleep.tags",
    MUST,
    text="An engine that slept at level 1 or 2 is updated exactly while its weights are awake and its cache is not, and"
    " computes with the new weights once the cache is awake too.",
    because="Trainers on the same GPU leave no room for the cache until the update is over. Waking the cache must not"
    " bring old weights back, and an update must not need the cache.",
    seen_in=("vllm#15254", "vllm#44395", "trl#5312"),
    on="gpu",
    models=MODELS,
)
def test_tags(sync: Sync, target: int) -> None:
    for level, seed in ((2, target), (1, sync.seed)):
        sync.sleep(level)
        sync.wake_up("weights")
        sync.load(seed)
        sync.update()
        sync.wake_up("kv_cache")
        sync.expect_exact(seed)
        sync.expect_same_behaviour()


def _exact_after_sleep(sync: Sync, target: int, level: int) -> None:
    sync.load(sync.seed)
    sync.update()
    sync.sleep_and_wake(level)
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    sync.expect_same_behaviour()
