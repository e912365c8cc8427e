"""What selftests share: a process with vLLM's models, bait for what unpickles, an engine's socket; counts examples."""

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
TRIED = pytest.StashKey[dict[str, int]]()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if statistics := getattr(item, "hypothesis_statistics", ""):
        tried = item.config.stash.setdefault(TRIED, {})
        tried[item.nodeid] = sum(map(int, PASSING.findall(statistics)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from hypothesis import settings

    if tried := config.stash.get(TRIED, {}):
        profile = settings.get_current_profile_name()
        terminalreporter.write_line(
            f"{len(tried)} property tests tried {sum(tried.values())} examples (Hypothesis profile {profile})"
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
