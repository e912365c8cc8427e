"""Whether a collected test takes each subject, stage and model that the command line names."""

import re
from collections.abc import Iterator, Sequence

import pytest

from suite.session import selection
from suite.session.items import examines, names_of, params_of
from suite.session.needs import engines_of
from suite.session.selection import MissingStage, Selection
from suite.stages import Stage

NAMED = 6  # takers that a message names
BY_WORDS = "mark"  # pytest's own plugin for -k and -m


def expect_taken(
    config: pytest.Config, chosen: Selection, items: Sequence[pytest.Item], left: Sequence[pytest.Item]
) -> None:
    """Raise pytest.UsageError for the first value that none of these tests takes.

    items: all that were collected. left: those that -k and -m leave, whatever options like --lf and other plugins leave
    of them. Of what none of those takes, a value is refused where they take another of its kind: it would be dropped in
    silence. Where the command line names single tests, nothing is expected: a case repeats with all options of its run.
    """
    examining = [item for item in items if examines(item)]
    if not examining or any("::" in argument for argument in config.args):
        return
    asked = _kinds_asked(config.getoption("markexpr"))
    left = [item for item in left if examines(item)]
    taken = {value for item in examining if _kind(item) in (None, *asked) for value in _taken(item)} if left else set()
    of_left = _of_left(chosen, left)
    kinds = {option for option, _ in of_left}
    for option, value, given in _given(config, chosen):
        if (option, value) not in taken or (option in kinds and (option, value) not in of_left):
            takers = [_called(item) for item in examining if (option, value) in _could_take(item, chosen)]
            raise pytest.UsageError(_message(config, given, option, [*dict.fromkeys(takers)]))


def left_by_words(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """Leave out what -k and -m leave out, before anything else leaves out more; a copy of what is left.

    It is done by pytest itself, which finds nothing more to leave out when its turn comes.
    """
    others = [plugin for name, plugin in config.pluginmanager.list_name_plugin() if name != BY_WORDS and plugin]
    hook = config.pluginmanager.subset_hook_caller("pytest_collection_modifyitems", others)
    hook(session=session, config=config, items=items)
    return [*items]


def _of_left(chosen: Selection, left: Sequence[pytest.Item]) -> set[tuple[str, str]]:
    """What the tests that are left take.

    A subject is taken, too, where another one's cases are judged on its engines; so is a stage that lends an engine to
    a case of another.
    """
    taken = {value for item in left for value in _taken(item)}
    hosts = {subject.host for name, subject in chosen.subjects.items() if ("subject", name) in taken}
    lent = {("stage", key.stage) for item in left for key in engines_of(item)}
    return taken | lent | {("subject", host) for host in hosts}


def _given(config: pytest.Config, chosen: Selection) -> Iterator[tuple[str, str, str]]:
    """(what it is, its name, how the command line has it) of every value that was given."""
    for given, name in zip(config.getoption("model"), chosen.models, strict=True):
        yield "model", name, f"--model={given}"
    for name in config.getoption("stage"):
        yield "stage", name, f"--stage={name}"
    for name in config.getoption("subject"):
        yield "subject", name, f"--subject={name}"
    for given in config.getoption("extension"):
        yield "subject", given.rpartition(":")[2], f"--extension={given}"


def _kinds_asked(markers: str) -> tuple[str, ...]:
    asked = tuple(kind for kind in selection.KINDS if re.search(rf"\b{kind}\b", markers))
    return asked if asked and "not " not in markers else selection.KINDS


def _kind(item: pytest.Item) -> str | None:
    return getattr(params_of(item).get("stage"), "kind", None)


def _taken(item: pytest.Item) -> set[tuple[str, str]]:
    """What a test takes. On a stage that the machine cannot hold it has no model, and would take those it names."""
    taken = {(what, name) for what, name in names_of(item).items() if name}
    if isinstance(stage := params_of(item).get("stage"), MissingStage) and "model" in item.fixturenames:
        taken |= {("model", model) for model in selection.models_of(item, stage)}
    return taken


def _could_take(item: pytest.Item, chosen: Selection) -> set[tuple[str, str]]:
    """What a test takes on any stage, whether it was asked for or not."""
    stages: list[Stage | MissingStage] = [*chosen.everywhere] if "model" in item.fixturenames else []
    return _taken(item) | {("model", model) for stage in stages for model in selection.models_of(item, stage)}


def _called(item: pytest.Item) -> str:
    requirement = selection.requirement_of(item)
    return requirement.id if requirement else item.originalname


def _message(config: pytest.Config, given: str, option: str, takers: list[str]) -> str:
    narrowing = {"-k": config.option.keyword, "-m": config.option.markexpr}
    narrowed = " and ".join(f"{short} {said!r}" for short, said in narrowing.items() if said)
    more = f" and {len(takers) - NAMED} more" if len(takers) > NAMED else ""
    by = f"It is taken by {', '.join(takers[:NAMED])}{more}" if takers else "None of the collected tests names it"
    by_path = config.args_source == pytest.Config.ArgsSource.ARGS
    tries = [f"leave out {narrowed}"] if narrowed and takers else []
    tries += ["name no path of tests"] if by_path and not takers else []
    tries += ["put it into models= above a test"] if option == "model" and not takers else []
    return (
        f"{given}: expected a test that takes this {option}, found none{narrowed and f' with {narrowed}'}. {by}."
        f" Try: {' or '.join([*tries, f'choose another {option}'])}."
    )
