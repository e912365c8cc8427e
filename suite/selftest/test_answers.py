"""An engine's answers are a cold engine's, bit by bit, or as near as that one is to itself."""

from pathlib import Path

import pytest

from suite.actors import answers

TOKENS, LOGPROBS = [5, 6, 7], [-0.5, -1.0, -1.5]


def said(**change: list) -> dict:
    return {"tokens": TOKENS, "logprobs": LOGPROBS} | change


def cold(tmp_path: Path, second: dict) -> answers.Cold:
    path = str(tmp_path / "oracles" / "one")
    answers.write(path, [said(), said()], [said(), second])
    return answers.read([path])


def test_prompts_reach_the_longest_position_and_are_the_same_always():
    found = answers.prompts(64, 512)
    assert [len(prompt) for prompt in found] == [12, 100, 300, 512 - answers.TOKENS]
    assert found == answers.prompts(64, 512)
    assert {*range(64)} == {token for prompt in found for token in prompt}
    assert [len(prompt) for prompt in answers.prompts(64, 256)] == [12, 100, 256 - answers.TOKENS]


def test_an_engine_that_answers_alike_twice_leaves_no_tolerance(tmp_path: Path):
    exact = cold(tmp_path, said())
    assert exact.is_exact
    assert answers.differing([said(), said()], exact) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": [5, 9, 7]}, "prompt 1: expected tokens [5, 6, 7], found [5, 9, 7]"),
        ({"logprobs": [-0.5, -1.0000001, -1.5]}, "prompt 1: log-probabilities 1e-07 apart"),
        ({"logprobs": [-0.5, float("nan"), -1.5]}, "prompt 1: log-probabilities inf apart"),
    ],
)
def test_what_is_not_the_cold_engines_is_told(tmp_path: Path, change: dict, sentence: str):
    assert answers.differing([said(), said(**change)], cold(tmp_path, said())) == [sentence]


def test_how_far_a_cold_engine_is_from_itself_is_the_tolerance(tmp_path: Path):
    drifting = cold(tmp_path, said(logprobs=[-0.5, -1.25, -1.5]))
    assert (drifting.apart, drifting.is_exact) == (0.25, False)
    assert answers.differing([said(logprobs=[-0.75, -1.0, -1.5]), said()], drifting) == []
    assert answers.differing([said(logprobs=[-0.76, -1.0, -1.5]), said()], drifting) != []


def test_how_far_cold_engines_are_from_each_other_is_the_tolerance(tmp_path: Path):
    for name, logprobs in (("one", [-0.5, -1.0, -1.5]), ("other", [-0.5, -1.0, -1.75])):
        answers.write(str(tmp_path / name), [said(logprobs=logprobs)], [said(logprobs=logprobs)])
    both = answers.read([str(tmp_path / "one"), str(tmp_path / "other")])
    assert (both.apart, both.is_exact, answers.read([str(tmp_path / "other")]).is_exact) == (0.25, False, True)
    assert answers.differing([said(logprobs=[-0.5, -1.25, -1.5])], both) == []
    assert answers.differing([said(logprobs=[-0.5, -1.26, -1.5])], both) != []


def test_where_a_cold_engine_chose_otherwise_itself_nothing_is_asked(tmp_path: Path):
    unsure = cold(tmp_path, said(tokens=[5, 6, 8]))
    assert unsure.steady == [3, 2]
    assert not unsure.is_exact
    assert answers.differing([said(), said(tokens=[5, 6, 1])], unsure) == []
    assert answers.differing([said(), said(tokens=[5, 1, 7])], unsure) != []
    assert answers.differing([said(tokens=[5, 6, 1]), said()], unsure) != []
