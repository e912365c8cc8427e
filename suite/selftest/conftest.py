"""Counts the examples that property tests try."""

import re

import pytest

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
