"""names.*: an extension can be added to vLLM's worker at all."""

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.pool import Pool
from suite.driver.trainers import Trainers
from suite.processes.launcher import Launcher
from suite.subjects import Subject

IMPORT_DEADLINE_S = 120.0


@pytest.fixture(scope="session")
def worker_names(launcher: Launcher, pool: Pool, trainers: Trainers) -> list[str]:
    """Every attribute of the installed vLLM's worker classes, asked of a process that has no extension in it.

    Pool and trainers are asked for so that engines and trainers start meanwhile.
    """
    with pool.timeline("starting", "worker names"):
        process = launcher.start(
            "worker-names",
            "suite.actors.worker_names:WorkerNames",
            {},
            {"CUDA_VISIBLE_DEVICES": ""},
            IMPORT_DEADLINE_S,
        )
        names = process.ready(IMPORT_DEADLINE_S)["names"]
    process.stop()
    return names


@requirement(
    "names.free",
    MUST,
    text="No public name of the extension is one that the installed vLLM's Worker has.",
    because="vLLM mixes the extension into its worker and refuses to start where names collide; each release takes new "
    "ones.",
)
def test_free(subject: Subject, worker_names: list[str]) -> None:
    if len(worker_names) <= 20:
        raise RuntimeError(f"expected the names of vLLM's worker, found {worker_names}")
    own = {name for name in dir(subject.load()) if not name.startswith("__")}
    taken = sorted(own & set(worker_names))
    found = f"{', '.join(taken)}: rename them, since vLLM refuses to start with names that its worker has"
    expect(not taken, "names that vLLM's worker does not have", found, f"[subject={subject.name}]")
