"""Every tensor that a live model computes with, wherever the model keeps it.

`named_parameters` and `named_buffers` show a part. vLLM keeps others as plain attributes of modules, in attention
implementations (`layer.attn.impl`), quantisation methods and kernels, in lists, dicts and dataclasses of those, and in
what a lambda or a partial has bound. The walk goes through all of them, and through their classes' own attributes.

It does not enter what describes or runs a model: configurations, process groups, caches of keys and values, compiled
graphs, schedulers, loggers and threads, what gives the rows of a batch their LoRA adapters, nor anything of torch
beside modules and tensors. Memory that no Python object names stays unseen: what oneDNN packs on a CPU is read back by
`extensions.model.weights` instead.
"""

import contextlib
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator

import torch

from extensions.model.regions import memory_id

MAX_OBJECTS = 2_000_000  # visited in one walk; a model of 64 layers has some ten thousand
KV_CACHE = "kv_cache"  # the attribute by which vLLM binds a layer to its cache

# Packages whose objects are not entered. Modules and tensors are, whatever package they come from.
SKIPPED_PACKAGES = (
    "torch", "numpy", "transformers", "huggingface_hub", "tokenizers", "pydantic", "triton", "logging", "threading",
    "multiprocessing", "concurrent", "asyncio", "queue", "weakref", "inspect", "enum", "pathlib", "vllm.config",
    "vllm.compilation", "vllm.distributed", "vllm.engine", "vllm.forward_context", "vllm.logger", "vllm.multimodal",
    "vllm.lora.punica_wrapper", "vllm.platforms", "vllm.transformers_utils", "vllm.v1.core", "vllm.v1.executor",
    "vllm.v1.worker", "vllm.v1.kv_cache_interface",
)  # fmt: skip
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, torch.Size)
CONTAINERS = (dict, types.MappingProxyType, list, tuple, deque)
BOUND = (functools.partial, types.MethodType)
TABLES = ("_parameters", "_buffers", "_modules")  # in which a module holds what is registered in it


class WalkError(RuntimeError):
    """A model with more objects than a walk visits. Nothing is left out in silence."""


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`{path: tensor}` of every tensor that the model computes with; each view of each memory once.

    A path is Python's way to the tensor: `layers.0.attn.impl.alibi_slopes`, `experts.scales[1]`, `table['cos']`. A
    tensor with several paths goes by that of a parameter before that of a buffer before any other, and by the shortest.
    Two walks of one model give the same paths, also after its tensors were taken out and put back. Tensors on the meta
    device, which have no values, are among them. The tensors are detached and share their memory with the model.

    Raises WalkError where the model holds more than MAX_OBJECTS objects.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple] = set()
    for path, tensor in every_tensor(model):
        if (key := _view_key(tensor)) not in seen:
            seen.add(key)
            found[path] = tensor
    return found


