"""Seconds and GB/s of one whole update, beside what the hardware takes for the same bytes in the same run."""

import statistics

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from suite.clock import moved_clock
from suite.driver import Moved, Sync
from suite.plugin import timeline
from suite.pool import Pool

ROUNDS = 10
GB = 1e9


@pytest.mark.benchmark(group="update", timer=moved_clock)
@pytest.mark.models(cpu=["qwen3-1m", "qwen3-10m", "qwen3-100m"], **{"cpu-tp2": []})
def test_update(benchmark: BenchmarkFixture, sync: Sync, target: int, pool: Pool) -> None:
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    rounds: list[Moved] = []

    def one_update() -> None:
        rounds.append(sync.update())
        moved_clock.add(rounds[-1].elapsed_s)

    with timeline("moving", str(sync.engines[0].key)), pool.quiet():
        benchmark.pedantic(one_update, rounds=ROUNDS, iterations=1, warmup_rounds=0)
        nbytes = rounds[0].bytes_sent
        kind, roofline_s = sync.roofline(nbytes, ROUNDS)
        engine_bytes, trainer_bytes = sync.peak_memory()
    sync.expect_exact(target)
    seconds, fastest_s = statistics.median(r.elapsed_s for r in rounds), statistics.median(roofline_s)
    benchmark.extra_info.update(
        subject=sync.subject.name,
        stage=sync.stage.name,
        model=sync.model,
        parameters=sync.spec.elements,
        bytes_sent=nbytes,
        tensors=rounds[0].tensors,
        gb_per_s=nbytes / seconds / GB,
        roofline_kind=kind,
        roofline_samples_s=roofline_s,
        roofline_gb_per_s=nbytes / fastest_s / GB,
        fraction_of_roofline=fastest_s / seconds,
        engine_peak_extra_bytes=engine_bytes,
        trainer_peak_extra_bytes=trainer_bytes,
        steps_s={step: [r.steps_s[step] for r in rounds] for step in rounds[0].steps_s},
    )
