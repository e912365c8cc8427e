"""Trainers get the environment of their stage, and ports are free and stay so."""

import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest

from suite import trainers
from suite.stages import Stage
from suite.trainers import PORTS, TrainerGroup, free_port

SHARED = Stage(
    "gpu-shared", "gpu", 1, 1, True, ("GPU-1",) * 2, ("GPU-1",), ("3", "3"), ("3",), engines=2, hosts_apart=True
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict, dict]]:
    """(name, arguments, environment) of every process."""
    found: list[tuple[str, dict, dict]] = []

    def launch(run: object, name: str, target: str, arguments: dict, env: dict, deadline_s: float) -> SimpleNamespace:
        assert target == "suite.trainer:Trainer"
        found.append((name, arguments, env))
        return SimpleNamespace(submit=lambda method: None)

    monkeypatch.setattr(trainers, "launch", launch)
    return found


def test_a_trainer_that_shares_its_gpu_passes_for_a_host_of_its_own(launched: list):
    TrainerGroup.of_stage(None, "doomed", SHARED)
    [(name, arguments, env)] = launched
    assert (name, arguments["device"]) == ("doomed-gpu-shared-rank0", "cuda")
    assert (env["CUDA_VISIBLE_DEVICES"], env["NCCL_HOSTID"], env["NCCL_NET"]) == ("3", "trainer-0", "Socket")


def test_ranks_see_a_gpu_each_and_nothing_of_other_hosts(launched: list):
    TrainerGroup.of_stage(None, "trainer", replace(SHARED, hosts_apart=False, trainer_visible=("0", "1")), 2)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, _, env in launched] == ["0", "1"]
    assert len({arguments["master_port"] for _, arguments, _ in launched}) == 1
    assert not any("NCCL_HOSTID" in env for _, _, env in launched)


def test_a_port_is_free_and_outside_of_what_the_system_hands_out():
    for port in {free_port() for _ in range(50)}:
        assert PORTS[0] <= port < PORTS[1]
        with socket.create_server((trainers.ADDRESS, port)):
            pass


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server((trainers.ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(trainers, "PORTS", (port, port + 1))
        with pytest.raises(OSError, match=f"no port of {port}"):
            free_port()
