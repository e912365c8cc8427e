"""Which engines a run on GPUs plans to start, on machines of one to eight GPUs, as a fake nvidia-smi lists them."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from suite import ROOT
from suite.selftest.runs import preloaded

TRAINERS = "trainers"  # in a plan: those that see GPUs in their own way, as "CUDA_VISIBLE_DEVICES device"
PLANNING = """
import json
import os
from pathlib import Path
from suite.session import environment, needs

environment.lacks_engine = lambda kind: None
TRAINERS = "trainers"


def pytest_collection_finish(session):
    plan = {item.name: [f"{k.stage}={k.copy}" for k in needs.engines_of(item)] for item in session.items}
    plan[TRAINERS] = [" ".join(found) for item in session.items if (found := needs.trainer_of(item))]
    Path(os.environ["PLAN"]).write_text(json.dumps(plan))
"""
Planned = tuple[int, dict[str, list[str]]]


@pytest.fixture(params=[1, 2, 3, 4, 8])
def planned(request: pytest.FixtureRequest) -> Planned:
    """(the number of GPUs, {test: its engines, as stage=copy})."""
    return request.param, plan_of(request.param)


@cache
def plan_of(gpus: int) -> dict[str, list[str]]:
    listing = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}{i}{i}{i})\n" for i in range(gpus))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "planning.py").write_text(PLANNING)
        program = directory / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s' '{listing}'\n")
        program.chmod(0o755)
        env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        env["PATH"] = f"{directory}{os.pathsep}{env['PATH']}"
        env["PLAN"] = str(directory / "plan.json")
        env["PYTHONPATH"] = os.pathsep.join([str(directory), str(ROOT), env.get("PYTHONPATH", "")])
        arguments = [
            "-m", "gpu", "--collect-only", "-q", "-p", "planning", "-p", "no:cacheprovider",
            f"--report={directory / 'report'}",
        ]  # fmt: skip
        code, output = preloaded().run(ROOT, arguments, directory / "output.txt", env)
        assert code == 0, output
        return json.loads((directory / "plan.json").read_text())


def stages_of(plan: dict[str, list[str]], test: str) -> set[str]:
    return {engine for name, engines in plan.items() if name.startswith(f"{test}[") for engine in engines}


def test_every_stage_that_is_there_has_its_engines(planned: Planned):
    gpus, plan = planned
    two = {"gpu-colocate-tp1", "gpu-serve", "gpu-split", "gpu-colocate-tp2", "gpu-colocate-pp2"}
    four = {*two, "gpu-split-pp2", "gpu-split-tp2", "gpu-colocate-tp4", "gpu-colocate-pp2-tp2"}
    here = {
        1: {"gpu-colocate-tp1", "gpu-shared", "gpu-serve"},
        2: two,
        3: {*two, "gpu-split-pp2"},
        4: four,
        8: {*four, "gpu-split-pp2-tp2"},
    }[gpus]
    assert stages_of(plan, "test_exact") == {f"{stage}=0" for stage in here}


def test_sleep_at_level_2_is_judged_with_a_model_that_it_could_break(planned: Planned):
    gpus, plan = planned
    judged = {name.partition("[")[2].rstrip("]") for name in plan if name.startswith("test_level2[")}
    stage = "gpu-shared" if gpus == 1 else "gpu-split"
    for model in ("qwen3-tied-tiny", "bloom-tiny"):
        assert {f"broadcast-{stage}-{model}", f"colocate-gpu-colocate-tp1-{model}"} <= judged
    assert stages_of(plan, "test_level2") == {"gpu-colocate-tp1=0", f"{stage}=0"}


def test_experts_are_apart_where_an_engine_has_several_ranks_of_a_layer(planned: Planned):
    gpus, plan = planned
    here = {1: set(), 2: {"colocate-tp2"}, 3: {"colocate-tp2"}, 4: {"colocate-tp2", "split-tp2", "colocate-tp4"}}
    here[8] = {*here[4], "split-pp2-tp2"}
    assert stages_of(plan, "test_experts_apart") == {f"gpu-{stage}=0" for stage in here[gpus]}


def test_devices_are_told_apart_where_there_are_two(planned: Planned):
    gpus, plan = planned
    assert stages_of(plan, "test_remap") == ({"gpu-colocate-tp1=0"} if gpus > 1 else set())
    each = ["0,1 cuda:0", "0,1 cuda:1", "0,1 cuda:1", "GPU-0000,GPU-1111 cuda:1", "1,0 cuda:1"]
    assert plan[TRAINERS] == (each if gpus > 1 else [])


def test_one_trainer_feeds_as_many_engines_as_there_are_gpus_for(planned: Planned):
    gpus, plan = planned
    three, four = {"gpu-fanout": 2}, {"gpu-fanout": 2, "gpu-fanout3": 3}
    several = {1: {"gpu-shared": 2}, 2: {}, 3: three, 4: four, 8: four}[gpus]
    found = {engine for engine in stages_of(plan, "test_two_engines") if engine.partition("=")[0] in several}
    assert found == {f"{stage}={copy}" for stage, engines in several.items() for copy in range(engines)}
    assert not {engine for engine in stages_of(plan, "test_two_engines") - found if not engine.endswith("=0")}
