"""What selftests put into processes that are the ranks of one engine: each its part of a model, without an engine.

vLLM's CPU engine has pipelines and expert parallelism only in part, and none of four ranks on two cores. Its models and
their loaders have all of it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from extensions.manifest import manifest_of
from extensions.model.weights import effective_weights
from extensions.plan import plan_of
from suite import models
from suite.architectures.live import configured, digest, loaded
from suite.architectures.running import VARIABLES
from suite.processes.call import Process, gather
from suite.processes.local import LocalLauncher, free_port
from suite.subjects import load

DEADLINE_S, STARTING_S = 60, 180


class Ranks:
    """All ranks of an engine; a method of Rank is called on all of them at once."""

    def __init__(self, processes: list[Process]) -> None:
        self._processes = processes

    def call(self, method: str, *args: Any) -> list[Any]:
        """What each rank returns."""
        return gather([process.submit(method, *args) for process in self._processes], DEADLINE_S)


@contextlib.contextmanager
def ranks(directory: Path, tensor_parallel: int, pipeline: int) -> Iterator[Ranks]:
    """Start the ranks, and end them. Logs and checkpoints go to `directory`."""
    port = free_port()
    with LocalLauncher(directory / "logs") as launcher:
        processes = []
        for rank in range(tensor_parallel * pipeline):
            arguments = {"directory": str(directory), "rank": rank, "port": port, "sizes": [tensor_parallel, pipeline]}
            target = f"{__name__}:Rank"
            processes.append(launcher.start(f"rank-{rank}", target, arguments, VARIABLES, STARTING_S))
        for process in processes:
            process.ready()
        yield Ranks(processes)


class Rank:
    """One rank. Models come from seeds; experts are apart in those that have some."""

    def __init__(self, directory: str, rank: int, port: int, sizes: list[int]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
        self._directory, self._rank, self._sizes = Path(directory), rank, sizes
        with set_current_vllm_config(self._configure("qwen3-moe-tiny", 0)):  # with experts, for which there is a group
            init_distributed_environment(sizes[0] * sizes[1], rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            initialize_model_parallel(*sizes)

    def differing(self, name: str, extension: str) -> dict[str, Any]:
        """Load the checkpoint of seed 0, have an extension update it to that of seed 1, and compare with that one.

        Returns {"differing": names of weights, "compared": how many, "changed": how many the update had to change,
        "experts": the most that a weight has}.
        """
        before, after = (self._digests(self._loaded(name, seed)) for seed in (0, 1))
        model = self._loaded(name, 0)
        worker = self._worker(model, self._configure(name, 0), extension)
        tensors = self._sent(name)
        worker.begin_update(manifest_of(tensors.items()))
        worker._weight_sync_accept(tensors)
        worker.end_update()
        found = self._digests(model)
        fused = [len(weight) for path, weight in effective_weights(model) if ".experts." in path]
        return {
            "differing": [path for path, cold in after.items() if found[path] != cold],
            "compared": len(after),
            "changed": sum(before[path] != cold for path, cold in after.items()),
            "experts": max(fused, default=0),
        }

    def planned(self, name: str, lacking: list[str], more: list[str]) -> dict[str, list[str]]:
        """The plan of an update that lacks some tensors and announces others.

        Returns {"problems": sentences, "own": what fills this rank, "elsewhere": what only fills others}.
        """
        tensors = self._sent(name)
        announced = {n: t for n, t in tensors.items() if n not in lacking} | {n: torch.empty(1) for n in more}
        plan = plan_of(self._loaded(name, 0), self._configure(name, 0), manifest_of(announced.items()))
        own = [*plan.by_name]
        return {"problems": plan.problems(), "own": own, "elsewhere": [n for n in plan.elsewhere if n not in own]}

    def _loaded(self, name: str, seed: int) -> torch.nn.Module:
        return loaded(self._configure(name, seed))

    def _worker(self, model: torch.nn.Module, config: Any, extension: str) -> Any:
        """As much of vLLM's worker as the extensions touch."""
        worker = type("Worker", (load(extension),), {})()
        worker.rank, worker.device = self._rank, torch.device("cpu")
        worker.model_runner = SimpleNamespace(get_model=lambda: model)
        worker.model_config, worker.vllm_config = config.model_config, config
        return worker

    def _sent(self, name: str) -> dict[str, torch.Tensor]:
        spec = models.MODELS[name]
        return {n: models.values(n, shape, 1, spec.dtype_of(n)) for n, shape in models.tensors(spec)}

    def _digests(self, model: torch.nn.Module) -> dict[str, str]:
        return {path: digest(weight) for path, weight in effective_weights(model)}

    def _configure(self, name: str, seed: int) -> Any:
        """vLLM's configuration of this rank."""
        directory = self._directory / f"{name}-{seed}-{self._rank}"
        spec, (tensor_parallel, pipeline) = models.MODELS[name], self._sizes
        config = configured(
            directory if directory.exists() else models.write_checkpoint(spec, seed, directory),
            tensor_parallel_size=tensor_parallel,
            pipeline_parallel_size=pipeline,
            enable_expert_parallel="num_experts" in spec.config,
            distributed_executor_backend="mp",
        )
        config.parallel_config.rank = self._rank
        return config
