"""A plan says which part of which parameter each announced tensor fills, and through which conversion.

Method. A model's own `load_weights` turns a checkpoint's tensors into parameters: it fuses, shards, transposes and
casts. It has no table of this that could be read. So it is run once, without data, and watched:

1. Build a twin of the live model on the meta device (`model/twin.py`). It has the same class and configuration, the
   same parameters are tied, and there is no memory.
2. Give the announced tensors, as meta tensors, to the twin's `load_weights`, inside a TorchDispatchMode. The mode sees
   every operation. A meta tensor's storage tells which tensor it belongs to; offset, shape and strides tell which part.
   The result of an operation is remembered with the parts that it was computed from. A write into a parameter or buffer
   is not carried out but noted: the part written, the parts read, the operations in between.
3. Check the notes before the live model is touched. Each element of a parameter has to be filled exactly once, unless
   the engine's own checkpoint leaves it out too. Each announced element has to be read on this rank or on another; to
   know of other ranks, build their twins here.

An update follows the notes. A tensor that fills one contiguous part of one parameter unchanged is received right there,
by NCCL into the live weight. A tensor of which parts are copied, and at most cast, may arrive in pieces of any size.
Only the others go through `load_weights` again, and the elements that it writes for them are counted.

Recording a loader and replaying it is known from vLLM's sharded transfer over NIXL and from prime-rl. New here: tensors
are received in the recorded places over plain NCCL and IPC, and an update that does not fit is refused.

Limits.
* A loader that reads values cannot be recorded. There is no plan then, and updates go through `load_weights`.
* Two faults go unseen: elements that `load_weights` computes with and then drops, and a constant that it writes over
  elements that a tensor fills.
* Layers that vLLM processes after loading (packed, quantised, experts) are put back into their loaded form, filled, and
  processed again (`model/loading.py`).
* A plan holds for one rank and one manifest, and takes 0.02 to 0.8 s to make.

Safety.
* A kept plan is used again only for the same announced tensors, and while every parameter and buffer of the model has
  the address and the shape that it had (`kept.py`).
* Before each update, both ends compare a digest of names, dtypes, shapes and order (`planned.py`).
* Before a tensor of the model is written to, its dtype, shape and strides are compared with the twin's.
* An update that does not fit is refused by name, and nothing is touched. One that breaks off later leaves the model
  marked as inconsistent until a whole update succeeds.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from extensions.manifest import SHOWN, Announced, Layout, Manifest, parse
from extensions.model.headers import checkpoint_layouts
from extensions.model.regions import Memory, Region, elements_filled
from extensions.model.twin import (
    REPLACES,
    SPOILS,
    Fill,
    LoadFailed,
    TwinFailed,
    kv_scales,
    named_tensors,
    record,
    split,
    tied_heads,
    twin_of,
)
from extensions.model.views import View, views_of
from extensions.problems import misfits, missing, names_of, unknown, unread

MAX_SAID = 120  # characters of a loader's error
MAX_APART = 256  # tensors tried in a call each; where there are more, all are given in one call


class PlanError(ValueError):
    """A model for which no plan can be made. The message says why."""


@dataclass(frozen=True)
class Plan:
    """What an update with these announced tensors would do to a model, on one rank.

    parameters: the memory of every parameter, by vLLM's name; tied ones once.
    tensors: every parameter and buffer of the twin, tied ones under each of their names.
    refused: the announced tensors at which `load_weights` raises, and what it says; at most the first SHOWN of them.
    aliases: announced names of tensors that are loaded under another name: `lm_head.weight` of tied embeddings.
    elsewhere: what other ranks of the engine read of announced tensors.
    kept: by parameter, how many elements the engine's own checkpoint does not fill either.
    absent: by parameter, the tensors of that checkpoint that fill it and were not announced.
    dropped: announced tensors that the engine's own checkpoint has too, and that are written nowhere.
    views: tensors that the model keeps apart, each of which was built as a view of a parameter or buffer.
    scales: parameters for the scales of the cache of keys and values.
    together: whether `load_weights` needs all tensors that are not simply copied in one call.
    """

    announced: Announced
    fills: list[Fill]
    parameters: dict[str, Memory]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str | None] = field(default_factory=dict)
    elsewhere: dict[str, list[Region]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    absent: dict[str, list[str]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    views: list[View] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    together: bool = False

    def of(self, name: str) -> list[Fill]:
        """The parts of parameters and buffers that the tensor announced as `name` fills, in the order of loading."""
        return self.by_name.get(name, [])

    @cached_property
    def by_name(self) -> dict[str, list[Fill]]:
        """As `of`, for every announced tensor that fills anything."""
        found: dict[str, list[Fill]] = defaultdict(list)
        for fill in self.fills:
            for name in dict.fromkeys(name for name, _ in fill.reads):
                found[name].append(fill)
        return dict(found)

    @cached_property
    def reads(self) -> dict[str, list[Region]]:
        """The parts of each announced tensor that this rank reads."""
        found: dict[str, list[Region]] = defaultdict(list)
        for name, region in (read for fill in self.fills for read in fill.reads):
            found[name].append(region)
        return dict(found)

    @cached_property
    def copied(self) -> dict[str, list[Fill]]:
        """The fills of each tensor that is simply copied to where it belongs, cast at most."""
        constants = {fill.into for fill in self.fills if _is_constant(fill)}
        return {
            name: fills
            for name, fills in self.by_name.items()
            if all(_is_copy(fill) and fill.into not in constants for fill in fills)
        }

    @cached_property
    def converted(self) -> list[str]:
        """The announced tensors that `load_weights` itself has to load, in their order."""
        return [name for name in self.announced if name in self.by_name and name not in self.copied]

    @cached_property
    def spoilt(self) -> set[str]:
        """The announced tensors that `load_weights` writes into, or leaves in the model: it has to get copies of them.

        GPT-OSS fills a bias with zeros on each rank but the first, whosever memory it is (vLLM 0.32).
        """
        steps = {name: [step for fill in fills for step in fill.conversion] for name, fills in self.by_name.items()}
        return {name for name, said in steps.items() if any(s == REPLACES or s.endswith(SPOILS) for s in said)}

    @cached_property
    def layers(self) -> dict[str, set[str]]:
        """The names of the tensors that fill each layer, by the layer's path."""
        found: dict[str, set[str]] = defaultdict(set)
        for fill in self.fills:
            found[split(fill.into)[0]] |= {name for name, _ in fill.reads}
        return {path: names for path, names in found.items() if names}

    def problems(self) -> list[str]:
        """Why the update would not make all weights new: sentences, each of which begins with a tensor's name.

        A tensor that is unknown, or has another shape or dtype, goes by its announced name. A missing one goes by its
        name in the engine's own checkpoint, or else by vLLM's name of the parameter; so does a parameter of which
        elements are filled twice. Two faults go unseen, see the limits in the module's docstring.
        """
        return [*self.misfits(), *self.missing()]

    def misfits(self) -> list[str]:
        """The problems of announced tensors, without the weights for which no tensor was announced."""
        return misfits(self)

    def missing(self) -> list[str]:
        """The problems of parameters that announced tensors do not fill, or fill only in part."""
        return missing(self)

    @cached_property
    def unfilled(self) -> dict[str, int]:
        """How many elements of each parameter no announced tensor fills."""
        found = {}
        for name, memory in self.parameters.items():
            fills = self.into.get(name, [])
            # Padding is filled with a constant. A constant alone is no weight.
            loaded = fills if any(fill.reads for fill in fills) else []
            found[name] = elements_filled([fill.region for fill in loaded], memory).get(0, 0)
        return found

    @cached_property
    def filled(self) -> dict[str, list[str]]:
        """The paths of the layers that each announced tensor fills."""
        return {n: list(dict.fromkeys(split(f.into)[0] for f in fills)) for n, fills in self.by_name.items()}

    @cached_property
    def left(self) -> set[str]:
        """The parameters and buffers that keep elements which no announced tensor fills."""
        whole = {name for name in self.into if not self.unfilled.get(name)}
        return {*self.tensors} - whole

    @cached_property
    def into(self) -> dict[str, list[Fill]]:
        """What is written into each parameter and buffer, in the order of loading."""
        found: dict[str, list[Fill]] = defaultdict(list)
        for fill in self.fills:
            found[fill.into].append(fill)
        return dict(found)


