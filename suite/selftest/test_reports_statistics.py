"""Verdicts on timings: mirrored, sure of 20%, not taken in by noise, and honest about what would settle the rest."""

import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports import load, statistics
from reports.compare import compare
from reports.load import Run
from suite.selftest import reports_data as data
from suite.selftest.properties import examples

seeds = st.integers(0, 2**32)
samples = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


def parsed(**how):
    return load.parse(data.run(**how), "made up")


@examples(0.4)
@given(samples)
def test_samples_compared_with_themselves_are_the_same(a):
    found = statistics.compare(a, list(reversed(a)))
    assert (found.verdict, found.ratio, found.low, found.high) == ("same", 1.0, 1.0, 1.0)


@examples(0.4)
@given(samples, samples, st.lists(samples, max_size=1), st.floats(0.01, 0.5))
def test_swapping_the_sides_mirrors_verdict_ratio_and_interval(a, b, roofline, threshold):
    roofline = roofline[0] if roofline else ()
    there = statistics.compare_relative(a, roofline, b, b, threshold)
    back = statistics.compare_relative(b, b, a, roofline, threshold)
    assert data.mirrored(there.verdict) == back.verdict
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))
    assert there.p == pytest.approx(back.p)
    assert there.more == (back.more and back.more[::-1])


@examples(0.4)
@given(seeds, st.floats(0, 0.05), st.floats(1e-4, 100))
def test_a_slowdown_of_20_percent_is_found_at_20_samples(seed, spread, middle):
    rng = random.Random(seed)
    before = data.noisy(middle, 20, spread, rng)
    after = [1.2 * value for value in data.noisy(middle, 20, spread, rng)]
    assert statistics.compare(before, after).verdict == "slower"
    assert statistics.compare(before, [1.2 * value for value in before]).verdict == "slower"


def test_noise_alone_is_called_slower_in_at_most_1_percent_of_comparisons():
    # Measured over 24,012 comparisons of three shapes of noise: 0.48%, and 0.83% at a spread of 20%. This is a sample.
    rng = random.Random(5)
    shapes = [(count, spread) for count in (5, 10, 20) for spread in (0.02, 0.05, 0.1, 0.2)]
    verdicts = [
        statistics.compare(data.noisy(1, count, spread, rng), data.noisy(1, count, spread, rng)).verdict
        for count, spread in shapes * 80
    ]
    assert verdicts.count("slower") <= 0.01 * len(verdicts)
    assert verdicts.count("same") > 0.1 * len(verdicts), "a comparison that never says same would pass this test too"


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0] * 5, [1.2] * 5, "slower"),
        ([1.0] * 5, [1.04] * 5, "same"),  # certain, and too small to matter
        ([1.0, 1.01, 1.02, 1.03], [1.3, 1.31, 1.32, 1.33], "inconclusive"),  # clear to the eye, too few for the test
        ([1.0], [2.0], "inconclusive"),
        ([], [1.0], "inconclusive"),
        ([0.0] * 9, [1.0] * 9, "inconclusive"),
    ],
)
def test_small_and_odd_samples(a, b, verdict):
    assert statistics.compare(a, b).verdict == verdict


def test_the_threshold_is_the_callers():
    rng = random.Random(2)
    a, b = data.noisy(1, 40, 0.01, rng), data.noisy(1.1, 40, 0.01, rng)
    assert statistics.compare(a, b, 0.05).verdict == "slower"
    assert statistics.compare(a, b, 0.2).verdict == "same"


def test_the_advised_number_of_samples_settles_most_comparisons():
    rng, settled, asked = random.Random(3), 0, 0
    for factor in (1.0, 1.15) * 25:
        a, b = data.noisy(1, 6, 0.06, rng), data.noisy(factor, 6, 0.06, rng)
        found = statistics.compare(a, b)
        if found.more:
            assert max(found.more) > 0
            assert found.why == f"about {found.more[0]} more samples a side would settle"
            a, b = a + data.noisy(1, found.more[0], 0.06, rng), b + data.noisy(factor, found.more[1], 0.06, rng)
            asked, settled = asked + 1, settled + (statistics.compare(a, b).verdict != "inconclusive")
    assert asked > 20
    assert settled > 0.5 * asked


def test_the_side_that_has_fewer_samples_is_asked_for_more():
    rng = random.Random(6)
    found = statistics.compare(data.noisy(1, 12, 0.05, rng), data.noisy(1.05, 4, 0.05, rng))
    assert found.more[1] - found.more[0] == 8
    assert found.why == f"about {found.more[0]} more samples of A and {found.more[1]} of B would settle"


