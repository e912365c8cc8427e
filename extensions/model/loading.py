"""Getting tensors into a model that may have repacked or quantised its weights.

`DirectLoad` hands the tensors to the model's own `load_weights`, which copies them into the parameters. That is right
only while the parameters are those the checkpoint was loaded into. Where processing after loading has replaced them,
`LayerwiseReload` has vLLM's layerwise reload restore each layer's original parameters, load, process again and copy
the result to where the old one was. So addresses captured in CUDA graphs stay valid.

Parts of vLLM without a public name are used in two places. vLLM has no call that gives a reload up, so
`LayerwiseReload.abort` does it with `_place_kernel_tensors` and the attributes that the reload leaves on layers and
model. vLLM's reload does not repack experts on the CPU, so `_forget_cpu_experts` takes `moe_kernel` off the layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from extensions.model.expected import HEAD
from extensions.model.weights import is_packed


def processed_layers(model: torch.nn.Module) -> list[str]:
    """Names of layers whose parameters are not those a checkpoint loads into: repacked, shuffled or quantised.

    A mixture-of-experts layer always counts. Its kernels may permute weights in place and keep their shapes, and
    loading over permuted weights corrupts them in silence (vllm#42821).
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    names = []
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase) or not any(True for _ in module.parameters(recurse=False)):
            continue
        if type(method) not in plain or is_packed(module):
            names.append(prefix)
    return names


class Load(ABC):
    """One update of one model, from `begin` to `end` or `abort`."""

    def __init__(self, model: torch.nn.Module, vllm_config: object) -> None:
        self._model, self._vllm_config = model, vllm_config
        self._touched = False  # whether load() has been called
        self._tied = ties_its_head(model)

    @abstractmethod
    def begin(self) -> None:
        """Prepare the model for new weights."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take full tensors under their checkpoint names; they may be kept until `end`.

        Give it all tensors that are there in one call: each call of `load_weights` walks the model, which in some
        versions of vLLM takes longer than the copy of a tensor.
        """
        self._touched = True
        with configured(self._vllm_config):
            self._model.load_weights((n, t) for n, t in tensors.items() if n != HEAD or not self._tied)

    @abstractmethod
    def end(self) -> None:
        """Finish all layers. The model computes with the new weights afterwards."""

    @abstractmethod
    def abort(self) -> bool:
        """Give up. Returns True if the model computes with exactly the weights it had before `begin`."""


class DirectLoad(Load):
    """For models whose parameters are as loaded: unquantised dense models on GPUs."""

    def begin(self) -> None:
        """Nothing is to be prepared."""

    def end(self) -> None:
        """Nothing is left to do: each tensor was copied into its parameter as it was loaded."""

    def abort(self) -> bool:
        return not self._touched


class LayerwiseReload(Load):
    """For every other model, through `vllm.model_executor.model_loader.reload`."""

    def __init__(self, model: torch.nn.Module, vllm_config: object) -> None:
        super().__init__(model, vllm_config)
        self.expert_kernels: list[tuple[object, object]] = []  # (method, kernel), to put back on abort

    def begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.expert_kernels = _forget_cpu_experts(self._model)
        with configured(self._vllm_config):
            initialize_layerwise_reload(self._model)

    def end(self) -> None:
        with configured(self._vllm_config):
            finalize(self._model, self._vllm_config.model_config)
            _repack_tied_head(self._model)

    def abort(self) -> bool:
        """Put the old tensors back where no new ones were processed.

        A layer that had all its tensors has been overwritten. The model is whole again only if none was taken.
        """
        from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            if info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()
        for method, kernel in self.expert_kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        if hasattr(self._model, "_original_do_torchao_reload"):
            self._model._do_torchao_reload = self._model._original_do_torchao_reload
        return not self._touched


def new_load(model: torch.nn.Module, vllm_config: object) -> Load:
    """The cheaper of the two that is right for this model."""
    kind = LayerwiseReload if processed_layers(model) else DirectLoad
    return kind(model, vllm_config)


@contextmanager
def configured(vllm_config: object) -> Iterator[None]:
    """Set vLLM's current configuration, which layers look up when they are built, loaded or processed.

    Before 0.28 vLLM's reload does not set it itself.
    """
    from vllm.config import set_current_vllm_config

    with torch.no_grad(), set_current_vllm_config(vllm_config):
        yield


def finalize(model: torch.nn.Module, model_config: object) -> None:
    """Have vLLM's layerwise reload finish all layers. Versions of vLLM have it under one name or the other."""
    from vllm.model_executor.model_loader import reload

    finish = getattr(reload, "finalize_layerwise_reload", None) or reload.finalize_layerwise_processing
    finish(model, model_config)


def ties_its_head(model: torch.nn.Module) -> bool:
    """Whether the output embedding is the input embedding under another name. Then nothing is to be loaded for it.

    vLLM itself leaves a tied `lm_head` out, but from 0.32 refuses it where the input embedding is not in the same call.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head = parameters.pop(HEAD, None)
    return head is not None and any(parameter is head for parameter in parameters.values())


def _forget_cpu_experts(model: torch.nn.Module) -> list[tuple[object, object]]:
    """Have the CPU backend pack expert weights again. Returns the (method, kernel) pairs that were forgotten.

    From vLLM 0.27 the backend packs them only when it builds the layer's kernel. Where it finds a kernel, it computes
    with the unpacked new weights as if they were packed.
    """
    forgotten = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        weight = module._parameters.get("w13_weight")
        if weight is not None and weight.device.type == "cpu" and getattr(method, "moe_kernel", None) is not None:
            forgotten.append((method, method.moe_kernel))
            method.moe_kernel = None
    return forgotten


def _repack_tied_head(model: torch.nn.Module) -> None:
    """Renew the packed copy of an output embedding that is tied to the input embedding.

    The two share a parameter, but no tensor arrives under the output's name, so reload does not repack it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    addresses = [m.weight.data_ptr() for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for module in model.modules():
        packed = isinstance(module, ParallelLMHead) and is_packed(module)
        if packed and addresses.count(module.weight.data_ptr()) > 1:
            module.quant_method.process_weights_after_loading(module)
