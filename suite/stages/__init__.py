"""From a machine's devices to the stages that it can hold. What the machine has is asked in suite.stages.hardware."""

from dataclasses import dataclass, replace

from suite.stages.hardware import Device, Machine

# How long a reference extension and the trainer wait for a peer that has stopped in the middle of a tensor, by kind of
# stage: GPUs move the largest in less than a second; gloo on cores that others use too may take several.
UPDATE_TIMEOUT_S = {"cpu": 15.0, "gpu": 6.0}


@dataclass(frozen=True)
class Stage:
    """Which devices the trainer's and the engines' ranks get.

    colocated: trainer and engine ranks share devices, rank by rank; on a CPU everything shares the host's memory.
    engines: how many one trainer feeds where a test asks for all of them; every other test is given the first.
    data_parallel_size: replicas of an engine.
    server: engines are `vllm serve` processes that are called over HTTP.
    judged: the requirements, or families of them, that are judged there; empty for all but those of servers.
    hosts_apart: NCCL is told that each process is on a host of its own; it would refuse two ranks on one GPU. Devices
    are UUIDs, none on a CPU; `engine_devices` has those of all engines in turn. `engine_visible`, `trainer_visible`:
    what they are called in CUDA_VISIBLE_DEVICES, where CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """

    name: str
    kind: str  # "cpu" | "gpu"
    tensor_parallel_size: int
    trainer_world_size: int
    colocated: bool
    engine_devices: tuple[str, ...] = ()
    trainer_devices: tuple[str, ...] = ()
    engine_visible: tuple[str, ...] = ()
    trainer_visible: tuple[str, ...] = ()
    pipeline_parallel_size: int = 1
    engines: int = 1
    hosts_apart: bool = False
    server: bool = False
    judged: tuple[str, ...] = ()
    data_parallel_size: int = 1

    @property
    def engine_ranks(self) -> int:
        """Workers of one engine, of all its data-parallel replicas."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def layout(self) -> tuple[object, ...]:
        """What tells whether engines of two stages compute alike."""
        replicas = [f"dp{self.data_parallel_size}"] if self.data_parallel_size > 1 else []
        return self.kind, self.tensor_parallel_size, self.pipeline_parallel_size, *replicas

    @property
    def places(self) -> int:
        """How many GPUs the stage takes, or CPU cores: one for each rank, or for an engine's and a trainer's rank."""
        if self.colocated:
            return max(self.engine_ranks, self.trainer_world_size)
        return self.engines * self.engine_ranks + self.trainer_world_size

    @property
    def gpus(self) -> int:
        """How many GPUs the stage takes."""
        return 0 if self.kind == "cpu" else self.places

    def nccl_environment(self, process: str) -> dict[str, str]:
        """What NCCL reads in the environment of a trainer's or an engine's process, by whatever name tells them apart.

        With a NCCL_HOSTID each, two ranks on one GPU pass for two hosts (NCCL 2.28 checks for duplicates within a host
        only) and talk over sockets.
        """
        return {"NCCL_HOSTID": process, "NCCL_NET": "Socket"} if self.hosts_apart else {}

    def devices_of_engine(self, engine: int = 0) -> tuple[str, ...]:
        """The UUIDs for one engine, by rank."""
        return self.engine_devices[engine * self.engine_ranks : (engine + 1) * self.engine_ranks]

    def visible_to_engine(self, engine: int = 0) -> str:
        """One engine's CUDA_VISIBLE_DEVICES."""
        return ",".join(self.engine_visible[engine * self.engine_ranks : (engine + 1) * self.engine_ranks])


# What a server may answer otherwise than an engine that is called directly. The others would only be judged a second
# time there. So would, on replicas and on several engines, what is judged with one; and on CPUs, where the starts of
# engines take most of the time, what has nothing to do with layers that are on another rank.
JUDGED_ON_SERVERS = ("update.exact", "update.repeated", "errors.", "cache.", "inflight.", "server.")
JUDGED_ON_REPLICAS = ("update.exact", "errors.missing_name")
JUDGED_ON_SEVERAL = ("fanout.",)
JUDGED_ON_CPU_PIPELINES = ("update.exact", "errors.missing_name", "errors.shape")

