"""Which subjects, stages and models a run examines, and the cases that follow for each test."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from suite import models, stages
from suite.conformance.requirements import Requirement, catalogue
from suite.models import own
from suite.session import environment, waivers
from suite.session.waivers import Case, Ledger
from suite.stages import Stage, hardware
from suite.subjects import SUBJECTS, Subject, known_subjects, subject_from

KINDS = ("cpu", "gpu")
NOTHING = object()
Models = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class MissingStage:
    """A stage that this machine cannot hold."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """What the command line asks for and this machine can hold.

    subjects, stages: by name. missing: the stages that cannot be held, of the kinds that were asked for.
    models: names given by --model; empty for all. everywhere: all stages, asked for or not, held or not.
    """

    subjects: dict[str, Subject]
    stages: dict[str, Stage]
    missing: dict[str, MissingStage] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    everywhere: tuple[Stage | MissingStage, ...] = ()

    @property
    def every_subject(self) -> tuple[str, ...]:
        """The names of all subjects that there are, asked for or not."""
        return tuple(dict.fromkeys([*known_subjects(), *self.subjects]))


def select(config: pytest.Config) -> Selection:
    """Read the options. Raises pytest.UsageError for a name that does not exist."""
    available, missing = all_stages()
    everywhere = (*available.values(), *missing.values())
    names = config.getoption("stage")
    _expect_known("--stage", names, [*available, *missing])
    chosen = tuple(_model(name, config.invocation_params.dir) for name in config.getoption("model"))
    if names:
        available = {name: stage for name, stage in available.items() if name in names}
        missing = {name: stage for name, stage in missing.items() if name in names}
    asked = [kind for kind in KINDS if re.search(rf"\b{kind}\b", config.getoption("markexpr"))]
    if available and not names:  # where nothing can be held, the reasons are all there is to say
        missing = {name: stage for name, stage in missing.items() if stage.kind in asked}
    return Selection(subjects(config), available, missing, chosen, everywhere)


def _model(given: str, directory: Path) -> str:
    """The name of a model of the catalogue, or of a user's in a directory, which joins the catalogue for this run."""
    if given in models.MODELS:
        return given
    path = directory / given
    if not path.is_dir():
        _expect_known(
            "--model", [given], ["a directory with a config.json (there is none of this name)", *models.MODELS]
        )
    try:
        spec = own.spec_of(path)
    except own.UnknownModel as error:
        raise pytest.UsageError(f"--model {given}: {error}") from error
    if spec.name in models.MODELS:
        spec = replace(spec, name=f"own-{spec.name}")
    models.MODELS[spec.name] = spec
    return spec.name


def ledger(config: pytest.Config, selected: Selection) -> Ledger | None:
    """The waivers of --waivers that apply to this vLLM and device. Raises pytest.UsageError for an unusable file."""
    given, (_, version) = config.getoption("waivers"), environment.vllm()
    if given is None:
        return None
    try:
        found = waivers.read(config.invocation_params.dir / given)
        here = [waiver for waiver in found if version and waiver.applies(version, environment.device_names())]
    except ValueError as error:
        raise pytest.UsageError(f"--waivers {error}") from error
    in_part = ("update.sequence",) if config.getoption("play") else ()
    return Ledger(here, given, len(found), selected.every_subject, _takes_every_test(config), in_part)


def _takes_every_test(config: pytest.Config) -> bool:
    """Whether the run collects every test. pytest reports what -k and -m leave out, not what paths and --lf do."""
    source, sources = config.args_source, pytest.Config.ArgsSource
    above = source == sources.INVOCATION_DIR and config.invocation_params.dir == config.rootpath
    options = (config.getoption(name, None) for name in ("ignore", "ignore_glob", "lf"))
    return (source == sources.TESTPATHS or above) and not any(options)


def subjects(config: pytest.Config) -> dict[str, Subject]:
    """The subjects of --subject and --extension; the reference subjects where neither is given."""
    names, extensions = config.getoption("subject"), config.getoption("extension")
    try:
        known = known_subjects()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    _expect_known("--subject", names, known)
    found = {name: known[name] for name in names or ([] if extensions else SUBJECTS)}
    for subject in found.values():
        if missing := subject.missing():
            raise pytest.UsageError(f"--subject {subject.name}: {missing}")
    if extensions:
        sys.path.append(os.getcwd())  # where `pytest`, unlike `python -m pytest`, does not look
    for extension in extensions:
        try:
            subject = subject_from(extension)
        except ValueError as error:
            raise pytest.UsageError(f"--extension {extension}: {error}") from error
        if subject.name in found:
            raise pytest.UsageError(f"--extension {extension}: there is a subject {subject.name} already")
        found[subject.name] = subject
    for subject in found.values():
        if subject.host and subject.host not in found:
            host = f"is examined on the engines of {subject.host}"
            raise pytest.UsageError(f"{subject.name} {host}, which is not chosen: add --subject={subject.host}")
    return found


def requirement_of(definition: pytest.Item) -> Requirement | None:
    """The requirement that a test judges, by its marker."""
    marker = definition.get_closest_marker("requirement")
    if marker is None:
        return None
    if len(marker.args) != 1 or marker.args[0] not in catalogue():
        raise pytest.UsageError(f"{definition.nodeid}: expected the id of a requirement, found {marker.args}")
    return catalogue()[marker.args[0]]


