"""The bracket around an update, with a model and a loader of its own: every state, and every way out of it."""

from types import SimpleNamespace

import pytest
import torch

from extensions.bracket import UpdateError
from extensions.devices import device_id
from extensions.group import GroupError
from extensions.handles import HandleError
from extensions.manifest import ManifestError, manifest_of
from extensions.segments import SharedSegment
from suite.selftest.fakes import CPU, SHAPES, Worker, begin, fitted, tensors, untouched


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    return fitted(monkeypatch)


@pytest.fixture
def segment():
    segment = SharedSegment(1 << 12)
    yield segment
    segment.unlink()


def send(worker: Worker, name: str, tensor: torch.Tensor | None = None) -> None:
    worker._weight_sync_accept({name: tensors()[name] if tensor is None else tensor})


def whole_update(worker: Worker, value: float = 1) -> None:
    begin(worker)
    worker._weight_sync_accept(tensors(value))
    assert worker.end_update() == len(SHAPES)
    assert worker.update_state() == "ready"
    assert all(torch.all(held == value) for held in worker.model.held.values())


# ---- the way through


def test_an_update_goes_through_its_states(worker: Worker):
    assert worker.update_state() == "ready"
    assert worker.begin_update(manifest_of(tensors().items())) == len(SHAPES)
    assert worker.update_state() == "updating"
    for name in reversed(SHAPES):
        send(worker, name)
    assert worker.end_update() == len(SHAPES)
    assert worker.update_state() == "ready"
    assert worker.model.calls == ["begin", "load", "load", "load", "end"]
    whole_update(worker, 2)


def test_what_arrives_together_is_loaded_in_one_call(worker: Worker):
    whole_update(worker)
    assert worker.model.calls == ["begin", "load", "end"]


def test_of_a_load_that_fails_nothing_counts_as_arrived(worker: Worker):
    begin(worker)
    send(worker, "a.weight")
    worker.model.fails = {"load": MemoryError("full")}
    with pytest.raises(MemoryError):
        worker._weight_sync_accept({name: tensor for name, tensor in tensors().items() if name != "a.weight"})
    with pytest.raises(UpdateError, match=r"2 announced tensors have not arrived, first b\.weight"):
        worker.end_update()
    assert worker.update_state() == "inconsistent"
    whole_update(worker)


def test_two_workers_share_no_state(worker: Worker):
    begin(worker)
    assert Worker().update_state() == "ready"


# ---- begin


def test_begin_twice_is_refused_and_the_first_goes_on(worker: Worker):
    begin(worker)
    send(worker, "a.weight")
    with pytest.raises(UpdateError, match="an update is under way: call end_update"):
        begin(worker)
    send(worker, "b.weight")
    send(worker, "c.weight")
    assert worker.end_update() == len(SHAPES)


