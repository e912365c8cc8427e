"""What may be said in an update, by whom and when, and what a side makes of what may not."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator

import pytest

from suite.actors import dialogue
from suite.actors.dialogue import ENGINE_SAYS, TRAINER_SAYS, EngineSide, Line, TrainerSide
from suite.actors.link import Link, LinkError
from suite.processes.blame import SuiteFault

DEADLINE_S, SHORT_S = 20.0, 0.2
STATES = [*TRAINER_SAYS]
WORDS = [*dict.fromkeys(itertools.chain(*TRAINER_SAYS.values(), *ENGINE_SAYS.values()))]
CARRIED = {dialogue.ANNOUNCE: {"manifest": []}, dialogue.REFUSED: "why", dialogue.FAILED: "why"}


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    """(the trainer's end, the engine's end)."""
    ours, theirs = socket.socketpair()
    yield Link(ours, "the engine"), Link(theirs, "the trainer")
    for end in (ours, theirs):
        with contextlib.suppress(OSError):
            end.close()


@pytest.fixture
def sides(links: tuple[Link, Link]) -> tuple[TrainerSide, EngineSide]:
    return TrainerSide(links[:1], DEADLINE_S), EngineSide([links[1]], DEADLINE_S)


def test_both_tables_have_the_same_states_and_nothing_is_said_after_the_end():
    assert set(TRAINER_SAYS) == set(ENGINE_SAYS)
    for table in (TRAINER_SAYS, ENGINE_SAYS):
        assert table["over"] == {}
        assert {state for after in table.values() for state in after.values()} <= set(STATES)


def test_an_update_from_its_announcement_to_its_end(sides: tuple[TrainerSide, EngineSide], links: tuple[Link, Link]):
    trainer, engine = sides
    trainer.begin()
    trainer.lines[0].say(dialogue.ANNOUNCE, DEADLINE_S, {"manifest": [1]})
    assert engine.announced() == [{"manifest": [1]}]
    links[0].send({dialogue.GO: True}, DEADLINE_S)
    engine.expect_go()
    assert trainer.lines[0].hear(DEADLINE_S) == (dialogue.READY, True)
    trainer.lines[0].state = "moving"
    engine.ended()
    assert trainer.lines[0].hear(DEADLINE_S) == (dialogue.ENDED, True)
    assert trainer.lines[0].state == "over"


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("state", STATES)
def test_what_the_table_does_not_have_is_neither_said_nor_heard(links: tuple[Link, Link], state: str, word: str):
    for link, peer, says, hears in ((*links, TRAINER_SAYS, ENGINE_SAYS), (*links[::-1], ENGINE_SAYS, TRAINER_SAYS)):
        speaking, hearing = Line(link, says, hears), Line(peer, hears, says)
        speaking.state = hearing.state = state
        if word in says[state]:
            speaking.say(word, DEADLINE_S, CARRIED.get(word, True))
            assert hearing.hear(DEADLINE_S) == (word, CARRIED.get(word, True))
            assert hearing.state == speaking.state == says[state][word]
            continue
        with pytest.raises(KeyError):
            speaking.say(word, DEADLINE_S, CARRIED.get(word, True))
        link.send({word: CARRIED.get(word, True)}, DEADLINE_S)
        with pytest.raises(LinkError, match="expected one of"):
            hearing.hear(DEADLINE_S)
        assert hearing.state == state


@pytest.mark.parametrize(
    "message", [{}, {"announce": []}, {"announce": True}, {"failed": True}, {"failed": "why", "announce": {}}]
)
def test_what_is_malformed_is_not_heard(links: tuple[Link, Link], message: dict):
    links[0].send({dialogue.BEGUN: True}, DEADLINE_S)
    links[0].send(message, DEADLINE_S)
    with pytest.raises(LinkError, match="the trainer sent"):
        EngineSide([links[1]], DEADLINE_S).announced()


def test_a_side_that_has_heard_that_it_is_over_says_no_more(
    sides: tuple[TrainerSide, EngineSide], links: tuple[Link, Link]
):
    trainer, engine = sides
    trainer.begin()
    trainer.lines[0].say(dialogue.ANNOUNCE, DEADLINE_S, {})
    engine.announced()
    trainer.failed(ValueError("no memory"))
    with pytest.raises(dialogue.TrainersHalfFailed, match="ValueError: no memory"):
        engine.expect_go()
    assert links[0].receive(DEADLINE_S) == {dialogue.READY: True}
    engine.refuse(ValueError("too late"))
    with pytest.raises(LinkError, match="sent nothing"):
        links[0].receive(SHORT_S)


def test_refusals_and_announcements_may_cross(sides: tuple[TrainerSide, EngineSide]):
    trainer, engine = sides
    engine.refuse(TimeoutError("nothing came"))
    trainer.begin()
    assert trainer.announce({}) == ["the suite's own fault: TimeoutError: nothing came"]
    trainer.decide(go=False)
    assert trainer.lines[0].state == "over"


def test_a_trainer_that_is_silent_before_it_calls_the_subject_is_the_suites_fault(links: tuple[Link, Link]):
    with pytest.raises(SuiteFault, match="the subject was not called in time"):
        EngineSide([links[1]], SHORT_S).announced()


def test_a_trainer_that_is_silent_once_it_has_called_the_subject_is_the_subjects_fault(links: tuple[Link, Link]):
    TrainerSide(links[:1], DEADLINE_S).begin()
    with pytest.raises(dialogue.NotAnnounced, match=r"was called and announced nothing for 0\.2 s"):
        EngineSide([links[1]], SHORT_S).announced()


def test_a_subject_that_was_called_at_the_last_moment_is_not_blamed(links: tuple[Link, Link]):
    threading.Timer(0.7, TrainerSide(links[:1], DEADLINE_S).begin).start()
    with pytest.raises(SuiteFault, match=r"called 0\.\d s before the deadline"):
        EngineSide([links[1]], 1.0).announced()


def test_an_engine_that_ends_the_dialogue_while_it_is_told_of_a_failure_is_no_error(
    sides: tuple[TrainerSide, EngineSide],
):
    trainer, _ = sides
    line = trainer.lines[0]
    line.may_say, line.state = lambda what: True, "over"  # as seen a moment ago
    trainer.failed(ValueError("no memory"))