def every_tensor(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """As `tensors_of`, with a tensor under each of its paths. What holds tensors is entered by one path only."""
    modules = dict(model.named_modules())
    waiting = deque(modules.items())
    for table in TABLES[:2]:
        for prefix, module in modules.items():
            for name, tensor in sorted(getattr(module, table).items()):
                if tensor is not None:
                    yield from _parts(_joined(prefix, name), tensor)
                    waiting.append((_joined(prefix, name), tensor))
    yield from _beside(waiting, {id(module) for module in modules.values()})


def _view_key(tensor: torch.Tensor) -> tuple:
    """The same for two tensors that are the same view of the same memory."""
    try:
        memory, shape = memory_id(tensor), tuple(tensor.shape)
        return memory, tensor.storage_offset(), shape, tensor.stride(), tensor.dtype, tensor.device
    except (RuntimeError, NotImplementedError):  # a sparse tensor has no storage of its own
        return (id(tensor),)


def _beside(waiting: deque[tuple[str, object]], registered: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that the waiting objects hold beside their parameters and buffers. Nearer ones come first."""
    kept: dict[int, object] = {id(holder): holder for _, holder in waiting}  # a freed id would come back as another
    while waiting:
        path, holder = waiting.popleft()
        for name, value in _held(path, holder, id(holder) in registered):
            if isinstance(value, torch.Tensor):
                yield from _parts(name, value)
            if id(value) not in kept and _is_entered(value):
                kept[id(value)] = value
                waiting.append((name, value))
        if len(kept) > MAX_OBJECTS:
            raise WalkError(f"the model holds more than {MAX_OBJECTS} objects; the walk was given up at {path}")


def _parts(path: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, or those that it is a wrapper of, as quantised tensors of torchao are."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in sorted(tensor.__tensor_flatten__()[0]):
            yield from _parts(_joined(path, name), getattr(tensor, name))
    else:
        yield path, tensor.detach()


def _held(path: str, holder: object, is_registered: bool) -> Iterator[tuple[str, object]]:
    """What an object holds, with the path to it."""
    if isinstance(holder, dict | types.MappingProxyType):
        yield from ((f"{path}[{_key(key, i)}]", value) for i, (key, value) in enumerate(holder.items()))
    elif isinstance(holder, list | tuple | deque):
        yield from ((f"{path}[{index}]", value) for index, value in enumerate(holder))
    elif isinstance(holder, functools.partial):
        yield from ((f"{path}.{name}", getattr(holder, name)) for name in ("func", "args", "keywords"))
    elif isinstance(holder, types.MethodType):
        yield from ((f"{path}.{name}", getattr(holder, name)) for name in ("__self__", "__func__"))
    elif isinstance(holder, types.FunctionType):
        yield from _of_function(path, holder)
    else:
        yield from ((_joined(path, name), value) for name, value in _of_object(holder, is_registered))


def _key(key: object, index: int) -> str:
    """A key as it is written, the same in every process; the number of its entry where it may not be."""
    plain = isinstance(key, PLAIN) or (isinstance(key, tuple) and all(isinstance(part, PLAIN) for part in key))
    return repr(key) if plain else f"entry {index}"


def _of_function(path: str, function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What a function has bound: the variables of its closure, its defaults and its attributes."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            yield f"{path}.<{name}>", cell.cell_contents
    yield f"{path}.__defaults__", function.__defaults__
    yield f"{path}.__kwdefaults__", function.__kwdefaults__
    yield from ((f"{path}.{name}", value) for name, value in sorted(vars(function).items()))


def _of_object(holder: object, is_registered: bool) -> Iterator[tuple[str, object]]:
    """Attributes of an object in the order of their names, those in slots too, then what its classes hold.

    Nothing is computed: properties are left out. Of a registered module, the tables come on their own.
    """
    own = dict(getattr(holder, "__dict__", {}))
    classes = [cls for cls in type(holder).__mro__ if not _is_skipped(cls.__module__)]
    for cls in classes:
        slots = [name for name, value in vars(cls).items() if isinstance(value, types.MemberDescriptorType)]
        own |= {name: getattr(holder, name) for name in slots if name != "__dict__" and hasattr(holder, name)}
    if isinstance(holder, torch.nn.Module):
        tables = [own.pop(table, None) or {} for table in TABLES]
        for table in tables if not is_registered else ():
            own |= table
    own.pop(KV_CACHE, None)
    yield from sorted(own.items(), key=lambda item: str(item[0]))
    for cls in classes:
        for name, value in sorted(vars(cls).items()):
            if isinstance(value, (torch.Tensor, *CONTAINERS)) and not name.startswith("__"):
                yield f"({cls.__name__}).{name}", value


def _is_entered(value: object) -> bool:
    kind = type(value)
    if isinstance(value, (type, types.ModuleType, *PLAIN)) or kind in weakref.ProxyTypes:
        return False
    if isinstance(value, (torch.nn.Module, torch.Tensor, *CONTAINERS, *BOUND)):
        return True
    if isinstance(value, types.FunctionType):
        return not _is_skipped(value.__module__ or "")
    if _is_skipped(kind.__module__):
        return False
    return hasattr(value, "__dict__") or any("__slots__" in vars(cls) for cls in kind.__mro__)


def _is_skipped(module: str) -> bool:
    return module == "builtins" or any(module == name or module.startswith(f"{name}.") for name in SKIPPED_PACKAGES)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