@pytest.mark.parametrize(
    "announced",
    [
        None, [], manifest_of([("a.weight", torch.ones(2, 3))]), manifest_of(tensors(ghost=torch.ones(1)).items()),
        manifest_of({**tensors(), "b.weight": torch.ones(5)}.items()), manifest_of([*tensors().items()] * 2),
        manifest_of({**tensors(), "b.weight": torch.ones(4, dtype=torch.int8)}.items()),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_touches_nothing(worker: Worker, announced: object):
    with pytest.raises(ManifestError):
        worker.begin_update(announced)
    assert worker.model.calls == []
    assert untouched(worker)
    whole_update(worker)


def test_a_begin_that_fails_is_undone(worker: Worker):
    worker.model.fails = {"begin": MemoryError("full")}
    with pytest.raises(MemoryError):
        begin(worker)
    assert worker.model.calls == ["begin", "abort"]
    assert untouched(worker)
    whole_update(worker)


# ---- tensors


def test_a_tensor_that_was_not_announced_is_not_loaded(worker: Worker):
    begin(worker)
    with pytest.raises(UpdateError, match=r"^ghost was not announced"):
        send(worker, "ghost", torch.ones(1))
    assert worker.model.calls == ["begin"]
    assert worker.update_state() == "updating"


def test_a_tensor_that_arrives_twice_is_loaded_once(worker: Worker):
    begin(worker)
    send(worker, "a.weight")
    with pytest.raises(UpdateError, match=r"^a.weight has arrived before"):
        send(worker, "a.weight")
    assert worker.model.calls == ["begin", "load"]


@pytest.mark.parametrize("tensor", [torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, dtype=torch.bfloat16)])
def test_a_tensor_that_is_not_as_announced_is_not_loaded(worker: Worker, tensor: torch.Tensor):
    begin(worker)
    with pytest.raises(UpdateError, match=r"^a.weight: announced as .*torch.float32, \(2, 3\)\), arrived as"):
        send(worker, "a.weight", tensor)
    assert worker.model.calls == ["begin"]


@pytest.mark.parametrize("wrong", [{"ghost": torch.ones(1)}, {"b.weight": torch.ones(5)}])
def test_of_tensors_that_come_together_none_is_loaded_where_one_is_wrong(worker: Worker, wrong: dict):
    begin(worker)
    with pytest.raises(UpdateError):
        worker._weight_sync_accept(tensors() | wrong)
    assert worker.abort_update() == "the weights are as they were before the update"
    assert untouched(worker)


def test_after_a_load_that_failed_the_update_takes_nothing_more(worker: Worker):
    """Part of it may have been taken, and would be taken twice."""
    begin(worker)
    worker.model.fails = {"load": MemoryError("full")}
    with pytest.raises(MemoryError):
        send(worker, "a.weight")
    for name in SHAPES:
        with pytest.raises(UpdateError, match=rf"{name}: a load .* has failed before; call abort_update\(\) and begin"):
            send(worker, name)
    assert worker.model.calls == ["begin", "load"]
    assert worker.update_state() == "updating"
    worker.abort_update()
    whole_update(worker)


# ---- end and abort


@pytest.mark.parametrize("method", ["end_update"])
def test_an_end_without_a_begin_is_refused(worker: Worker, method: str):
    with pytest.raises(UpdateError, match=r"no update is under way: call begin_update\(manifest\) first"):
        getattr(worker, method)()
    assert untouched(worker)


def test_an_end_without_any_tensor_leaves_all_as_it_was(worker: Worker):
    begin(worker)
    with pytest.raises(UpdateError, match=r"^3 announced tensors have not arrived, first a.weight; the weights are as"):
        worker.end_update()
    assert untouched(worker)


def test_an_end_with_one_missing_says_which_and_what_became_of_the_weights(worker: Worker):
    begin(worker)
    send(worker, "a.weight")
    send(worker, "c.weight")
    with pytest.raises(UpdateError, match=r"^1 announced tensors have not arrived, first b.weight; part of the"):
        worker.end_update()
    assert worker.update_state() == "inconsistent"
    with pytest.raises(UpdateError, match="no update is under way"):
        worker.end_update()
    whole_update(worker)


def test_an_abort_without_an_update_says_how_things_are(worker: Worker):
    assert worker.abort_update() == "the weights are as they were before the update"
    assert worker.model.calls == []


def test_an_abort_before_any_tensor_leaves_all_as_it_was(worker: Worker):
    begin(worker)
    assert worker.abort_update() == "the weights are as they were before the update"
    assert untouched(worker)


def test_only_a_whole_update_ends_an_inconsistency(worker: Worker):
    begin(worker)
    send(worker, "a.weight")
    assert worker.abort_update().startswith("part of the weights is new")
    begin(worker)
    assert worker.update_state() == "updating"
    assert worker.abort_update().startswith("part of the weights is new"), "expected the first abort to be remembered"
    assert worker.abort_update().startswith("part of the weights is new")
    with pytest.raises(ManifestError):
        worker.begin_update([])
    assert worker.update_state() == "inconsistent"
    whole_update(worker)
    assert worker.abort_update() == "the weights are as they were before the update"


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt()])
def test_an_end_that_fails_leaves_an_inconsistency(worker: Worker, error: BaseException):
    begin(worker)
    worker._weight_sync_accept(tensors())
    worker.model.fails = {"end": error}
    with pytest.raises(type(error)):
        worker.end_update()
    assert worker.model.calls[-2:] == ["end", "abort"]
    assert worker.update_state() == "inconsistent"
    whole_update(worker)


