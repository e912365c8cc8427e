"""Where each announced tensor goes in a model: which parts of which parameters it fills, and through which conversion.

A plan is made before an update touches anything. It comes from the model's own `load_weights`, recorded on a copy of
the model without memory (see `model/twin.py`), so it needs no table of names.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from extensions.manifest import SHOWN, Announced, Manifest, parse
from extensions.model.expected import HEAD
from extensions.model.loading import ties_its_head
from extensions.model.twin import Fill, LoadFailed, Region, named_tensors, record, twin_of

MAX_SAID = 120  # characters of a loader's error


class PlanError(ValueError):
    """A model for which no plan can be made. The message says why."""


@dataclass(frozen=True)
class Memory:
    """How large a tensor's memory is, and one element of it, in bytes."""

    nbytes: int
    itemsize: int


@dataclass(frozen=True)
class Plan:
    """What an update with these announced tensors would do to a model, on one rank.

    parameters: the memory of every parameter, by vLLM's name; tied ones once.
    refused: the announced tensors at which `load_weights` raises, and what it says. After too many, it holds the first.
    aliases: announced names of tensors that are loaded under another name: `lm_head.weight` of tied embeddings.
    all_names, all_elements: whether this rank is to read a part of each announced tensor, or each element of them.
    """

    announced: Announced
    fills: list[Fill]
    parameters: dict[str, Memory]
    refused: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    all_names: bool = True
    all_elements: bool = True

    def of(self, name: str) -> list[Fill]:
        """The parts of parameters and buffers that the tensor announced as `name` fills, in the order of loading."""
        return [fill for fill in self.fills if any(source == name for source, _ in fill.reads)]

    def problems(self) -> list[str]:
        """Why the update would not make all weights new, a sentence each. It begins with the tensor's name.

        The name is an announced one where the tensor is unknown or has another shape, vLLM's name of a parameter where
        elements are missing or filled twice. Two kinds are not seen: elements that `load_weights` computes with and
        drops, and those that it fills with a constant in a parameter that announced tensors fill in part.
        """
        if self.refused and not self.fills:
            return [*self._refused()]  # the recording was given up: nothing is known of the other tensors
        return [*self._refused(), *self._unknown(), *self._other_shapes(), *self._not_filled_once()]

    def _refused(self) -> Iterable[str]:
        for name, said in self.refused.items():
            yield f"{name}: load_weights refuses it in shape {list(self.announced[name][1])}: {said}"

    def _unknown(self) -> Iterable[str]:
        read = {source for fill in self.fills for source, _ in fill.reads}
        for name in self.announced if self.all_names else ():
            if name not in read and name not in self.refused and name not in self.aliases:
                yield f"{name}: unknown, load_weights writes it nowhere"

    def _other_shapes(self) -> Iterable[str]:
        for name, other in self.aliases.items():
            found, expected = (list(self.announced[tensor][1]) for tensor in (name, other))
            if found != expected:
                yield f"{name}: expected shape {expected}, that of {other}, found {found}"
        for fill in self.fills:
            if fill.misfit:
                yield f"{_names(fill.reads)}: other shape than {fill.into} takes, {fill.misfit}"
        if self.all_elements:
            yield from self._partly_read()

    def _partly_read(self) -> Iterable[str]:
        regions: dict[str, list[Region]] = defaultdict(list)
        for name, region in (read for fill in self.fills for read in fill.reads):
            regions[name].append(region)
        for name, parts in regions.items():
            dtype, shape = self.announced[name]
            memory = Memory(math.prod(shape) * dtype.itemsize, dtype.itemsize)
            if unread := elements_filled(parts, memory).get(0, 0):
                total = math.prod(shape)
                yield f"{name}: other shape than expected, {unread} of {total} elements of {list(shape)} go nowhere"

    def _not_filled_once(self) -> Iterable[str]:
        into: dict[str, list[Fill]] = defaultdict(list)
        for fill in self.fills:
            into[fill.into].append(fill)
        for name, memory in self.parameters.items():
            loaded = [fill for fill in into[name] if fill.reads]
            total, sources = memory.nbytes // memory.itemsize, _names(read for fill in loaded for read in fill.reads)
            filled = elements_filled([fill.region for fill in loaded], memory)
            if twice := sum(elements for times, elements in filled.items() if times > 1):
                yield f"{name}: {twice} of {total} elements are filled more than once, by {sources}"
            # Padding is filled with a constant. A constant alone is no weight.
            missing = elements_filled([fill.region for fill in into[name] if loaded], memory).get(0, 0)
            if missing and name not in self.refused:
                rest = f"; the others are filled by {sources}" if loaded else ""
                yield f"{name}: missing, {missing} of {total} elements are filled by no announced tensor{rest}"


