"""A subject that costs a process in every update is given up, one that works now and then is not."""

import pytest

from suite.driver.patience import LOST_S, NEVER_WELL, ONCE_WELL, GivenUp, Patience
from suite.session.verdicts import FAIL, judge

CAUSE = "DeadlineExceeded: update()"


@pytest.fixture
def patience() -> Patience:
    return Patience()


def lose(patience: Patience, count: int, subject: str = "stuck", elapsed_s: float = 1.0) -> None:
    for _ in range(count):
        patience.lost(subject, elapsed_s, CAUSE)


def test_one_that_never_had_a_good_update_is_given_up_soon(patience: Patience):
    lose(patience, NEVER_WELL - 1)
    patience.expect_hope("stuck")
    patience.lost("stuck", 1.0, "another cause")
    with pytest.raises(GivenUp, match="it has never had a good one") as given_up:
        patience.expect_hope("stuck")
    assert given_up.value.cause == CAUSE, "expected the first cause"


def test_given_up_is_a_fail_wherever_it_shows():
    for phase in ("setup", "call"):
        judgement = judge(phase, GivenUp("not tried", CAUSE))
        assert (judgement.verdict, judgement.cause) == (FAIL, CAUSE)


def test_a_long_wait_is_enough(patience: Patience):
    lose(patience, 1, elapsed_s=LOST_S)
    with pytest.raises(GivenUp):
        patience.expect_hope("stuck")


def test_one_that_had_a_good_update_gets_more_tries_and_begins_anew_with_every_good_one(patience: Patience):
    patience.succeeded("stuck")
    lose(patience, ONCE_WELL - 1, elapsed_s=LOST_S)
    patience.expect_hope("stuck")
    patience.succeeded("stuck")
    lose(patience, ONCE_WELL - 1)
    patience.expect_hope("stuck")
    lose(patience, 1)
    with pytest.raises(GivenUp, match="since its last good one"):
        patience.expect_hope("stuck")


def test_subjects_do_not_pay_for_each_other(patience: Patience):
    lose(patience, 10)
    patience.expect_hope("another")
