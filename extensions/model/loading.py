"""Getting tensors into a model that may have repacked or quantised its weights.

`DirectLoad` writes into the model's parameters. That is right only while they are those the checkpoint was loaded into.
Where processing after loading has replaced them, `LayerwiseReload` restores each layer's original parameters, writes
into those, has vLLM process the layer again and copies the result to where the old one was. So addresses captured in
CUDA graphs stay valid.

With a plan, a layer is processed once everything that fills it has been written. Without one, vLLM's own wrappers
around the parameters' loaders count what a layer has got; they do not see what a model copies past them.

Parts of vLLM without a public name are used. vLLM has no call that gives a reload up, nor one that processes a single
layer: `_place_kernel_tensors`, `_layerwise_process` and the attributes that the reload leaves on layers and model are
used for that. vLLM's reload does not repack experts on the CPU, so `_forget_cpu_experts` takes `moe_kernel` off them.
"""

from collections.abc import Iterable
from functools import partial

import torch

from extensions.model.load import DirectLoad, Load, configured
from extensions.model.twin import default_dtype, unwrap_loader
from extensions.model.weights import is_packed
from extensions.plan import Plan


def processed_layers(model: torch.nn.Module) -> list[str]:
    """Names of layers whose parameters are not those a checkpoint loads into: repacked, shuffled or quantised.

    A mixture-of-experts layer always counts. Its kernels may permute weights in place and keep their shapes, and
    loading over permuted weights corrupts them in silence (vllm#42821). So does latent attention, which derives
    matrices from its weights.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    names = []
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        held = isinstance(method, QuantizeMethodBase) and any(True for _ in module.parameters(recurse=False))
        processed = held and (type(method) not in plain or is_packed(module))
        if processed or (hasattr(module, "kv_b_proj") and hasattr(module, "process_weights_after_loading")):
            names.append(prefix)
    return names


class LayerwiseReload(Load):
    """For every other model, through `vllm.model_executor.model_loader.reload`."""

    def __init__(self, model: torch.nn.Module, vllm_config: object, plan: Plan | None) -> None:
        super().__init__(model, vllm_config, plan)
        self.expert_kernels: list[tuple[object, object]] = []  # (method, kernel), to put back on abort
        self._waiting = {path: set(names) for path, names in plan.layers.items()} if plan is not None else {}
        self._restored: set[str] = set()
        self._attention = {path for path in self._waiting if is_attention(self._layers[path])}

    def begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        _name_loaders(self._model)
        self.expert_kernels = _forget_cpu_experts(self._model)
        with configured(self._vllm_config):
            initialize_layerwise_reload(self._model)

    def load_pieces(self, pieces: Iterable[tuple[str, int, torch.Tensor]]) -> None:
        with configured(self._vllm_config):  # a layer that is whole is processed
            super().load_pieces(pieces)

    def end(self) -> None:
        self._settle()
        with configured(self._vllm_config):
            finalize(self._model, self._vllm_config.model_config)
            _repack_tied_head(self._model)
        self._require_same_views()
        self._require_equal_heads()

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

    def unwritten(self) -> list[str]:
        if self._plan is None:
            return _unloaded_layers(self._model)
        return [
            f"{path}, which waits for {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for path, names in self._waiting.items()
            if names
        ]

    def _is_copied(self, name: str) -> bool:
        """Scales of attention layers are processed by vLLM when it finishes, so its loaders have to see them."""
        return super()._is_copied(name) and self._attention.isdisjoint(self._plan.filled[name])

    def _restore(self, path: str) -> None:
        """Give a layer memory for the tensors that a checkpoint is loaded into, and loaders that write into it.

        Elements that no announced tensor fills keep their values.
        """
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        if path in self._restored or path in self._attention:
            return
        self._restored.add(path)
        layer = self._layers[path]
        parameters, buffers = get_layerwise_info(layer).kernel_tensors
        before = parameters | buffers
        device = next(iter(before.values())).device
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = _with_memory(tensor, device)
                    old = before.get(name)
                    if f"{path}.{name}" in self._plan.left and old is not None and old.shape == tensor.shape:
                        tensors[name].data.copy_(old)
                unwrap_loader(tensors[name])

    def _takes(self, found: torch.dtype, planned: torch.dtype) -> bool:
        """Float32 too: the CPU backend widens the biases of small layers, and vLLM's reload leaves them so."""
        return super()._takes(found, planned) or (found == torch.float32 and planned.itemsize == 2)

    def _written(self, names: Iterable[str]) -> None:
        filled = self._plan.filled if self._plan is not None else {}
        for path in {path for name in names for path in filled.get(name, ())}:
            waiting = self._waiting[path]
            before = len(waiting)
            waiting.difference_update(names)
            if before and not waiting and path not in self._attention:
                self._process(path)

    def _process(self, path: str) -> None:
        """Have vLLM process a layer that is whole, and put the result where the old one was."""
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

        self._renew_views(path)
        layer = self._layers[path]
        info = get_layerwise_info(layer)
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):
            _give_memory(info.kernel_tensors[0], layer)
        for name, buffer in info.kernel_tensors[1].items():
            if f"{path}.{name}" in self._plan.into:  # vLLM leaves some buffers as they were
                buffer.data.copy_(layer._buffers[name])
        _layerwise_process(layer, info)


