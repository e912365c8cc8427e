"""The command line and the markers of the suite. What the options name is read in suite.session.selection."""

import shlex

import pytest

MARKERS = (
    "cpu: judges or measures an engine on this machine's CPU",
    "gpu: judges or measures an engine on GPUs",
    "benchmark: measures; its data is verified before it is timed",
    "selftest: tests the suite itself",
    "requirement(id, models=None): the requirement that a test judges, and the models it is judged with",
    "needs(engines=choose, trainer=choose, serving=True): the engines and the trainer of a test, in place of its case's"
    " own; serving=True for an engine that answers requests while it is updated",
    "engine(**options): arguments of vllm.LLM for the engines of a test",
    "alone: judges what engines that start or end beside it would change; comes after what judges otherwise",
    "ends_engine: leaves an engine that no other test can use; comes after all that judge",
    "changes: measures updates of what has changed; of subjects that send that alone",
    "models(cpu=[...], gpu=[...]): the models that a test takes, by the kind or the name of the stage",
)
SEQUENCES, SEQUENCE_STEPS = {"cpu": 4, "gpu": 2}, 20  # of each subject and stage, by the stage's kind
# What decides how a case is judged, and what it is where nothing was said. Subject, stage and model stand in the test's
# id, but the other subjects and stages have their part: in which checkpoint an engine starts from, and in a second one.
DECIDING: dict[str, object] = {
    "--subject": [], "--extension": [], "--model": [], "--stage": [], "--waivers": None, "--sequences": None,
    "--sequence-steps": SEQUENCE_STEPS, "--play": None, "--hypothesis-seed": None,
}  # fmt: skip


def add(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("weight sync")
    group.addoption("--subject", action="append", default=[], metavar="NAME", help="examine this subject (repeatable)")
    group.addoption(
        "--extension", action="append", default=[], metavar="PKG.MODULE:CLASS",
        help="examine this worker extension class, alone or beside --subject (repeatable)",
    )  # fmt: skip
    group.addoption(
        "--model", action="append", default=[], metavar="NAME|DIR",
        help="use this model only: of the catalogue, or in a directory with a config.json or a checkpoint (repeatable)",
    )  # fmt: skip
    group.addoption("--stage", action="append", default=[], metavar="NAME", help="use this stage only (repeatable)")
    group.addoption(
        "--waivers", default=None, metavar="FILE", help="TOML file of known failures, which do not fail the run"
    )
    group.addoption(
        "--sequences", type=int, default=None, metavar="N",
        help=f"update.sequence: play so many sequences (default: {SEQUENCES['cpu']}, on GPUs {SEQUENCES['gpu']})",
    )  # fmt: skip
    group.addoption(
        "--sequence-steps", type=int, default=SEQUENCE_STEPS, metavar="N",
        help=f"update.sequence: of so many steps (default: {SEQUENCE_STEPS})",
    )  # fmt: skip
    group.addoption(
        "--play", metavar="STEPS", help="update.sequence: play this sequence, as a failure's message has it"
    )
    group.addoption(
        "--report", default=None, metavar="DIR",
        help="where the artefacts go (default: reports/latest); write --report=DIR, since pytest takes an existing"
        " directory that stands alone for one of tests",
    )  # fmt: skip


def repeating(item: pytest.Item) -> str:
    """The command that judges this case again, with the options of this run that decide how."""
    config = item.config
    words = ["pytest", *(["-m", config.option.markexpr] if config.option.markexpr else []), item.nodeid]
    for option, unset in DECIDING.items():
        if (given := config.getoption(option, unset)) != unset:
            words += [f"{option}={value}" for value in (given if isinstance(given, list) else [given])]
    return shlex.join(words)
