"""Where the time of one update went: parts that follow each other, and that together are the update.

gather     both sides are told of the update, and the trainer has its tensors at hand
announce   the trainer's half prepares what it announces
agree      the announcement arrives, the engine begins, and both say so
transfer   the engine's half moves the weights. Of an extension that says when its parts were over:
    call       a call to the workers arrives
    ...        the extension's own parts, of the worker that was done last
    answer     its answer arrives
end        the engine's half ends the update, and the prefix cache is reset
hear       the trainer hears of it
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

BEGUN = "begun"  # how an extension calls the moment at which its call began


def moments(
    engine: Mapping[str, Any], trainer: Mapping[str, Any], started_s: float, ended_s: float
) -> dict[str, float]:
    """When each part was over (monotonic clock), the beginning first, of what both halves say of an update."""
    steps_s, ended_by_engine = engine["steps_s"], engine["ended_s"]
    transferred = ended_by_engine - steps_s["end"]
    return {
        BEGUN: started_s,
        "gather": trainer["announced_s"] - trainer["announce_s"],
        "announce": trainer["announced_s"],
        "agree": transferred - steps_s["transfer"],
        "transfer": transferred,
        "end": ended_by_engine,
        "hear": ended_s,
    }


def parts_of(over: Mapping[str, float], workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of each part. `workers` is what every worker says, as `over`, of its own call; empty where none does."""
    found: dict[str, float] = {}
    for part, at in over.items():
        if part == "transfer" and all(workers) and workers:
            last = max(workers, key=lambda worker: max(worker.values()))
            found |= {"call" if own == BEGUN else own: own_at for own, own_at in last.items()}
            part = "answer"
        found[part] = at
    return {part: until - since for (_, since), (part, until) in pairwise(found.items())}
