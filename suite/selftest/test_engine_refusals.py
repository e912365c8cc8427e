"""A refusal of one rank is one of the whole engine: what other ranks have begun is given up."""

from types import SimpleNamespace
from typing import Any

import pytest

from suite.actors import engine as module
from suite.actors.engine import Engine


class Said:
    """The engine's side of a dialogue with a trainer that announces and then hears what the engine says."""

    def __init__(self, links: list[Any], deadline_s: float) -> None:
        self.refused: list[str] = []

    def announced(self) -> list[dict]:
        return [{"manifest": []}]

    def refuse(self, error: Exception) -> None:
        self.refused.append(str(error))


@pytest.mark.parametrize(("ranks", "bracket", "given_up"), [(2, True, 1), (1, True, 0), (2, False, 0)])
def test_where_a_rank_refuses_the_others_give_up(
    monkeypatch: pytest.MonkeyPatch, ranks: int, bracket: bool, given_up: int
):
    aborted: list[str] = []

    def refusing(manifest: list[dict]) -> list[dict]:
        raise ValueError("rank 1: no such name")

    monkeypatch.setattr(module, "EngineSide", Said)
    engine = Engine.__new__(Engine)
    engine._links, engine.devices = [], [{}] * ranks
    engine._half = SimpleNamespace(receive=refusing, begin=refusing, abort=lambda: aborted.append("all ranks"))
    with pytest.raises(ValueError, match="rank 1: no such name"):
        engine.update(1.0, bracket=bracket)
    assert len(aborted) == given_up


def test_what_can_not_be_given_up_is_told_beside_the_refusal(monkeypatch: pytest.MonkeyPatch):
    def raising(*_: object) -> None:
        raise ValueError("no such name")

    monkeypatch.setattr(module, "EngineSide", Said)
    engine = Engine.__new__(Engine)
    engine._links, engine.devices = [], [{}, {}]
    engine._half = SimpleNamespace(receive=lambda announced: [], begin=raising, abort=raising)
    with pytest.raises(ValueError, match="no such name") as caught:
        engine.update(1.0)
    assert caught.value.__notes__ == ["nor could the update be aborted: ValueError: no such name"]
