"""What tests are given, and that it is taken back: runs of pytest with a pool that only notes what it is told."""

from pathlib import Path

from suite.selftest.test_plugin import CONFTEST, ONE_CASE, examine

NOTING = (
    CONFTEST
    + """
from suite import fixtures

pytest_plugins += ["suite.fixtures"]


def name(test):
    return test.partition("::")[2].partition("[")[0]


class Noting:
    def __init__(self, *args):
        pass

    def plan(self, needs, references):
        print("planned for", *map(name, needs))

    def done(self, test):
        print("done with", name(test))

    def close(self):
        pass


fixtures.Pool = Noting
"""
)
ENDINGS = """
@judged()
def test_passes(subject, stage, model, pool):
    pass

@judged()
def test_fails(subject, stage, model):
    assert False

@judged()
def test_has_no_setup(subject, stage, model, failing_setup):
    pass

@judged()
def test_does_not_apply(subject, stage, model):
    verdicts.not_applicable("for a reason")

@judged()
def test_ends_badly(subject, stage, model, broken_teardown):
    pass
"""


def done_with(output: str) -> list[str]:
    return [line.rpartition(" ")[2] for line in output.splitlines() if "done with" in line]


def test_a_test_is_done_with_its_engines_however_it_ends(tmp_path: Path):
    finished = examine(tmp_path, ENDINGS, *ONE_CASE, "-s", conftest=NOTING)
    tests = ["test_passes", "test_fails", "test_has_no_setup", "test_does_not_apply", "test_ends_badly"]
    assert done_with(finished.output) == tests


MIXED = """
@judged()
def test_unsupported_first(subject, stage, model, pool):
    pass

@judged("update.zeroed")
def test_supported(subject, stage, model, pool):
    pass

@judged()
def test_unsupported(subject, stage, model, pool):
    pass
"""


def test_what_its_subject_does_not_support_needs_no_engine_once_it_has_ended(tmp_path: Path):
    finished = examine(tmp_path, MIXED, "--subject=lacking", "--stage=cpu-tp1", "-s", conftest=NOTING)
    assert [*finished.verdicts.values()] == ["unsupported", "pass", "unsupported"]
    assert "planned for test_supported test_unsupported\n" in finished.output
    assert done_with(finished.output) == ["test_supported", "test_unsupported"]
