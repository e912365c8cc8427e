"""Stages follow from the devices that this process may use, and every stage that does not has its reason."""

import os

import pytest

from suite.conformance.requirements import catalogue
from suite.stages import STAGES, Stage, available_stages, hardware, takes, unavailable
from suite.stages.hardware import Device, Machine, parse_listing, visible_devices

pytestmark = pytest.mark.selftest

LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa2222-0000-0000-0000-000000000000)
"""
SLICED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
  MIG 3g.40gb     Device  0: (UUID: MIG-bbbb1111-0000-0000-0000-000000000000)
  MIG 1g.10gb     Device  1: (UUID: MIG-bbbb2222-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa2222-0000-0000-0000-000000000000)
"""
GPU0, GPU1 = parse_listing(LISTING)


def machine_of(gpus: int, cores: int = 2, note: str = "") -> Machine:
    return Machine(tuple(Device(f"GPU-{i}", "H100", i) for i in range(gpus)), cores, note)


def uuid_of(name: str) -> str:
    """What `machine_of` calls the GPU of an ordinal."""
    return f"GPU-{int(name)}"


ON_CPU = ["cpu-tp1", "cpu-tp2", "cpu-pp2", "cpu-fanout", "cpu-serve", "cpu-dp2"]
ON_TWO = ["gpu-colocate-tp1", "gpu-serve", "gpu-split", "gpu-colocate-tp2", "gpu-colocate-pp2"]
ON_THREE = [*ON_TWO, "gpu-fanout", "gpu-split-pp2"]
ON_FOUR = [*ON_THREE, "gpu-fanout3", "gpu-split-tp2", "gpu-colocate-tp4", "gpu-colocate-pp2-tp2"]


@pytest.mark.parametrize(
    ("gpus", "held"),
    [
        (0, []),
        (1, ["gpu-colocate-tp1", "gpu-shared", "gpu-serve"]),
        (2, ON_TWO),
        (3, ON_THREE),
        (4, ON_FOUR),
        (5, [*ON_FOUR, "gpu-split-pp2-tp2"]),
        (8, [*ON_FOUR, "gpu-split-pp2-tp2"]),
    ],
)
def test_stages_by_the_number_of_gpus(gpus: int, held: list[str]):
    machine, held = machine_of(gpus), [*ON_CPU, *held]
    assert sorted(stage.name for stage in available_stages(machine)) == sorted(held)
    assert set(unavailable(machine)) == {stage.name for stage in STAGES} - set(held)


@pytest.mark.parametrize(
    ("name", "trainer", "engines"),
    [
        ("gpu-colocate-pp2", "01", ["01"]),
        ("gpu-split-pp2", "0", ["12"]),
        ("gpu-fanout", "0", ["1", "2"]),
        ("gpu-fanout3", "0", ["1", "2", "3"]),
        ("gpu-split-tp2", "01", ["23"]),
        ("gpu-colocate-tp4", "0123", ["0123"]),
        ("gpu-colocate-pp2-tp2", "0123", ["0123"]),
        ("gpu-split-pp2-tp2", "0", ["1234"]),
    ],
)
def test_which_gpus_a_stage_of_several_takes(name: str, trainer: str, engines: list[str]):
    for gpus in (5, 8):
        (stage,) = (stage for stage in available_stages(machine_of(gpus)) if stage.name == name)
        assert stage.trainer_devices == tuple(f"GPU-{i}" for i in trainer)
        assert [stage.devices_of_engine(i) for i in range(stage.engines)] == [
            tuple(f"GPU-{i}" for i in devices) for devices in engines
        ]
        assert [stage.visible_to_engine(i) for i in range(stage.engines)] == [",".join(devices) for devices in engines]
        assert [*stage.trainer_visible] == [*trainer]


def test_smaller_stages_come_first():
    """The largest engines start while others are in use, and a run that is ended early has judged most."""
    on_gpus = [stage.gpus for stage in STAGES if stage.kind == "gpu"]
    assert on_gpus == sorted(on_gpus)


@pytest.mark.parametrize(
    ("requirement", "on_servers", "elsewhere"),
    [
        ("update.exact", True, True),
        ("update.order", False, True),
        ("errors.shape", True, True),
        ("inflight.update", True, True),
        ("server.checker", True, False),
        ("", False, True),  # what measures
    ],
)
def test_servers_are_asked_for_what_they_may_answer_otherwise(requirement: str, on_servers: bool, elsewhere: bool):
    assert takes("cpu-serve", requirement) is on_servers
    assert [takes(stage, requirement) for stage in ("cpu-tp1", "gpu-split", "cpu-other")] == [elsewhere] * 3


