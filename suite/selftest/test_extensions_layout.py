"""Every change of where a tensor is and how it reads is seen, by torch's guards or without them, and no other."""

from collections.abc import Callable

import pytest
import torch

from extensions import layout
from extensions.layout import Layout, guards_tell


def _set(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list], None]:
    def change(tensors: list) -> None:
        tensors[1].data = of(tensors[1].data)

    return change


CHANGES = {
    "elsewhere": _set(lambda held: held.clone()),
    "another shape": _set(lambda held: held.view(3, 2)),
    "another number of dimensions": _set(lambda held: held.view(6)),
    "other strides": _set(lambda held: held.as_strided((2, 3), (1, 2))),
    "another dtype": _set(lambda held: held.view(torch.int32)),
    "fewer elements": _set(lambda held: held[:1]),
    "one more": lambda tensors: tensors.append(torch.zeros(1)),
    "one less": lambda tensors: tensors.pop(),
    "another order": lambda tensors: tensors.reverse(),
}


@pytest.fixture(params=[True, False], ids=["guards", "no guards"])
def tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    if not request.param:
        monkeypatch.setattr(layout, "guards_tell", lambda: False)
    return [torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False) for _ in range(3)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(tensors: list[torch.Tensor], change: Callable[[list], None]):
    held, kept = Layout(tensors), [tensor.data for tensor in tensors]  # no address is used a second time
    change(tensors)
    assert not held.holds(tensors)
    assert kept


def test_what_is_no_change_is_none(tensors: list[torch.Tensor]):
    held = Layout(tensors)
    tensors[0].fill_(7)
    tensors[1] = tensors[1].detach()
    tensors[2].requires_grad_()
    assert held.holds(tensors)
    with torch.inference_mode():
        assert held.holds(tensors)


@pytest.mark.parametrize("parts", [False, True])
def test_a_tensor_that_is_there_twice_is_seen_to_part(monkeypatch: pytest.MonkeyPatch, parts: bool):
    tied = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    other = torch.nn.Parameter(tied.data.view(3, 2), requires_grad=False)  # at the same address
    held = Layout([tied, torch.zeros(1), tied])
    assert held.holds([tied, torch.zeros(0), tied]) is False
    single = torch.zeros(1)
    held = Layout([tied, single, tied])
    if not parts:
        monkeypatch.setattr(layout, "_looks", None)  # the guards have said yes
    assert held.holds([tied, single, other if parts else tied]) is not parts


def test_this_torch_has_guards_that_tell():
    assert guards_tell()


def test_guards_that_miss_a_change_are_not_used(monkeypatch: pytest.MonkeyPatch):
    def raising(tensors: list) -> Callable[..., bool]:
        raise TypeError("called in another way")

    for guards in (lambda tensors: lambda *others: True, lambda tensors: lambda *others: False, raising):
        monkeypatch.setattr(layout, "_guards", guards)
        assert not guards_tell.__wrapped__()


def test_no_tensor_is_kept():
    import gc
    import weakref

    tensor = torch.zeros(3)
    held, alive = Layout([tensor]), weakref.ref(tensor)
    del tensor
    gc.collect()
    assert alive() is None
    assert held
