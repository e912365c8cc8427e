"""The walk finds a tensor in every kind of place, by a path that stays, once, and enters nothing that is no model."""

import functools
import logging
import threading
import time
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from extensions.model import walk
from extensions.model.walk import WalkError, every_tensor, tensors_of

PAIR = namedtuple("PAIR", "one other")


@dataclass
class Scales:
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    value: torch.Tensor


class Impl:
    """As vLLM's attention implementations, quantisation methods and kernels: no module."""

    def __init__(self, value: object) -> None:
        self.value = value

    def apply(self) -> None:
        pass

    @property
    def computed(self) -> torch.Tensor:
        raise AssertionError("the walk has computed a property")


class Wrapper(torch.Tensor):
    """As torchao's quantised tensors: it has no memory of its own."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    __torch_dispatch__ = None


class Shared(torch.nn.Module):
    table = torch.arange(3.0)


class Layer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def closure(value: object) -> Callable:
    return lambda: value


def default(value: object) -> Callable:
    def apply(x: int, weight: object = value, *, scale: object = None) -> None:
        pass

    return apply


def unregistered(value: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.inner = torch.nn.Module()
    layer.inner.weight = torch.nn.Parameter(value, requires_grad=False)
    return layer


def on_a_parameter(value: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    parameter.scale = value
    return parameter


def model() -> torch.nn.Module:
    """Two layers as vLLM's are, with weights and a place for what a test plants."""
    built = torch.nn.Module()
    built.layers = torch.nn.ModuleList([Layer(), Layer()])
    for layer in built.layers:
        layer.weight = torch.nn.Parameter(torch.randn(2, 3), requires_grad=False)
    return built


def place(built: torch.nn.Module, planted: object) -> None:
    """Hold it as a plain attribute, whatever it is."""
    object.__setattr__(built.layers[1], "place", planted)