@pytest.mark.parametrize(
    ("stage", "requirement", "judged"),
    [
        ("cpu-fanout", "fanout.two_engines", True),
        ("gpu-fanout3", "fanout.two_engines", True),
        ("gpu-fanout3", "update.exact", False),
        ("gpu-fanout3", "", True),  # what measures
        ("gpu-shared", "update.exact", True),  # on one GPU nothing else judges broadcasts
        ("cpu-pp2", "update.exact", True),
        ("cpu-pp2", "update.order", False),
        ("gpu-split-pp2", "update.order", True),
        ("cpu-dp2", "update.exact", True),
        ("cpu-dp2", "update.order", False),
    ],
)
def test_what_stages_are_asked_for_that_would_judge_the_same_again(stage: str, requirement: str, judged: bool):
    assert takes(stage, requirement) is judged


def test_every_family_that_a_stage_is_asked_for_is_there():
    for stage in STAGES:
        for named in stage.judged:
            assert any(requirement.startswith(named) for requirement in catalogue()), (stage.name, named)


def test_replicas_are_ranks_of_one_engine():
    (replicas,) = [stage for stage in STAGES if stage.name == "cpu-dp2"]
    (alone,) = [stage for stage in STAGES if stage.name == "cpu-tp1"]
    assert (replicas.engine_ranks, replicas.places) == (2, 2)
    assert replicas.layout != alone.layout


def test_on_one_gpu_nccl_takes_every_process_for_a_host():
    held = {stage.name: stage for stage in available_stages(machine_of(1))}
    shared, colocated = held["gpu-shared"], held["gpu-colocate-tp1"]
    assert shared.trainer_devices == ("GPU-0",)
    assert [shared.devices_of_engine(engine) for engine in (0, 1)] == [("GPU-0",), ("GPU-0",)]
    assert [shared.visible_to_engine(engine) for engine in (0, 1)] == ["0", "0"]
    hosts = {shared.nccl_environment(process)["NCCL_HOSTID"] for process in ("trainer-0", "engine-0", "engine-1")}
    assert len(hosts) == 3
    assert shared.nccl_environment("trainer-0")["NCCL_NET"] == "Socket"
    assert colocated.nccl_environment("trainer-0") == {}
    assert "CUDA_VISIBLE_DEVICES=0" in unavailable(machine_of(2))["gpu-shared"]
    assert unavailable(machine_of(0))["gpu-shared"] == "needs 1 whole GPU, found 0"


def test_every_rank_has_a_device_and_only_colocated_ones_share():
    for stage in available_stages(machine_of(8)):
        if stage.kind == "cpu":
            assert stage.engine_devices == stage.trainer_devices == ()
            continue
        assert len(stage.trainer_devices) == stage.trainer_world_size
        assert len(set(stage.engine_devices)) == stage.engines * stage.engine_ranks
        assert len({*stage.trainer_devices, *stage.engine_devices}) == stage.gpus
        shared = set(stage.trainer_devices) & set(stage.engine_devices)
        assert shared == (set(stage.trainer_devices) if stage.colocated else set())
        of_engines = [device for i in range(stage.engines) for device in stage.devices_of_engine(i)]
        assert tuple(of_engines) == stage.engine_devices
        of_engines = [name for i in range(stage.engines) for name in stage.visible_to_engine(i).split(",")]
        assert [uuid_of(name) for name in of_engines] == [*stage.engine_devices]
        assert [uuid_of(name) for name in stage.trainer_visible] == [*stage.trainer_devices]


def test_reasons_say_what_is_needed_what_is_there_and_why():
    reasons = unavailable(machine_of(1, cores=1, note="CUDA_VISIBLE_DEVICES='1' shows 1 of the 2 devices"))
    assert (
        reasons["cpu-tp2"] == "needs 2 CPU cores, one for the engine's and the trainer's rank; this process may use 1"
    )
    assert reasons["gpu-split"] == ("needs 2 whole GPUs, found 1 (CUDA_VISIBLE_DEVICES='1' shows 1 of the 2 devices)")


@pytest.mark.parametrize(
    ("colocated", "needed"), [(True, "3 CPU cores, one for the engine's and"), (False, "5 CPU cores, one for each")]
)
def test_a_cpu_stage_needs_cores_for_the_trainers_ranks(monkeypatch, colocated, needed):
    stage = Stage("cpu-dp3", "cpu", tensor_parallel_size=2, trainer_world_size=3, colocated=colocated)
    monkeypatch.setattr("suite.stages.STAGES", (stage,))
    assert unavailable(machine_of(0, cores=2))["cpu-dp3"].startswith(f"needs {needed}")
    assert unavailable(machine_of(0, cores=5)) == {}


