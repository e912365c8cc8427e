"""The ranks of a trainer, as pytest's process sees them."""

import contextlib
import random
import socket

from suite.processes import Process, Run, gather, launch
from suite.stages import UPDATE_TIMEOUT_S, Stage

CALL_DEADLINE_S = 120.0
ADDRESS = "127.0.0.1"
PORTS = (15000, 32000)  # below those that Linux hands out: from 32768 on, see ip_local_port_range


def free_port() -> int:
    """A port that nothing listens on now, and that Linux by default gives to nobody who asks for any, as NCCL does."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((ADDRESS, port))
            return port
    raise OSError(f"no port of {PORTS[0]}..{PORTS[1]} could be bound at {ADDRESS}, in 1000 tries")


class TrainerGroup:
    """The ranks of one trainer. Every call goes to all of them."""

    def __init__(
        self,
        run: Run,
        name: str,
        world_size: int,
        device: str,
        visible: list[str],
        warm_up: bool = True,
        stage: Stage | None = None,
    ) -> None:
        """`warm_up=False` leaves out what only `load` needs. `stage` has more to say of the environment."""
        port = free_port()
        self.world_size = world_size
        self.processes: list[Process] = []
        for rank in range(world_size):
            arguments = {"rank": rank, "world_size": world_size, "device": device, "master_port": port}
            env = {
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": visible[rank] if visible else "",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "WEIGHT_UPDATE_TIMEOUT_S": str(UPDATE_TIMEOUT_S["cpu" if device == "cpu" else "gpu"]),
                **(stage.nccl_environment(f"trainer-{rank}") if stage else {}),
            }
            self.processes.append(
                launch(run, f"{name}-rank{rank}", "suite.trainer:Trainer", arguments, env, CALL_DEADLINE_S)
            )
            if warm_up:
                self.processes[-1].submit("warm_up")
        self.connected: tuple[int, ...] = ()
        self.held: object = None

    @classmethod
    def of_stage(cls, run: Run, name: str, stage: Stage, world_size: int = 1, warm_up: bool = True) -> "TrainerGroup":
        """A trainer on the devices that its stage has for it."""
        device = "cpu" if stage.kind == "cpu" else "cuda"
        return cls(run, f"{name}-{stage.name}", world_size, device, list(stage.trainer_visible), warm_up, stage)

    def ready(self) -> None:
        """Wait until all ranks are up."""
        for process in self.processes:
            process.ready(CALL_DEADLINE_S)

    def call(self, method: str, *args: object, deadline_s: float = CALL_DEADLINE_S, **kwargs: object) -> list:
        """Call a method on all ranks; their results by rank."""
        return gather([p.submit(method, *args, **kwargs) for p in self.processes], deadline_s)

    def load(self, path: str, dtype: str = "bfloat16") -> None:
        """Load a checkpoint, unless it is what the trainer holds unchanged."""
        if self.held != (path, dtype):
            self.held = None
            self.call("load", path, dtype)
            self.held = (path, dtype)

    def hold_random(self, config: str, seed: int) -> None:
        """Hold seeded tensors of a model's names and shapes, without the model."""
        self.held = None
        self.call("load_random", config, "bfloat16", seed)

    def fill(self, seed: int | None) -> None:
        """Give every weight its value of the seed, or zero."""
        self.held = None
        self.call("fill", seed)

    def step(self, count: int, seed: int, learning_rate: float) -> list[dict]:
        """Take optimiser steps on random tokens."""
        self.held = None
        return self.call("step", count, seed, learning_rate)

    @property
    def alive(self) -> bool:
        return all(process.alive for process in self.processes)

    def stop(self) -> None:
        """End all ranks."""
        for process in self.processes:
            process.stop()