@pytest.mark.parametrize("sent", [0, 1])
def test_an_abort_that_fails_leaves_an_inconsistency(worker: Worker, sent: int):
    begin(worker)
    for name in list(SHAPES)[:sent]:
        send(worker, name)
    worker.model.fails = {"abort": MemoryError("full")}
    with pytest.raises(MemoryError):
        worker.abort_update()
    assert worker.update_state() == "inconsistent"
    whole_update(worker)


def test_weights_are_not_looked_at_within_an_update(worker: Worker):
    begin(worker)
    with pytest.raises(UpdateError, match="an update is under way"):
        worker.check_weights_changed()


# ---- tensors on their own


def test_a_tensor_on_its_own_is_loaded_where_layers_are_as_loaded(worker: Worker):
    send(worker, "a.weight")
    assert worker.model.calls == ["load", "end"]
    assert worker.update_state() == "ready"


def test_a_tensor_on_its_own_that_fails_to_load_leaves_an_inconsistency(worker: Worker):
    worker.model.fails = {"load": MemoryError("full")}
    with pytest.raises(MemoryError):
        send(worker, "a.weight")
    assert worker.update_state() == "inconsistent"
    send(worker, "a.weight")
    assert worker.update_state() == "inconsistent", "expected a tensor alone not to make up for a whole update"
    whole_update(worker)


def test_a_tensor_on_its_own_is_refused_where_layers_are_packed(worker: Worker):
    worker.model.packed = ["layers.0.proj", "layers.1.proj"]
    with pytest.raises(UpdateError, match=r"2 layers .*, first layers\.0\.proj.*begin_update\(manifest\) before"):
        send(worker, "a.weight")
    assert worker.model.calls == []


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("ghost", torch.ones(1), "1 unknown name: ghost"),
        ("a.weight", torch.ones(3, 2), r"a.weight: expected shape \[2, 3\], found \[3, 2\]"),
        ("a.weight", torch.ones(2, 3, dtype=torch.int8), "a.weight: expected a dtype of"),
    ],
)
def test_a_wrong_tensor_on_its_own_is_not_loaded(worker: Worker, name: str, tensor: torch.Tensor, said: str):
    with pytest.raises(ManifestError, match=said):
        send(worker, name, tensor)
    with pytest.raises(ManifestError, match=said):
        worker._weight_sync_accept({"b.weight": torch.ones(4), name: tensor})
    assert worker.model.calls == []


# ---- the extensions' own methods


class Group:
    """Has received what is to arrive next."""

    closed = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.taken = tensor, 0

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        self.taken += 1
        tensor.copy_(self._tensor)

    def close(self) -> None:
        self.closed = True


def test_a_tensor_without_a_group_is_refused(worker: Worker):
    with pytest.raises(GroupError, match="there is no group: call init_weight_update_group"):
        worker.update_weight("a.weight", "float32", [2, 3])


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", torch.float32])
@pytest.mark.parametrize("form", [list, tuple, torch.Size])
def test_a_tensor_is_received_by_dtype_and_shape_in_every_spelling(worker: Worker, dtype: object, form: type):
    worker._weight_sync_group = Group(torch.full((2, 3), 7.0))
    begin(worker)
    worker.update_weight("a.weight", dtype, form([2, 3]))
    assert worker._weight_sync_state.update.load.taken["a.weight"].tolist() == [[7.0] * 3] * 2


def test_a_wrong_tensor_is_received_before_it_is_refused(worker: Worker):
    """Else the trainer would wait, and the next tensor would be taken for this one."""
    worker._weight_sync_group = group = Group(torch.ones(5))
    begin(worker)
    with pytest.raises(UpdateError, match="ghost was not announced"):
        worker.update_weight("ghost", "float32", [5])
    with pytest.raises(UpdateError, match=r"b.weight: announced as"):
        worker.update_weight("b.weight", "float32", [5])
    assert group.taken == 2


