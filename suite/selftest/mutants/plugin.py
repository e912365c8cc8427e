"""pytest's side of a run of mutants: which cases are left of the suite, and on whose engines mutants are examined.

Loaded by `-p`, beside the suite's own plugins, by `python -m suite.selftest.mutants`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from suite.driver.together import Together
from suite.selftest.mutants import MUTANTS, Mutant
from suite.session.selection import requirement_of
from suite.session.state import selection_of

PATIENCE_S = 40.0  # a mutant that hangs costs this; what does not hang takes a few seconds
SHORTER = {"DEADLINE_S": PATIENCE_S, "SHRINKING_S": 5.0}  # what tests of mutants wait for at the most, by its name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=0, metavar="N", help="judge every case of the references N times")


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session: pytest.Session) -> Iterator[None]:
    """Have mutants examined on the engines of the references, and those that hang waited for less long."""
    yield
    subjects = selection_of(session.config).subjects
    for name in subjects.keys() & MUTANTS.keys():
        subjects[name] = replace(subjects[name], host=MUTANTS[name].host)
    if subjects.keys() & MUTANTS.keys():
        Together.call_deadline_s = PATIENCE_S


@pytest.fixture(autouse=True)
def repetition(request: pytest.FixtureRequest) -> int:
    """Which time a case is judged, from 0."""
    return getattr(request, "param", 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("repeat"):
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(metafunc.config.getoption("repeat")), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the cases of the references and, of a run of mutants, those that judge one."""
    mutants = [MUTANTS[name] for name in selection_of(config).subjects if name in MUTANTS]
    left = [item for item in items if (_wanted(item, mutants) if mutants else requirement_of(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left
    for module in {item.module for item in items if mutants}:
        for name, most in SHORTER.items():
            if hasattr(module, name):
                setattr(module, name, min(getattr(module, name), most))


def _wanted(item: pytest.Item, mutants: list[Mutant]) -> bool:
    """Whether a case judges its mutant, or is the control of one: the same case with the reference."""
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    requirement, subject, stage = requirement_of(item), params.get("subject"), params.get("stage")
    if requirement is None or subject is None:
        return False
    kinds = (stage.kind,) if stage else ("cpu", "gpu")
    for mutant in mutants:
        concerned = subject.name in (mutant.name, mutant.host)
        name = stage.name if stage else None
        if concerned and any(mutant.judged_by(kind, requirement.id, name, item.callspec.id) for kind in kinds):
            return True
    return False
