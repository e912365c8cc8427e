"""The weights that a model computes with, which are not always its parameters.

vLLM's CPU backend packs the weight of a linear layer for its matrix kernels and leaves an empty parameter behind.
Beside the output embedding's parameter it keeps a packed copy, and computes with the copy. "Every parameter is zero" is
true of empty parameters, whatever the layer computes. So packed weights are read back through the layer: applied to the
identity, a layer returns its weight. The result is exact, since every output is one product by 1 plus zeros.
"""

from collections.abc import Iterator

import torch

IDENTITY_ROWS = 1024  # rows of the identity that a layer is applied to at a time, to bound memory


def effective_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (vLLM's name, this rank's weight) of every weight that the model computes with, each once.

    A weight that was read back through its layer is a fresh tensor; any other is the parameter itself. A vocabulary
    embedding may be looked up in its parameter and applied through a packed copy: then both are yielded, the copy as
    `<name>.weight (applied)`. Scales of quantised layers are yielded too.
    """
    seen: set[tuple[int, int]] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (parameter.numel() == 0 and is_packed(module)):
                continue
            # Tied embeddings are one weight under two names: told by the address. All empty tensors have address 0.
            key = (parameter.data_ptr(), parameter.numel())
            if parameter.numel() == 0 or key not in seen:
                seen.add(key)
                yield f"{prefix}.{name}", parameter.detach()
        if is_packed(module) and _is_applied(model, module):
            kept = module._parameters["weight"].numel() > 0
            yield f"{prefix}.weight{' (applied)' if kept else ''}", applied_weight(module)


def applied_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight that a linear layer applies: this rank's [out, in] in the layer's dtype, as a fresh tensor."""
    weight = module._parameters["weight"]
    columns = getattr(module, "input_size_per_partition", None) or getattr(module, "embedding_dim", None)
    if columns is None:
        columns = module.input_size
    rows = []
    for start in range(0, columns, IDENTITY_ROWS):
        count = min(IDENTITY_ROWS, columns - start)
        ones = torch.zeros(count, columns, dtype=weight.dtype, device=weight.device)
        ones[torch.arange(count), torch.arange(start, start + count)] = 1
        rows.append(module.quant_method.apply(module, ones, None))
    return torch.cat(rows).t().contiguous()


def all_zero(model: torch.nn.Module) -> bool:
    """Whether every weight element is zero, and there is at least one. Scales of quantised layers are not counted."""
    elements = nonzero = 0
    for name, weight in effective_weights(model):
        if name.endswith(("_scale", "_scale_inv", "input_scale")):
            continue
        elements += weight.numel()
        nonzero += _count_nonzero(weight)
    return elements > 0 and nonzero == 0


def _count_nonzero(weight: torch.Tensor) -> int:
    if weight.is_floating_point() and weight.element_size() == 1:
        weight = weight.to(torch.float32)  # torch cannot count in 8-bit floats
    return int(torch.count_nonzero(weight))


def is_packed(module: torch.nn.Module) -> bool:
    """Whether vLLM's CPU backend keeps a packed copy of this layer's weight, which the layer computes with."""
    return "cpu_linear" in vars(module)  # not hasattr: vLLM's wrapper for LoRA answers for the layer in it


def _is_applied(model: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether the layer computes with its packed weight. An input embedding has one and does not use it.

    Latent attention on CPUs with AMX takes what it needs of a layer's weight, and leaves the layer without any.
    """
    if module.cpu_linear is torch.nn.functional.linear and not module._parameters["weight"].numel():
        return False
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        return isinstance(module, ParallelLMHead) or getattr(model, "lm_head", None) is module
    return True
