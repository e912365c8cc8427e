"""fanout.*: one trainer feeds several engines."""

import pytest

from suite.driver import Sync


@pytest.mark.requirement("fanout.two_engines", models=["qwen3-tied-tiny"])
def test_two_engines(fanout: Sync, target: int) -> None:
    assert len(fanout.engines) == 2, f"expected two engines, found {len(fanout.engines)} {fanout.where}"
    for seed in (target, fanout.seed):
        fanout.load(seed)
        fanout.update()
        fanout.expect_exact(seed)
    fanout.expect_same_behaviour()
