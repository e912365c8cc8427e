"""What an engine's rank computes with: written down where it was cold-loaded, compared wherever it was updated.

There are two kinds. *Weights* are what `effective_weights` yields, packed ones read back through their layers. What is
*beside* them is every other tensor that the walk finds: buffers, scales, tables and what is derived from weights.

Weights are compared to the last bit. Beside them, elements are left out in which cold engines of one checkpoint differ
by themselves, such as addresses and scratch space. They are found on the cold engine, before any update:

* The worker loads the checkpoint twice more, as an engine that starts does, and compares the two. What a load leaves
  unset differs too, since the first of them finds NaN in all new memory. Neither vLLM's reload nor the extension under
  examination takes part in these loads, so nothing that those spoil or forget is left out.
* The engine answers the same prompts twice, and what it computes with is compared before and after the second time.

The engine under examination has no part in this: an element that differs in it alone is never left out. Two loads in
one process do not show what changes from process to process only. vLLM keeps nothing like that in a model, and if it
did, engines would fail for it, not pass.
"""

import copy
import gc
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extensions.model.loading import configured
from extensions.model.walk import every_tensor
from extensions.model.weights import effective_weights
from extensions.tensors import dtype_name, flat_bytes
from suite.actors.written import weights_path, write_whole

Tensors = dict[str, torch.Tensor]
Beside = dict[str, "Kept"]
WHOLE = torch.zeros(0, dtype=torch.bool)  # instead of a mask: every element, however many there are


class Kept:
    """A copy of a tensor on the CPU, as integers of its elements' size: [elements], or [elements, 2] of 16 bytes."""

    def __init__(self, layout: str, bits: torch.Tensor) -> None:
        self.layout, self.bits = layout, bits

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Kept":
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        return cls(f"{dtype_name(dense.dtype)} {list(dense.shape)}", bits_of(dense.cpu().clone()))

    def digest(self) -> str:
        """The same for two tensors of the same dtype, shape and bits."""
        return f"{self.layout} {hashlib.sha256(self.bits.numpy()).hexdigest()}"

    def differing(self, other: "Kept") -> torch.Tensor:
        """Which elements differ: bool [elements]. The layouts have to be the same."""
        differs = self.bits != other.bits
        return differs if differs.ndim == 1 else differs.any(dim=1)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers of their size: [elements], or int64 [elements, 2] where one has 16 bytes."""
    size = tensor.element_size()
    bits = flat_bytes(tensor.contiguous()).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64))
    return bits.view(-1, 2) if size == 16 else bits


def weights_of(model: torch.nn.Module) -> Tensors:
    """Copies of the model's effective weights, on the CPU, each in memory of its own."""
    return {name: weight.cpu().clone().contiguous() for name, weight in effective_weights(model)}


def beside_of(model: torch.nn.Module, weights: Collection[str]) -> Beside:
    """Copies of every tensor that the model computes with, by path, but for those that `weights` names.

    Its callers have the names of the effective weights: to read packed ones back again takes as long as the first time.
    Empty tensors and those on the meta device have no values and are left out.
    """
    return {
        path: Kept.of(tensor)
        for path, tensor in every_tensor(model)
        if path not in weights and tensor.numel() and not tensor.is_meta
    }


# ---- what cold engines differ in


def unsteady_of(one: Beside, other: Beside) -> Tensors:
    """Masks by path of the elements in which the two differ, bool [elements]; WHOLE where one lacks the tensor."""
    masks = {}
    for path in one.keys() | other.keys():
        if path not in one or path not in other or one[path].layout != other[path].layout:
            masks[path] = WHOLE
        elif (differs := one[path].differing(other[path])).any():
            masks[path] = differs
    return masks


def both(masks: Tensors, more: Tensors) -> Tensors:
    """What one of the two leaves out."""
    joined = dict(masks)
    for path, mask in more.items():
        before = joined.get(path, mask)
        joined[path] = WHOLE if before.shape != mask.shape else before | mask
    return joined


def unsteady_loads(vllm_config: object, weights: Collection[str]) -> Tensors:
    """Load the checkpoint twice more, and say in what the two differ beside the weights.

    Both are held at once: what one had freed, the other would get at the same address.
    """
    with unset_is_nan():
        one = _loaded_again(vllm_config)
    other = _loaded_again(vllm_config)
    unsteady = unsteady_of(beside_of(one, weights), beside_of(other, weights))
    if torch.cuda.is_available():
        del one, other
        gc.collect()  # a model is made of cycles
        torch.cuda.empty_cache()
    return unsteady


def _loaded_again(vllm_config: object) -> torch.nn.Module:
    from vllm.model_executor.model_loader import get_model

    with _apart(vllm_config) as own, configured(own):
        return get_model(vllm_config=own)


