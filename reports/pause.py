"""The time for which an engine cannot generate: from the last token before an update to the first after it.

A run measures it in a few updates with requests in flight, beside those that it times on an idle engine. In run.json
it stands in a benchmark's extra_info, as `in_flight`; a file has none for sizes that were left out, and older files
have none at all (their `pause_samples_s` were taken with no request in flight, and are not read):

    requests          how many are in flight
    pause_samples_s   seconds from the last token before each update to the first after it
    update_samples_s  seconds of these updates themselves
    token_samples_s   seconds between two tokens before each of them: what a pause with no update in it would last
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from reports import units
from reports.node import Node

MEANING = (
    "pause: the time the engine cannot generate, from the last token before an update to the first after it, with"
    " requests in flight"
)
LEGEND = f"{MEANING}; over: that less the time of the update itself; token: between two tokens with no update."


@dataclass(frozen=True)
class Pause:
    """Seconds of every sample; the three have one each for every update with requests in flight."""

    samples_s: tuple[float, ...]
    update_samples_s: tuple[float, ...]
    token_samples_s: tuple[float, ...]

    @property
    def medians_s(self) -> tuple[float, float, float]:
        """The pause, how much longer it is than its update (negative: shorter), and the time between two tokens."""
        over = [paused - updated for paused, updated in zip(self.samples_s, self.update_samples_s, strict=True)]
        return median(self.samples_s), median(over), median(self.token_samples_s)


def cells(found: Pause | None) -> tuple[str, str, str]:
    """The medians as a table has them."""
    if found is None:
        return ("-", "-", "-")
    paused, over, token = found.medians_s
    return units.seconds(paused), f"{'-' if over < 0 else '+'}{units.seconds(abs(over))}", units.seconds(token)


def pause(extra: Node) -> Pause | None:
    """What `in_flight` of a benchmark's extra_info says; None where it is missing."""
    if "in_flight" not in extra:
        return None
    node = extra["in_flight"]
    names = [f"{what}_samples_s" for what in ("pause", "update", "token")]
    samples = [node[name].numbers() for name in names]
    for name, taken in zip(names, samples, strict=True):
        if not taken or len(taken) != len(samples[0]):
            expected = "at least one sample" if not taken else f"{len(samples[0])} samples, as of pause_samples_s"
            raise node[name].refuse(expected, str(len(taken)))
    return Pause(*samples)