class PartialReload(LayerwiseReload):
    """For an update of some of the layers of such a model: those that the plan fills. The others stay as they are."""

    def begin(self) -> None:
        super().begin()
        self._put_back({id(layer) for path, layer in self._layers.items() if path not in self._waiting})

    def _put_back(self, untouched: set[int]) -> None:
        """Give layers what they had before the update began. Those of attention are processed again by vLLM."""
        from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

        methods = set()
        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            if id(layer) not in untouched or is_attention(layer):
                continue
            if info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()
            methods.add(id(getattr(layer, "quant_method", None)))
        for method, kernel in self.expert_kernels:
            if id(method) in methods:
                method.moe_kernel = kernel


def new_load(model: torch.nn.Module, vllm_config: object, plan: Plan | None = None) -> Load:
    """The cheaper of the two that is right for this model."""
    kind = LayerwiseReload if processed_layers(model) else DirectLoad
    return kind(model, vllm_config, plan)


def partial_load(model: torch.nn.Module, vllm_config: object, plan: Plan | None) -> Load:
    """As `new_load`, for a plan that fills some of the layers. Where it fills none, or is None, nothing is prepared."""
    kind = PartialReload if plan is not None and plan.fills and processed_layers(model) else DirectLoad
    return kind(model, vllm_config, plan)


def finalize(model: torch.nn.Module, model_config: object) -> None:
    """Have vLLM's layerwise reload finish all layers. Versions of vLLM have it under one name or the other."""
    from vllm.model_executor.model_loader import reload

    finish = getattr(reload, "finalize_layerwise_reload", None) or reload.finalize_layerwise_processing
    with default_dtype(model_config.dtype):
        finish(model, model_config)


def _name_loaders(model: torch.nn.Module) -> None:
    """Give loaders that are partials a name: they have none, and vLLM's reload compares those of all (MiniMax-M2)."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        for tensors in (layer._parameters, layer._buffers, *get_layerwise_info(layer).restore_metadata):
            loaders = (getattr(tensor, "weight_loader", None) for tensor in tensors.values())
            for loader in loaders:
                if isinstance(loader, partial):
                    loader.__name__ = "partial"


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


def _give_memory(parameters: dict[str, torch.Tensor], layer: torch.nn.Module) -> None:
    """Give a layer memory for weights that were released: on CPUs with AMX, latent attention does so with kv_b_proj's.

    vLLM's reload needs memory to copy into. Attention is processed last, takes what it needs and releases it again.
    """
    for name, released in parameters.items():
        loaded = layer._parameters[name]
        if not released.numel():
            parameters[name] = torch.nn.Parameter(torch.empty_like(loaded.data), requires_grad=False)


def _with_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same class, attributes and layout, with memory for its values."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device, requires_grad=False)
    made.__class__ = tensor.__class__
    made.__dict__ = tensor.__dict__.copy()
    return made


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether vLLM processes this layer after all others."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return isinstance(layer, AttentionLayerBase) and hasattr(layer, "process_weights_after_loading")


def _unloaded_layers(model: torch.nn.Module) -> list[str]:
    """The layers of which vLLM's reload has seen too few elements, but for those that it finishes in another way."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = []
    for path, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_attention(layer) or isinstance(layer, VocabParallelEmbedding):
            continue
        if info.load_numel < info.load_numel_total and any(True for _ in layer.parameters(recurse=False)):
            found.append(f"{path}, of which {info.load_numel} of {info.load_numel_total} elements were loaded")
    return found
