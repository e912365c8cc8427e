"""The host's own pace: what a call to all workers takes, by stage, as a run measured it beside what it timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from reports import statistics, units
from reports.node import Node
from reports.statistics import Ratio

if TYPE_CHECKING:
    from reports.load import Timing

# Names of the calls, by their keys in run.json.
CALLS = {"empty_call_samples_s": "empty call", "manifest_call_samples_s": "call with a manifest"}
OF_WEIGHT = 0.1  # from this share on, calls are taken to explain the whole of a time


@dataclass(frozen=True)
class Pace:
    """Seconds of every sample by call: ((call, samples), ...). `quiet`: whether no engine was starting beside it."""

    calls: tuple[tuple[str, tuple[float, ...]], ...]
    quiet: bool = True

    def calls_s(self, number: float, kinds: Iterable[str]) -> list[float]:
        """An upper bound for the seconds that an update of so many calls spends on them, one of which has the manifest.

        One value a sample. Kinds of call that are not among `kinds` count as 0; no values where there are none.
        """
        times = dict(zip(CALLS.values(), (number, 1.0), strict=True))
        taken = [[times[kind] * seconds for seconds in samples] for kind, samples in self.calls if kind in kinds]
        return [sum(sample) for sample in zip(*taken, strict=False)]

    def __str__(self) -> str:
        told = ", ".join(f"{call} {units.seconds(median(samples))}" for call, samples in self.calls)
        return told if self.quiet else f"{told} (measured while engines may have been starting)"


Paces = tuple[tuple[str, Pace], ...]  # by stage


def paces(environment: Node) -> Paces:
    """The section `pace` of a run's environment; empty where the file has none, as older ones."""
    if "pace" not in environment:
        return ()
    node = environment["pace"]
    found = [(stage, _pace(node[stage])) for stage in node.of(dict, "an object with a stage's pace each")]
    return tuple((stage, pace) for stage, pace in found if pace.calls)


def _pace(node: Node) -> Pace:
    node.of(dict, "an object with the samples of calls")
    samples = [(call, node[name].numbers()) for name, call in CALLS.items()]
    return Pace(tuple((call, taken) for call, taken in samples if taken), node["quiet"].value is not False)


def drifts(a: Paces, b: Paces, threshold: float) -> list[tuple[str, Ratio]]:
    """B's pace over A's for every stage and call that both measured, as ("cpu-tp1 empty call", ratio)."""
    before, after = ({(stage, call): taken for stage, pace in side for call, taken in pace.calls} for side in (a, b))
    both = [place for place in before if place in after]
    return [(" ".join(place), statistics.compare(before[place], after[place], threshold)) for place in both]


def unknown(stages: Iterable[str], a: Paces, b: Paces) -> str:
    """A note for timed stages on which a run lacks the host's pace; empty where both have it."""
    lacking = {name: [stage for stage in stages if stage not in dict(known)] for name, known in (("A", a), ("B", b))}
    sides = [f"{name} ({', '.join(missing)})" for name, missing in lacking.items() if missing]
    if not sides:
        return ""
    return f"The host's pace is not known in {' nor in '.join(sides)}: a slower host may look like a slower vLLM."


@dataclass(frozen=True)
class Against:
    """One benchmark against the host's pace in both runs.

    drift: of the calls of such an update. relative: B's time over A's, the drift taken out.
    """

    drift: Ratio
    relative: Ratio

    def doubt(self, seconds: Ratio) -> str:
        """Why the pace leaves the verdict in seconds open; empty where it does not.

        Only an upper bound of an update's calls is known, so a verdict has to hold with the drift and without it.
        """
        if seconds.verdict in ("inconclusive", self.relative.verdict) or self.drift.verdict == "same":
            return ""
        if (seconds.verdict, self.relative.verdict) == ("same", "inconclusive"):
            return ""
        host = f"which is {'unsure' if self.drift.verdict == 'inconclusive' else self.drift.verdict}"
        left = f"{self.relative.verdict} {units.ratio(self.relative)} once the host's pace is taken out"
        return f"{seconds.verdict} in seconds, {left}, {host} {units.ratio(self.drift)}"


def _calls_of(timing: Timing) -> float:
    """How many calls to all workers an update made; in older files, which do not say it, at most one a tensor."""
    return timing.worker_calls or timing.tensors or 1


def against(a: Timing, b: Timing, threshold: float) -> Against | None:
    """Take the pace's drift out of a benchmark; None where a run does not know its pace.

    A host that is slow in calls is slow in the work around them. So where calls may take OF_WEIGHT of the time or
    more, the drift is taken out of all of it; else out of what they may take.
    """
    if not (a.pace and b.pace):
        return None
    number, kinds = max(map(_calls_of, (a, b))), dict(a.pace.calls).keys() & dict(b.pace.calls)
    calls = [side.pace.calls_s(number, kinds) for side in (a, b)]
    if not all(calls):
        return None
    shares = [median(taken) / (side.median_s or 1.0) for taken, side in zip(calls, (a, b), strict=True)]
    rest_s = min(side.median_s - median(taken) for taken, side in zip(calls, (a, b), strict=True))
    if max(shares) >= OF_WEIGHT or not all(side.worker_calls or side.tensors for side in (a, b)):
        rest_s = 0.0
    with_rest = [[rest_s + seconds for seconds in taken] for taken in calls]
    relative = statistics.compare_relative(a.samples_s, with_rest[0], b.samples_s, with_rest[1], threshold)
    return Against(statistics.compare(*calls, threshold), relative)
