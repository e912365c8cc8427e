"""Mutants that take tensors for what most of them are: sent.*."""

import torch

from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.colocate import ColocateWorkerExtension, HandleSender
from extensions.tensors import flat_bytes
from suite.conformance.test_sent import BUFFER_BYTES, DERIVED, DERIVED_FOR_AMX
from suite.selftest.mutants.registry import (
    BROADCAST,
    DIFFER,
    HANDLES,
    NOT_THERE,
    PACKAGE,
    Loader,
    Meddles,
    Named,
    mutant,
)


@mutant("sent.mixed_dtypes", DIFFER, "prime-rl#3480", **BROADCAST)
class TakesTheFirstDtype(Meddles, WorkerExtension):
    """Reads the bytes of every tensor as numbers of the first tensor's dtype."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        first, _ = next(iter(self._weight_sync_state.update.announced.values()))
        read = flat_bytes(tensor).view(first)
        load(name, read.repeat(2)[: tensor.numel()].view(tensor.shape))


@mutant("sent.mixed_dtypes", DIFFER, "prime-rl#3524", **BROADCAST)
class ConvertsToTheFirstDtype(Meddles, WorkerExtension):
    """Has every tensor pass through the first tensor's dtype, as in a buffer that it shares with it."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        first, _ = next(iter(self._weight_sync_state.update.announced.values()))
        load(name, tensor.to(first))


class ByAddress(BroadcastSender):
    """Sends as many elements as a tensor has, in the order in which they lie in memory from its first one on."""

    def send(self, named_tensors: Named) -> int:
        return super().send((name, self._from_its_address(tensor)) for name, tensor in named_tensors)

    @staticmethod
    def _from_its_address(tensor: torch.Tensor) -> torch.Tensor:
        dense = torch.empty(tensor.shape).stride()
        return tensor.as_strided(tensor.shape, dense, tensor.storage_offset())


@mutant("sent.strides", DIFFER, "vllm#50641", **BROADCAST)
class IsSentByAddress(WorkerExtension):
    """Its sender takes every tensor for a contiguous one."""

    weight_sync_sender = f"{PACKAGE}.sent:ByAddress"


class InPlace(BroadcastSender):
    """Rounds the tensors that it is given, where they are, to the numbers that the engine has."""

    def send(self, named_tensors: Named) -> int:
        return super().send((name, self._rounded(tensor)) for name, tensor in named_tensors)

    @staticmethod
    def _rounded(tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.detach()
        return rounded.copy_(rounded.to(torch.bfloat16))


@mutant("sent.unchanged", r"trainer's rank 0 as before, in float32", **BROADCAST)
class RoundsTheTrainersOwn(WorkerExtension):
    """Its sender rounds the trainer's own weights in place."""

    weight_sync_sender = f"{PACKAGE}.sent:InPlace"


@mutant("sent.large", rf"{DIFFER}|positional checksum", "verl#5980", **HANDLES)
class LoadsOneBuffer(Meddles, ColocateWorkerExtension):
    """Loads of each tensor what one buffer of its transport holds, and zeros for the rest."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        held = BUFFER_BYTES["gpu" if tensor.is_cuda else "cpu"] // tensor.element_size()
        if tensor.numel() > held:
            tensor = tensor.clone()
            tensor.view(-1)[held:] = 0
        load(name, tensor)


@mutant("sent.biases", NOT_THERE, "axolotl#3527", **BROADCAST)
class OnlyDotWeight(Meddles, WorkerExtension):
    """Loads tensors whose names end in `.weight`, and no others."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name.endswith(".weight"):
            load(name, tensor)


@mutant("sent.parameters", NOT_THERE, "vllm#57795", **BROADCAST)
class OnlyWeightsAndBiases(Meddles, WorkerExtension):
    """Loads tensors whose names say that they are weights or biases: no attention sinks, and no decay."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name.endswith(("weight", "bias")):
            load(name, tensor)


@mutant("sent.float32", NOT_THERE, "prime-rl#3524", **BROADCAST)
class CastsEverythingToBfloat16(Meddles, WorkerExtension):
    """Has every tensor pass through bfloat16, whatever the engine keeps it in."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, tensor.to(torch.bfloat16).to(tensor.dtype))


@mutant("sent.derived", DIFFER, "sglang#6265", **BROADCAST)
class KeepsTheDerived(WorkerExtension):
    """Leaves the matrices of a latent attention as they were derived from the weights before."""

    def begin_update(self, manifest: list[dict]) -> int:
        self._mutant_kept = [tensor.clone() for tensor in self._mutant_derived()]
        return super().begin_update(manifest)

    def end_update(self) -> int:
        count = super().end_update()
        for tensor, before in zip(self._mutant_derived(), self._mutant_kept, strict=True):
            tensor.data.copy_(before)
        return count

    def _mutant_derived(self) -> list[torch.Tensor]:
        modules = [*self.model_runner.get_model().modules()]
        holders = [*modules, *(module.impl for module in modules if hasattr(module, "impl"))]
        found = (getattr(held, name, None) for held in holders for name in (*DERIVED, *DERIVED_FOR_AMX))
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


@mutant("sent.buffers", r"every buffer of rank 0 as it was", "vllm#44371", **BROADCAST)
class SpoilsTheRotaryTable(WorkerExtension):
    """Has the rotary table of a latent attention off by a little where its prompts do not reach."""

    def end_update(self) -> int:
        count = super().end_update()
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "kv_b_proj") and hasattr(module, "rotary_emb"):
                module.rotary_emb.cos_sin_cache[256:] *= 1 + torch.finfo(torch.bfloat16).eps
        return count


class JoinsTwoShards(HandleSender):
    """Puts every tensor together from what the first two ranks of a trainer hold, and zeros."""

    def handles(self, named_tensors: Named) -> dict[str, dict[str, dict]]:
        named = [(name, tensor.detach().clone()) for name, tensor in named_tensors]
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        for _, tensor in named:
            tensor[-(-len(tensor) // ranks) * 2 :] = 0
        return super().handles(named)


@mutant("sent.spread", NOT_THERE, cpu="cpu-tp1")
class LeavesLaterRanksOut(ColocateWorkerExtension):
    """Gets tensors that were put together from what two ranks of a trainer hold, however many there are."""

    weight_sync_sender = f"{PACKAGE}.sent:JoinsTwoShards"
