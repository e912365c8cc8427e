"""The catalogue is collected from the tests, complete, well formed, and cites threads in one spelling."""

import re
import sys
from pathlib import Path

import pytest

from suite.conformance import requirements
from suite.conformance.requirements import MUST, Requirement, catalogue, requirement

pytestmark = pytest.mark.selftest

# Ids are promises to whoever compares runs: one that goes missing here breaks their comparisons.
IDS = [
    "update.zeroed", "update.exact", "update.behaviour", "update.repeated", "update.tied",
    "update.untied", "update.moe", "update.order", "update.dtype", "update.trained", "update.sequence",
    "update.graphs", "update.fp8", "update.experts_apart", "fanout.two_engines", "names.free", "errors.unknown_name",
    "errors.missing_name", "errors.shape", "errors.dtype", "devices.remap", "devices.identity",
    "devices.wrong_handle", "devices.missing_handle", "cache.prefix", "sleep.level1", "sleep.level2",
    "sleep.tags", "memory.steady",
    "update.nonfinite", "errors.nested", "faults.trainer_killed", "faults.trainer_stopped", "faults.worker_killed",
    "update.sparse", "sent.mixed_dtypes", "sent.strides", "sent.large", "sent.biases",
    "sent.parameters", "sent.float32", "sent.derived", "sent.buffers",
    "inflight.update", "inflight.prefix", "inflight.refused", "inflight.versions", "server.checker",
    "lora.exact", "lora.reloaded", "draft.stale", "draft.updated", "cache.encoder",
    "sent.spread", "devices.expandable",
    "update.fp8_cache", "update.quantised", "sent.unchanged", "memory.settings",
]  # fmt: skip


def test_every_id_is_there():
    new, gone = sorted({*catalogue()} - {*IDS}), sorted({*IDS} - {*catalogue()})
    assert not new, f"expected every id in IDS, found {new} above tests only; try next: put them into IDS"
    assert not gone, f"expected every id above a test, found {gone} in IDS only"
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("clause", catalogue().values(), ids=catalogue())
def test_is_well_formed(clause: Requirement):
    assert clause.level in ("MUST", "SHOULD")
    assert clause.on in ("cpu", "gpu", "both")
    assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", clause.id)
    for sentence in (clause.text, clause.because):
        assert re.fullmatch(r"(vLLM|[A-Z])(?!.*  ).*\.", sentence), sentence
    odd = [thread for thread in clause.seen_in if not re.fullmatch(r"[A-Za-z-]+#\d+", thread)]
    assert not odd, f"expected threads like vllm#42821, found {odd}"
    assert len(set(clause.seen_in)) == len(clause.seen_in)


@pytest.mark.parametrize("clause", catalogue().values(), ids=catalogue())
def test_stands_in_the_file_of_its_family(clause: Requirement):
    family = clause.id.partition(".")[0]
    places = [
        module
        for name, module in sys.modules.items()
        if name.startswith(f"{requirements.CONFORMANCE}.test_{family}")
        for test in vars(module).values()
        if getattr(test, "requirement", None) is clause
    ]
    assert len(places) == 1, f"expected {clause.id} above one test of suite/conformance/test_{family}*.py"
    found = places[0].__doc__.partition(":")[0]
    assert f"{family}." in found, (
        f"expected {places[0].__name__} to begin with its families, as {family}.*:, not {found}"
    )


def test_a_declaration_marks_its_test():
    @requirement("a.b", MUST, text="It does.", because="It did not.", on="gpu", models=["one"])
    def judges() -> None: ...

    (mark,) = judges.pytestmark
    assert (mark.name, mark.args, mark.kwargs) == ("requirement", ("a.b",), {"models": ["one"]})
    assert judges.requirement == Requirement("a.b", "MUST", "It does.", "It did not.", (), "gpu")


DECLARES = """
from suite.conformance.requirements import MUST, requirement

@requirement("a.b", MUST, text="It does.", because="It did not.")
def test_{name}(): ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the package of conformance tests."""
    directory = tmp_path / f"declaring_{tmp_path.name.replace('-', '_')}"
    directory.mkdir()
    (directory / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(requirements, "CONFORMANCE", directory.name)
    return directory


def test_the_catalogue_is_what_the_package_declares(package: Path):
    (package / "test_one.py").write_text(DECLARES.format(name="one") + "test_again = pytest = None\n")
    assert [*catalogue.__wrapped__()] == ["a.b"]


def test_an_id_that_two_tests_declare_is_refused(package: Path):
    for name in ("one", "two"):
        (package / f"test_{name}.py").write_text(DECLARES.format(name=name))
    with pytest.raises(ValueError, match=r"test_two.test_two declares a.b, as another test does; mark one of the two"):
        catalogue.__wrapped__()
