"""How a requirement is declared beside the test that judges it, and the catalogue of all that are.

An id is stable: clauses may be added, and one that no longer holds is removed, but an id is never given to another
clause.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import pytest

MUST, SHOULD = "MUST", "SHOULD"
CONFORMANCE = "suite.conformance"  # the package whose tests declare
Test = TypeVar("Test", bound=Callable)


@dataclass(frozen=True)
class Requirement:
    """One clause.

    because: why it is asked for. seen_in: where it went wrong before, as <project>#<issue or pull request>.
    on: the kind of the stages on which it can be judged, "cpu", "gpu" or "both".
    """

    id: str
    level: str  # MUST or SHOULD
    text: str
    because: str
    seen_in: tuple[str, ...] = ()
    on: str = "both"


def requirement(
    name: str,
    level: str,
    *,
    text: str,
    because: str,
    seen_in: tuple[str, ...] = (),
    on: str = "both",
    models: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
) -> Callable[[Test], Test]:
    """Declare the requirement that the test below judges; see Requirement.

    Another test that judges a part of it is marked with its id: `@pytest.mark.requirement(id, models=...)`.

    Args:
        models: those that the test takes, by name: one list, or lists by the kind or the name of the stage.
    """
    declared = Requirement(name, level, text, because, seen_in, on)
    mark = pytest.mark.requirement(name, **({"models": models} if models else {}))

    def declare(test: Test) -> Test:
        test.requirement = declared
        return mark(test)

    return declare


@cache
def catalogue() -> dict[str, Requirement]:
    """Every requirement by its id, as the conformance tests declare them. No engine and no run of pytest is needed.

    Raises ValueError where two tests declare the same id.
    """
    found: dict[str, Requirement] = {}
    for module in pkgutil.iter_modules(importlib.import_module(CONFORMANCE).__path__, f"{CONFORMANCE}."):
        for name, test in vars(importlib.import_module(module.name)).items():
            declared = getattr(test, "requirement", None) if inspect.isfunction(test) else None
            if declared and declared.id in found:
                raise ValueError(
                    f"{module.name}.{name} declares {declared.id}, as another test does; mark one of the two with"
                    f' @pytest.mark.requirement("{declared.id}")'
                )
            if declared:
                found[declared.id] = declared
    return found
