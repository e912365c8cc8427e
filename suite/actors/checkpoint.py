"""From a trainer's parameters to the tensors of its checkpoint: their names, their order, and what a test alters."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

# transformers 5 holds all experts of a layer in two parameters; released checkpoints hold every expert's own three.
FUSED_EXPERTS = re.compile(r"(?P<prefix>.+\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)")


def views(parameter: str, tensor: torch.Tensor, first_expert: int = 0) -> list[tuple[str, torch.Tensor]]:
    """(checkpoint name, view) of everything that the parameter holds; contiguous and never copied.

    `tensor` is the whole parameter, or its experts from `first_expert` on.
    """
    fused = FUSED_EXPERTS.fullmatch(parameter)
    if fused is None:
        return [(parameter, tensor)]
    prefix, part = fused["prefix"], fused["part"]
    if part == "down_proj":
        return [(f"{prefix}.{first_expert + i}.down_proj.weight", tensor[i]) for i in range(len(tensor))]
    width = tensor.shape[1] // 2
    named = []
    for i in range(len(tensor)):
        named.append((f"{prefix}.{first_expert + i}.gate_proj.weight", tensor[i, :width]))
        named.append((f"{prefix}.{first_expert + i}.up_proj.weight", tensor[i, width:]))
    return named


def ordered(names: list[str], order: str) -> list[str]:
    """The names as "checkpoint" (as they are), "reversed" or "shuffled:<seed>", the same on every rank."""
    if order == "checkpoint":
        return list(names)
    if order == "reversed":
        return names[::-1]
    kind, _, seed = order.partition(":")
    if kind != "shuffled" or not seed.isdigit():
        raise ValueError(f"expected order checkpoint, reversed or shuffled:<seed>, found {order!r}")
    return random.Random(int(seed)).sample(names, len(names))


@dataclass(frozen=True)
class Alterations:
    """What a test changes about an update, in what is announced and in what is sent alike."""

    rename: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    truncate: list[str] = field(default_factory=list)  # one row less
    lengthen: list[str] = field(default_factory=list)  # one row more, of zeros
    turn: list[str] = field(default_factory=list)  # a matrix of as many rows as it had columns
    cast: dict[str, str] = field(default_factory=dict)  # to this dtype
    duplicate: list[str] = field(default_factory=list)  # sent twice in a row
    bits: dict[str, list[int]] = field(default_factory=dict)  # the first elements, of 16 bits each, become these
    add: dict[str, str] = field(default_factory=dict)  # after this tensor, the same one under a name of no model's
    lay: dict[str, str] = field(default_factory=dict)  # in memory as one of LAYOUTS says, which is never contiguous

    @classmethod
    def of(cls, alter: dict[str, Any] | None, names: list[str]) -> "Alterations":
        """From plain data. Raises ValueError for what would silently alter nothing."""
        alterations = cls(**(alter or {}))
        named = {name for kind in (alter or {}).values() for name in kind}
        if unknown := sorted(named - set(names)):
            raise ValueError(f"nothing to alter: {', '.join(unknown)} not among the {len(names)} tensors of the model")
        return alterations

    def apply(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What is sent in place of one tensor."""
        if name in self.drop:
            return
        if name in self.truncate:
            tensor = tensor[:-1]
        if name in self.lengthen:
            tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
        if name in self.turn:
            tensor = tensor.t().contiguous()
        if name in self.cast:
            tensor = tensor.to(getattr(torch, self.cast[name]))
        if name in self.bits:
            tensor = with_bits(tensor, self.bits[name])
        if name in self.lay:
            tensor = LAYOUTS[self.lay[name]](tensor)
        for _ in range(2 if name in self.duplicate else 1):
            yield self.rename.get(name, name), tensor
        if name in self.add:
            yield self.add[name], tensor


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, whose first dimension is the innermost in memory."""
    last_first = (*range(1, tensor.ndim), 0)
    return tensor.permute(last_first).contiguous().permute(tensor.ndim - 1, *range(tensor.ndim - 1))


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as every other element of a larger tensor, from its second on; NaN lies between them."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first of its rows, or elements, as many times as there are: all are the same memory."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = {"transposed": transposed, "sliced": sliced, "expanded": expanded}


def with_bits(tensor: torch.Tensor, patterns: list[int]) -> torch.Tensor:
    """A copy whose first elements have these patterns of 16 bits."""
    changed = tensor.clone()
    if not changed.is_meta:
        signed = [pattern - 2**16 if pattern >= 2**15 else pattern for pattern in patterns]
        changed.view(torch.int16).view(-1)[: len(patterns)] = torch.tensor(signed, dtype=torch.int16)
    return changed
