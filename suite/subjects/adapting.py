"""What an extension's methods are given, in the form that they take: converted in the worker, so that nothing travels
but plain data.

    weight_sync_dtype    "torch" or "text": what update_weight gets. Where a class does not say, torch where the
                         parameter is called dtype, else text.
    weight_sync_handles  "plain" or "pairs": what the sender made, under the device's own id, or the pairs that torch's
                         reduce_tensor makes, under what the worker reported. Where a class does not say, plain if it
                         names its sender, else pairs.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

FORMS = {"weight_sync_dtype": ("torch", "text"), "weight_sync_handles": ("plain", "pairs")}


def expect_known_forms(extension: type) -> None:
    """Raises ValueError where an extension asks for a form that there is not."""
    for attribute, forms in FORMS.items():
        if (found := getattr(extension, attribute, forms[0])) not in forms:
            raise ValueError(f"{extension.__name__}.{attribute}: expected one of {', '.join(forms)}, found {found!r}")


def adapted(worker: Any, method: str, args: list) -> list:
    """The arguments of a worker method as the worker's extension takes them."""
    if method == "update_weight":
        name, dtype, shape = args
        return [name, _dtype(dtype) if _takes_torch(worker) else dtype, shape]
    if method == "update_weights_from_ipc_handles" and takes_pairs(worker):
        (handles,) = args
        return [{device: _pairs(named, worker.device) for device, named in handles.items()}]
    return args


def takes_pairs(extension: Any) -> bool:
    """Whether an extension, or a worker that has it, takes handles as pairs."""
    said = getattr(extension, "weight_sync_handles", "")
    return said == "pairs" if said else not getattr(extension, "weight_sync_sender", "")


def _takes_torch(worker: Any) -> bool:
    said = getattr(worker, "weight_sync_dtype", "")
    return said == "torch" if said else _names_dtype(getattr(worker.update_weight, "__func__", worker.update_weight))


@cache
def _names_dtype(update_weight: Callable[..., None]) -> bool:
    """Whether a parameter is called dtype. Kept, since it is asked for every tensor."""
    return "dtype" in inspect.signature(update_weight).parameters


def _dtype(text: str) -> Any:
    from extensions.tensors import dtype_of

    return dtype_of(text)


def _pairs(named: dict[str, dict], device: Any) -> dict[str, tuple]:
    return {name: pair(handle, device) for name, handle in named.items()}


def pair(handle: dict, device: Any) -> tuple:
    """(torch's rebuild function, its arguments) for a plain handle, as `reduce_tensor` makes it in the sender.

    The device's ordinal is the sender's where the handle has it. On a CPU the memory is mapped before, since torch's
    pair carries the storage itself there.
    """
    import torch
    from torch.multiprocessing import reductions

    from extensions.handles import open_handle
    from extensions.tensors import dtype_of

    if handle.get("kind") != "cuda_ipc":
        return reductions.reduce_tensor(open_handle(handle, device))
    return reductions.rebuild_cuda_tensor, (
        torch.Tensor,
        torch.Size(handle["shape"]),
        tuple(handle["stride"]),
        handle["storage_offset"],
        torch.storage.TypedStorage,
        dtype_of(handle["dtype"]),
        handle.get("device_index", device.index),
        handle["memory_handle"],
        handle["storage_bytes"],
        handle["storage_offset_bytes"],
        False,  # requires_grad
        handle["ref_counter_handle"],
        handle["ref_counter_offset"],
        handle["event_handle"],
        handle["event_sync_required"],
    )
