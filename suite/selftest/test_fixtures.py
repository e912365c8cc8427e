"""What tests are given, and that it is taken back: runs of pytest with a pool that only notes what it is told."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from suite import fixtures
from suite.processes.call import DeadlineExceeded
from suite.selftest.runs import CONFTEST, ONE_CASE, examine
from suite.session import ending, needs
from suite.session.selection import Selection
from suite.stages import STAGES, Stage
from suite.subjects import SUBJECTS
from suite.subjects.registry import NAMED

NOTING = (
    CONFTEST
    + """
from suite import fixtures


def name(test):
    return test.partition("::")[2].partition("[")[0]


class Noting:
    def __init__(self, *args):
        pass

    def plan(self, needs, references):
        print("planned for", *map(name, needs))

    def done(self, test):
        print("done with", name(test))

    def close(self):
        pass


fixtures.Pool = Noting
"""
)
ENDINGS = """
@judged()
def test_passes(subject, stage, model, pool):
    pass

@judged()
def test_fails(subject, stage, model):
    assert False

@judged()
def test_has_no_setup(subject, stage, model, failing_setup):
    pass

@judged()
def test_does_not_apply(subject, stage, model):
    verdicts.not_applicable("for a reason")

@judged()
def test_ends_badly(subject, stage, model, broken_teardown):
    pass
"""


def done_with(output: str) -> list[str]:
    return [line.rpartition(" ")[2] for line in output.splitlines() if "done with" in line]


def test_a_test_is_done_with_its_engines_however_it_ends(tmp_path: Path):
    finished = examine(tmp_path, ENDINGS, *ONE_CASE, "-s", conftest=NOTING)
    tests = ["test_passes", "test_fails", "test_has_no_setup", "test_does_not_apply", "test_ends_badly"]
    assert done_with(finished.output) == tests


MIXED = """
@judged()
def test_unsupported_first(subject, stage, model, pool):
    pass

@judged("update.zeroed")
def test_supported(subject, stage, model, pool):
    pass

@judged()
def test_unsupported(subject, stage, model, pool):
    pass
"""


def test_what_its_subject_does_not_support_needs_no_engine_once_it_has_ended(tmp_path: Path):
    finished = examine(tmp_path, MIXED, "--subject=lacking", "--stage=cpu-tp1", "-s", conftest=NOTING)
    assert [*finished.verdicts.values()] == ["unsupported", "pass", "unsupported"]
    assert "planned for test_supported test_unsupported\n" in finished.output
    assert done_with(finished.output) == ["test_supported", "test_unsupported"]


SEEING = """
class Trainers:
    def __init__(self, launcher, ahead):
        pass

    def start_seeing(self, visible, device):
        print("started to see", visible, device)

    def close(self):
        pass

fixtures.Trainers = Trainers

def own_engines(key, params):
    return [key] if params["visible"] else []

def own_trainer(params):
    return params["visible"], "cuda:1"
"""
SEEN = """
from conftest import own_engines, own_trainer

@judged()
def test_takes_the_stages(subject, stage, model, trainers):
    pass

@pytest.mark.needs(engines=own_engines, trainer=own_trainer)
@pytest.mark.parametrize("visible", ["1,0", "", "0"])
@judged()
def test_takes_its_own(subject, stage, model, visible, trainers):
    pass
