"""Why an update does not fit a model, or would not make all its weights new: sentences, found in its plan."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from extensions.manifest import Layout, shown, wrong_dtype
from extensions.model.regions import Memory, Region, elements_filled

if TYPE_CHECKING:
    from extensions.plan import Plan


def misfits(plan: "Plan") -> list[str]:
    """The problems of announced tensors, without the weights for which no tensor was announced."""
    if plan.refused and not plan.fills:
        return [*_refused(plan)]  # the recording was given up: nothing is known of the other tensors
    return [*_refused(plan), *_unknown(plan), *_dtypes(plan), *_other_shapes(plan), *_filled_twice(plan)]


def missing(plan: "Plan") -> list[str]:
    """The problems of parameters that announced tensors do not fill, or fill only in part."""
    if plan.refused and not plan.fills:
        return []
    found = []
    for name, unfilled in plan.unfilled.items():
        if unfilled and unfilled != plan.kept.get(name) and name not in plan.refused:
            sources = names_of(read for fill in plan.into.get(name, ()) for read in fill.reads)
            rest = f"; the others are filled by {sources}" if sources else ""
            elements = f"{unfilled} of {plan.parameters[name].elements} elements"
            absent = ", ".join(other for other in plan.absent.get(name, ()) if other != name)
            where = f"{absent}: missing, {elements} of {name}" if absent else f"{name}: missing, {elements}"
            found.append(f"{where} are filled by no announced tensor{rest}")
    return found


def _refused(plan: "Plan") -> Iterable[str]:
    for name, said in plan.refused.items():
        yield f"{name}: load_weights refuses it in shape {list(plan.announced[name][1])}: {said}"


def unknown(plan: "Plan") -> list[str]:
    """The announced tensors from which nothing is written anywhere."""
    known = (plan.by_name, plan.elsewhere, plan.refused, plan.aliases)
    return [name for name in plan.announced if not any(name in names for names in known)]


def _unknown(plan: "Plan") -> Iterable[str]:
    for name in unknown(plan):
        if name in plan.dropped:
            yield f"{name}: load_weights drops it, from the engine's own checkpoint too; leave it out of the update"
        else:
            yield f"{name}: unknown, load_weights writes it nowhere"


def _dtypes(plan: "Plan") -> Iterable[str]:
    for name, fills in plan.by_name.items():
        yield from wrong_dtype(name, plan.announced[name][0], plan.tensors[fills[0].into].dtype)
    for name in plan.aliases:  # of embeddings, which are floating-point
        yield from wrong_dtype(name, plan.announced[name][0], torch.float32)


def _other_shapes(plan: "Plan") -> Iterable[str]:
    for name, other in plan.aliases.items():
        if other is None:
            continue
        found, expected = (list(plan.announced[tensor][1]) for tensor in (name, other))
        if found != expected:
            yield f"{name}: expected shape {expected}, that of {other}, found {found}"
    for fill in plan.fills:
        if fill.misfit:
            yield f"{names_of(fill.reads)}: other shape than {fill.into} takes, {fill.misfit}"
    yield from _partly_read(plan)


def _partly_read(plan: "Plan") -> Iterable[str]:
    for name in plan.elsewhere | plan.reads:
        shape, parts = plan.announced[name][1], [*plan.elsewhere.get(name, ()), *plan.reads.get(name, ())]
        if elements := unread(plan.announced[name], parts):
            total = math.prod(shape)
            yield f"{name}: other shape than expected, {elements} of {total} elements of {list(shape)} go nowhere"


def _filled_twice(plan: "Plan") -> Iterable[str]:
    for name, memory in plan.parameters.items():
        loaded = [fill for fill in plan.into.get(name, ()) if fill.reads]
        filled = elements_filled([fill.region for fill in loaded], memory)
        if twice := sum(elements for times, elements in filled.items() if times > 1):
            sources = names_of(read for fill in loaded for read in fill.reads)
            yield f"{name}: {twice} of {memory.elements} elements are filled more than once, by {sources}"


def names_of(reads: Iterable[tuple[str, Region]]) -> str:
    """The names of announced tensors that are read, as a message shows them."""
    return shown(list(dict.fromkeys(name for name, _ in reads)))


def unread(layout: Layout, parts: list[Region]) -> int:
    """How many elements of a tensor lie in none of its parts."""
    dtype, shape = layout
    return elements_filled(parts, Memory(math.prod(shape) * dtype.itemsize, dtype.itemsize)).get(0, 0)
