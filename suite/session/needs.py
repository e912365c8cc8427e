"""Which engines and trainers a collected test needs, so that they can be started ahead.

A test that takes `sync`, `sharded` or `spread` needs one engine, and one that takes `fanout` needs several. Another
says it by a marker: `@pytest.mark.needs(engines=choose)`, where choose(key, params) returns the engines in place of
the case's own.
With `serving=True` its engine answers requests while it is updated; subjects whose engines start alike share one. So
do the engines of a stage with servers.
With `trainer=choose` it needs one that sees GPUs in its own way: choose(params) returns what Trainers.seeing takes.
"""

from dataclasses import replace

import pytest

from suite.driver.engines import EngineKey, seed_of
from suite.models import MODELS
from suite.session.items import params_of
from suite.session.selection import Selection
from suite.session.state import selection_of
from suite.stages import Stage
from suite.subjects import Subject


def engines_of(item: pytest.Item) -> list[EngineKey]:
    """The engines that a collected test updates."""
    params, selection = params_of(item), selection_of(item.config)
    subject, stage, model = (params.get(name) for name in ("subject", "stage", "model"))
    if not isinstance(stage, Stage) or not isinstance(subject, Subject) or model is None:
        return []
    if subject.unfit(stage):
        return []
    names, options = set(item.fixturenames), item.get_closest_marker("engine")
    seed = None if MODELS[model].purpose == "published" else seed_of(index_of(subject, selection))
    given = tuple(sorted(options.kwargs.items())) if options else ()
    key = EngineKey(model, stage.name, subject.host or subject.name, seed, given)
    needs = item.get_closest_marker("needs")
    if stage.server or (needs and needs.kwargs.get("serving")):
        return [_serving(key, subject, stage, selection)]
    if needs:
        return needs.kwargs["engines"](key, params)
    if "fanout" in names:
        return _several(key, stage, subject, selection)
    return [key] if names & {"sync", "sharded", "spread"} else []


def trainer_of(item: pytest.Item) -> tuple[str | None, str] | None:
    """What `Trainers.seeing` is to be asked for by a collected test; None where it takes a trainer of its stage."""
    needs = item.get_closest_marker("needs")
    choose = needs.kwargs.get("trainer") if needs else None
    return choose(params_of(item)) if choose and engines_of(item) else None


def index_of(subject: Subject, selection: Selection) -> int:
    """The place of a subject among those that are examined: of its host's where it is examined on another's engines."""
    return list(selection.subjects).index(subject.host or subject.name)


def _serving(key: EngineKey, subject: Subject, stage: Stage, selection: Selection) -> EngineKey:
    """The first examined subject's whose engines start as this one's do. A subject with a host has its host's."""

    def starts(other: Subject) -> tuple[dict, dict]:
        return other.engine_arguments(), other.engine_environment()

    alike = (
        o for o in selection.subjects.values() if not o.host and not o.unfit(stage) and starts(o) == starts(subject)
    )
    owner = next(alike, None)
    if owner is None:
        return replace(key, serves=True)
    seed = None if key.seed is None else seed_of(index_of(owner, selection))
    return replace(key, subject=owner.name, seed=seed, serves=True)


def _several(key: EngineKey, stage: Stage, subject: Subject, selection: Selection) -> list[EngineKey]:
    """All engines of a stage that has several. On GPUs a stage of one has no room for more.

    On CPUs there is room for a second. It is of another stage's tensor-parallel size, where the subject has such a one.
    """
    if stage.engines > 1 or stage.kind == "gpu":
        return [replace(key, copy=copy) for copy in range(stage.engines)]
    size = stage.tensor_parallel_size
    others = [s for s in selection.stages.values() if s.kind == "cpu" and s.tensor_parallel_size != size]
    for other in others:
        if not subject.unfit(other) and not other.server:
            return [key, replace(key, stage=other.name)]
    return [key, replace(key, copy=1)]
