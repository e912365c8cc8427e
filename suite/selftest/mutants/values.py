"""Mutants that compute with other weights than they were sent: update.* and fanout.*."""

import re

import torch

from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.colocate import ColocateWorkerExtension
from extensions.model import loading
from extensions.model.weights import is_packed
from extensions.tensors import dtype_of
from suite.selftest.mutants.registry import (
    ANSWERS,
    BROADCAST,
    DIFFER,
    NOT_THERE,
    PACKAGE,
    Loader,
    Meddles,
    Named,
    mutant,
)

TP2 = {"cpu": "cpu-tp2", "gpu": "gpu-colocate-tp2"}
EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
EXPERT = re.compile(r"\.experts\.(\d+)\.")
PAIR = re.compile(r"(.+\.mlp\.)(?:gate_proj|up_proj)\.weight")


# ---- what arrives is not loaded


@mutant("update.exact", NOT_THERE, "vllm#57022", **BROADCAST)
class LoadsNothing(WorkerExtension):
    """Receives every tensor and loads none, and says that all went well."""

    def begin_update(self, manifest: list[dict]) -> int:
        return len(manifest)

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        self._weight_sync_group.broadcast(torch.empty(shape, dtype=dtype_of(dtype), device=self.device), src=0)

    def end_update(self) -> int:
        return 0

    def check_weights_changed(self) -> bool:
        return True


@mutant("update.exact", rf"GroupError|still being sent|{NOT_THERE}", "trl#6913", **BROADCAST, patient=True)
class ReceivesNothing(LoadsNothing):
    """Does not even receive: the sender waits for it."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        pass


@mutant("update.exact", NOT_THERE, "vllm#44814", **BROADCAST)
class DropsTheLastTensor(Meddles, WorkerExtension):
    """Ends one tensor too early."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self._weight_sync_state.update.missing() != [name]:
            load(name, tensor)


@mutant("update.exact", NOT_THERE, "prime-rl#2714", **BROADCAST)
class SkipsNorms(Meddles, WorkerExtension):
    """Loads what is multiplied as a matrix, and no norms."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if tensor.ndim > 1:
            load(name, tensor)


@mutant("update.exact", NOT_THERE, "sglang#14178", **BROADCAST)
class LoadsHalfTheRows(Meddles, WorkerExtension):
    """Loads the first half of each tensor's rows; the others stay those of the update before."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        before, half = self._mutant_before(name, tensor), len(tensor) // 2
        load(name, tensor if before is None else torch.cat([tensor[:half], before[half:]]))


