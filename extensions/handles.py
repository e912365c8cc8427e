"""Handles to tensors in another process's memory.

A handle is plain data. The functions that rebuild a tensor from it are named in this file: nothing in a handle is
called or unpickled. The device ordinal inside a CUDA handle is the sender's, and is replaced by the receiver's own.
"""

import re
from types import BuiltinFunctionType, FunctionType

import torch

from extensions.segments import ALIGNMENT_BYTES, SEGMENT_NAME, SHARED_MEMORY
from extensions.tensors import MAX_ELEMENTS, dtype_name, dtype_of, is_shape

EVENT_BYTES = 64  # the size of a cudaIpcEventHandle_t: torch reads as many bytes, whatever it is given
COUNTER_BYTES = 8
EXPANDABLE = b"e"  # second byte of torch's handle to memory in an expandable segment; of any other handle it is "c"
EXPANDABLE_HINT = (
    "; the sender's memory is in expandable segments, whose handles are file descriptors that this process takes by"
    " pidfd_getfd(): allow it that (both processes of one user; in a container the capability SYS_PTRACE; elsewhere"
    " kernel.yama.ptrace_scope=0), or start the sender without expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF"
)
COUNTERS_PREFIX = b"/torch_"  # prefix of the files in which senders count the tensors that are still in use

# The arguments of torch.multiprocessing.reductions.rebuild_cuda_tensor after the tensor class, in order.
CUDA_FIELDS = (
    "shape", "stride", "storage_offset", "storage_class", "dtype", "device_index", "memory_handle", "storage_bytes",
    "storage_offset_bytes", "requires_grad", "ref_counter_handle", "ref_counter_offset", "event_handle",
    "event_sync_required",
)  # fmt: skip
CUDA_BYTES = ("memory_handle", "ref_counter_handle", "event_handle")
CUDA_COUNTS = ("storage_offset", "storage_bytes", "storage_offset_bytes", "ref_counter_offset")


class HandleError(ValueError):
    """A malformed handle, or one that cannot be opened in this process."""


def export_tensor(tensor: torch.Tensor) -> dict:
    """A handle to a CUDA tensor. The tensor has to stay alive and unchanged until the receiver is done with it."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(tensor)
    return _plain_cuda(arguments)


def _plain_cuda(arguments: tuple) -> dict:
    """torch's arguments as plain data, without the ordinal and without the classes, which are always the same."""
    if len(arguments) != len(CUDA_FIELDS) + 1:
        raise HandleError(f"expected {len(CUDA_FIELDS) + 1} arguments of a CUDA tensor, found {len(arguments)}")
    fields = dict(zip(CUDA_FIELDS, arguments[1:], strict=True))
    for name in ("storage_class", "device_index", "requires_grad"):
        del fields[name]
    fields["shape"], fields["stride"] = _sizes(fields, "shape"), _sizes(fields, "stride")
    fields["dtype"] = dtype_name(_dtype(fields))
    return {"kind": "cuda_ipc", **fields}


def open_handle(handle: object, device: torch.device) -> torch.Tensor:
    """The tensor behind a handle. It is mapped on `device`, the receiver's own, and not copied.

    `handle` is plain data, or the pair (function, arguments) that torch's `reduce_tensor` returns. Raises HandleError
    where it is malformed, or is a handle to another kind of device.
    """
    if isinstance(handle, tuple | list) and len(handle) == 2 and callable(handle[0]):
        return _open_pair(handle[0], handle[1], device)
    if not isinstance(handle, dict):
        raise HandleError(f"a handle is a mapping or torch's (function, arguments), found {type(handle).__name__}")
    kind = handle.get("kind")
    if kind == "shared_memory" and device.type == "cpu":
        return _open_shared_memory(handle)
    if kind == "cuda_ipc" and device.type == "cuda":
        return _open_cuda(handle, device)
    raise HandleError(f"expected a handle that device {device} can open, found kind {kind!r:.120}")


def _open_pair(function: object, arguments: object, device: torch.device) -> torch.Tensor:
    from torch.multiprocessing import reductions

    opens = {"cuda": reductions.rebuild_cuda_tensor, "cpu": reductions.rebuild_tensor}
    if function is not opens.get(device.type):
        plain = isinstance(function, FunctionType | BuiltinFunctionType)  # else reading an attribute may run code
        name = f"{function.__module__}.{function.__qualname__}" if plain else f"a {type(function).__name__}"
        raise HandleError(f"{name:.120} is not torch's function for a tensor on {device.type}; it was not called")
    if not isinstance(arguments, tuple | list):
        raise HandleError(f"expected the arguments of {function.__qualname__}, found {type(arguments).__name__}")
    return _open_cuda(_plain_cuda(tuple(arguments)), device) if device.type == "cuda" else _open_storage(arguments)


def _open_storage(arguments: tuple | list) -> torch.Tensor:
    """A tensor in a CPU storage that was handed over as an object, as torch's `rebuild_tensor` would make it."""
    try:
        _, storage, (offset, shape, stride, _) = arguments
    except (TypeError, ValueError):
        raise HandleError("the arguments are not those of torch's rebuild_tensor") from None
    if not isinstance(storage, torch.TypedStorage) or storage._untyped_storage.device.type != "cpu":
        raise HandleError(f"expected a CPU storage, found {type(storage).__name__}")
    whole = storage._untyped_storage
    fields = {"shape": shape, "stride": stride, "storage_offset": offset, "storage_bytes": whole.nbytes()}
    shape, stride, offset = _layout(fields, storage.dtype)
    return torch.empty(0, dtype=storage.dtype).set_(whole, offset, shape, stride)


