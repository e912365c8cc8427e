"""Sequences are read, played, counted and shrunk as they should be, with a player that has no engine."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.sequences.player import STEPS, Sequence, Step, parse, text
from suite.sequences.trial import PLAYED_CHARACTERS, Trial, shrink
from suite.session.verdicts import DETAIL_CHARACTERS

pytestmark = pytest.mark.selftest

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text("ab' ;()\\\n=\"é"))
STEP = st.builds(Step, st.sampled_from(STEPS), st.dictionaries(st.sampled_from(["seed", "how", "name"]), LEAVES))
START = Step("update", {"seed": 0})
GENERATE, NESTED, CALLED_OFF, RESET = (Step(name) for name in ("generate", "nested", "called_off", "reset_cache"))


class Player:
    """As suite.sequences.player.Player: `fails` says of the steps since the last update whether the last one fails."""

    start = START

    def __init__(self, fails=lambda steps: False, error=AssertionError, recovers=True) -> None:
        self.fails, self.error, self.recovers = fails, error, recovers
        self.steps, self.counts = 0, Counter()
        self.taken: list[Step] = []

    def take(self, step: Step) -> None:
        self.steps += 1
        self.taken.append(step)
        if self.fails(self.taken):
            raise self.error(f"{step} is wrong")
        self.counts[step.name] += 1

    def recover(self) -> None:
        if not self.recovers:
            raise RuntimeError("stuck")
        self.taken = [START]


def played(player: Player, *sequences: Sequence, budget_s: float = 60) -> Trial:
    trial = Trial(player, budget_s)
    for sequence in sequences:
        trial.begin()
        for step in sequence:
            trial.take(step)
    return trial


def nested_then_reset(steps: list[Step]) -> bool:
    """Hidden state: what was nested breaks a later reset, whatever comes between."""
    return steps[-1] == RESET and NESTED in steps


@given(st.lists(STEP, min_size=1, max_size=5))
def test_a_sequence_is_read_as_it_was_written(steps):
    assert parse(text(tuple(steps))) == tuple(steps)


@pytest.mark.parametrize(
    "line", ["", "x", "update(", "update(1)", "unknown()", "update(seed=f())", "update(**{})", "a.b()"]
)
def test_what_is_no_sequence_is_refused(line):
    with pytest.raises(ValueError, match="expected"):
        parse(line)


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_shrinking_leaves_what_fails_and_nothing_that_could_go(letters):
    def fails(steps):
        ends = [i for i, step in enumerate(steps) if step == "b" and "a" in steps[:i]]
        return steps[: ends[0] + 1] if ends else None

    found = fails(tuple(letters))
    if found is not None:
        assert shrink(fails, found) == ("a", "b")


def test_what_passes_is_counted():
    trial = played(Player(), (GENERATE, NESTED), (GENERATE,))
    assert trial.failure(60) is None
    assert trial.counts() == {"sequences": 2, "left out": 0, "steps": 5, "generate": 2, "nested": 1, "update": 2}
    assert str(trial) == "2 sequences of 5 steps in all, passed"
    assert str(played(Player(), ())) == "1 sequence of 1 step in all, passed"


def test_no_sequence_begins_after_the_time_is_over_and_that_is_said():
    player = Player()
    trial = played(player, (GENERATE,), budget_s=-1)
    assert player.taken == []
    assert trial.counts() == {"sequences": 0, "left out": 1, "steps": 0}
    assert "1 more left out since the time was over" in str(trial)


def test_a_failure_comes_with_the_shortest_sequence_and_ends_the_trial(capsys):
    long = (GENERATE, CALLED_OFF, NESTED, GENERATE, GENERATE, CALLED_OFF, RESET, GENERATE)
    player = Player(nested_then_reset)
    trial = played(player, (GENERATE,), long, (GENERATE,))
    assert player.taken[-1] == RESET, "expected no step after the one that failed"
    message = str(trial.failure(60))
    assert message.startswith("reset_cache() is wrong\nafter: update(seed=0); nested(); reset_cache()\n")
    assert "it failed first after 8 steps of sequence 2" in message
    assert text((START, *long[:-1])) in capsys.readouterr().out, "expected the sequence as it was found, too"
    assert "failed" in str(trial)


def test_a_start_that_fails_is_told_with_what_came_before():
    player = Player(lambda steps: steps[-1] == START and NESTED in steps)
    trial = played(player, (NESTED, GENERATE), (GENERATE,))
    assert "after: update(seed=0); nested(); update(seed=0)\n" in str(trial.failure(60))


def test_a_failure_that_does_not_come_again_says_so():
    player = Player(nested_then_reset)
    trial = played(player, (NESTED, RESET))
    player.fails = lambda steps: False
    message = str(trial.failure(60))
    assert "after: update(seed=0); nested(); reset_cache()\n" in message
    assert "played again 3 times, it passed: what the engine had seen before counts" in message


def test_what_fails_by_turns_is_played_until_it_fails_again():
    turns = itertools.count()
    player = Player(lambda steps: steps[-1] == RESET and next(turns) % 2 == 0)
    message = str(played(player, (NESTED, RESET)).failure(60))
    assert (
        "after: update(seed=0); reset_cache()\n" in message
        or "after: update(seed=0); nested(); reset_cache()" in message
    )
    assert "tried" in message


def test_an_engine_that_cannot_be_brought_back_ends_the_shrinking():
    player = Player(nested_then_reset, recovers=False)
    message = str(played(player, (GENERATE, NESTED, RESET)).failure(60))
    assert "after: update(seed=0); generate(); nested(); reset_cache()\n" in message
    assert "the engine could not be brought back: stuck" in message


def test_shrinking_has_a_deadline():
    message = str(played(Player(nested_then_reset), (GENERATE, NESTED, RESET)).failure(-1))
    assert "after: update(seed=0); generate(); nested(); reset_cache()\n" in message
    assert "before the time was over" in message


def test_what_the_suite_itself_cannot_tell_is_no_failure():
    error = played(Player(nested_then_reset, RuntimeError), (NESTED, RESET)).failure(60)
    assert type(error) is RuntimeError


def test_a_message_is_bounded_and_keeps_the_last_steps():
    player = Player(lambda steps: steps.count(GENERATE) == 500)
    message = str(played(player, (GENERATE,) * 500).failure(-1))
    assert len(message) < DETAIL_CHARACTERS
    assert "generate(); generate()\n" in message
    assert len(message) > PLAYED_CHARACTERS