"""


def test_trainers_that_see_gpus_in_their_own_way_start_with_the_others(tmp_path: Path):
    finished = examine(tmp_path, SEEN, *ONE_CASE, "-s", conftest=NOTING + SEEING)
    assert set(finished.verdicts.values()) == {"pass"}
    lines = [line.rpartition("started to see ")[2] for line in finished.output.splitlines() if "started to see" in line]
    assert lines == ["1,0 cuda:1", "0 cuda:1"], "expected one for each test that has engines, before the first needs it"


@pytest.mark.parametrize("told", [[], ["SIGTERM"]], ids=["goes on", "ends"])
def test_a_run_that_was_told_to_end_waits_for_no_process_and_starts_none(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
):
    def hang(*_: object, **__: object) -> None:
        did.append("asked")
        raise DeadlineExceeded("no answer", SimpleNamespace(name="it", log_path="", tail=lambda: ""), "generate()")

    did, hanging = [], SimpleNamespace(name="it", call=hang)
    trainer = SimpleNamespace(processes=[hanging], stop=lambda: did.append("trainer stopped"))
    pool = SimpleNamespace(
        announce=lambda _: None, done=lambda _: did.append("done"), discard=lambda _: did.append("engine replaced")
    )
    monkeypatch.setattr(ending, "_heard", told)
    sync = SimpleNamespace(pool=pool, trainer=trainer, engines=[SimpleNamespace(process=hanging)])
    fixtures._take_back(sync, "test_it", host=None)
    assert did == ([] if told else ["asked", "trainer stopped", "asked", "done", "engine replaced"])


def test_an_engine_that_does_not_take_a_subjects_extension_is_replaced():
    def refuse(subject: object) -> None:
        raise RuntimeError("it hangs")

    discarded, engine = [], SimpleNamespace(become=refuse)
    with pytest.raises(RuntimeError, match="it hangs"):
        fixtures._become(SimpleNamespace(discard=discarded.append), [engine], SUBJECTS["broadcast"])
    assert discarded == [engine]


def test_what_a_subject_has_left_of_its_hosts_engine_is_charged_to_the_subject(monkeypatch: pytest.MonkeyPatch):
    charged, became, host = [], [], SUBJECTS["broadcast"]

    class Spoilt:
        seed = 0

        def __init__(self, *arguments: object) -> None:
            charged.append(arguments[3])

        def load(self, seed: int) -> None:
            raise RuntimeError("the engine does not update any more")

    monkeypatch.setattr(fixtures, "Sync", Spoilt)
    pool = SimpleNamespace(announce=lambda text: None)
    sync = SimpleNamespace(pool=pool, trainer=None, subject=SimpleNamespace(name="mutant"), stage=None, model="")
    engine = SimpleNamespace(become=became.append, process=SimpleNamespace(name="engine"))
    assert not fixtures._given_back(sync, engine, host)
    assert became == [host], "expected the host's own extension"
    assert [(subject.name, subject.extension) for subject in charged] == [("mutant", host.extension)]


def test_an_engine_is_given_back_that_answers_right_with_either_checkpoint(monkeypatch: pytest.MonkeyPatch):
    did = []

    class Given:
        seed = 0

        def __init__(self, *arguments: object) -> None: ...

        def __getattr__(self, step: str) -> Callable[..., None]:
            return lambda *arguments: did.append(step)

    monkeypatch.setattr(fixtures, "Sync", Given)
    sync = SimpleNamespace(pool=None, trainer=None, subject=SimpleNamespace(name="mutant"), stage=None, model="")
    assert fixtures._given_back(sync, SimpleNamespace(become=lambda host: None), SUBJECTS["broadcast"])
    assert did.count("expect_same_behaviour") == 2
    assert (did.count("update"), did.count("expect_exact"), did.count("expect_own_answers")) == (2, 1, 1)


@pytest.mark.parametrize(
    ("others", "second"),
    [
        ((), ("cpu-tp1", 1)),
        ((("cpu-many", 1),), ("cpu-tp1", 1)),
        ((("cpu-many", 1), ("cpu-tp2", 2)), ("cpu-tp2", 0)),
        ((("gpu-split", 2),), ("cpu-tp1", 1)),
        ((("cpu-unfit", 2),), ("cpu-tp1", 1)),
        ((("cpu-serve", 2),), ("cpu-tp1", 1)),
    ],
)
def test_the_second_engine_is_of_another_tensor_parallel_size_where_its_subject_has_one(
    monkeypatch: pytest.MonkeyPatch, others: tuple[tuple[str, int], ...], second: tuple[str, int]
):
    stages = {
        name: Stage(name, name[:3], size, 1, True, server=name == "cpu-serve")
        for name, size in (("cpu-tp1", 1), *others)
    }
    subject = SUBJECTS["colocate"]
    monkeypatch.setattr(type(subject), "unfit", lambda _, stage: "unfit" if stage.name == "cpu-unfit" else "")
    params = {"subject": subject, "stage": stages["cpu-tp1"], "model": "qwen3-tied-tiny"}
    item = SimpleNamespace(
        callspec=SimpleNamespace(params=params), fixturenames=["fanout"], config=None, get_closest_marker=lambda _: None
    )
    monkeypatch.setattr(needs, "selection_of", lambda _: Selection({subject.name: subject}, stages))
    assert [(key.stage, key.copy) for key in needs.engines_of(item)] == [("cpu-tp1", 0), second]


@pytest.mark.parametrize("stage", [known for known in STAGES if known.engines > 1], ids=lambda known: known.name)
def test_all_engines_of_a_stage_are_fed(monkeypatch: pytest.MonkeyPatch, stage: Stage):
    subject = SUBJECTS["broadcast"]
    params = {"subject": subject, "stage": stage, "model": "qwen3-tied-tiny"}
    item = SimpleNamespace(
        callspec=SimpleNamespace(params=params), fixturenames=["fanout"], config=None, get_closest_marker=lambda _: None
    )
    others = {known.name: known for known in STAGES}
    monkeypatch.setattr(needs, "selection_of", lambda _: Selection({subject.name: subject}, others))
    found = [(key.stage, key.copy) for key in needs.engines_of(item)]
    assert found == [(stage.name, copy) for copy in range(stage.engines)]


@pytest.mark.parametrize(
    ("name", "examined", "owned_by", "target"),
    [
        ("broadcast", ["broadcast", "colocate"], "broadcast", 1),
        ("colocate", ["broadcast", "colocate"], "broadcast", 1),  # of its own it would have 0, which is the server's
        ("colocate", ["colocate"], "colocate", 1),
        ("native-gloo", ["broadcast", "native-gloo"], "native-gloo", 0),
    ],
)
def test_subjects_share_a_server_and_update_to_what_it_has_not_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str, examined: list[str], owned_by: str, target: int
):
    stage = Stage("cpu-serve", "cpu", 1, 1, True, server=True)
    every = SUBJECTS | NAMED
    item = SimpleNamespace(
        callspec=SimpleNamespace(params={"subject": every[name], "stage": stage, "model": "qwen3-tied-tiny"}),
        fixturenames=["sync"], config=None, get_closest_marker=lambda _: None,
    )  # fmt: skip
    monkeypatch.setattr(needs, "selection_of", lambda _: Selection({o: every[o] for o in examined}, {}))
    (key,) = needs.engines_of(item)
    assert (key.subject, key.serves) == (owned_by, True)
    request = SimpleNamespace(node=item, config=None)
    assert fixtures.target.__wrapped__(every[name], stage, request) == target == 1 - key.seed
