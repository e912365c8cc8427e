"""Extensions that are broken on purpose: each has to fail the requirement that it names.

They are given to the suite as a user's own would be, `--extension suite.selftest.mutants:LoadsNothing`, and all
together by `python -m suite.selftest.mutants`. Each is a few lines over a reference class.
"""

from suite.selftest.mutants import (
    devices,
    drafts,
    faults,
    hopeless,
    inflight,
    options,
    planned,
    planning,
    ranks,
    refusals,
    replicas,
    sent,
    sequences,
    server,
    sparse,
    states,
    surroundings,
    unseen,
    values,
)
from suite.selftest.mutants.registry import CLASSES, MUTANTS, Mutant

__all__ = [
    "MUTANTS", "Mutant",
    "devices", "drafts", "faults", "hopeless", "inflight", "options", "planned", "planning", "ranks", "refusals",
    "replicas", "sent", "sequences", "server", "sparse", "states", "surroundings", "unseen",
    "values",
]  # fmt: skip


def __getattr__(name: str) -> type:
    """The classes of all files, by their names."""
    if name not in CLASSES:
        raise AttributeError(f"there is no mutant {name}")
    return CLASSES[name]
