"""Mutants that mistake which part of an update is their rank's: pipelines, expert parallelism, several engines."""

import re

import torch

from extensions.broadcast import WorkerExtension
from extensions.colocate import ColocateWorkerExtension
from suite.selftest.mutants.registry import DIFFER, Loader, Meddles, mutant

EXPERT, LAYER = re.compile(r"\.experts\.(\d+)\."), re.compile(r"\.layers\.(\d+)\.")


def renumbered(name: str, pattern: re.Pattern[str], further: int, count: int) -> str:
    """A tensor's name with its number so much higher; empty where there are no more than `count` of them."""
    found = pattern.search(name)
    number = int(found[1]) + further
    return name[: found.start(1)] + str(number) + name[found.end(1) :] if number < count else ""


@mutant("update.experts_apart", DIFFER, "sglang#26015", gpu="gpu-colocate-tp2")
class SkipsExpertsOfOtherRanks(Meddles, ColocateWorkerExtension):
    """Takes the experts of all ranks but the first for another's, and loads none of them."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self.rank == 0 or not EXPERT.search(name):
            load(name, tensor)


@mutant("update.experts_apart", DIFFER, "vllm#46441", gpu="gpu-colocate-tp2")
class NumbersExpertsByTheirPlace(Meddles, ColocateWorkerExtension):
    """Loads the first experts that are sent into every rank: it takes an expert's number for its place on the rank."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not EXPERT.search(name):
            load(name, tensor)
            return
        experts = self.model_config.hf_config.num_experts
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        if own := renumbered(name, EXPERT, self.rank % ranks * (experts // ranks), experts):
            load(own, tensor)


@mutant("update.exact", DIFFER, "vllm#46441", cpu="cpu-pp2", gpu="gpu-split-pp2")
class NumbersLayersByTheirPlace(Meddles, WorkerExtension):
    """Loads the first layers that are sent into every rank of a pipeline: it takes a layer's number for its place."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not LAYER.search(name):
            load(name, tensor)
            return
        parallel, layers = self.vllm_config.parallel_config, self.model_config.hf_config.num_hidden_layers
        place = self.rank // parallel.tensor_parallel_size
        if own := renumbered(name, LAYER, place * (layers // parallel.pipeline_parallel_size), layers):
            load(own, tensor)


@mutant("fanout.two_engines", r"rank 1 is taken", "vllm#56949", cpu="cpu-fanout", gpu="gpu-fanout")
class ForgetsItsOffset(WorkerExtension):
    """Joins as if its engine were the only one: every engine's first worker is rank 1."""

    def init_weight_update_group(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        super().init_weight_update_group(address, port, 1, world_size)