def parametrize(metafunc: pytest.Metafunc, selection: Selection) -> None:
    """Give a test that judges or measures its cases: subjects x stages x models, as far as it takes them.

    Where nothing of what was asked for concerns it, its only case is NOTHING, which is not to be run.
    """
    names = [name for name in ("subject", "stage", "model") if name in metafunc.fixturenames]
    if names:
        nothing = pytest.param(*(NOTHING for _ in names), id="nothing")
        metafunc.parametrize(names, [*_cases(metafunc.definition, names, selection)] or [nothing], scope="session")


def _cases(definition: pytest.Item, names: list[str], selection: Selection) -> Iterator[object]:
    stages_taken = _stages(definition, names, (*selection.stages.values(), *selection.missing.values()))
    wanted = _models(definition) if "model" in names else ()
    for stage in stages_taken:
        chosen = [None] if isinstance(stage, MissingStage) or "model" not in names else _of_kind(wanted, stage)
        if models.TIED in chosen:  # a test that takes any model
            chosen = [*chosen, *(name for name in selection.models if models.MODELS[name].layout is not None)]
        for subject in selection.subjects.values() if "subject" in names else [None]:
            for model in dict.fromkeys(_model_for(subject, definition, model) for model in chosen):
                if model in (None, *(selection.models or models.MODELS)):
                    yield _case(names, {"subject": subject, "stage": stage, "model": model})


def _model_for(subject: Subject | None, definition: pytest.Item, model: str | None) -> str | None:
    """The model that a subject's case takes for one that the test names; empty where it has no such case."""
    if subject is not None and definition.get_closest_marker("changes") and not subject.compares:
        return ""
    if not model or subject is None:
        return model
    requirement = requirement_of(definition)
    return subject.model_for(requirement.id if requirement else "", model)


def possible(metafunc: pytest.Metafunc, selection: Selection) -> Iterator[tuple[Case, bool]]:
    """Every case that a test which judges could have, whatever was asked for, and whether this machine can hold it."""
    requirement, names = requirement_of(metafunc.definition), metafunc.fixturenames
    if requirement is None:
        return
    wanted = _models(metafunc.definition) if "model" in names else ()
    known = known_subjects() | selection.subjects
    for stage in _stages(metafunc.definition, names, selection.everywhere):
        for named in _of_kind(wanted, stage) if "model" in names else [""]:
            for subject in selection.every_subject if "subject" in names else [""]:
                model = _model_for(known.get(subject), metafunc.definition, named)
                case = Case(requirement.id, subject, stage.name if stage else "", model)
                yield case, not isinstance(stage, MissingStage)


def _stages(
    definition: pytest.Item, names: Sequence[str], among: Iterable[Stage | MissingStage]
) -> list[Stage | MissingStage | None]:
    """The stages on which a test can judge or measure; None alone where it takes no stage."""
    requirement = requirement_of(definition)
    kinds = KINDS if requirement is None or requirement.on == "both" else (requirement.on,)
    judged = requirement.id if requirement else ""
    there = [stage for stage in among if stage.kind in kinds and stages.takes(stage.name, judged)]
    return there if "stage" in names else [None]


def _case(names: list[str], values: dict[str, object]) -> object:
    parts = [getattr(values[name], "name", values[name]) for name in names]
    marks = [getattr(pytest.mark, values["stage"].kind)] if values["stage"] else []
    return pytest.param(*(values[name] for name in names), id="-".join(filter(None, parts)), marks=marks)


def _models(definition: pytest.Item) -> Models:
    """The models that a test's marker names: one list, or lists by kind or name of the stage."""
    requirement, by_kind = definition.get_closest_marker("requirement"), definition.get_closest_marker("models")
    wanted = (requirement and requirement.kwargs.get("models")) or (by_kind and by_kind.kwargs)
    if not wanted:
        raise pytest.UsageError(f"{definition.nodeid} takes a model and names none: requirement(..., models=[...])")
    _expect_known(f"{definition.nodeid}: models=", _of_kind(wanted, None), models.MODELS)
    if isinstance(wanted, Mapping):
        known = [*KINDS, *(stage.name for stage in stages.STAGES)]
        _expect_known(f"{definition.nodeid}: models= for stages", [*wanted], known)
    return wanted


def models_of(definition: pytest.Item, stage: Stage | MissingStage) -> list[str]:
    """The models of the catalogue that a test names for a stage, and a user's own where it takes any."""
    requirement = requirement_of(definition)
    if requirement and requirement.on not in ("both", stage.kind):
        return []
    named = [*_of_kind(_models(definition), stage)]
    own_ones = [name for name, spec in models.MODELS.items() if spec.layout is not None]
    return [*named, *own_ones] if models.TIED in named else named


def _of_kind(wanted: Models, stage: Stage | None) -> Sequence[str]:
    if isinstance(wanted, Mapping):
        return (
            wanted.get(stage.name, wanted.get(stage.kind, ()))
            if stage
            else [name for names in wanted.values() for name in names]
        )
    return wanted


def all_stages() -> tuple[dict[str, Stage], dict[str, MissingStage]]:
    """Every stage: those that this machine can hold with the installed vLLM, and those that it cannot."""
    machine = hardware.machine()
    available, missing = {}, {}
    for stage in stages.available_stages(machine):
        reason = environment.lacks_engine(stage.kind)
        if reason is None:
            available[stage.name] = stage
        else:
            missing[stage.name] = MissingStage(stage.name, stage.kind, reason)
    for name, reason in stages.unavailable(machine).items():
        kind = name.partition("-")[0]
        missing[name] = MissingStage(name, kind, environment.lacks_engine(kind) or reason)
    return available, missing


def _expect_known(option: str, names: Sequence[str], known: Sequence[str] | Mapping[str, object]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise pytest.UsageError(f"{option} {unknown[0]}: expected one of {', '.join(known)}")
