"""A load copies to where its plan says, has `load_weights` do the rest, and names what did not get where it belongs."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from extensions.model import load as loads
from extensions.model.load import DirectLoad, LoadError
from extensions.model.twin import named_tensors, record
from extensions.model.views import parted, resolve, views_of
from extensions.plan import Plan, _parameters

HALF = torch.bfloat16
NEW = {name: torch.randn(3, 4).to(HALF) for name in ("upper", "lower")} | {"scale": torch.rand(4)}


class Live(torch.nn.Module):
    """`rows` of two tensors, `scale` that is loaded through a function, and views of each in other places."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.inner = torch.nn.Module()
        self.inner.rows = torch.nn.Parameter(torch.zeros(6, 4, dtype=HALF, device=device), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.zeros(4, dtype=HALF, device=device), requires_grad=False)
        self.register_buffer("shown", self.inner.rows.data[2:4].t(), persistent=False)
        self.held, self.drops = [self.scale], ()

    def load_weights(self, named) -> None:
        for name, tensor in named:
            if name == "scale" and name not in self.drops:
                self.scale.data.copy_(tensor)
                self.scale.data.copy_(-torch.exp(self.scale))
            elif name == "upper":
                self.inner.rows.data[:3].copy_(tensor)
            elif name == "lower":
                self.inner.rows.data[3:].copy_(tensor)


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "configured", lambda config: contextlib.nullcontext())


def plan_for(model: Live) -> Plan:
    twin = Live("meta")
    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in NEW.items()}
    parameters, seen = _parameters(twin), views_of(twin)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(twin).items()}
    fills = record(twin, {name: tensor.to("meta") for name, tensor in NEW.items()})
    live, problems = parted(seen, model)
    assert problems == []
    return Plan(announced, fills, parameters, tensors, views=live)


def loaded(model: Live, plan: Plan | None = None, together: bool = True) -> DirectLoad:
    load = DirectLoad(model, None, plan or plan_for(model))
    load.begin()
    for tensors in [NEW] if together else [{name: tensor} for name, tensor in NEW.items()]:
        load.load(tensors)
    load.end()
    return load


@pytest.mark.parametrize("together", [True, False])
def test_each_tensor_is_where_load_weights_would_have_put_it(together: bool):
    expected, found = Live(), Live()
    expected.load_weights(NEW.items())
    loaded(found, together=together)
    assert torch.equal(found.inner.rows, expected.inner.rows)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.shown, expected.shown)


def test_tensors_that_are_not_contiguous_are_copied_as_they_read():
    model = Live()
    load = DirectLoad(model, None, plan_for(model))
    load.load(NEW | {"upper": NEW["upper"].t().contiguous().t()})
    assert torch.equal(model.inner.rows[:3], NEW["upper"])


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("spoil", ["written into", "kept"])
def test_what_load_weights_does_to_a_tensor_does_not_reach_the_trainers_memory(
    monkeypatch: pytest.MonkeyPatch, planned: bool, spoil: str
):
    def load_weights(self: Live, named) -> None:
        for name, tensor in named:
            if name == "scale" and spoil == "kept":
                self.scale.data = tensor
            elif name == "scale":
                self.scale.data.copy_(tensor.zero_())

    monkeypatch.setattr(Live, "load_weights", load_weights)
    monkeypatch.setitem(NEW, "scale", torch.rand(4).to(HALF))
    model, before = Live(), NEW["scale"].clone()
    model.held = []
    load = DirectLoad(model, None, replace(plan_for(model), views=[]) if planned else None)
    load.load({"scale": NEW["scale"]})
    load.end()
    assert torch.equal(NEW["scale"], before)
    assert torch.equal(model.scale, before if spoil == "kept" else torch.zeros(4, dtype=HALF))
    model.scale.data.fill_(3)
    assert torch.equal(NEW["scale"], before)


def test_an_element_that_load_weights_drops_is_named():
    model = Live()
    plan, model.drops = plan_for(model), ("scale",)
    with pytest.raises(LoadError, match=r"^scale: 0 of 4 elements were written to scale$"):
        loaded(model, plan)


