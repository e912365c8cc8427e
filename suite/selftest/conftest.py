"""What selftests share: a process with vLLM's models, bait for what unpickles, an engine's socket; counts examples."""

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from suite.actors.link import Listener
from suite.selftest.strangers import Bait

if TYPE_CHECKING:
    from suite.selftest.vllm_models import Held

PASSING = re.compile(r"(\d+) passing")  # in what Hypothesis says of each of its phases
TRIED = "examples tried"  # a report's property: how many


def pytest_configure() -> None:
    """Runs of pytest that a test starts are not workers of this one."""
    for variable in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[variable]


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if statistics := getattr(item, "hypothesis_statistics", ""):
        item.user_properties.append((TRIED, sum(map(int, PASSING.findall(statistics)))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from hypothesis import settings

    reports = [report for group in terminalreporter.stats.values() for report in group]
    ended = [report for report in reports if getattr(report, "when", "") == "teardown"]
    tried = [count for report in ended for name, count in report.user_properties if name == TRIED]
    if tried:
        profile = settings.get_current_profile_name()
        terminalreporter.write_line(
            f"{len(tried)} property tests tried {sum(tried)} examples (Hypothesis profile {profile})"
        )


@pytest.fixture(scope="session")
def held(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Held]":
    """A process that has imported vLLM, which takes seconds; every test builds its model in it anew."""
    from suite.selftest.vllm_models import holding

    with holding(tmp_path_factory.mktemp("models")) as held:
        yield held


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Bait]:
    """A bait that works, and that nobody has taken by the end of the test."""
    bait = Bait(tmp_path / "executed")
    pickle.loads(bait.pickled)
    assert bait.taken
    bait.path.rmdir()
    yield bait
    assert not bait.taken, "something unpickled what a stranger sent"


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    return str(tmp_path / "engine.sock")


@pytest.fixture
def listener(socket_path: str) -> Iterator[Listener]:
    listener = Listener(socket_path)
    yield listener
    listener.close()
