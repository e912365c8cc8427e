"""A user's class becomes a subject by the methods that it has, or is refused with what is missing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from suite import ROOT
from suite.subjects import SUBJECTS, TRANSPORT_METHODS, load, subject_from

MODULE = """
import functools

class Broadcasting:
    def init_weight_update_group(self): ...
    def update_weight(self): ...
    def check_weights_changed(self): ...

class Handing:
    def report_device_id(self): ...
    def update_weights_from_ipc_handles(self): ...
    def check_weights_changed(self): ...

class Inheriting(Broadcasting):
    pass

class Sending(Broadcasting):
    weight_sync_sender = "ws_theirs:Sender"

class Both(Broadcasting, Handing):
    pass

class Partial:
    def update_weight(self): ...
    def check_weights_changed(self): ...

class Attributes:
    init_weight_update_group = update_weight = check_weights_changed = "text"

class Strict:
    def __init__(self):
        raise AssertionError("vLLM never makes an object of it, and neither may the suite")
    def init_weight_update_group(self): ...
    def update_weight(self): ...
    def check_weights_changed(self): ...

def function(): ...
instance = Broadcasting()
made = functools.partial(Broadcasting)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules of a user's own: theirs, and some that can't be imported."""
    for name, text in {
        "theirs": MODULE,
        "syntax": "class Broken(:",
        "raising": "raise RuntimeError('no GPU here')",
        "lacking": "import no_such_module_of_theirs",
        "asserting": "assert False",
    }.items():
        (tmp_path / f"ws_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("ws_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_reference_subjects_have_what_their_transport_needs(name: str):
    subject = SUBJECTS[name]
    assert subject.name == name
    assert subject.lacks == {}
    found = subject_from(subject.extension)
    assert dataclasses.replace(found, name=name) == subject
    assert all(callable(getattr(subject.load(), method)) for method in TRANSPORT_METHODS[subject.transport])


@pytest.mark.parametrize(
    ("name", "transport"),
    [
        ("Broadcasting", "broadcast"), ("Handing", "handles"), ("Inheriting", "broadcast"), ("Both", "broadcast"),
        ("Strict", "broadcast"),
    ],
)  # fmt: skip
def test_a_users_class_becomes_a_subject(modules: Path, name: str, transport: str):
    subject = subject_from(f"ws_theirs:{name}")
    assert (subject.name, subject.extension, subject.transport) == (name, f"ws_theirs:{name}", transport)
    assert subject.load().__name__ == name


@pytest.mark.parametrize("name", ["Partial", "Attributes"])
def test_a_class_without_the_methods_is_told_which_there_would_be(modules: Path, name: str):
    with pytest.raises(ValueError, match=f"ws_theirs:{name} has the methods of no known transport") as caught:
        subject_from(f"ws_theirs:{name}")
    for methods in TRANSPORT_METHODS.values():
        assert ", ".join(methods) in str(caught.value)


@pytest.mark.parametrize("name", ["function", "instance", "made", "functools"])
def test_what_is_no_class_is_refused(modules: Path, name: str):
    with pytest.raises(ValueError, match=f"ws_theirs:{name} is a [a-zA-Z]+, not a class"):
        subject_from(f"ws_theirs:{name}")


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        ("", "Empty module name"),
        (":", "Empty module name"),
        (":Broadcasting", "Empty module name"),
        ("ws_theirs", "no attribute ''"),
        ("ws_theirs:", "no attribute ''"),
        ("ws_theirs.Broadcasting", "No module named 'ws_theirs.Broadcasting'"),
        ("ws_theirs:Missing", "no attribute 'Missing'"),
        ("ws_theirs:Broadcasting:more", "no attribute 'Broadcasting:more'"),
        ("ws_missing:Class", "No module named 'ws_missing'"),
        ("ws_theirs.sub:Class", "is not a package"),
        (".ws_theirs:Class", "relative import"),
        ("..:Class", "relative import"),
        ("ws_theirs.py:Class", "is not a package"),
        ("/tmp/ws_theirs:Class", "No module named"),
        ("ws theirs:Class", "No module named"),
        ("ws_syntax:Class", "SyntaxError"),
        ("ws_raising:Class", "RuntimeError: no GPU here"),
        ("ws_lacking:Class", "No module named 'no_such_module_of_theirs'"),
        ("ws_asserting:Class", "AssertionError"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(modules: Path, extension: str, said: str):
    with pytest.raises(ValueError, match=r"^expected an extension as pkg\.module:Class, found ") as caught:
        load(extension)
    assert said in str(caught.value)
    assert repr(extension) in str(caught.value)


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        ("ws_raising:Class", "expected an extension as pkg.module:Class, found 'ws_raising:Class'"),
        (".ws_theirs:Class", "expected an extension as pkg.module:Class"),
        ("ws_theirs:Partial", "has the methods of no known transport"),
    ],
)
def test_a_wrong_extension_is_an_error_of_usage_not_a_traceback(modules: Path, extension: str, said: str):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    ended = subprocess.run(
        [*command, f"--extension={extension}"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(modules)}, check=False,
    )  # fmt: skip
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--extension {extension}: " in ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_module_beside_the_user_is_found(modules: Path):
    """As with `python -m pytest`, also where pytest is started by its own name."""
    script = Path(sys.executable).with_name("pytest")
    command = [str(script) if script.exists() else "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    ended = subprocess.run(
        [*command, *options, "--extension=ws_theirs:Broadcasting", str(ROOT / "suite" / "conformance")],
        cwd=modules, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), ended.stdout + ended.stderr


def test_a_sender_of_its_own_is_taken_from_the_class(modules: Path):
    assert subject_from("ws_theirs:Sending").sender == "ws_theirs:Sender"
    assert subject_from("ws_theirs:Broadcasting").sender == ""