def test_a_worker_joins_behind_the_offset_and_leaves_its_old_group(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    joined = []
    monkeypatch.setattr(
        "extensions.broadcast.stateless_init_process_group",
        lambda *how: joined.append(how) or Group(torch.ones(1)),
    )
    worker.init_weight_update_group("trainer", 1234, 3, 7)
    assert joined == [("trainer", 1234, 3 + worker.rank, 7, CPU)]
    first = worker._weight_sync_group
    worker.init_weight_update_group("trainer", 1235, 3, 7)
    assert first.closed
    worker.close_weight_update_group()
    worker.close_weight_update_group()
    with pytest.raises(GroupError):
        worker.update_weight("a.weight", "float32", [2, 3])


def handles(segment: SharedSegment, named: dict[str, torch.Tensor]) -> dict[str, dict]:
    return {device_id(CPU): segment.fill(list(named.items()))}


def test_handles_are_loaded_in_one_call_or_in_several(worker: Worker, segment: SharedSegment):
    both = handles(segment, tensors(3))
    begin(worker)
    assert worker.update_weights_from_ipc_handles(both) == 3
    assert worker.end_update() == 3
    assert all(torch.all(held == 3) for held in worker.model.held.values())
    begin(worker)
    for name, handle in both[device_id(CPU)].items():
        assert worker.update_weights_from_ipc_handles({device_id(CPU): {name: handle}, "GPU-other": {}}) == 1
    assert worker.end_update() == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "found handles for: none"), ({"GPU-1": {"a.weight": {}}, "GPU-2": {}}, "for: 'GPU-1', 'GPU-2'; nothing"),
        (None, "found handles for: none"), ([1], "found handles for: none"), ({"own": {}}, "are empty"),
        ({"own": None}, "are empty"), ({"own": [1]}, "are empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bracket", [True, False])
def test_handles_for_no_device_or_another_are_refused(worker: Worker, wrong: object, said: str, bracket: bool):
    if isinstance(wrong, dict) and "own" in wrong:
        wrong = {device_id(CPU): wrong["own"]}
    if bracket:
        begin(worker)
    with pytest.raises(ManifestError, match=said):
        worker.update_weights_from_ipc_handles(wrong)
    worker.abort_update()
    assert untouched(worker)


@pytest.mark.parametrize("bracket", [True, False])
def test_of_handles_none_is_loaded_where_one_is_wrong(worker: Worker, segment: SharedSegment, bracket: bool):
    good = handles(segment, tensors())[device_id(CPU)]
    for wrong, error in (
        (good | {"c.weight": good["c.weight"] | {"segment": "../x"}}, HandleError),
        (good | {"c.weight": (print, ())}, HandleError),
        (good | {"c.weight": good["b.weight"]}, UpdateError if bracket else ManifestError),
        (good | {"ghost": good["c.weight"]}, UpdateError if bracket else ManifestError),
    ):
        if bracket:
            begin(worker)
        with pytest.raises(error):
            worker.update_weights_from_ipc_handles({device_id(CPU): wrong})
        assert "load" not in worker.model.calls
        assert worker.abort_update() == "the weights are as they were before the update"
        assert untouched(worker)


def test_handles_are_not_even_opened_where_layers_are_packed(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extensions.colocate.open_handle", lambda *_: pytest.fail("opened"))
    worker.model.packed = ["layers.0.proj"]
    with pytest.raises(UpdateError, match="hold repacked or quantised weights"):
        worker.update_weights_from_ipc_handles({device_id(CPU): {"a.weight": {}}})
    begin(worker)
    with pytest.raises(UpdateError, match="ghost was not announced"):
        worker.update_weights_from_ipc_handles({device_id(CPU): {"ghost": {}}})


def test_an_update_whose_group_was_left_is_not_acknowledged(monkeypatch: pytest.MonkeyPatch):
    """What a group that is gone brought may not have come through, also where a new group is whole."""
    worker = fitted(monkeypatch)
    worker._weight_sync_group = SimpleNamespace(broadcast=lambda *_, **__: None, wait=lambda: None, close=lambda: None)
    begin(worker)
    for name, tensor in tensors().items():
        worker.update_weight(name, "float32", list(tensor.shape))
    worker.close_weight_update_group()
    with pytest.raises(UpdateError, match="was lost or its load failed"):
        worker.end_update()
    assert worker.update_state() == "inconsistent"
