"""fanout.*: one trainer feeds several engines."""

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED


@requirement(
    "fanout.two_engines",
    MUST,
    text="One trainer updates two engines at once, and both are exact.",
    because="Ranks are offset by engine, and an offset that is wrong leaves one of them waiting or with "
    "another's shard.",
    seen_in=("vllm#56949",),
    models=[TIED],
)
def test_two_engines(fanout: Sync, target: int) -> None:
    expect(len(fanout.engines) == 2, "two engines", len(fanout.engines), fanout.where)
    for seed in (target, fanout.seed):
        fanout.load(seed)
        fanout.update()
        fanout.expect_exact(seed)
    fanout.expect_same_behaviour()
