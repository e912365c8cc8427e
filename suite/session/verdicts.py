"""From how a test ended to its verdict.

pass, fail, unsupported (the subject declares that it lacks it), not-applicable (the machine lacks it) or error (the
suite itself could not tell); waived is a fail that a waiver of --waivers covers. Only what is raised in a test's own
call, and only an assertion or the failure of what is examined, is a fail; a set-up or tear-down that breaks is an
error, never a skip and never a pass. A subject that is given up, see suite.driver.patience, fails wherever that shows.
"""

import re
from dataclasses import dataclass
from typing import NoReturn

import pytest

from suite.driver.patience import GivenUp
from suite.processes.call import DeadlineExceeded, ProcessDied, SubjectFailed

PASS, FAIL, ERROR = "pass", "fail", "error"
UNSUPPORTED, NOT_APPLICABLE = "unsupported", "not-applicable"
WAIVED = "waived"
JUDGED = (PASS, FAIL, ERROR, WAIVED)
FAILURES = (AssertionError, pytest.fail.Exception, SubjectFailed, DeadlineExceeded, ProcessDied)
DETAIL_CHARACTERS, CAUSE_CHARACTERS = 2000, 300
SAYS = ("expected: ", "found: ")
CASE = re.compile(r" \[subject=[^\]]*\]")


class Unsupported(pytest.skip.Exception):
    """The subject declares that it lacks what the requirement asks for."""


class NotApplicable(pytest.skip.Exception):
    """The machine or the stage lacks what the requirement needs."""


def unsupported(reason: str) -> NoReturn:
    """End the running test with the verdict unsupported."""
    raise Unsupported(reason)


def not_applicable(reason: str) -> NoReturn:
    """End the running test with the verdict not-applicable."""
    raise NotApplicable(reason)


@dataclass(frozen=True)
class Judgement:
    """A verdict and, unless it is pass, why. `cause` is the same for cases that one fault explains."""

    verdict: str = PASS
    detail: str = ""
    cause: str = ""

    def then(self, later: "Judgement") -> "Judgement":
        """The judgement of this phase and a later one of the same test.

        A fail stands. A tear-down that breaks takes the place of a pass, and of a waived fail: no waiver covers it.
        """
        return self if later.verdict == PASS or self.verdict == FAIL else later


def judge(phase: str, error: BaseException | None) -> Judgement:
    """The judgement of one phase (setup, call or teardown) that ended with this exception, or without one."""
    if error is None:
        return Judgement()
    if isinstance(error, Unsupported):
        return Judgement(UNSUPPORTED, str(error))
    if isinstance(error, pytest.skip.Exception):
        return Judgement(NOT_APPLICABLE, str(error))
    if isinstance(error, GivenUp) or (phase == "call" and _is_failure(error)):
        return Judgement(FAIL, _detail(error), cause_of(error))
    return Judgement(ERROR, f"{phase}: {_detail(error)}", cause_of(error))


def cause_of(error: BaseException) -> str:
    """What is the same wherever the same fault shows: neither the case nor the process nor the time."""
    error = error.__cause__ if isinstance(error, AssertionError) and hasattr(error.__cause__, "cause") else error
    named = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    said = getattr(error, "cause", None) or named + _without_case(str(error))
    return CASE.sub("", said)[:CAUSE_CHARACTERS]


def _without_case(message: str) -> str:
    """The first line of a message, or what it says in lines that begin with "expected: " and "found: "."""
    lines = message.splitlines() or [""]
    return "\n".join(line for line in lines if line.startswith(SAYS)) or lines[0]


def _is_failure(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_failure(inner) for inner in error.exceptions)
    return isinstance(error, FAILURES)


def _detail(error: BaseException) -> str:
    """What was raised in a few lines: without remote tracebacks and logs, which the log files have."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(_detail(inner) for inner in error.exceptions)[:DETAIL_CHARACTERS]
    said = getattr(error, "said", None) or str(error)
    if not isinstance(error, FAILURES):
        said = f"{type(error).__name__}: {said}"
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return "\n".join([said, *notes])[:DETAIL_CHARACTERS]
