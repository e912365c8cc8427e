"""Mutants on an engine with data-parallel replicas: what each worker takes itself for."""

from extensions.broadcast import WorkerExtension
from extensions.ranks import rank_in_engine
from suite.selftest.mutants.registry import mutant


@mutant("update.exact", r"rank \d is taken", "vllm#56949", cpu="cpu-dp2")
class ForgetsTheReplica(WorkerExtension):
    """Joins the group by its rank in its data-parallel replica."""

    def init_weight_update_group(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        of_replicas_before = rank_in_engine(self) - self.rank
        super().init_weight_update_group(address, port, rank_offset - of_replicas_before, world_size)
