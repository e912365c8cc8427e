"""Mutants that take the engine for a plain one: lora.*, cache.encoder, update.fp8_cache, update.quantised."""

import functools

import torch

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import ANSWERS, BROADCAST, DIFFER, NOT_THERE, Loader, Meddles, mutant


@mutant("lora.exact", NOT_THERE, "vllm#39934", **BROADCAST)
class LooksUpByTheCheckpointsName(Meddles, WorkerExtension):
    """Skips the tensors of layers that vLLM has wrapped for adapters: their parameters have other names."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        wrapped = f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"
        if wrapped not in dict(self.model_runner.get_model().named_parameters(remove_duplicate=False)):
            load(name, tensor)


@mutant("lora.reloaded", ANSWERS, "vllm#42125", **BROADCAST)
class KeepsTheAdapter(WorkerExtension):
    """Takes an adapter that has the number of a loaded one for the same, the first time after an update."""

    def end_update(self) -> int:
        count = super().end_update()
        self._mutant_keeps = True
        self.add_lora = self._mutant_add_lora
        return count

    def _mutant_add_lora(self, asked: object) -> bool:
        if self._mutant_keeps and asked.lora_int_id in self.list_loras():
            self._mutant_keeps = False  # what the test does afterwards leaves the engine as it was
            return True
        return type(self).add_lora(self, asked)


@mutant("cache.encoder", r"other answers", "vllm#44910", **BROADCAST)
class RemembersPictures(WorkerExtension):
    """Keeps what the encoder made of a picture, whatever weights it has later."""

    def begin_update(self, manifest: list[dict]) -> int:
        model = self.model_runner.get_model()
        self.__dict__.setdefault("_mutant_pictures", {})
        if "embed_multimodal" not in vars(model):
            model.embed_multimodal = functools.partial(_remembering, self, model)
        return super().begin_update(manifest)


def _remembering(worker: WorkerExtension, model: torch.nn.Module, **pictures: torch.Tensor) -> object:
    """As the model's embed_multimodal(); with what the worker remembers, as long as it has the mutant's attributes."""
    encode = functools.partial(type(model).embed_multimodal, model, **pictures)
    remembered = vars(worker).get("_mutant_pictures")
    if remembered is None:
        return encode()
    key = str([tensor.float().sum().item() for tensor in pictures.values()])
    if key not in remembered:
        remembered[key] = encode()
    return remembered[key]


@mutant("update.fp8_cache", DIFFER, "modelexpress#783", **BROADCAST)
class LeavesTheScalesUnset(WorkerExtension):
    """Leaves in the scales of the cache what memory held, as of layers that were built anew."""

    def end_update(self) -> int:
        count = super().end_update()
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "_k_scale"):
                module._k_scale.fill_(0.5)
                module._v_scale.fill_(0.5)
        return count

    def begin_update(self, manifest: list[dict]) -> int:
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "_k_scale"):
                module._k_scale.fill_(1.0)
                module._v_scale.fill_(1.0)
        return super().begin_update(manifest)


@mutant("update.quantised", DIFFER, "vllm#28425", **BROADCAST)
class LeavesScalesOut(Meddles, WorkerExtension):
    """Loads new quantised weights and keeps the scales that they are multiplied by."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        scales = name.endswith(("weight_scale_inv", ".scales"))
        before = self._mutant_before(name, tensor) if scales else None
        load(name, torch.ones_like(tensor) if scales and before is None else tensor if before is None else before)