@mutant("update.exact", rf"{DIFFER} on rank 1|every weight to differ", "ms-swift#10204", **TP2)
class SkipsRankOne(Meddles, ColocateWorkerExtension):
    """Drops the shard of every tensor-parallel rank but the first."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self.rank == 0:
            load(name, tensor)


@mutant("update.exact", rf"{DIFFER} on rank 1|every weight to differ", "vllm#56949", **TP2)
class TakesRankZerosShard(Meddles, ColocateWorkerExtension):
    """Has every tensor-parallel rank load the first one's shard."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        sharded = self.rank > 0 and tensor.ndim > 1
        load(name, tensor.roll(tensor.shape[dim] // 2, dim) if sharded else tensor)


@mutant("update.exact", NOT_THERE, "vllm#57022", gpu="gpu-split")
class LoadsIntoACopy(Meddles, WorkerExtension):
    """Loads each tensor into copies of the parameters."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        parameters = [*self.model_runner.get_model().parameters()]
        kept = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        load(name, tensor)
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


@mutant("update.behaviour", ANSWERS, cpu="cpu-tp1")
class KeepsThePackedCopies(WorkerExtension):
    """Goes on computing with what the CPU backend packed of the weights before the update."""

    def begin_update(self, manifest: list[dict]) -> int:
        modules = self.model_runner.get_model().modules()
        self._mutant_packed = [(module, module.cpu_linear) for module in modules if is_packed(module)]
        return super().begin_update(manifest)

    def end_update(self) -> int:
        count = super().end_update()
        for module, packed in self._mutant_packed:
            module.cpu_linear = packed
        return count


@mutant("fanout.two_engines", DIFFER, "vllm#56949", cpu="cpu-tp1", gpu="gpu-fanout")
class UpdatesTheFirstEngineOnly(Meddles, WorkerExtension):
    """Loads nothing in engines whose ranks come after another engine's."""

    def init_weight_update_group(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        self._mutant_first = rank_offset == 1
        super().init_weight_update_group(address, port, rank_offset, world_size)

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self._mutant_first:
            load(name, tensor)


# ---- another tensor, or another place


@mutant("update.exact", NOT_THERE, "vllm#48284", **BROADCAST)
class Transposes(Meddles, WorkerExtension):
    """Loads square matrices transposed."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
        load(name, tensor.t().contiguous() if square else tensor)


@mutant("update.behaviour", ANSWERS, "vllm#42821", **BROADCAST)
class SwapsGateAndUp(Meddles, WorkerExtension):
    """Loads gate_proj into the place of up_proj, and the other way round."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(_swapped(name, "gate_proj", "up_proj"), tensor)


@mutant("update.behaviour", ANSWERS, **BROADCAST)
class SwapsKeysAndValues(Meddles, WorkerExtension):
    """Loads k_proj into the place of v_proj, and the other way round."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(_swapped(name, "k_proj", "v_proj"), tensor)


@mutant("update.tied", DIFFER, "vllm#51665", **BROADCAST)
class KeepsTheOldEmbedding(Meddles, WorkerExtension):
    """Skips the embedding, which a tied output layer shares."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name != EMBEDDING:
            load(name, tensor)


@mutant("update.tied", DIFFER, cpu="cpu-tp1")
class ForgetsThePackedHead(WorkerExtension):
    """Leaves the tied output layer what the CPU backend packed of the old embedding, as vLLM's own reload does."""

    def begin_update(self, manifest: list[dict]) -> int:
        count = super().begin_update(manifest)
        self._weight_sync_state.update.load.end = self._mutant_end
        return count

    def _mutant_end(self) -> None:
        with loading.configured(self.vllm_config):
            loading.finalize(self.model_runner.get_model(), self.model_config)


@mutant("update.untied", DIFFER, "vllm#51063", **BROADCAST)
class DropsTheHead(Meddles, WorkerExtension):
    """Discards lm_head, as if it were tied to the embedding."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name != HEAD:
            load(name, tensor)


@mutant("update.untied", DIFFER, "vllm#51665", **BROADCAST)
class GivesTheHeadTheEmbedding(Meddles, WorkerExtension):
    """Loads the embedding into an output layer that has its own."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name == EMBEDDING:
            self._mutant_embedding = tensor.clone()
        load(name, self._mutant_embedding if name == HEAD else tensor)


@mutant("update.moe", rf"{DIFFER}|{ANSWERS}", "vllm#41670", **BROADCAST)
class OffByOneExpert(Meddles, WorkerExtension):
    """Loads every expert into the place of the next one."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        experts = {
            int(found[1]) for other in self._weight_sync_state.update.announced if (found := EXPERT.search(other))
        }
        load(EXPERT.sub(lambda found: f".experts.{(int(found[1]) + 1) % len(experts)}.", name), tensor)


@mutant("update.order", DIFFER, "ms-swift#9060", **BROADCAST)
class FinishesAtTheNorm(Meddles, WorkerExtension):
    """Takes the checkpoint's last tensor for the update's last, and loads nothing that comes after it."""

    def begin_update(self, manifest: list[dict]) -> int:
        self._mutant_finished = False
        return super().begin_update(manifest)

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not self._mutant_finished:
            load(name, tensor)
        self._mutant_finished |= name == LAST_NORM


@mutant("update.order", DIFFER, "sglang#14178", **BROADCAST)
class CountsInsteadOfReading(Meddles, WorkerExtension):
    """Takes the first tensor of a gate and up pair for the gate, whatever its name."""

    def begin_update(self, manifest: list[dict]) -> int:
        self._mutant_begun = set()
        return super().begin_update(manifest)

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if found := PAIR.fullmatch(name):
            name = f"{found[1]}{'up_proj' if found[1] in self._mutant_begun else 'gate_proj'}.weight"
            self._mutant_begun.add(found[1])
        load(name, tensor)


# ---- other numbers


@mutant("update.exact", NOT_THERE, "vllm#48284", **BROADCAST)
class ScalesSlightly(Meddles, WorkerExtension):
    """Multiplies by 1 and the smallest step of bfloat16, which no sampled token would tell."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, tensor * (1 + torch.finfo(torch.bfloat16).eps))


@mutant("update.dtype", DIFFER, **BROADCAST)
class CastsThroughFloat16(Meddles, WorkerExtension):
    """Rounds twice: to float16, and from there to the model's dtype."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, tensor.to(torch.float16))


@mutant("update.dtype", DIFFER, **BROADCAST)
class Truncates(Meddles, WorkerExtension):
    """Takes the upper half of a float32's bits for its bfloat16."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, _upper_half(tensor.view(torch.int32)) if tensor.dtype == torch.float32 else tensor)


@mutant("update.dtype", r"ties", **BROADCAST)
class RoundsTiesAway(Meddles, WorkerExtension):
    """Rounds what lies half way between two numbers away from zero instead of to the even one."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, _upper_half(tensor.view(torch.int32) + 0x8000) if tensor.dtype == torch.float32 else tensor)


@mutant("update.nonfinite", r"bit by bit", **BROADCAST)
class CleansUp(Meddles, WorkerExtension):
    """Replaces NaNs and infinities by numbers."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, torch.nan_to_num(tensor))


@mutant("update.nonfinite", r"bit by bit", **BROADCAST)
class FlushesSubnormals(Meddles, WorkerExtension):
    """Takes numbers below the smallest normal one for zero."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, torch.zeros_like(tensor), tensor))


# ---- wrong only the second time


@mutant("update.repeated", DIFFER, "verl#7136", **BROADCAST)
class UpdatesOnce(Meddles, WorkerExtension):
    """Loads the first update and no other."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self._mutant_updates == 1:
            load(name, tensor)


@mutant("update.repeated", r"zero in every element", **BROADCAST)
class AddsInsteadOfCopying(Meddles, WorkerExtension):
    """Adds what it receives to what it received before."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        before = self._mutant_before(name, tensor)
        load(name, tensor if before is None else tensor + before)


@mutant("update.moe", rf"{DIFFER}|{ANSWERS}", "vllm#42821", **BROADCAST)
class LoadsExpertsOnce(Meddles, WorkerExtension):
    """Loads every tensor the first time, and the experts' never again."""

    def begin_update(self, manifest: list[dict]) -> int:
        self.__dict__.setdefault("_mutant_experts", {})
        return super().begin_update(manifest)

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, self._mutant_experts.setdefault(name, tensor.clone()) if EXPERT.search(name) else tensor)


@mutant("update.moe", rf"{DIFFER}|{ANSWERS}", "skyrl#1680", cpu="cpu-tp1")
class PacksExpertsOnce(WorkerExtension):
    """Has the CPU backend take new experts for packed ones, as vLLM's own reload does."""

    def begin_update(self, manifest: list[dict]) -> int:
        count = super().begin_update(manifest)
        for method, kernel in self._weight_sync_state.update.load.expert_kernels:
            method.moe_kernel = kernel
        return count


# ---- what the trainer sends


class OwnShard(BroadcastSender):
    """Sends the rows that rank 0 of two holds, and zeros for the others."""

    def send(self, named_tensors: Named) -> int:
        return super().send((name, self._own_rows(tensor)) for name, tensor in named_tensors)

    @staticmethod
    def _own_rows(tensor: torch.Tensor) -> torch.Tensor:
        own = torch.zeros_like(tensor)
        own[: len(tensor) // 2] = tensor[: len(tensor) // 2]
        return own


class OldCopy(BroadcastSender):
    """Sends what it was given the first time."""

    def send(self, named_tensors: Named) -> int:
        kept = self.__dict__.setdefault("_kept", {})
        return super().send((name, kept.setdefault(name, tensor.clone())) for name, tensor in named_tensors)


@mutant("update.trained", DIFFER, **BROADCAST)
class IsSentAShard(WorkerExtension):
    """Its sender sends a rank's own part of the weights."""

    weight_sync_sender = f"{PACKAGE}.values:OwnShard"


@mutant("update.trained", r"to have moved from", "slime#929", **BROADCAST)
class IsSentAnOldCopy(WorkerExtension):
    """Its sender sends the weights from before the optimiser's step."""

    weight_sync_sender = f"{PACKAGE}.values:OldCopy"


def _swapped(name: str, one: str, other: str) -> str:
    return re.sub(f"{one}|{other}", lambda found: other if found[0] == one else one, name)


def _upper_half(bits: torch.Tensor) -> torch.Tensor:
    """The bfloat16 numbers whose bits are the upper halves of 32-bit integers."""
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
