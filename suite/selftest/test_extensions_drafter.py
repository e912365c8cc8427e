"""Updates of an engine with a draft model: which of the two they bring, and what state that leaves."""

from types import SimpleNamespace

import pytest
import torch

from extensions.bracket import UpdateError
from extensions.manifest import ManifestError, manifest_of
from extensions.model.drafter import DRAFT, DraftLoad, drafter_of
from extensions.model.load import LoadError
from suite.selftest import fakes
from suite.selftest.fakes import fitted, tensors

pytestmark = pytest.mark.selftest


class Guesses(fakes.Model):
    """A draft model, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.zeros(1))


class Worker(fakes.Worker):
    """A worker that guesses ahead."""

    vllm_config = SimpleNamespace(quant_config="the model's", speculative_config=SimpleNamespace(draft_model_config=3))

    def __init__(self) -> None:
        super().__init__()
        self.guesses = Guesses()
        self.model_runner.drafter = SimpleNamespace(model=self.guesses)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    return fitted(monkeypatch, Worker)


def of_drafter(value: float = 1) -> dict[str, torch.Tensor]:
    return {f"{DRAFT}{name}": tensor for name, tensor in tensors(value).items()}


def update(worker: Worker, brought: dict[str, torch.Tensor]) -> None:
    worker.begin_update(manifest_of(brought.items()))
    for name, tensor in brought.items():
        worker._weight_sync_accept({name: tensor})
    assert worker.end_update() == len(brought)


def holds(model: fakes.Model) -> set[float]:
    return {value for held in model.held.values() for value in held.flatten().tolist()}


def test_a_model_that_is_updated_alone_leaves_its_draft_model_stale(worker: Worker):
    assert worker.update_state() == "ready"
    update(worker, tensors(1))
    assert (worker.update_state(), holds(worker.model), holds(worker.guesses)) == ("stale draft", {1}, {0})
    update(worker, of_drafter(2))
    assert (worker.update_state(), holds(worker.model), holds(worker.guesses)) == ("ready", {1}, {2})


def test_one_update_brings_both(worker: Worker):
    update(worker, {**of_drafter(2), **tensors(1)})
    assert (worker.update_state(), holds(worker.model), holds(worker.guesses)) == ("ready", {1}, {2})


def test_a_tensor_alone_leaves_the_draft_model_stale(worker: Worker):
    worker._weight_sync_accept({"a.weight": tensors(1)["a.weight"]})
    assert worker.update_state() == "stale draft"


def test_of_a_draft_model_tensors_are_refused_as_of_the_model(worker: Worker):
    brought = of_drafter()
    del brought[f"{DRAFT}b.weight"]
    with pytest.raises(ManifestError, match=r"^draft model: .*b\.weight"):
        worker.begin_update(manifest_of({**tensors(), **brought}.items()))
    assert worker.update_state() == "ready"
    assert worker.model.calls == worker.guesses.calls == []


def test_an_update_of_both_wants_all_of_the_model(worker: Worker):
    with pytest.raises(ManifestError, match=r"b\.weight"):
        worker.begin_update(manifest_of({"a.weight": tensors()["a.weight"], **of_drafter()}.items()))


def test_without_a_draft_model_its_tensors_are_unknown(monkeypatch: pytest.MonkeyPatch):
    plain = fitted(monkeypatch)
    with pytest.raises(ManifestError, match=r"draft\.a\.weight"):
        plain.begin_update(manifest_of({**tensors(), **of_drafter()}.items()))


def test_a_draft_model_that_shares_a_tensor_is_not_updated(worker: Worker):
    worker.model.embedding = worker.guesses.shared = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ManifestError, match="the draft model shares shared with the model"):
        worker.begin_update(manifest_of(of_drafter().items()))
    assert worker.guesses.calls == []
    update(worker, tensors())
    assert worker.update_state() == "stale draft"


def test_a_draft_model_that_has_no_tensor_of_its_own_is_never_stale(worker: Worker):
    worker.model.embedding = worker.guesses.own
    update(worker, tensors())
    assert worker.update_state() == "ready"


@pytest.mark.parametrize("holder", [None, SimpleNamespace(), SimpleNamespace(model="n-grams")])
def test_what_guesses_without_weights_is_no_draft_model(holder: object):
    assert drafter_of(SimpleNamespace(drafter=holder, get_model=fakes.Model), None) is None


def test_a_draft_model_is_taken_out_of_its_graphs():
    inner = Guesses()
    runner = SimpleNamespace(
        get_model=fakes.Model, speculator=SimpleNamespace(model=SimpleNamespace(unwrap=lambda: inner))
    )
    assert drafter_of(runner, None).model is inner


@pytest.mark.parametrize(
    ("holder", "expected"),
    [
        ({"_draft_vllm_config": SimpleNamespace(quant_config="its own")}, "its own"),
        ({"_create_draft_vllm_config": lambda: SimpleNamespace(quant_config="made")}, "made"),
        ({}, None),
    ],
)
def test_a_draft_model_has_a_configuration_of_its_own(holder: dict, expected: str | None):
    runner = SimpleNamespace(get_model=fakes.Model, drafter=SimpleNamespace(model=Guesses(), **holder))
    config = drafter_of(runner, Worker.vllm_config).vllm_config
    assert (config.quant_config, config.model_config) == (expected, 3)
    assert Worker.vllm_config.quant_config == "the model's"


# ---- what breaks off


def test_a_draft_model_whose_load_failed_is_stale_and_the_model_as_it_was(worker: Worker):
    update(worker, {**tensors(1), **of_drafter(1)})
    worker.guesses.fails = {"end": MemoryError("full")}
    with pytest.raises(MemoryError):
        update(worker, of_drafter(2))
    assert worker.update_state() == "stale draft"
    assert worker.abort_update() == "the model's weights are as they were before the update; the draft model is stale"
    update(worker, of_drafter(2))
    assert worker.update_state() == "ready"


def test_an_update_of_the_draft_model_makes_no_inconsistent_model_right(worker: Worker):
    worker.model.fails = {"end": MemoryError("full")}
    with pytest.raises(MemoryError):
        update(worker, tensors(1))
    assert worker.update_state() == "inconsistent"
    update(worker, of_drafter(1))
    assert worker.update_state() == "inconsistent"
    update(worker, tensors(1))
    assert worker.update_state() == "stale draft"


def test_of_an_update_that_is_given_up_before_a_tensor_came_nothing_is_left(worker: Worker):
    update(worker, {**tensors(1), **of_drafter(1)})
    worker.begin_update(manifest_of({**tensors(2), **of_drafter(2)}.items()))
    assert worker.update_state() == "updating"
    assert worker.abort_update() == "the weights are as they were before the update"
    assert worker.update_state() == "ready"


def test_an_update_of_the_draft_model_that_lacks_tensors_spoils_it_alone(worker: Worker):
    worker.begin_update(manifest_of(of_drafter().items()))
    worker._weight_sync_accept({f"{DRAFT}a.weight": tensors()["a.weight"]})
    with pytest.raises(UpdateError, match=r"2 announced tensors have not arrived, first draft\.b\.weight"):
        worker.end_update()
    assert worker.update_state() == "stale draft"


# ---- the load of both


class Part:
    """Notes what is done with one of the two."""

    def __init__(self, again: bool = True) -> None:
        self.done: list[tuple] = []
        self._again = again

    def load(self, tensors: dict) -> None:
        self.done.append(("load", *tensors))

    def place(self, name: str) -> str:
        return f"place of {name}"

    def written_past(self, names: list[str]) -> None:
        self.done.append(("written", *names))

    def takes_pieces(self, name: str) -> bool:
        return name == "a"

    def load_pieces(self, pieces: list) -> None:
        self.done.append(("pieces", *pieces))

    def again(self) -> "Part | None":
        return self if self._again else None

    def end(self) -> None:
        raise LoadError("a: lost")


def test_each_of_the_two_gets_its_own_by_the_names_of_its_checkpoint():
    model, drafter = Part(), Part()
    load = DraftLoad(model, drafter)
    load.load({"a": 1, "draft.b": 2})
    assert (load.place("draft.a"), load.place("b")) == ("place of a", "place of b")
    assert (load.takes_pieces("draft.a"), load.takes_pieces("b")) == (True, False)
    load.written_past(["draft.a"])
    load.load_pieces([("draft.a", 0, 1), ("b", 0, 2), ("draft.a", 8, 3)])
    assert model.done == [("load", "a"), ("written",), ("pieces", ("b", 0, 2))]
    assert drafter.done == [("load", "b"), ("written", "a"), ("pieces", ("a", 0, 1), ("a", 8, 3))]
    with pytest.raises(LoadError, match=r"^a: lost"):
        load.end()
    with pytest.raises(LoadError, match=r"^draft model: a: lost"):
        DraftLoad(None, drafter).end()


@pytest.mark.parametrize(
    ("model", "drafter", "expected"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_load_serves_again_where_both_do(model: bool, drafter: bool, expected: bool):
    load = DraftLoad(Part(model), Part(drafter))
    assert load.again() is (load if expected else None)