def plan_of(model: torch.nn.Module, vllm_config: object, manifest: Manifest) -> Plan:
    """What an update of `model` with this manifest would do on this rank. The model is neither read nor changed.

    Raises ManifestError where the manifest is malformed. Raises PlanError where `load_weights` raises before it takes a
    tensor, and where the model can't be built without memory.
    """
    return planned(model, vllm_config, parse(manifest))


def planned(model: torch.nn.Module, vllm_config: object, announced: Announced) -> Plan:
    """As `plan_of`, for a manifest that has been parsed."""
    try:
        plan = _recorded(model, vllm_config, announced)
    except TwinFailed as error:
        raise PlanError(f"a copy of the model can't be built without memory: {_first_line(error.cause)}") from error
    plan = _with_other_ranks(plan, model, vllm_config)
    if plan.missing():
        plan = _with_checkpoint(plan, model, vllm_config)
    if names := unknown(plan):
        plan = replace(plan, dropped=_checkpoint(vllm_config).keys() & names)
    if plan.converted and not plan.problems():
        plan = replace(plan, together=not _loads_apart(plan, model, vllm_config))
    return plan


def _recorded(
    model: torch.nn.Module, vllm_config: object, announced: Announced, ranks: tuple[int, ...] | None = None
) -> Plan:
    """The plan of one rank. Where the loader refuses a tensor, the others are recorded again without it."""
    refused: dict[str, str] = {}
    while True:
        with twin_of(model, vllm_config, ranks) as twin:
            heads = tied_heads(twin, vllm_config, announced)
            parameters = _parameters(twin)
            tensors = {name: tensor.detach() for name, tensor in named_tensors(twin).items()}
            views, scales = views_of(twin), kv_scales(twin)
            try:
                fills = record(twin, _meta(announced, without={*refused, *heads}))
            except LoadFailed as error:
                if error.name is None:
                    raise PlanError(f"load_weights took no tensor and raised {_first_line(error.cause)}") from error
                refused[error.name] = _first_line(error.cause)
                if len(refused) < SHOWN:
                    continue
                fills = []
        return Plan(announced, fills, parameters, tensors, refused, _aliases(heads, fills), views=views, scales=scales)


