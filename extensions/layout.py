"""Whether tensors are what and where they were, which is asked of hundreds before every update.

To look at a tensor from Python takes 0.1 to 0.3 us for each of its properties, and 10 us where its class has a
`__torch_function__`, as vLLM's parameters have: that is left out here. Torch's own guards compare all properties but
the address in one call. They have no public name, so they are tried first, and only their yes counts.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch._C import DisableTorchFunctionSubclass, TensorBase

LOOKS = (TensorBase.size, TensorBase.stride, TensorBase.dtype.__get__)


class Layout:
    """Addresses, shapes, strides and dtypes of tensors, in their order. It keeps no tensor."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        with DisableTorchFunctionSubclass():
            self._addresses = [*map(TensorBase.data_ptr, tensors)]
            self._looks = _looks(tensors)
        firsts: dict[int, int] = {}
        pairs = [(at, firsts.setdefault(id(tensor), at)) for at, tensor in enumerate(tensors)]
        self._once = [at for at, first in pairs if at == first]
        self._tied = [(at, first) for at, first in pairs if at != first]  # the guards take no tensor twice
        self._guards = _guards([tensors[at] for at in self._once]) if guards_tell() else None

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these have the same, one by one."""
        with DisableTorchFunctionSubclass():
            if [*map(TensorBase.data_ptr, tensors)] != self._addresses:
                return False
            return self._are_as_guarded(tensors) or _looks(tensors) == self._looks

    def _are_as_guarded(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the guards say yes, and what was one tensor twice still is."""
        if self._guards is None or not all(tensors[at] is tensors[first] for at, first in self._tied):
            return False
        return self._guards(*tensors) if not self._tied else self._guards(*[tensors[at] for at in self._once])


def _looks(tensors: Sequence[torch.Tensor]) -> list[list]:
    return [[*map(look, tensors)] for look in LOOKS]


def _guards(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """What says, of as many tensors, whether they are of these shapes, strides, dtypes and classes."""
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


@functools.cache
def guards_tell() -> bool:
    """Whether torch has such guards, and they see each change that has to be seen."""
    first, held = torch.zeros(3), torch.zeros(2, 2, dtype=torch.int32)
    others = (held.view(1, 4), held.view(4), held.t(), held.view(torch.float32), held.view(torch.int16))
    try:
        check = _guards([first, held])
        return check(first, held) and not any(check(first, other) for other in others)
    except Exception:  # another torch has none, or calls them in another way
        return False
