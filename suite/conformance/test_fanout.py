"""fanout.*: one trainer feeds several engines."""

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED


@requirement(
    "fanout.two_engines",
    MUST,
    text="One trainer updates two engines at once, or as many as the stage has, and all of them are exact.",
    because="Ranks are offset by engine, and an offset that is wrong leaves one of them waiting or with "
    "another's shard.",
    seen_in=("vllm#56949",),
    models=[TIED],
)
def test_two_engines(fanout: Sync, target: int) -> None:
    count = max(2, fanout.stage.engines)
    expect(len(fanout.engines) == count, f"{count} engines", len(fanout.engines), fanout.where)
    for seed in (target, fanout.seed):
        fanout.load(seed)
        fanout.update()
        fanout.expect_exact(seed)
    fanout.expect_same_behaviour()