def test_too_close_to_the_threshold_is_said():
    rng = random.Random(4)
    a, b = data.noisy(1, 20, 0.1, rng), data.noisy(1, 20, 0.1, rng)
    factor = 1.05 / statistics.compare(a, b).ratio
    assert "choose another --threshold" in statistics.compare(a, [factor * value for value in b]).why


@examples(0.05)
@given(seeds)
def test_a_run_compared_with_itself_says_same(seed):
    run = parsed(seed=seed)
    found = compare(run, run)
    assert found.timings
    assert {change.verdict for change in found.timings} == {"same"}
    assert {change.kind for change in found.requirements} <= {"unchanged", "still failing"}
    assert found.exit_status(strict=True) == 0


@examples(0.1)
@given(seeds, seeds, st.sampled_from([0.8, 1.0, 1.04, 1.3]), st.integers(0, 30), st.sampled_from(["0.20.2", "0.33.0"]))
def test_swapping_two_runs_mirrors_every_verdict(seed, other, slower, without, vllm):
    document = data.run(seed=other, slower=slower, vllm=vllm)
    del document["conformance"][:without], document["benchmarks"][: without % 5]
    a, b = parsed(seed=seed), load.parse(document, "made up too")
    there, back = compare(a, b), compare(b, a)
    timed = {change.key: change.verdict for change in back.timings}
    sides = {"only in A": "only in B", "only in B": "only in A"}
    for change in there.timings:
        assert timed[change.key] == sides.get(change.verdict, data.mirrored(change.verdict)), change.label
    judged = {change.key: (change.now, change.was) for change in back.requirements}
    assert judged == {change.key: (change.was, change.now) for change in there.requirements}


def drifting(machine: float, vllm: float, seed: int = 9, roofline_samples: int = 20, share: float = 0.8) -> Run:
    """A run on a machine, and of a vLLM, so many times slower; `share` of the time is the roofline's."""
    document = data.run(seed=seed)
    for index, entry in enumerate(document["benchmarks"]):
        document["benchmarks"][index] = data.scaled(document, index, machine * vllm)["benchmarks"][index]
        extra, roof_s = document["benchmarks"][index]["extra_info"], entry["extra_info"]["roofline_samples_s"]
        unit = share * entry["stats"]["median"] / median(roof_s)
        extra["roofline_samples_s"] = [value * unit * machine for value in roof_s[:roofline_samples]]
    return load.parse(document, "made up")


@pytest.mark.parametrize(
    ("machine", "vllm", "verdict", "judged_by"),
    [
        (1.0, 1.2, "slower", "seconds"),
        (1.3, 1.0, "same", "fraction of roofline"),  # a slower machine is not a slower vLLM
        (1.0, 1.0, "same", "seconds"),
        (0.8, 1.25, "slower", "fraction of roofline"),  # nor does a faster machine hide one
        (1.3, 1.3, "slower", "seconds"),
    ],
)
def test_a_drifting_machine_is_told_from_a_changed_vllm(machine, vllm, verdict, judged_by):
    found = compare(drifting(1.0, 1.0, seed=8), drifting(machine, vllm))
    assert {(change.verdict, change.judged_by) for change in found.timings} == {(verdict, judged_by)}
    assert {drift.verdict for _, drift in found.drift} == {{1.0: "same", 1.3: "slower", 0.8: "faster"}[machine]}


@pytest.mark.parametrize(("machine", "vllm", "seconds"), [(1.3, 1.0, "slower"), (0.8, 1.25, "same")])
def test_what_drift_does_to_a_time_that_is_mostly_something_else_nobody_knows(machine, vllm, seconds):
    found = compare(drifting(1.0, 1.0, seed=8, share=0.1), drifting(machine, vllm, share=0.1))
    assert {(change.verdict, change.judged_by) for change in found.timings} == {("inconclusive", "both")}
    assert all(f"{seconds} in seconds, " in change.why and "far from" in change.why for change in found.timings)


def test_a_roofline_of_too_few_samples_leaves_a_slowdown_open():
    found = compare(drifting(1.0, 1.0, roofline_samples=3), drifting(1.3, 1.0, roofline_samples=3))
    assert {change.verdict for change in found.timings} == {"inconclusive"}
    assert all("roofline that is itself unsure" in change.why for change in found.timings)
