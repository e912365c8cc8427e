"""The weights that a model computes with, which are not always its parameters.

vLLM's CPU backend packs the weight of a linear layer for its matrix kernels and leaves an empty parameter behind, and
it keeps a packed copy beside the output embedding that its parameter no longer governs. "Every parameter is zero" is
true of empty parameters, whatever the layer computes. Such weights are read back through the layer: applied to the
identity it returns its weight, exactly, since every output is one product by 1 plus zeros.
"""

from collections.abc import Iterator

import torch

IDENTITY_ROWS = 1024  # of the identity at a time, to bound memory


def effective_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(vLLM's name, this rank's weight) of everything that the model computes with, each once.

    A weight read back through its layer comes as a fresh tensor, others as they are. Where a vocabulary embedding is
    looked up in a parameter and applied through a packed copy, both come, the copy as `<name>.weight (applied)`.
    Scales of quantised layers come too.
    """
    seen: set[tuple[int, int]] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (parameter.numel() == 0 and _is_packed(module)):
                continue
            # Tied embeddings are one weight under two names. Empty tensors share the address 0.
            key = (parameter.data_ptr(), parameter.numel())
            if parameter.numel() == 0 or key not in seen:
                seen.add(key)
                yield f"{prefix}.{name}", parameter.detach()
        if _is_packed(module) and _is_applied(model, module):
            kept = module._parameters["weight"].numel() > 0
            yield f"{prefix}.weight{' (applied)' if kept else ''}", applied_weight(module)


def applied_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight that a layer applies: this rank's [out, in], in the layer's dtype, as a fresh tensor."""
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


def all_zero(model: torch.nn.Module) -> tuple[bool, int]:
    """(whether every weight element is zero and at least one was looked at, how many elements were).

    Scales of quantised layers multiply weights and are left out.
    """
    elements = nonzero = 0
    for name, weight in effective_weights(model):
        if name.endswith(("_scale", "_scale_inv", "input_scale")):
            continue
        elements += weight.numel()
        nonzero += _count_nonzero(weight)
    return elements > 0 and nonzero == 0, elements


def _count_nonzero(weight: torch.Tensor) -> int:
    if weight.is_floating_point() and weight.element_size() == 1:
        weight = weight.to(torch.float32)  # counting is not implemented for the 8-bit floats
    return int(torch.count_nonzero(weight))


def _is_packed(module: torch.nn.Module) -> bool:
    return hasattr(module, "cpu_linear")


def _is_applied(model: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether the packed weight is used: an input embedding has one too, and only looks rows up."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        return isinstance(module, ParallelLMHead) or getattr(model, "lm_head", None) is module
    return True