def _open_cuda(handle: dict, device: torch.device) -> torch.Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    expected = {"kind", *CUDA_FIELDS} - {"storage_class", "device_index", "requires_grad"}
    _require_keys(handle, expected)
    dtype = _dtype(handle)
    for name in CUDA_BYTES:
        if not isinstance(handle[name], bytes) or not handle[name]:
            raise HandleError(f"{name}: expected bytes, found {handle[name]!r:.80}")
    for name in CUDA_COUNTS:
        _count(handle, name)
    _check_synchronisation(handle)
    shape, stride, offset = _layout(handle, dtype)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        # Called with the receiver's own ordinal, it maps the memory on the receiver's device.
        return rebuild_cuda_tensor(
            torch.Tensor, torch.Size(shape), tuple(stride), offset, torch.UntypedStorage, dtype, index,
            handle["memory_handle"], handle["storage_bytes"], handle["storage_offset_bytes"], False,
            handle["ref_counter_handle"], handle["ref_counter_offset"], handle["event_handle"],
            handle["event_sync_required"],
        )  # fmt: skip
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        hint = EXPANDABLE_HINT if handle["memory_handle"][1:2] == EXPANDABLE else ""
        raise HandleError(f"CUDA could not open the memory on {device}: {said}{hint}") from error


def _check_synchronisation(handle: dict) -> None:
    """Refuse a malformed event or counter: torch would read the one and write to the other without a check."""
    if type(handle["event_sync_required"]) is not bool:
        raise HandleError(f"event_sync_required: expected True or False, found {handle['event_sync_required']!r:.80}")
    if len(handle["event_handle"]) != EVENT_BYTES:
        raise HandleError(f"event_handle: expected {EVENT_BYTES} bytes, found {len(handle['event_handle'])}")
    name = handle["ref_counter_handle"]
    if not name.startswith(COUNTERS_PREFIX) or not re.fullmatch(rb"/[A-Za-z0-9_]{1,100}", name):
        raise HandleError(f"ref_counter_handle: expected a name such as {COUNTERS_PREFIX!r}..., found {name!r:.80}")
    counters = SHARED_MEMORY / name[1:].decode()
    end = (handle["ref_counter_offset"] + 1) * COUNTER_BYTES
    if counters.is_file() and end > counters.stat().st_size:  # where the file is gone, torch writes nothing
        raise HandleError(f"ref_counter_offset: {handle['ref_counter_offset']} is outside {counters.name}")


def _open_shared_memory(handle: dict) -> torch.Tensor:
    _require_keys(
        handle, {"kind", "segment", "dtype", "shape", "stride", "storage_offset", "storage_bytes", "offset_bytes"}
    )
    segment = handle["segment"]
    if not isinstance(segment, str) or not SEGMENT_NAME.fullmatch(segment):
        raise HandleError(f"expected a segment called weight-sync-..., found {segment!r:.120}")
    dtype, start, nbytes = _dtype(handle), _count(handle, "offset_bytes"), _count(handle, "storage_bytes")
    shape, stride, offset = _layout(handle, dtype)
    path = SHARED_MEMORY / segment
    if not path.is_file() or path.is_symlink():
        raise HandleError(f"shared memory {segment} is not there: has the sender released it?")
    size = path.stat().st_size
    if start + nbytes > size or start % ALIGNMENT_BYTES or nbytes % dtype.itemsize or not size:
        raise HandleError(f"expected {nbytes} bytes of {dtype_name(dtype)} at {start} inside {segment}, found {size}")
    whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    return whole[start : start + nbytes].view(dtype).as_strided(shape, stride, start // dtype.itemsize + offset)


def _require_keys(handle: dict, expected: set[str]) -> None:
    if set(handle) != expected:
        problem = sorted(map(str, set(handle) ^ expected))
        raise HandleError(f"a {handle['kind']} handle has other fields than expected: {', '.join(problem)}")


def _dtype(handle: dict) -> torch.dtype:
    try:
        return dtype_of(handle["dtype"])
    except (TypeError, ValueError) as error:
        raise HandleError(str(error)) from None


def _count(handle: dict, name: str) -> int:
    value = handle[name]
    if type(value) is not int or not 0 <= value < MAX_ELEMENTS:
        raise HandleError(f"{name}: expected a count, found {value!r:.80}")
    return value


def _sizes(handle: dict, name: str) -> list[int]:
    values = handle[name]
    if not isinstance(values, list | tuple) or not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in values):
        raise HandleError(f"{name}: expected a list of sizes, found {values!r:.80}")
    return list(values)


def _layout(handle: dict, dtype: torch.dtype) -> tuple[list[int], list[int], int]:
    """Shape, stride and offset, in elements. Raises HandleError where they reach outside the storage."""
    shape, stride, offset = _sizes(handle, "shape"), _sizes(handle, "stride"), _count(handle, "storage_offset")
    if len(shape) != len(stride):
        raise HandleError(f"shape and stride: expected as many strides as sizes, found {len(stride)} and {len(shape)}")
    if not is_shape(shape):
        raise HandleError(f"shape: expected that of a tensor, found {shape!r:.80}")
    if not all(shape):
        return shape, stride, 0  # in torch an empty tensor may have any offset
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if (offset + reach) * dtype.itemsize > _count(handle, "storage_bytes"):
        raise HandleError(f"shape {shape} with strides {stride} reaches outside its storage")
    return shape, stride, offset
