"""Loading one update into a model: what every way of loading shares, and the plain way.

A plan says where each tensor goes. Plain copies are made here; `load_weights` loads what is more than a copy.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from extensions.model.regions import Region, memory_id, overlaps, part, region_of
from extensions.model.twin import REPLACES, Fill, split, without_lora
from extensions.model.views import View, resolve
from extensions.plan import Plan

COMPARED_BYTES = 4 * 2**20  # of a piece at a time, since comparing takes memory


class LoadError(RuntimeError):
    """A load that did not write every announced element to where it belongs."""


class Writes(TorchDispatchMode):
    """Counts the elements that are written into each tensor's memory."""

    def __init__(self) -> None:
        super().__init__()
        self._elements: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            self._elements[memory_id(args[0])] += args[0].numel()
        return function(*args, **(kwargs or {}))

    def into(self, tensor: torch.Tensor) -> int:
        return self._elements[memory_id(tensor)]


class Load(ABC):
    """One update of one model, from `begin` to `end` or `abort`."""

    def __init__(self, model: torch.nn.Module, vllm_config: object, plan: Plan | None) -> None:
        self._model, self._vllm_config, self._plan = model, vllm_config, plan
        self.together = plan is None or plan.together  # whether load_weights gets all tensors in one call, at the end
        self._touched = False  # whether load() has been called
        self._held: dict[str, torch.Tensor] = {}  # what has to be loaded together
        self._heads: dict[str, torch.Tensor] = {}  # output embeddings that are tied: compared at the end
        self._unequal: dict[str, list[torch.Tensor]] = {}  # tied heads in pieces: whether a part was unequal
        self._there: set[str] = set()  # what has been copied
        self._layers = layers_of(model)
        self._views = _views_by_layer(model, plan)

    @abstractmethod
    def begin(self) -> None:
        """Prepare the model for new weights."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take full tensors under their checkpoint names; they may be kept until `end`.

        Give it all tensors at hand in one call. Each call of `load_weights` walks the model, and in some versions of
        vLLM the walk takes longer than the copy of a tensor.
        """
        self._touched = True
        if self._plan is not None:
            tensors = self._copied(tensors)
        if self.together:
            self._held |= tensors
        elif tensors:
            self._convert(tensors)

    def again(self) -> "Load | None":
        """This load, for another update of the same tensors; None where a new one has to be made."""
        return None

    def place(self, name: str) -> torch.Tensor | None:
        """The memory in the model that a tensor may be received into; None where it has to be given to `load`."""
        return None

    def written_past(self, names: Iterable[str]) -> None:
        """These tensors are being received into their places, past `load`."""
        self._touched = True
        self._there.update(names)
        self._written(names)

    def takes_pieces(self, name: str) -> bool:
        """Whether a tensor can be given to `load_pieces`; any other has to be loaded whole."""
        if self._plan is None:
            return False
        if name in self._plan.aliases:
            embedding = self._plan.aliases[name]
            return embedding is None or embedding in self._there
        return self._is_copied(name) or not self._plan.of(name)

    def load_pieces(self, pieces: Iterable[tuple[str, int, torch.Tensor]]) -> None:
        """Copy pieces (checkpoint name, first byte, bytes): those of each tensor in their order, without a gap.

        No piece is kept. A piece is a uint8 tensor of one dimension that begins and ends between two elements.
        """
        self._touched = True
        for name, start, piece in pieces:
            dtype, shape = self._plan.announced[name]
            values, end = piece.view(dtype), start + piece.numel()
            if name in self._plan.aliases:
                self._compare(name, start, values)
                continue
            for read, target in self._targets_of(name, start, end):
                target.copy_(part(values, read))
            if end == math.prod(shape) * dtype.itemsize:
                self._there.add(name)
                self._written([name])

    def _targets_of(self, name: str, start: int, end: int) -> list[tuple[Region, torch.Tensor]]:
        """The parts of a piece, from byte `start` to `end` of its tensor, and where each belongs in the model."""
        return [
            (read, part(target, write))
            for fill in self._plan.of(name)
            for target in [self._target(fill.into)]
            for read, write in overlaps(fill.reads[0][1], fill.region, start, end)
        ]

    def _compare(self, name: str, start: int, values: torch.Tensor) -> None:
        """Compare a flat piece of a tied output embedding with the input embedding, which has arrived before."""
        size, embedding = values.element_size(), self._plan.aliases[name]
        for fill in self._plan.of(embedding) if embedding is not None else ():
            live, region = self._tensor(fill.into), _of_itemsize(size, fill.reads[0][1])
            for index, some in enumerate(values.split(COMPARED_BYTES // size)):
                begin = start + index * COMPARED_BYTES
                for read, write in overlaps(region, fill.region, begin, begin + some.nbytes):
                    there, sent = part(live, write), part(some, read).to(live.dtype)
                    unequal = there.contiguous().view(torch.uint8) != sent.contiguous().view(torch.uint8)
                    self._unequal.setdefault(name, []).append(unequal.any())

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy what the plan copies. Returns the others, which `load_weights` has to load."""
        left = {}
        with configured(self._vllm_config):
            for name, tensor in tensors.items():
                if name in self._plan.aliases:
                    self._heads[name] = tensor
                elif self._is_copied(name):
                    self._copy(self._plan.copied[name], tensor)
                    self._there.add(name)
                    self._written([name])
                elif self._plan.of(name):
                    left[name] = tensor
        return left

    def _is_copied(self, name: str) -> bool:
        return name in self._plan.copied

    def _copy(self, fills: list[Fill], tensor: torch.Tensor) -> None:
        whole = tensor.detach().contiguous()
        for fill in fills:
            part(self._target(fill.into), fill.region).copy_(part(whole, fill.reads[0][1]))

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        """Have `load_weights` load these."""
        with configured(self._vllm_config):
            for fill in (fill for name in tensors for fill in self._planned(name)):
                self._restore(split(fill.into)[0])
            with unwrapped(self._model), Writes() as writes:
                self._model.load_weights(self._kept_whole(tensors))
            self._require_writes(writes, tensors)
            self._written(tensors)

    def _kept_whole(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, or copies where `load_weights` may write into them: their memory may be the trainer's."""
        for name, tensor in tensors.items():
            yield name, tensor.clone() if self._plan is None or name in self._plan.spoilt else tensor

    def _require_writes(self, writes: "Writes", tensors: dict[str, torch.Tensor]) -> None:
        """Raise LoadError where `load_weights` wrote fewer elements than it did when the plan was made."""
        expected: Counter[str] = Counter()
        for fill in {id(fill): fill for name in tensors for fill in self._planned(name)}.values():
            expected[fill.into] += fill.region.elements if REPLACES not in fill.conversion else 0
        for into, elements in expected.items():
            found = writes.into(self._tensor(into))
            if found < elements:
                names = [name for name in tensors if any(fill.into == into for fill in self._planned(name))]
                raise LoadError(f"{names[0]}: {found} of {elements} elements were written to {into}")

    def _planned(self, name: str) -> list[Fill]:
        return self._plan.of(name) if self._plan is not None else []

    def _tensor(self, name: str) -> torch.Tensor:
        """The tensor that a layer has under this name now."""
        path, attribute = split(name)
        found = self._layers[path]._parameters.get(attribute)
        return (self._layers[path]._buffers[attribute] if found is None else found).data

    def _target(self, into: str) -> torch.Tensor:
        """The tensor of this name that loading writes into. Raises LoadError where the plan was made for another."""
        self._restore(split(into)[0])
        target, planned = self._tensor(into), self._plan.tensors[into]
        alike = self._takes(target.dtype, planned.dtype)
        if not alike or (target.shape, target.stride()) != (planned.shape, planned.stride()):
            expected, there = (f"{t.dtype} {list(t.shape)}" for t in (planned, target))
            raise LoadError(f"{into}: planned as {expected}, found {there}; the plan is not of this model any more")
        return target

    def _takes(self, found: torch.dtype, planned: torch.dtype) -> bool:
        """Whether a tensor that was planned with one dtype may have another."""
        return found == planned

    def _renew_views(self, path: str) -> None:
        """Give the views of a layer's tensors the values that these have now."""
        for view, tensor in self._views.get(path, ()):
            tensor.data.copy_(part(self._tensor(view.of), view.region))

    def _require_same_views(self) -> None:
        """Raise LoadError where the model now computes with another tensor than the one that was renewed."""
        for view, tensor in (pair for pairs in self._views.values() for pair in pairs):
            if resolve(self._model, view).data_ptr() != tensor.data_ptr():
                raise LoadError(f"{view.of}: {view.path}, which was renewed with it, was replaced meanwhile")

    def _restore(self, path: str) -> None:  # noqa: B027 (nothing is to be done for a layer that is as loaded)
        """Make a layer ready to be written into."""

    def _written(self, names: Iterable[str]) -> None:  # noqa: B027
        """These tensors are where they belong."""

    def unwritten(self) -> list[str]:
        """A sentence for each announced tensor that is not where it belongs. Asked when all tensors have been taken."""
        return []

    def _settle(self) -> None:
        """Load what was kept. Raises LoadError where something is not where it belongs."""
        if self._held:
            held, self._held = self._held, {}
            self._convert(held)
        if lost := self.unwritten():
            raise LoadError(f"{len(lost)} announced weights were not written to where they belong, first {lost[0]}")

    def _require_equal_heads(self) -> None:
        """Raise LoadError where a tied output embedding came with other values than the input embedding has now."""
        for name, tensor in self._heads.items():
            self._compare(name, 0, tensor.contiguous().view(-1))
        for name, unequal in self._unequal.items():
            if any(found.item() for found in unequal):
                raise LoadError(
                    f"{name}: its values are not those of {self._plan.aliases[name]}, and this engine has one tensor"
                    " for the two"
                )

    @abstractmethod
    def end(self) -> None:
        """Finish all layers. The model computes with the new weights afterwards."""

    @abstractmethod
    def abort(self) -> bool:
        """Give up. Returns True if the model computes with exactly the weights it had before `begin`."""


class DirectLoad(Load):
    """For models whose parameters are as loaded: unquantised dense models on GPUs."""

    def __init__(self, model: torch.nn.Module, vllm_config: object, plan: Plan | None) -> None:
        super().__init__(model, vllm_config, plan)
        self._places: dict[str, torch.Tensor | None] = {}
        self._targets: dict[tuple[str, int, int], list[tuple[Region, torch.Tensor]]] = {}

    def again(self) -> "DirectLoad | None":
        """This load, for another update of the same tensors; None where it holds tensors of this one."""
        if self._held or self._heads:
            return None
        self._touched = False
        self._there.clear()
        self._unequal.clear()
        return self

    def place(self, name: str) -> torch.Tensor | None:
        """One part of one parameter, contiguous, that gets all elements of the tensor as they are."""
        if name not in self._places:
            self._places[name] = self._only_place(name)
        return self._places[name]

    def _only_place(self, name: str) -> torch.Tensor | None:
        fills = self._plan.copied.get(name, ()) if self._plan is not None and name not in self._plan.aliases else ()
        if len(fills) != 1:
            return None
        (fill,), (dtype, shape) = fills, self._plan.announced[name]
        found = part(self._target(fill.into), fill.region)
        whole = region_of(torch.empty(shape, dtype=dtype, device="meta"))
        as_sent = found.dtype == dtype and fill.reads[0][1] == whole
        return found if as_sent and found.is_contiguous() else None

    def _targets_of(self, name: str, start: int, end: int) -> list[tuple[Region, torch.Tensor]]:
        """As in Load; found once, for the updates after this one."""
        key = (name, start, end)
        if key not in self._targets:
            self._targets[key] = super()._targets_of(name, start, end)
        return self._targets[key]

    def begin(self) -> None:
        """Nothing is to be prepared."""

    def end(self) -> None:
        """Each tensor was copied into its parameter as it was loaded."""
        self._settle()
        for path in self._views:
            self._renew_views(path)
        self._require_same_views()
        self._require_equal_heads()

    def abort(self) -> bool:
        return not self._touched


def _views_by_layer(model: torch.nn.Module, plan: Plan | None) -> dict[str, list[tuple[View, torch.Tensor]]]:
    found: dict[str, list[tuple[View, torch.Tensor]]] = {}
    for view in plan.views if plan is not None else ():
        found.setdefault(split(view.of)[0], []).append((view, resolve(model, view)))
    return found


@contextmanager
def configured(vllm_config: object) -> Iterator[None]:
    """Set vLLM's current configuration, which layers look up when they are built, loaded or processed.

    Before 0.28 vLLM's reload does not set it itself.
    """
    from vllm.config import set_current_vllm_config

    with torch.no_grad(), set_current_vllm_config(vllm_config):
        yield


@contextmanager
def unwrapped(model: torch.nn.Module) -> Iterator[None]:
    """Take off vLLM's LoRA wrappers around layers, through which not every `load_weights` finds its parameters."""
    wrappers = [
        (parent._modules, name, wrapper)
        for parent in model.modules()
        for name, wrapper in parent._modules.items()
        if name != "base_layer" and wrapper is not None and "base_layer" in wrapper._modules
    ]
    for modules, name, wrapper in wrappers:
        modules[name] = wrapper.base_layer
    try:
        yield
    finally:
        for modules, name, wrapper in wrappers:
            modules[name] = wrapper


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of a model by path. A layer that vLLM has wrapped for LoRA goes by the path that it had before."""
    return {without_lora(path): module for path, module in model.named_modules()}


def _of_itemsize(size: int, region: Region) -> Region:
    """The same elements of a tensor whose elements have another size."""
    old = region.itemsize
    return Region(region.offset // old * size, region.shape, tuple(s // old * size for s in region.stride), size)
