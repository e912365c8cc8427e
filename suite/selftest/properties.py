"""How many examples property tests try."""

from hypothesis import settings


def examples(times: float, **more: object) -> settings:
    """`times` as many examples as the profile has (conftest.py), for tests that need more than others or cost more."""
    return settings(max_examples=max(1, round(settings.default.max_examples * times)), **more)
