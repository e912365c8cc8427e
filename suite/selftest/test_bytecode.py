"""Bytecode that is compiled before processes start."""

import os
import sys
from pathlib import Path

import pytest

from suite.processes import bytecode


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `compiled_ahead` with one module that cannot be compiled."""
    found = tmp_path / "compiled_ahead"
    (found / "inner").mkdir(parents=True)
    for name in ("__init__.py", "one.py", "inner/two.py"):
        (found / name).write_text("raise RuntimeError('imported')\n")
    (found / "broken.py").write_text("this is no Python\n")
    monkeypatch.syspath_prepend(tmp_path)
    return found


def test_packages_are_compiled_and_not_imported(package: Path):
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(package.parent / "bytecode")}
    assert bytecode.compile_packages(["compiled_ahead", "of_no_such_name"], env) == ""
    written = (package.parent / "bytecode" / package.relative_to("/")).rglob("*.pyc")
    tag = sys.implementation.cache_tag
    assert {path.name for path in written} == {f"{name}.{tag}.pyc" for name in ("__init__", "one", "two")}
    assert not list(package.rglob("*.pyc")), "the environment said where bytecode goes"


def test_what_takes_too_long_is_ended_and_said(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bytecode, "DEADLINE_S", 0.01)
    assert bytecode.compile_packages(["compiled_ahead"], dict(os.environ)) == "was not compiled within 0.01 s"


def test_nothing_is_compiled_where_it_could_not_be_written(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    said = bytecode.compile_packages(["compiled_ahead"], {})
    assert said == "can't be compiled ahead: nothing may be written beside the sources"
