"""What pytest has collected: which tests judge or measure, what each is about, and the order in which they come."""

from pathlib import Path
from typing import Any

import pytest

from suite.models import MODELS
from suite.session import selection
from suite.session.selection import NOTHING
from suite.session.state import state_of
from suite.session.waivers import Case

SELFTESTS = Path(__file__).resolve().parents[1] / "selftest"
PHASES = ("alone", "ends_engine", "benchmark")  # the markers of what comes after the rest, in this order


def is_selftest(item: pytest.Item) -> bool:
    """Whether a test is one of the suite's own."""
    return SELFTESTS in item.path.parents


def examines(item: pytest.Item) -> bool:
    """Whether a test judges a requirement or measures, and so needs an engine."""
    return any(map(item.get_closest_marker, ("requirement", "models", "benchmark"))) and not is_selftest(item)


def params_of(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a test by name; none where it takes none."""
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


def names_of(item: pytest.Item) -> dict[str, str | None]:
    """The subject, stage and model of a test by name; None for what it does not take."""
    params = params_of(item)
    return {name: getattr(params.get(name), "name", params.get(name)) for name in ("subject", "stage", "model")}


def asked_for_nothing(item: pytest.Item) -> bool:
    """Whether nothing that was asked for concerns a test."""
    return NOTHING in params_of(item).values()


def case_of(item: pytest.Item) -> Case | None:
    """What a test judges; None for one that judges no requirement."""
    if asked_for_nothing(item) or not examines(item) or not (requirement := selection.requirement_of(item)):
        return None
    return Case(requirement.id, *(name or "" for name in names_of(item).values()))


def place_of(item: pytest.Item) -> tuple[int, ...]:
    """Selftests first, then what needs no stage, while engines start; then phase by phase, stage and model.

    Models whose engines start slowly come last in a phase, so that no other test waits for them.
    What measures comes by model: an engine ends, and gives its memory back, while one of another stage is measured.
    Stages come in reverse then: where they share no GPU, the largest engine starts beside the last measurement.
    """
    if is_selftest(item):
        return (0, 0, 0, 0, 0)
    names, examined = names_of(item), state_of(item.config).selection
    stages = [None, *examined.stages, *examined.missing] if examined else []
    phase, stage, model = _phase(item), _index(stages, names["stage"]), _index([*MODELS], names["model"])
    spec = MODELS.get(names["model"])
    late = spec is not None and spec.starts_slowly
    return (1, phase, late, model, -stage) if phase == len(PHASES) else (1, phase, late, stage, model)


def _phase(item: pytest.Item) -> int:
    """What ends engines comes when they have served, and measuring when there are none left that would disturb it."""
    return next((number for number, name in enumerate(PHASES, 1) if item.get_closest_marker(name)), 0)


def _index(names: list[str | None], name: str | None) -> int:
    return names.index(name) if name in names else len(names)
