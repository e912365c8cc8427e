"""Seconds of an update in which few elements have changed, beside what the hardware takes for the whole model."""

import itertools
import statistics

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from suite.benchmarks import pace
from suite.benchmarks.clock import moved_clock
from suite.benchmarks.test_throughput import IN_FLIGHT_ROUNDS, ROUNDS, SEED
from suite.driver.expected import expect
from suite.driver.measuring import REQUESTS
from suite.driver.moving import Moved
from suite.driver.pool import Pool
from suite.driver.room import GB
from suite.driver.sync import Sync
from suite.driver.trainers import Trainers

MODELS = {
    "cpu-tp1": ["qwen3-10m"],
    "gpu-split": ["qwen3-0.6b", "qwen3-8b", "qwen3-32b"],
}  # on CPUs vLLM repacks layers, which are sent whole
PERCENT = (1, 5)


@pytest.mark.changes
@pytest.mark.benchmark(group="changes", timer=moved_clock)
@pytest.mark.models(**MODELS)
@pytest.mark.parametrize("percent", PERCENT)
def test_changes(
    benchmark: BenchmarkFixture,
    sync: Sync,
    pool: Pool,
    trainers: Trainers,
    pytestconfig: pytest.Config,
    percent: int,
) -> None:
    """Time sending and writing; put comparing, the pause, the roofline of a whole update and peak memory beside it."""
    sync.trainer.hold_random(pool.config(sync.model), SEED)
    whole_bytes, rounds, seeds = sync.update().bytes_sent, [], itertools.count(1)

    def change() -> None:
        sync.trainer.turn_bits(100 // percent, next(seeds))

    def one_update() -> None:
        change()
        rounds.append(sync.update())
        moved_clock.add(rounds[-1].steps_s["transfer"])

    with trainers.quiet(), pool.quiet():
        benchmark.pedantic(one_update, rounds=ROUNDS, iterations=1, warmup_rounds=0)
        kind, roofline_s = sync.roofline(whole_bytes, ROUNDS)
        pace.measure(pytestconfig, sync.engines[0], quiet=True)
        engine_bytes, trainer_bytes = sync.peak_memory(change)
        sync.expect_sent()
        benchmark.extra_info.update(
            measures=f"{percent} % changed",
            subject=sync.subject.name,
            stage=sync.stage.name,
            model=sync.model,
            parameters=sync.spec.elements,
            tensors=rounds[0].tensors,
            worker_calls=rounds[0].calls,
            roofline_kind=kind,
            roofline_samples_s=roofline_s,
            roofline_gb_per_s=whole_bytes / statistics.median(roofline_s) / GB,
            engine_peak_extra_bytes=engine_bytes,
            trainer_peak_extra_bytes=trainer_bytes,
            **shares(rounds, whole_bytes, roofline_s),
        )
        benchmark.extra_info["in_flight"] = in_flight(sync.with_requests(IN_FLIGHT_ROUNDS, change))
    for moved in rounds:
        few = moved.bytes_sent < whole_bytes / 2
        expect(few, f"less than half of {whole_bytes} bytes to be sent", moved.bytes_sent, sync.where)
    sync.expect_sent()


def shares(rounds: list[Moved], whole_bytes: int, roofline_s: list[float]) -> dict[str, object]:
    """What is said of such updates: seconds by step, and the share of a raw broadcast of the whole model."""
    steps_s = {"compare": [moved.announce_s for moved in rounds]}
    steps_s |= {step: [moved.steps_s[step] for moved in rounds] for step in rounds[0].steps_s}
    hardware_s = statistics.median(roofline_s)
    sent = statistics.median(moved.bytes_sent for moved in rounds)
    return {
        "bytes_sent": sent,
        "whole_bytes": whole_bytes,
        "gb_per_s": sent / statistics.median(steps_s["transfer"]) / GB,
        "steps_s": steps_s,
        "elapsed_samples_s": [moved.elapsed_s for moved in rounds],
        "transfer_of_whole_broadcast": statistics.median(steps_s["transfer"]) / hardware_s,
        "compare_of_whole_broadcast": statistics.median(steps_s["compare"]) / hardware_s,
    }


def in_flight(rounds: list[Moved]) -> dict[str, object]:
    """What is said of the pause, without the time of comparing, for which no engine has to pause: none is called then.

    These engines were paused before it, as before every update that is measured.
    """
    return {
        "requests": REQUESTS,
        "pause_samples_s": [moved.pause_s - moved.announce_s for moved in rounds],
        "update_samples_s": [moved.elapsed_s - moved.announce_s for moved in rounds],
        "token_samples_s": [moved.token_s for moved in rounds],
    }