PLACES = {
    "attribute": (lambda t: t, "place"),
    "list": (lambda t: [0, t], "place[1]"),
    "nested lists": (lambda t: [[t]], "place[0][0]"),
    "tuple": (lambda t: ("a", t), "place[1]"),
    "named tuple": (lambda t: PAIR(1, t), "place[1]"),
    "deque": (lambda t: deque([t]), "place[0]"),
    "dict": (lambda t: {"cos": t}, "place['cos']"),
    "dict of another key": (lambda t: {(1, "a"): t}, "place[(1, 'a')]"),
    "dict of an object": (lambda t: {Impl(1): t}, "place[entry 0]"),
    "ordered dict": (lambda t: OrderedDict(a=t), "place['a']"),
    "mapping proxy": (lambda t: MappingProxyType({"a": t}), "place['a']"),
    "dataclass": (Scales, "place.value"),
    "dataclass with slots": (Slotted, "place.value"),
    "implementation": (Impl, "place.value"),
    "kernel of a method": (lambda t: Impl(Impl({"w": (t,)})), "place.value.value['w'][0]"),
    "namespace": (lambda t: SimpleNamespace(a=t), "place.a"),
    "closure": (closure, "place.<value>"),
    "closure of an object": (lambda t: closure(Impl(t)), "place.<value>.value"),
    "default": (default, "place.__defaults__[0]"),
    "argument of a partial": (lambda t: functools.partial(max, t), "place.args[0]"),
    "keyword of a partial": (lambda t: functools.partial(max, key=t), "place.keywords['key']"),
    "object of a bound method": (lambda t: Impl(t).apply, "place.__self__.value"),
    "module in a list": (lambda t: [unregistered(t)], "place[0].inner.weight"),
    "module as a plain attribute": (unregistered, "place.inner.weight"),
    "attribute of a parameter": (lambda t: [on_a_parameter(t)], "place[0].scale"),
    "wrapper": (Wrapper, "place.codes"),
    "wrapper in a list": (lambda t: [Wrapper(t)], "place[0].codes"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_tensor_is_found_in(kind: str):
    plant, path = PLACES[kind]
    built, tensor = model(), torch.randn(4)
    place(built, plant(tensor))
    found = tensors_of(built)
    assert f"layers.1.{path}" in found, f"expected layers.1.{path}, found {[*found]}"
    assert found[f"layers.1.{path}"].data_ptr() == tensor.data_ptr()
    assert {"layers.0.weight", "layers.1.weight"} < found.keys()


def test_a_tensor_of_a_namespace_has_one_path():
    built = model()
    place(built, SimpleNamespace(a=torch.ones(1)))
    assert [*dict(every_tensor(built))] == ["layers.0.weight", "layers.1.weight", "layers.1.place.a"]


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_are_found(persistent: bool):
    built = model()
    built.layers[0].register_buffer("table", torch.arange(3), persistent=persistent)
    assert [*tensors_of(built)] == ["layers.0.weight", "layers.1.weight", "layers.0.table"]


def test_what_a_parameter_has_beside_its_values_is_found():
    built = model()
    built.layers[0].weight.scale = torch.ones(1)
    assert "layers.0.weight.scale" in tensors_of(built)


def test_what_a_class_holds_is_found_once():
    built = torch.nn.Sequential(Shared(), Shared())
    assert [*tensors_of(built)] == ["0.(Shared).table"]


def test_a_view_of_a_memory_comes_once_by_its_first_path():
    built = model()
    weight = built.layers[1].weight
    built.layers[0].register_buffer("alias", weight.detach())
    place(built, [weight, weight.detach(), weight[0], weight.t()])
    assert [*tensors_of(built)] == ["layers.0.weight", "layers.1.weight", "layers.1.place[2]", "layers.1.place[3]"]
    assert {"layers.0.alias", "layers.1.place[0]", "layers.1.place[1]"} < dict(every_tensor(built)).keys()


def test_a_tied_parameter_has_all_its_paths():
    built = model()
    built.layers[1].weight = built.layers[0].weight
    assert [*tensors_of(built)] == ["layers.0.weight"]
    assert [*dict(every_tensor(built))] == ["layers.0.weight", "layers.1.weight"]


def test_empty_tensors_are_not_taken_for_each_other():
    built = model()
    place(built, [torch.empty(0), torch.empty(0, 3), torch.empty(2, device="meta"), torch.empty(2, device="meta")])
    assert len(tensors_of(built)) == 6


def test_a_cycle_ends():
    built, first, second = model(), Impl(None), Impl(None)
    first.value, second.value, first.model, first.weight = [second], {"first": first}, built, torch.ones(1)
    place(built, second)
    assert "layers.1.place.value['first'].weight" in tensors_of(built)


def test_the_order_in_which_attributes_were_set_does_not_matter():
    one, other = model(), model()
    for built, names in ((one, "abc"), (other, "cab")):
        for name in names:
            setattr(built.layers[0], name, Impl(torch.ones(1)))
            built.layers[1].register_buffer(name, torch.zeros(1))
    assert [*tensors_of(one)] == [*tensors_of(other)]
    built, before = one, [*tensors_of(one)]
    weight = built.layers[0].weight
    del built.layers[0].weight
    built.layers[0].weight = weight
    assert [*tensors_of(built)] == before


@pytest.mark.parametrize(
    "name", ["vllm.config.model", "vllm.distributed.parallel_state", "transformers.modeling", "torch.fx"]
)
def test_what_is_no_part_of_a_model_is_not_entered(name: str):
    built = model()
    kind = type("Config", (), {"__module__": name})
    config = kind()
    config.tensor = torch.ones(1)
    place(built, config)
    assert [*tensors_of(built)] == ["layers.0.weight", "layers.1.weight"]


@pytest.mark.parametrize(
    "value", [logging.getLogger("walk"), threading.Thread(), threading.Lock(), torch, Impl, closure]
)
def test_loggers_threads_packages_and_classes_are_passed(value: object):
    built = model()
    place(built, value)
    assert [*tensors_of(built)] == ["layers.0.weight", "layers.1.weight"]


def test_the_cache_of_keys_and_values_is_no_part():
    built = model()
    built.layers[0].kv_cache = [torch.ones(5)]
    assert [*tensors_of(built)] == ["layers.0.weight", "layers.1.weight"]


def test_a_model_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(walk, "MAX_OBJECTS", 200)
    built = model()
    place(built, [[index] for index in range(300)])
    with pytest.raises(WalkError, match=r"more than 200 objects; the walk was given up at layers\.1\.place"):
        tensors_of(built)


def test_it_shares_the_memory_and_changes_nothing():
    built = model()
    place(built, Impl([torch.ones(2)]))
    before = {name: tensor.clone() for name, tensor in tensors_of(built).items()}
    tensors_of(built)["layers.1.place.value[0]"].fill_(7)
    assert built.layers[1].place.value[0].tolist() == [7, 7]
    assert {*tensors_of(built)} == {*before}


def test_a_model_of_many_layers_takes_little_time():
    built = torch.nn.Module()
    built.layers = torch.nn.ModuleList(Layer() for _ in range(1000))
    for layer in built.layers:
        layer.weight, layer.impl = torch.nn.Parameter(torch.zeros(1)), Impl({"a": [torch.zeros(1)]})
    started = time.monotonic()
    assert len(tensors_of(built)) == 2000
    assert time.monotonic() - started < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_are_found():
    built = model().cuda()
    place(built, Impl(torch.ones(2, device="cuda")))
    assert {tensor.device.type for tensor in tensors_of(built).values()} == {"cuda"}
    assert len(tensors_of(built)) == 3
