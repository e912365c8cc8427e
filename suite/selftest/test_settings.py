"""What a process has set is told from what it had set before, and a generator that is seeded from one that is not."""

import os
import random
import signal

import pytest
import torch

from suite.actors.settings import changed, random_state, settings

pytestmark = pytest.mark.selftest


def test_what_stays_as_it_was_is_not_told():
    assert changed(settings(), settings()) == []


def test_a_setting_that_has_changed_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch):
    before, handler = settings(), signal.getsignal(signal.SIGUSR2)
    monkeypatch.setenv("WEIGHT_SYNC_OF_A_TEST", "1")
    monkeypatch.delenv("PATH")
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with torch.no_grad():
            found = changed(before, settings())
    finally:
        torch.set_default_dtype(torch.float32)
        signal.signal(signal.SIGUSR2, handler)
    assert len(found) == 5
    assert "torch's default dtype: torch.float32 became torch.float64" in found
    assert "torch's gradients: True became False" in found
    assert "the variable WEIGHT_SYNC_OF_A_TEST: unset became 1" in found
    assert any(sentence.endswith("became unset") for sentence in found)
    assert any(sentence.startswith("the handler of SIGUSR2") for sentence in found)
    assert "PATH" in os.environ or any(sentence.startswith("the variable PATH") for sentence in found)


@pytest.mark.parametrize("seeded", [torch.manual_seed, random.seed], ids=["torch", "Python"])
def test_a_generator_that_is_seeded_again_and_again_is_told(seeded):
    before = random_state(draw=True)
    assert random_state(draw=False) == before
    seeded(0)
    found = random_state(draw=True)
    seeded(0)
    assert random_state(draw=False) != found, "expected the number that was drawn to tell one seeding from the other"