def _with_other_ranks(plan: Plan, model: torch.nn.Module, vllm_config: object) -> Plan:
    """The plan, with what other ranks of the engine read of tensors that this rank reads in part or not at all.

    A tensor that the engine's own checkpoint holds in the same shape counts as read whole. For the others, the plans of
    all ranks are made here.
    """
    parallel = vllm_config.parallel_config
    sizes = [parallel.tensor_parallel_size, parallel.pipeline_parallel_size]
    if getattr(parallel, "data_parallel_size", 1) > 1:  # of a dense model, each replica takes itself for the only one
        sizes.append(parallel.data_parallel_size)
    open_names = _not_read_whole(plan)
    if math.prod(sizes) == 1 or not open_names:
        return plan
    layouts = _checkpoint(vllm_config)
    spread = sizes[1] > 1 or parallel.enable_expert_parallel
    elsewhere = {
        name: [_whole(plan.announced[name])]
        for name in open_names
        if name in layouts and layouts[name][1] == plan.announced[name][1] and (spread or plan.of(name))
    }
    others = {name: plan.announced[name] for name in open_names if name not in elsewhere}
    refused = dict(plan.refused)
    for ranks in itertools.product(*map(range, sizes)) if others else ():
        other = _recorded(model, vllm_config, others, ranks)
        refused |= other.refused | {names_of(fill.reads): fill.misfit for fill in other.fills if fill.misfit}
        for name, regions in other.reads.items():
            elsewhere[name] = [*elsewhere.get(name, ()), *regions]
    return replace(plan, elsewhere=elsewhere, refused=refused)


