"""The catalogue is complete, well formed, and cites threads in one spelling."""

import re

import pytest

from suite.requirements import _ALL, REQUIREMENTS

pytestmark = pytest.mark.selftest

# Ids are promises to whoever compares runs: one that goes missing here breaks their comparisons.
IDS = [
    "update.zeroed", "update.exact", "update.behaviour", "update.repeated", "update.tied",
    "update.untied", "update.moe", "update.order", "update.dtype", "update.trained", "update.sequence",
    "update.graphs", "update.fp8", "fanout.two_engines", "names.free", "errors.unknown_name",
    "errors.missing_name", "errors.shape", "errors.dtype", "devices.remap", "devices.identity",
    "devices.wrong_handle", "cache.prefix", "sleep.level1", "sleep.level2", "memory.steady",
    "update.nonfinite", "errors.nested", "faults.trainer_killed", "faults.trainer_stopped", "faults.worker_killed",
]  # fmt: skip


def test_every_id_is_there_once():
    assert sorted(requirement.id for requirement in _ALL) == sorted(IDS)


@pytest.mark.parametrize("requirement", REQUIREMENTS.values(), ids=REQUIREMENTS)
def test_is_well_formed(requirement):
    assert requirement.level in ("MUST", "SHOULD")
    assert requirement.kind in ("cpu", "gpu", "both")
    assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", requirement.id)
    for sentence in (requirement.text, requirement.reason):
        assert re.fullmatch(r"(vLLM|[A-Z])(?!.*  ).*\.", sentence), sentence
    odd = [thread for thread in requirement.threads if not re.fullmatch(r"[A-Za-z-]+#\d+", thread)]
    assert not odd, f"expected threads like vllm#42821, found {odd}"
    assert len(set(requirement.threads)) == len(requirement.threads)
