"""update.graphs, update.fp8, sleep.*, cache.*: the engine's own optimisations meet new weights."""

import pytest

from suite.driver import Sync
from suite.stages import GPU_OF_ONE_RANK

TIED = "qwen3-tied-tiny"
MODELS = dict.fromkeys(GPU_OF_ONE_RANK, (TIED,))
LONG_PROMPT = 200  # tokens: more than one block of the prefix cache on every backend


@pytest.mark.engine(enforce_eager=False)
@pytest.mark.requirement("update.graphs", models=MODELS)
def test_graphs(sync: Sync, target: int) -> None:
    addresses = sync.call_engines("probe_addresses")
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
        sync.expect_same_behaviour()
    found = sync.call_engines("probe_addresses")
    moved = [name for name, address in addresses[0][0].items() if found[0][0].get(name) != address]
    assert not moved, f"expected every parameter at its address, found {len(moved)} moved: {moved[:5]} {sync.where}"


@pytest.mark.engine(quantization="fp8")
@pytest.mark.requirement("update.fp8", models=MODELS)
def test_fp8(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)


@pytest.mark.engine(enable_sleep_mode=True)
@pytest.mark.requirement("sleep.level1", models=MODELS)
def test_level1(sync: Sync, target: int) -> None:
    _exact_after_sleep(sync, target, level=1)


@pytest.mark.engine(enable_sleep_mode=True)
@pytest.mark.requirement("sleep.level2", models=MODELS)
def test_level2(sync: Sync, target: int) -> None:
    _exact_after_sleep(sync, target, level=2)


def _exact_after_sleep(sync: Sync, target: int, level: int) -> None:
    sync.load(sync.seed)
    sync.update()
    sync.sleep_and_wake(level)
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    sync.expect_same_behaviour()


@pytest.mark.requirement("cache.prefix", models=[TIED])
def test_prefix(sync: Sync, target: int) -> None:
    prompts = sync.prompts(length=LONG_PROMPT)
    sync.load(sync.seed)
    sync.update()
    sync.generate(prompts)
    sync.load(target)
    sync.update(reset_cache=False)
    stale = sync.generate(prompts)
    sync.reset_cache()
    fresh = sync.generate(prompts)
    if stale == fresh:
        raise RuntimeError(f"the engine caches no prefixes: a missing reset would not be seen {sync.where}")
    sync.expect_same_behaviour(prompts)
    sync.load(sync.seed)
    sync.update()
    sync.expect_same_behaviour(prompts)
