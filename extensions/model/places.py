"""Which announced tensors may be written into a model element by element, and where each element goes.

A tensor may be written so if the plan copies it as it is, into layers whose parameters are as they were loaded. Any
other is loaded whole, together with all tensors that fill the same layers: they are a unit.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from extensions.elements import INTEGERS, MAX_POSITION, Destination
from extensions.model.load import DirectLoad, LoadError
from extensions.model.loading import is_attention, processed_layers
from extensions.model.regions import Region, part
from extensions.model.twin import Fill, split, without_lora
from extensions.patches import units_of
from extensions.plan import Plan

SAMPLED = 64  # elements of a parameter that are looked at


@dataclass(frozen=True)
class Places:
    """Where the elements of an update go on one rank.

    destinations: by the names of tensors that are written element by element; empty where this rank has no part of one.
    units: of each announced tensor in their order, EACH (`extensions.patches`) or the number of the first in its unit.
    """

    destinations: dict[str, list[Destination]]
    units: list[int]


def places_of(model: torch.nn.Module, vllm_config: object, plan: Plan | None, names: list[str]) -> Places:
    """The places of the announced tensors `names`. Without a plan they are one unit."""
    if plan is None:
        return Places({}, [0] * len(names))
    load, whole = DirectLoad(model, vllm_config, plan), _whole_layers(model, plan)
    found = {name: _destinations(load, plan, name, whole) for name in names}
    alone = {name for name, destinations in found.items() if destinations is None}
    return Places(
        {name: destinations for name, destinations in found.items() if destinations is not None},
        units_of([*_together(plan, whole), *([name] for name in alone)], names),
    )


def part_of_plan(plan: Plan, names: Iterable[str]) -> Plan:
    """The plan of an update of these tensors alone. They are whole units: nothing else fills what they fill."""
    chosen = {*names}
    announced = {name: layout for name, layout in plan.announced.items() if name in chosen}
    into = {fill.into for name in announced for fill in plan.of(name)}
    fills = [
        fill
        for fill in plan.fills
        if any(name in announced for name, _ in fill.reads) or (not fill.reads and fill.into in into)
    ]
    aliases = {name: embedding for name, embedding in plan.aliases.items() if name in announced}
    views = [view for view in plan.views if view.of in into]
    return replace(plan, announced=announced, fills=fills, aliases=aliases, views=views)


def _whole_layers(model: torch.nn.Module, plan: Plan) -> set[str]:
    """Paths of the layers that are loaded whole: their tensors are processed, or others are derived from them."""
    modules = {without_lora(path): module for path, module in model.named_modules()}
    found = {without_lora(path) for path in processed_layers(model)}
    found |= {split(view.of)[0] for view in plan.views}
    sources = [modules[path].kv_b_proj for path in found if hasattr(modules[path], "kv_b_proj")]  # latent attention's
    read = {id(module) for source in sources for module in source.modules()}
    return found | {path for path, module in modules.items() if is_attention(module) or id(module) in read}


def _together(plan: Plan, whole: set[str]) -> Iterator[Iterable[str]]:
    """Tensors that are only loaded together, and whole."""
    yield from (names for path, names in plan.layers.items() if path in whole)
    yield from ([name for name, _ in fill.reads] for fill in plan.fills if len(fill.reads) > 1)
    yield from ([name, embedding] if embedding else [name] for name, embedding in plan.aliases.items())
    if plan.together:
        yield plan.converted


def _destinations(load: DirectLoad, plan: Plan, name: str, whole: set[str]) -> list[Destination] | None:
    """Where a tensor's elements go; None where it has to be loaded whole."""
    dtype, shape = plan.announced[name]
    fills, elements = plan.of(name), math.prod(shape)
    if name in plan.aliases or elements > MAX_POSITION or dtype.itemsize not in INTEGERS:
        return None
    if fills and (name not in plan.copied or name in plan.spoilt):
        return None
    found = [_destination(load, fill, dtype, elements) for fill in fills if split(fill.into)[0] not in whole]
    return None if len(found) < len(fills) or None in found else found


def _destination(load: DirectLoad, fill: Fill, dtype: torch.dtype, elements: int) -> Destination | None:
    try:
        target = load._target(fill.into)
    except LoadError:  # it has been processed
        return None
    read, write = fill.reads[0][1], fill.region
    steps = steps_of(read, write)
    if target.dtype != dtype or fill.conversion or steps is None:
        return None
    memory = part(target, replace(write, shape=(_extent(write),), stride=(write.itemsize,)))
    return Destination(elements, read.offset // read.itemsize, steps, memory.view(INTEGERS[dtype.itemsize]))


def steps_of(read: Region, write: Region) -> tuple[tuple[int, int, int], ...] | None:
    """How positions in `read` become places in `write`, as in Destination.steps; None where they are not one to one."""
    dims = [
        (step // read.itemsize, size, to // write.itemsize)
        for size, step, to in zip(read.shape, read.stride, write.stride, strict=True)
        if size != 1
    ]
    dims.sort(reverse=True)
    joined: list[tuple[int, int, int]] = []
    for step, size, to in dims:
        outer = joined[-1] if joined else None
        if outer is not None and outer[0] == size * step and outer[2] == size * to:
            joined[-1] = (step, outer[1] * size, to)
        else:
            joined.append((step, size, to))
    nested = all(outer[0] >= inner[0] * inner[1] for outer, inner in pairwise(joined))
    apart = all(step > 0 and to > 0 for step, _, to in joined)
    return tuple(joined or [(1, min(1, read.elements), 1)]) if nested and apart and read.elements else None


def _extent(region: Region) -> int:
    """Elements of a tensor from the first of a region to its last."""
    sizes = zip(region.shape, region.stride, strict=True)
    return 1 + sum((size - 1) * step // region.itemsize for size, step in sizes)


class Sample:
    """Some elements of each parameter of a model, which show whether the parameters still have their values.

    Sleep drops parameters, and loading past the extension replaces them. Either leaves few elements unchanged.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._views: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
        for parameter in model.parameters():
            if parameter.numel() and parameter.element_size() in INTEGERS and not parameter.is_meta:
                self._views.setdefault((parameter.device, parameter.element_size()), []).append(_some(parameter.data))
        self.take()

    def take(self) -> None:
        """Remember the elements as they are now. Call this only while the parameters are where they were at first."""
        self._values = self._now()

    def holds(self) -> bool:
        """Whether the elements are as remembered."""
        return all(torch.equal(*pair) for pair in zip(self._values, self._now(), strict=True))

    def _now(self) -> list[torch.Tensor]:
        return [torch.cat(views) for views in self._views.values()]


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Up to SAMPLED elements, evenly over the tensor's memory, as integers that share it."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(SAMPLED, extent)
    spread = tensor.as_strided((count,), (max(1, extent // count),), tensor.storage_offset())
    return spread.view(INTEGERS[tensor.element_size()])