def plan_of(model: torch.nn.Module, vllm_config: object, manifest: Manifest) -> Plan:
    """What an update of `model` with this manifest would do on this rank. The model is neither read nor changed.

    Raises ManifestError where the manifest is malformed. Raises PlanError where `load_weights` raises before it takes a
    tensor, and for a model that vLLM quantises while it loads: that would be processed instead of recorded.
    """
    announced, refused = parse(manifest), {}
    plan = None
    while plan is None:
        plan = _recorded(model, vllm_config, announced, refused)
    return plan


def _recorded(
    model: torch.nn.Module, vllm_config: object, announced: Announced, refused: dict[str, str]
) -> Plan | None:
    """The plan without the refused tensors. None where one more is refused: it has been added to them."""
    with twin_of(model, vllm_config) as twin:
        _refuse_online(twin)
        parameters, aliases = _parameters(twin), _aliases(twin, announced)
        try:
            fills = record(twin, _meta(announced, without={*refused, *aliases}))
        except LoadFailed as error:
            if error.name is None:
                raise PlanError(f"load_weights took no tensor and raised {_first_line(error.cause)}") from error
            refused[error.name] = _first_line(error.cause)
            if len(refused) < SHOWN:
                return None
            fills = []
    return Plan(announced, fills, parameters, refused, aliases, *_holds(vllm_config.parallel_config))


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


def _aliases(twin: torch.nn.Module, announced: Announced) -> dict[str, str]:
    """The output embedding, where it is the input embedding and both are announced."""
    if HEAD not in announced or not ties_its_head(twin):
        return {}
    embedding = next((name for name in announced if name.endswith("embed_tokens.weight")), None)
    return {} if embedding is None else {HEAD: embedding}


def _refuse_online(twin: torch.nn.Module) -> None:
    for name, tensor in named_tensors(twin).items():
        if getattr(getattr(tensor, "weight_loader", None), "__name__", "") == "online_process_loader":
            raise PlanError(f"{name}: vLLM quantises this model while it loads, and no plan can be made for that")


def _holds(parallel: object) -> tuple[bool, bool]:
    """Whether this rank reads a part of each tensor, and each element of each."""
    names = parallel.pipeline_parallel_size == 1 and not parallel.enable_expert_parallel
    return names, names and parallel.tensor_parallel_size == 1


def elements_filled(regions: list[Region], memory: Memory) -> dict[int, int]:
    """How many elements of a tensor lie in how many of the regions: `{number of regions: elements}`."""
    runs = [_runs(region) for region in regions if region.elements]
    # Counted in blocks: the largest unit in which no region begins, ends or jumps anywhere but between two blocks.
    sizes = [size for offset, outer, run in runs for size in (offset, run, *(step for _, step in outer))]
    block = math.gcd(memory.nbytes, *sizes)
    if not block:
        return {}
    counts = torch.zeros(memory.nbytes // block, dtype=torch.int32)
    for offset, outer, run in runs:
        shape = [*(size for size, _ in outer), run // block]
        stride = [*(step // block for _, step in outer), 1]
        counts.as_strided(shape, stride, offset // block).add_(1)
    times, blocks = counts.unique(return_counts=True)
    return {time: n * block // memory.itemsize for time, n in zip(times.tolist(), blocks.tolist(), strict=True)}


def _runs(region: Region) -> tuple[int, list[tuple[int, int]], int]:
    """A region as runs of bytes without a gap: offset, (number, stride) of the runs by dimension, and their length."""
    dims = sorted(
        ((size, step) for size, step in zip(region.shape, region.stride, strict=True) if size > 1 and step),
        key=lambda dim: -dim[1],
    )
    run = region.itemsize
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    return region.offset, dims, run


def _first_line(error: Exception) -> str:
    """The type of an error and the begin of what it says. vLLM may add the names of all parameters."""
    said = str(error).partition("\n")[0][:MAX_SAID]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _names(reads: Iterable[tuple[str, Region]]) -> str:
    names = list(dict.fromkeys(name for name, _ in reads))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
