"""Seconds and GB/s of one whole update, beside what the hardware takes for the same bytes in the same run."""

import statistics

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from suite.benchmarks import pace
from suite.benchmarks.clock import moved_clock
from suite.driver.measuring import REQUESTS
from suite.driver.moving import Moved
from suite.driver.pool import Pool
from suite.driver.room import GB
from suite.driver.sync import Sync
from suite.driver.trainers import Trainers
from suite.session.state import selection_of

ROUNDS, IN_FLIGHT_ROUNDS = 10, 5
SEED = 1
GENERATED_TOKENS = 24
LADDER = ["qwen3-1m", "qwen3-10m", "qwen3-100m"]
PUBLISHED = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b"]
IN_FLIGHT = ["qwen3-10m", "qwen3-100m", "qwen3-0.6b", "qwen3-8b"]  # sizes also updated with requests in flight
UPDATE = pytest.mark.benchmark(group="update", timer=moved_clock)


@UPDATE
@pytest.mark.models(**{"cpu-tp1": LADDER})
def test_update(
    benchmark: BenchmarkFixture, sync: Sync, target: int, pool: Pool, trainers: Trainers, pytestconfig: pytest.Config
) -> None:
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    sync.load(sync.seed)
    _measure(benchmark, sync, pool, trainers, pytestconfig)
    if sync.subject.compares:  # each of its updates had other weights to bring
        sync.expect_sent()
    else:
        sync.expect_exact(sync.seed)  # brought by the updates that were timed: the first one has brought other weights


@UPDATE
@pytest.mark.models(**{"cpu-fanout": ["qwen3-10m"]})
def test_fanout(
    benchmark: BenchmarkFixture, fanout: Sync, target: int, pool: Pool, trainers: Trainers, pytestconfig: pytest.Config
) -> None:
    test_update(benchmark, fanout, target, pool, trainers, pytestconfig)


@UPDATE
@pytest.mark.models(**dict.fromkeys(("gpu-fanout", "gpu-fanout3"), ("qwen3-8b",)))
def test_fanout_published(
    benchmark: BenchmarkFixture, fanout: Sync, pool: Pool, trainers: Trainers, pytestconfig: pytest.Config
) -> None:
    test_update_published(benchmark, fanout, pool, trainers, pytestconfig)


@UPDATE
@pytest.mark.models(**{"gpu-split": PUBLISHED, "gpu-colocate-tp1": PUBLISHED})
def test_update_published(
    benchmark: BenchmarkFixture, sync: Sync, pool: Pool, trainers: Trainers, pytestconfig: pytest.Config
) -> None:
    sync.trainer.hold_random(pool.config(sync.model), SEED)
    sync.update()
    before = sync.tokens_per_s(GENERATED_TOKENS)
    sync.trainer.negate()
    negated = sync.negated() if sync.spec.has_experts else None
    _measure(benchmark, sync, pool, trainers, pytestconfig)
    if negated is None:
        sync.expect_sent()  # by the updates that were timed: the first one has brought other values
    else:
        sync.expect_negated(negated)
    after = sync.tokens_per_s(GENERATED_TOKENS, warm_ups=0)
    benchmark.extra_info.update(tokens_per_s_before=before, tokens_per_s_after=after)


def _measure(benchmark: BenchmarkFixture, sync: Sync, pool: Pool, trainers: Trainers, config: pytest.Config) -> None:
    """Time updates, pauses, the roofline, the host's pace and peak memory; put them beside pytest-benchmark's samples.

    How `in_flight` is read says reports/pause.py.
    """
    rounds: list[Moved] = []
    parts_s: list[dict[str, float]] = []

    def one_update() -> None:
        sync.renew()
        rounds.append(sync.update())
        moved_clock.add(rounds[-1].elapsed_s)
        parts_s.append(sync.parts(rounds[-1]))

    with trainers.quiet(), pool.quiet():
        benchmark.pedantic(one_update, rounds=ROUNDS, iterations=1, warmup_rounds=0)
        nbytes = rounds[0].bytes_sent
        kind, roofline_s = sync.roofline(nbytes, ROUNDS)
        pace.measure(config, sync.engines[0], quiet=True)
        engine_bytes, trainer_bytes = sync.peak_memory()
        update_s, hardware_s = statistics.median(r.elapsed_s for r in rounds), statistics.median(roofline_s)
        benchmark.extra_info.update(
            subject=sync.subject.name,
            stage=sync.stage.name,
            model=sync.model,
            engines=len(sync.engines),
            parameters=sync.spec.elements,
            bytes_sent=nbytes,
            tensors=rounds[0].tensors,
            worker_calls=rounds[0].calls,
            gb_per_s=nbytes / update_s / GB,
            roofline_kind=kind,
            roofline_samples_s=roofline_s,
            roofline_gb_per_s=nbytes / hardware_s / GB,
            fraction_of_roofline=hardware_s / update_s,
            engine_peak_extra_bytes=engine_bytes,
            trainer_peak_extra_bytes=trainer_bytes,
            steps_s={step: [r.steps_s[step] for r in rounds] for step in rounds[0].steps_s},
            parts_s={part: [taken[part] for taken in parts_s] for part in parts_s[0]},
        )
        benchmark.extra_info.update(_in_flight(sync, config))  # last: a subject may fail only with requests in flight


def _in_flight(sync: Sync, config: pytest.Config) -> dict[str, dict]:
    """Time updates of one engine with requests in flight; nothing for a size that is left out without --model."""
    if len(sync.engines) > 1 or (sync.model not in IN_FLIGHT and not selection_of(config).models):
        return {}
    rounds = sync.with_requests(IN_FLIGHT_ROUNDS)
    samples = {
        "pause_samples_s": [r.pause_s for r in rounds],
        "update_samples_s": [r.elapsed_s for r in rounds],
        "token_samples_s": [r.token_s for r in rounds],
    }
    return {"in_flight": {"requests": REQUESTS, **samples}}
