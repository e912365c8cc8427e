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
    text="Over 50 updates, device memory, host memory, file descriptors and mapped handles of both sides stay level.",
    because="A buffer kept each round ends a training run after hours.",
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
    sync.expect_exact(target)
    for process, held in before.items():
        for what, amount in held.items():
            allowed = max(NOISE[what], BUFFERS * moved.bytes_sent if what in SCALED else 0)
            grown = after[process][what] - amount
            level = f"{what} of {process} level over {UPDATES} updates (at most {allowed:.0f} more)"
            expect(grown <= allowed, level, f"{grown} more{HINTS.get(what, '')}", sync.where)