def _not_read_whole(plan: Plan) -> list[str]:
    return [
        name
        for name, layout in plan.announced.items()
        if name not in plan.aliases
        and name not in plan.refused
        and (name not in plan.reads or unread(layout, plan.reads[name]))
    ]


def _with_checkpoint(plan: Plan, model: torch.nn.Module, vllm_config: object) -> Plan:
    """The plan, with what the engine's own checkpoint fills, and with which tensors.

    Elements that this checkpoint does not fill either, such as scales of 1, are kept. Without a checkpoint only the
    scales of the cache of keys and values are kept, since vLLM sets them itself.
    """
    layouts = _checkpoint(vllm_config)
    if not layouts:
        return replace(plan, kept={name: plan.unfilled[name] for name in plan.scales if not plan.into.get(name)})
    own = _recorded(model, vllm_config, layouts)
    sources = {name: {n: None for fill in own.into.get(name, ()) for n, _ in fill.reads} for name in own.unfilled}
    absent = {name: [n for n in found if n not in plan.announced] for name, found in sources.items()}
    kept = {name: missing for name, missing in own.unfilled.items() if missing and not absent[name]}
    return replace(plan, kept=kept, absent=absent)


def _checkpoint(vllm_config: object) -> Announced:
    try:
        return checkpoint_layouts(vllm_config.model_config.model)
    except (OSError, ValueError, KeyError):
        return {}


def _loads_apart(plan: Plan, model: torch.nn.Module, vllm_config: object) -> bool:
    """Whether `load_weights` writes the same where each tensor that is not simply copied comes in its own call."""
    names = set(plan.converted)
    if len(names) > MAX_APART:
        return False
    with twin_of(model, vllm_config) as twin:
        try:
            apart = record(twin, _meta(plan.announced, without={*plan.announced} - names), apart=True)
        except LoadFailed:
            return False
    whole = [fill for fill in plan.fills if any(name in names for name, _ in fill.reads) or _is_constant(fill)]
    return [fill for fill in apart if fill.reads or _is_constant(fill)] == whole


def _meta(announced: Announced, without: set[str]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in announced.items()
        if name not in without
    }


def _parameters(twin: torch.nn.Module) -> dict[str, Memory]:
    return {
        name: Memory(parameter.untyped_storage().nbytes(), parameter.element_size())
        for name, parameter in twin.named_parameters()
    }


def _aliases(heads: dict[str, str | None], fills: list[Fill]) -> dict[str, str | None]:
    """The announced name that fills the embedding, for each name of the output embedding."""
    return {
        head: next((name for fill in fills if fill.into == into for name, _ in fill.reads), None)
        for head, into in heads.items()
    }


def _is_constant(fill: Fill) -> bool:
    return not fill.reads and fill.region.elements > 0


def _is_copy(fill: Fill) -> bool:
    """Whether one announced tensor's values are copied, element by element, and cast at most."""
    if len(fill.reads) != 1 or fill.misfit or len(fill.conversion) > 1:
        return False
    return all(step.startswith("cast ") for step in fill.conversion) and fill.reads[0][1].shape == fill.region.shape


def _whole(layout: Layout) -> Region:
    dtype, shape = layout
    return Region(0, (math.prod(shape),), (dtype.itemsize,), dtype.itemsize)


def _first_line(error: Exception) -> str:
    """The type of an error and the beginning of its message, to which vLLM may add the names of all parameters."""
    said = str(error).partition("\n")[0][:MAX_SAID]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