@contextmanager
def _apart(vllm_config: object) -> Iterator[object]:
    """A configuration for one more model. The engine's keeps its layers, and its rotary embeddings stay its own."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    own = copy.copy(vllm_config)
    own.compilation_config = copy.copy(vllm_config.compilation_config)
    own.compilation_config.static_forward_context = {}
    own.compilation_config.static_all_moe_layers = []
    ropes = dict(_ROPE_DICT)
    _ROPE_DICT.clear()
    try:
        yield own
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(ropes)


@contextmanager
def unset_is_nan() -> Iterator[None]:
    """New memory is filled with NaN, integers with their largest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ---- on disk


def _beside_path(path: str, rank: int) -> Path:
    return Path(f"{path}.rank{rank}.beside.safetensors")


def _unsteady_path(path: str, rank: int) -> Path:
    return Path(f"{path}.rank{rank}.unsteady.safetensors")


def write(path: str, rank: int, weights: Tensors, beside: Beside, unsteady: Tensors | None = None) -> None:
    """Write copies of what a rank computes with."""
    layouts = {name: kept.layout for name, kept in beside.items()}
    bits = {name: kept.bits for name, kept in beside.items()}
    write_whole(_beside_path(path, rank), partial(save_file, bits, metadata=layouts))
    if unsteady is not None:
        write_whole(_unsteady_path(path, rank), partial(save_file, unsteady))
    write_whole(weights_path(path, rank), partial(save_file, weights))


def read_weights(path: str, rank: int) -> Tensors:
    return load_file(weights_path(path, rank))


def read_beside(path: str, rank: int) -> Beside:
    with safe_open(_beside_path(path, rank), framework="pt") as file:
        layouts = file.metadata() or {}
        return {name: Kept(layouts[name], file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


# ---- compared


def differing_weights(found: Iterable[tuple[str, torch.Tensor]], expected: Tensors) -> Iterator[str]:
    """What differs of the weights, a sentence for each, which begins with its name."""
    missing = dict(expected)
    for name, weight in found:
        reference = missing.pop(name, None)
        if reference is None:
            yield f"{name}: the engine has it, the reference does not"
        elif (weight.shape, weight.dtype) != (reference.shape, reference.dtype):
            wanted = f"{tuple(reference.shape)} {reference.dtype}"
            yield f"{name}: expected {wanted}, found {tuple(weight.shape)} {weight.dtype}"
        elif weight.is_meta:
            yield f"{name}: expected {weight.numel()} elements, found none: it is on the meta device"
        elif count := int((bits_of(weight.cpu()) != bits_of(reference)).sum()):
            yield f"{name}: {count} of {weight.numel()} elements differ"
    yield from (f"{name}: expected, but the engine has none" for name in missing)


def differing_beside(found: Beside, expected: Beside, unsteady: Tensors) -> list[str]:
    """What differs of the tensors beside the weights, a sentence for each, which begins with its path."""
    sentences = []
    for path in [*expected, *(path for path in found if path not in expected)]:
        mask = unsteady.get(path)
        if mask is not None and mask.shape == WHOLE.shape:
            continue
        if path not in found or path not in expected:
            there, not_there = ("a cold engine", "the engine") if path in expected else ("the engine", "a cold engine")
            sentences.append(f"{path}: {there} has it, {not_there} does not")
        elif found[path].layout != expected[path].layout:
            sentences.append(f"{path}: expected {expected[path].layout}, found {found[path].layout}")
        else:
            differs = found[path].differing(expected[path])
            count = int((differs if mask is None else differs & ~mask).sum())
            sentences += [f"{path}: {count} of {len(differs)} elements differ"] if count else []
    return sentences


def telling(weights: Tensors, other: str, rank: int) -> Tensors:
    """Those of a cold engine's weights that differ from what a cold engine of another checkpoint wrote at `other`.

    What both have in common depends on neither checkpoint: a rank of GPT-OSS has zeros for a bias that another adds.
    """
    differing = differing_weights(weights.items(), read_weights(other, rank))
    names = {said.partition(": ")[0] for said in differing}
    return {name: weight for name, weight in weights.items() if name in names}


def agreed(paths: Sequence[str], unsteady_at: str, rank: int) -> tuple[Beside, Tensors]:
    """What the engines that wrote at `paths` agree on, and masks of what is to be left out.

    With several checkpoints that is what depends on none of them.
    """
    first, *others = (read_beside(path, rank) for path in paths)
    unsteady = load_file(_unsteady_path(unsteady_at, rank))
    for other in others:
        unsteady = both(unsteady, unsteady_of(first, other))
    return first, unsteady