def test_what_has_to_be_loaded_together_waits_for_the_end():
    model = Live()
    load = DirectLoad(model, None, replace(plan_for(model), together=True))
    load.load(NEW)
    assert not model.scale.any()
    load.end()
    assert model.scale.all()


def test_without_a_plan_load_weights_gets_all_tensors_in_one_call(monkeypatch: pytest.MonkeyPatch):
    model, calls, load_weights = Live(), [], Live.load_weights

    def counted(self: Live, named) -> None:
        calls.append(dict(named))
        load_weights(self, calls[-1].items())

    monkeypatch.setattr(Live, "load_weights", counted)
    load = DirectLoad(model, None, None)
    for name, tensor in NEW.items():
        load.load({name: tensor})
    assert calls == []
    load.end()
    assert [[*call] for call in calls] == [[*NEW]]
    assert torch.equal(model.inner.rows, torch.cat([NEW["upper"], NEW["lower"]]))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.inner, "rows", torch.nn.Parameter(torch.zeros(5, 4, dtype=HALF), False)),
        lambda model: setattr(model.inner, "rows", torch.nn.Parameter(torch.zeros(4, 6, dtype=HALF).t(), False)),
        lambda model: setattr(model.inner, "rows", torch.nn.Parameter(torch.zeros(6, 4), False)),
    ],
)
def test_a_plan_of_other_parameters_is_not_followed(change: Callable[[Live], None]):
    """They have moved since it was made, and are smaller, transposed or wider."""
    model = Live()
    plan = plan_for(model)
    change(model)
    with pytest.raises(LoadError, match=r"^inner.rows: planned as .* found .*; the plan is not of this model any more"):
        loaded(model, plan)
    assert not model.inner.rows.any()


def test_a_tied_head_with_other_values_is_named():
    model = Live()
    plan = replace(plan_for(model), aliases={"lm_head.weight": "upper"})
    load = DirectLoad(model, None, plan)
    load.load(NEW | {"lm_head.weight": NEW["upper"].float()})
    load.end()
    other = NEW["upper"].clone()
    other[2, 3] += 1
    load.load({"lm_head.weight": other})
    with pytest.raises(LoadError, match=r"^lm_head.weight: its values are not those of upper, and this engine has one"):
        load.end()


# ---- views


def test_a_view_that_is_part_of_its_parameter_needs_nothing():
    assert parted(views_of(Live("meta")), Live()) == ([], [])


def test_a_view_that_has_parted_is_renewed():
    model = Live()
    model.shown = model.shown.clone()
    model.inner.rows.data = model.inner.rows.data.clone()
    model.shown.data = model.inner.rows.data[2:4].t().float()  # cast, as attention does with sinks
    plan = plan_for(model)
    assert [(view.path, view.of) for view in plan.views] == [("shown", "inner.rows")]
    loaded(model, plan)
    assert torch.equal(model.shown, model.inner.rows[2:4].t().float())


def test_a_view_of_a_packed_parameter_is_renewed_as_it_was_built():
    model, seen = Live(), views_of(Live("meta"))
    model.inner.rows.data = torch.empty(0, dtype=HALF)
    (view,), problems = parted(seen, model)
    assert (view.path, problems) == ("shown", [])
    assert resolve(model, view) is model.shown


def test_a_view_that_holds_other_values_can_not_be_renewed():
    model, seen = Live(), views_of(Live("meta"))
    model.shown = model.shown.float() + 1
    assert parted(seen, model)[1] == ["inner.rows: shown was derived from it and can't be renewed"]


def test_a_view_in_a_list_that_has_parted_can_not_be_renewed():
    model, seen = Live(), views_of(Live("meta"))
    model.held = [model.scale.detach().clone()]
    assert parted(seen, model)[1] == ["scale: held[0] was derived from it and can't be renewed"]


def test_a_view_that_is_replaced_within_an_update_is_named():
    model = Live()
    model.shown = model.shown.float()
    plan = plan_for(model)
    load = DirectLoad(model, None, plan)
    load.load(NEW)
    model.shown = model.shown.clone()
    with pytest.raises(LoadError, match=r"^inner.rows: shown, which was renewed with it, was replaced meanwhile"):
        load.end()