# As they are without devices. Those of more GPUs come later: their engines start while others are in use.
STAGES = (
    Stage("cpu-tp1", "cpu", tensor_parallel_size=1, trainer_world_size=1, colocated=True),
    Stage("cpu-tp2", "cpu", tensor_parallel_size=2, trainer_world_size=1, colocated=True),
    Stage("cpu-pp2", "cpu", 1, 1, colocated=True, pipeline_parallel_size=2, judged=JUDGED_ON_CPU_PIPELINES),
    Stage("cpu-fanout", "cpu", 1, 1, colocated=True, engines=2, judged=JUDGED_ON_SEVERAL),
    Stage("cpu-serve", "cpu", 1, 1, colocated=True, server=True, judged=JUDGED_ON_SERVERS),
    Stage("cpu-dp2", "cpu", 1, 1, colocated=True, data_parallel_size=2, judged=JUDGED_ON_REPLICAS),
    Stage("gpu-colocate-tp1", "gpu", tensor_parallel_size=1, trainer_world_size=1, colocated=True),
    Stage("gpu-shared", "gpu", 1, trainer_world_size=1, colocated=True, engines=2, hosts_apart=True),
    Stage("gpu-serve", "gpu", 1, trainer_world_size=1, colocated=True, server=True, judged=JUDGED_ON_SERVERS),
    Stage("gpu-split", "gpu", tensor_parallel_size=1, trainer_world_size=1, colocated=False),
    Stage("gpu-colocate-tp2", "gpu", tensor_parallel_size=2, trainer_world_size=2, colocated=True),
    Stage("gpu-colocate-pp2", "gpu", 1, trainer_world_size=2, colocated=True, pipeline_parallel_size=2),
    Stage("gpu-fanout", "gpu", 1, trainer_world_size=1, colocated=False, engines=2, judged=JUDGED_ON_SEVERAL),
    Stage("gpu-split-pp2", "gpu", 1, trainer_world_size=1, colocated=False, pipeline_parallel_size=2),
    Stage("gpu-fanout3", "gpu", 1, trainer_world_size=1, colocated=False, engines=3, judged=JUDGED_ON_SEVERAL),
    Stage("gpu-split-tp2", "gpu", tensor_parallel_size=2, trainer_world_size=2, colocated=False),
    Stage("gpu-colocate-tp4", "gpu", tensor_parallel_size=4, trainer_world_size=4, colocated=True),
    Stage("gpu-colocate-pp2-tp2", "gpu", 2, trainer_world_size=4, colocated=True, pipeline_parallel_size=2),
    Stage("gpu-split-pp2-tp2", "gpu", 2, trainer_world_size=1, colocated=False, pipeline_parallel_size=2),
)

# Of one trainer and one engine, each of one rank: for requirements that do not depend on ranks.
GPU_OF_ONE_RANK = ("gpu-colocate-tp1", "gpu-shared", "gpu-split")


def takes(stage: str, requirement: str) -> bool:
    """Whether a requirement is judged on the stage of this name; what measures is of the requirement ""."""
    known = next((known for known in STAGES if known.name == stage), None)
    if not known or not known.judged:
        return not requirement.startswith("server.")
    return requirement.startswith(known.judged) if requirement else not known.server


def available_stages(machine: Machine) -> list[Stage]:
    """The stages that the machine can hold, with their devices."""
    missing = unavailable(machine)
    return [_placed(stage, machine) for stage in STAGES if stage.name not in missing]


def unavailable(machine: Machine) -> dict[str, str]:
    """{stage name: why the machine cannot hold it}."""
    reasons = {stage.name: _lacking(stage, machine) for stage in STAGES}
    return {name: reason for name, reason in reasons.items() if reason}


def _lacking(stage: Stage, machine: Machine) -> str:
    if stage.kind == "cpu":
        needed, found = stage.places, machine.cpu_cores
        each = "for the engine's and the trainer's rank" if stage.colocated else "for each rank"
        return "" if found >= needed else f"needs {needed} CPU cores, one {each}; this process may use {found}"
    usable = _usable(stage, machine)
    if stage.hosts_apart and len(usable) > 1:
        return "stands in for gpu-split on a machine of one GPU; CUDA_VISIBLE_DEVICES=0 makes this one such"
    if len(usable) >= stage.gpus:
        return ""
    whole = "whole GPU" if _takes_whole(stage) else "GPU"
    note = f" ({machine.note})" if machine.note else ""
    return f"needs {stage.gpus} {whole}{'s' if stage.gpus > 1 else ''}, found {len(usable)}{note}"


def _usable(stage: Stage, machine: Machine) -> list[str]:
    return [device.uuid for device in machine.devices if not (device.is_slice and _takes_whole(stage))]


def _takes_whole(stage: Stage) -> bool:
    """MIG slices can't reach each other: they serve only stages of one device. NCCL is not for them."""
    return stage.gpus > 1 or stage.hosts_apart


def _placed(stage: Stage, machine: Machine) -> Stage:
    if stage.kind == "cpu":
        return stage
    chosen = tuple(_usable(stage, machine)[: stage.gpus])
    trainer = chosen[: stage.trainer_world_size]
    engines = chosen * stage.engines if stage.colocated else chosen[stage.trainer_world_size :]
    called = {device.uuid: _called(device) for device in machine.devices}
    return replace(
        stage,
        engine_devices=engines,
        trainer_devices=trainer,
        engine_visible=tuple(called[uuid] for uuid in engines),
        trainer_visible=tuple(called[uuid] for uuid in trainer),
    )


def _called(device: Device) -> str:
    """A GPU by its ordinal, which is all that vLLM understands before 0.24 (vllm#41848); a slice has none."""
    return device.uuid if device.is_slice else str(device.gpu)
