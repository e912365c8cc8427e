"""What is wrong with an update is told in words, for every alteration that a test can ask for."""

import dataclasses

import pytest

from suite.actors.checkpoint import Alterations
from suite.driver.wrong import ALTERED, in_words

pytestmark = pytest.mark.selftest


def test_every_alteration_has_words():
    assert [*ALTERED] == [field.name for field in dataclasses.fields(Alterations)]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({}, ""),
        ({"running": {"mode": "keep"}}, ""),
        ({"alter": {"drop": ["a"]}}, " with no a"),
        ({"alter": {"cast": {"a": "int32"}}}, " with a as int32"),
        (
            {"alter": {"add": {"a": "b"}, "truncate": ["c"]}},
            " with b, which the model does not have and c of a row less",
        ),
        ({"relabel": "GPU-1"}, " with handles for device GPU-1"),
        ({"relabel": ""}, " with no handles"),
        ({"withhold": "a"}, " with no handle for a"),
        ({"call_off": True}, " with an end before it was sent"),
    ],
)
def test_what_is_wrong_is_told(how: dict, told: str):
    assert in_words(**how) == told
