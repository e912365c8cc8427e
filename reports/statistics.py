"""Whether one set of timings is slower than another, by how much, and how certain that is.

Slower takes three things: medians apart by more than the practical threshold, a two-sided Mann-Whitney U test below
ALPHA, and a bootstrap interval of the ratio of medians that excludes 1. Same takes an interval inside the threshold.
Everything else is inconclusive, and comes with the number of samples that would be expected to settle it.

All of it is done on logarithms, where slower and faster mirror each other: swapping the sides swaps the verdicts.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

ALPHA = 0.02  # at 0.01 a slowdown of 20% over 10 samples that vary by 10% is missed twice as often
CONFIDENCE = 0.95
THRESHOLD = 0.05
RESAMPLES = 4000
FEWEST_FOR_SAME = 3
FEWEST_FOR_DIFFERENCE = 5  # 5 against 5 is the smallest pair for which the U test can go below ALPHA
MOST_WORTH_ASKING = 1000


@dataclass(frozen=True)
class Ratio:
    """B's median over A's with its interval; `more` is how many further samples A and B need, None if unknown."""

    verdict: str
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    more: tuple[int, int] | None = None
    why: str = ""


def compare(a: Sequence[float], b: Sequence[float], threshold: float = THRESHOLD) -> Ratio:
    """Judge samples `b` against samples `a`, both in seconds."""
    return compare_relative(a, (), b, (), threshold)


def compare_relative(
    a: Sequence[float],
    roofline_a: Sequence[float],
    b: Sequence[float],
    roofline_b: Sequence[float],
    threshold: float = THRESHOLD,
) -> Ratio:
    """As `compare`, in units of the roofline's time, whose own spread widens the interval. No roofline: seconds."""
    import numpy as np

    if not len(a) or not len(b):
        return Ratio("inconclusive", None, None, None, None, why="no raw samples (--benchmark-save-data keeps them)")
    unit_a, unit_b = (float(np.median(r)) if len(r) else 1.0 for r in (roofline_a, roofline_b))
    if min(np.median(a), np.median(b), unit_a, unit_b) <= 0:
        return Ratio("inconclusive", None, None, None, None, why="a median of 0 s: the timer is too coarse")
    logs_a, logs_b = _log_medians(a) - _log_medians(roofline_a), _log_medians(b) - _log_medians(roofline_b)
    apart = np.sort(logs_b - logs_a)
    outside = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    low, high = float(apart[outside]), float(apart[-1 - outside])
    middle = (math.log(np.median(b)) - math.log(unit_b)) - (math.log(np.median(a)) - math.log(unit_a))
    p = _mann_whitney(np.asarray(a) / unit_a, np.asarray(b) / unit_b)
    limit = math.log1p(threshold)
    found = Ratio(_verdict(middle, low, high, p, limit, a, b), math.exp(middle), math.exp(low), math.exp(high), p)
    if found.verdict != "inconclusive":
        return found
    spread = len(a) * float(np.var(logs_a)) + len(b) * float(np.var(logs_b))
    return _advised(found, _needed(middle, spread, limit), len(a), len(b))


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The bootstrap interval of the median."""
    import numpy as np

    medians = np.sort(_log_medians(samples))
    outside = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return math.exp(medians[outside]), math.exp(medians[-1 - outside])


def _verdict(
    middle: float, low: float, high: float, p: float, limit: float, a: Sequence[float], b: Sequence[float]
) -> str:
    if middle == low == high == 0.0 and p == 1.0:
        return "same"  # the very same samples, however few
    if p < ALPHA and middle > limit and low > 0:
        return "slower"
    if p < ALPHA and middle < -limit and high < 0:
        return "faster"
    enough = min(len(a), len(b)) >= FEWEST_FOR_SAME
    return "same" if enough and -limit < low and high < limit else "inconclusive"


def _log_medians(samples: Sequence[float]) -> np.ndarray:
    """RESAMPLES bootstrap medians, as logarithms; 0 for no samples.

    The median of a resample is an order statistic, so its place is drawn at once (a Beta variable) rather than by
    drawing the whole resample: the same distribution at a cost that does not grow with the samples. The seed comes
    from the samples, so that the result depends neither on which side they stand nor on what was compared before.
    """
    import numpy as np

    count = len(samples)
    if not count:
        return np.zeros(RESAMPLES)
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    random = np.random.default_rng(zlib.crc32(ordered.tobytes()))
    lower = (count + 1) // 2
    place = random.beta(lower, count - lower + 1, RESAMPLES)
    medians = _at(ordered, place)
    if count % 2 == 0:
        place = 1 - (1 - place) * random.random(RESAMPLES) ** (1 / (count - lower))
        medians = (medians + _at(ordered, place)) / 2
    return np.log(np.maximum(medians, np.finfo(np.float64).tiny))


def _at(ordered: np.ndarray, place: np.ndarray) -> np.ndarray:
    import numpy as np

    return ordered[np.minimum((place * len(ordered)).astype(np.int64), len(ordered) - 1)]


def _mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    import numpy as np
    from scipy.stats import mannwhitneyu

    if a.shape == b.shape and np.array_equal(np.sort(a), np.sort(b)):
        return 1.0
    return min(float(mannwhitneyu(a, b, alternative="two-sided").pvalue), 1.0)


def _needed(middle: float, spread: float, limit: float) -> float:
    """Samples a side for a four-in-five chance of a verdict, were the medians truly as far apart as they look."""
    power, beyond = 0.84, abs(middle) > limit
    reach = abs(middle) / (2.58 + power) if beyond else (limit - abs(middle)) / (1.96 + power)
    fewest = FEWEST_FOR_DIFFERENCE if beyond else FEWEST_FOR_SAME
    return max(spread / reach**2, fewest) if reach > 0 else math.inf


def _advised(found: Ratio, needed: float, count_a: int, count_b: int) -> Ratio:
    if needed > MOST_WORTH_ASKING:
        return replace(found, why="too close to the threshold for more samples to settle: choose another --threshold")
    more_a, more_b = max(math.ceil(needed) - count_a, 0), max(math.ceil(needed) - count_b, 0)
    if not more_a and not more_b:  # by this estimate they should have been enough
        more_a = more_b = max(min(count_a, count_b) // 2, 1)
    count = f"{more_a} more samples a side" if more_a == more_b else f"{more_a} more samples of A and {more_b} of B"
    return replace(found, more=(more_a, more_b), why=f"about {count} would settle")