def test_slices_hold_a_stage_of_one_device():
    machine = Machine(tuple(parse_listing(SLICED)), 2)
    held = {stage.name: stage for stage in available_stages(machine)}
    assert held["gpu-colocate-tp1"].engine_devices == ("MIG-bbbb1111-0000-0000-0000-000000000000",)
    assert held["gpu-colocate-tp1"].visible_to_engine() == "MIG-bbbb1111-0000-0000-0000-000000000000"
    assert held["gpu-shared"].engine_devices == ("GPU-aaaa2222-0000-0000-0000-000000000000",) * 2, "NCCL takes no slice"
    assert "gpu-split" not in held


def test_listing_gives_slices_in_place_of_their_gpu():
    assert [(device.uuid[:8], device.name, device.gpu) for device in parse_listing(SLICED)] == [
        ("MIG-bbbb", "MIG 3g.40gb", 0), ("MIG-bbbb", "MIG 1g.10gb", 0), ("GPU-aaaa", "NVIDIA H100 80GB HBM3", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [GPU0, GPU1]),
        ("", []),
        ("0", [GPU0]),
        ("1,0", [GPU1, GPU0]),
        (" 1 , 0 ", [GPU1, GPU0]),
        ("0,7,1", [GPU0]),
        ("-1,0", []),
        ("1,-1,0", [GPU1]),
        ("0,0", []),
        ("0,,1", [GPU0]),
        ("1x,0", [GPU1, GPU0]),
        ("x1", []),
        (GPU1.uuid, [GPU1]),
        (f"{GPU1.uuid},{GPU0.uuid}", [GPU1, GPU0]),
        (f"{GPU1.uuid},{GPU1.uuid[:10]}", []),
        ("GPU-aaaa2", [GPU1]),
        ("GPU-aaaa", []),
        ("GPU-ffff,GPU-aaaa2", []),
        ("GPU-aaaa2,0", [GPU1]),
        ("0,GPU-aaaa2", [GPU0]),
        ("MIG-bbbb1", []),
    ],
)
def test_cuda_visible_devices(value, expected):
    assert visible_devices(value, [GPU0, GPU1]) == expected


def test_cuda_visible_devices_with_slices():
    first, second, whole = parse_listing(SLICED)
    assert visible_devices("0", [first, second, whole]) == [first]
    assert visible_devices("MIG-bbbb2,MIG-bbbb1", [first, second, whole]) == [second, first]
    assert visible_devices("1", [first, second, whole]) == [whole]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program that prints `said` and ends with `code` in nvidia-smi's place; None for no program."""

    def install(said: str | None, code: int = 0) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        if said is not None:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\nexit {code}\n")
            program.chmod(0o755)

    return install


def test_this_machine_as_nvidia_smi_and_the_environment_say(nvidia_smi, monkeypatch):
    nvidia_smi(LISTING)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = hardware.machine()
    assert found.devices == (GPU0, GPU1)
    assert found.note == ""
    assert found.cpu_cores == len(os.sched_getaffinity(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aaaa2")
    found = hardware.machine()
    assert found.devices == (GPU1,)
    assert found.note == "CUDA_VISIBLE_DEVICES='GPU-aaaa2' shows 1 of the 2 devices"


@pytest.mark.parametrize(
    ("said", "code", "note"),
    [
        (None, 0, "there is no nvidia-smi"),
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18, "18 and said: Failed to initialize NVML"),
        ("No devices were found\n", 6, "No devices were found"),
        ("", 0, "said: nothing"),
    ],
)
def test_a_machine_without_gpus_says_why(nvidia_smi, said, code, note):
    nvidia_smi(said, code)
    found = hardware.machine()
    assert found.devices == ()
    assert note in found.note
    assert note in unavailable(found)["gpu-colocate-tp1"]


def test_the_memory_of_gpus_goes_by_uuid(nvidia_smi):
    nvidia_smi("GPU-1, 81559\nGPU-2, [N/A]\nno such line\n")
    assert hardware.gpu_memory_bytes() == {"GPU-1": 81559 << 20, "GPU-2": None}


@pytest.mark.parametrize(
    ("profile", "gigabytes"), [("1g.10gb", 10), ("3g.40gb", 40), ("1g.10gb+me", 10), ("1c.3g.40gb", 40), ("odd", None)]
)
def test_the_memory_of_a_slice_is_in_its_name(nvidia_smi, profile, gigabytes):
    nvidia_smi(SLICED.replace("1g.10gb", profile))
    found = hardware.gpu_memory_bytes()["MIG-bbbb2222-0000-0000-0000-000000000000"]
    assert found == (gigabytes and gigabytes * 10**9)
