"""memory.*: an update leaves nothing behind."""

from contextlib import ExitStack

import pytest

from suite.conformance.requirements import SHOULD, requirement
from suite.driver.expected import expect
from suite.driver.pool import Pool
from suite.driver.sync import Sync
from suite.driver.trainers import Trainers
from suite.models import TIED

UPDATES, WARM_UP = 50, 10
BUFFERS = UPDATES / 4  # one in four updates that keeps its tensors is found
NOISE = {"host_bytes": 16e6, "device_bytes": 16e6, "torch_bytes": 1e6, "descriptors": 2, "mappings": 12}
HINTS = {"device_bytes": " (which counts every process on the GPU: is one of them not of this run?)"}
SCALED = ("host_bytes", "device_bytes", "torch_bytes")


@requirement(
    "memory.steady",
    SHOULD,
    text="Over 50 updates, device memory, host memory, file descriptors and mapped handles of both sides stay level, "
    "and the update that follows is exact.",
    because="A buffer kept each round ends a training run after hours, and so does a counter, a cache of handles or a "
    "pool that is used up: from then on the weights are old.",
    seen_in=("vllm#51258", "verl#6958", "vllm#52950", "verl#7873"),
    models=[TIED],
)
@pytest.mark.alone
def test_steady(sync: Sync, target: int, pool: Pool, trainers: Trainers) -> None:
    sync.load(target)
    with ExitStack() as quiet:
        if sync.stage.kind == "gpu":  # whose memory is counted over all processes
            quiet.enter_context(pool.quiet())
            quiet.enter_context(trainers.quiet())
        for _ in range(WARM_UP):
            moved = sync.update()
        before = sync.resources()
        for _ in range(UPDATES):
            sync.update()
        after = sync.resources()
    sync.load(sync.seed)  # else weights that stay as they are would be right
    sync.update()
    sync.expect_exact(sync.seed)
    levels, found = [], []
    for process, held in before.items():
        for what, amount in held.items():
            allowed = max(NOISE[what], BUFFERS * moved.bytes_sent if what in SCALED else 0)
            grown = after[process][what] - amount
            if grown > allowed:
                levels.append(f"{what} of {process} level over {UPDATES} updates (at most {allowed:.0f} more)")
                found.append(f"{grown} more{HINTS.get(what, '')}")
    expect(not found, "; ".join(levels), "; ".join(found), sync.where)


@requirement(
    "memory.settings",
    SHOULD,
    text="After updates the settings of the engine's workers are those from before the first: torch's default dtype, "
    "gradients, threads and precision, signal handlers, environment variables. Random numbers go on as if there had "
    "been no update.",
    because="Whoever sets them for a load, or imports a trainer's library that does, changes what is computed later, or"
    " how fast. A generator that every update seeds has each round of rollouts sampled alike.",
    models=[TIED],
)
def test_settings(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed):
        sync.load(seed)
        before = sync.call_engines("probe_random", True)
        sync.update()
        drawn = sync.call_engines("probe_random", False) != before
        expect(not drawn, "random numbers to go on as before the update", "generators that stand elsewhere", sync.where)
        sync.expect_exact(seed)
    for ranks in sync.call_engines("probe_settings"):
        for rank, changed in enumerate(ranks):
            expect(not changed, f"every setting of rank {rank} as before", "; ".join(changed), sync.where)
