"""What is beside the weights is compared to the last bit, but for what cold engines differ in by themselves."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from suite.actors import recording
from suite.actors.probe import Probe
from suite.actors.recording import WHOLE, Kept, beside_of, both, differing_beside, unsteady_of, weights_of
from suite.selftest import fakes

RANK = 1


def model(seed: int = 0) -> torch.nn.Module:
    """A weight, a buffer that depends on no seed, one that is derived from the weight, and an implementation's."""
    built = torch.nn.Module()
    weight = torch.arange(6, dtype=torch.bfloat16) + seed
    built.proj = torch.nn.Module()
    built.proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    built.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)
    built.derived = weight.float() * 2
    built.impl = SimpleNamespace(scales=[torch.ones(3, dtype=torch.float64)], pointer=torch.zeros(1, dtype=torch.int64))
    return built


class Worker(Probe):
    """A probe in a worker that holds a model, beside a cold engine's record of it."""

    def __init__(self, built: torch.nn.Module) -> None:
        self.rank, self.device = RANK, torch.device("cpu")
        self.model, self.vllm_config = built, fakes.VLLM_CONFIG
        self.model_runner = SimpleNamespace(get_model=lambda: built)


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """What is loaded when the checkpoint is loaded twice more; without vLLM nothing is packed."""
    more = [model(), model()]
    more[0].impl.pointer += 7
    left = iter(more)
    monkeypatch.setattr(recording, "_loaded_again", lambda config: next(left))
    monkeypatch.setattr("extensions.model.weights._is_applied", lambda model, module: True)
    return more


@pytest.fixture
def cold(tmp_path: Path) -> str:
    """Where the cold engine of seed 0 has written."""
    worker, path = Worker(model()), str(tmp_path / "cold-0")
    worker.probe_record()
    worker.probe_settle(path)
    return path


def test_what_is_set_before_the_cold_engine_has_answered_is_no_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worker = Worker(model())
    worker.probe_device()
    monkeypatch.setenv("SET_BY_A_FIRST_ANSWER", "1")
    worker.probe_record()
    worker.probe_settle(str(tmp_path / "cold-0"))
    assert worker.probe_settings() == []
    monkeypatch.setenv("SET_BY_AN_UPDATE", "1")
    assert worker.probe_settings() == ["the variable SET_BY_AN_UPDATE: unset became 1"]


def compared(built: torch.nn.Module, cold: str) -> list[str]:
    found = Worker(built).probe_compare(cold, [cold], cold)
    assert found["differing"] + found["others"] == len(found["first"])
    return found["first"]


def test_another_cold_engine_is_equal_though_its_addresses_are_others(cold: str):
    other = model()
    other.impl.pointer += 99
    assert compared(other, cold) == []


def put(built: torch.nn.Module, derived: torch.Tensor) -> None:
    built.derived = derived


SPOILT = {
    "a weight": (lambda m: m.proj.weight.data[2:4].fill_(9), "proj.weight: 2 of 6 elements differ"),
    "a buffer": (lambda m: m.table[5:].fill_(1.5), "table: 3 of 8 elements differ"),
    "one ulp": (lambda m: m.table.view(torch.int32)[3:4].add_(1), "table: 1 of 8 elements differ"),
    "minus zero": (lambda m: m.table[0:1].neg_(), "table: 1 of 8 elements differ"),
    "a derived tensor": (lambda m: m.derived.mul_(2), "derived: 5 of 6 elements differ"),
    "an implementation's": (lambda m: m.impl.scales[0][0:1].add_(1), "impl.scales[0]: 1 of 3 elements differ"),
    "another dtype": (lambda m: put(m, m.derived.double()), "derived: expected float32 [6], found float64 [6]"),
    "another shape": (lambda m: put(m, m.derived.view(2, 3)), "derived: expected float32 [6], found float32 [2, 3]"),
    "one too many": (lambda m: setattr(m, "extra", torch.ones(1)), "extra: the engine has it, a cold engine does not"),
    "one too few": (lambda m: delattr(m, "derived"), "derived: a cold engine has it, the engine does not"),
    "left on meta": (lambda m: put(m, m.derived.to("meta")), "derived: a cold engine has it, the engine does not"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_what_differs_is_told_by_its_path(cold: str, how: str):
    spoil, said = SPOILT[how]
    spoilt = model()
    spoil(spoilt)
    assert compared(spoilt, cold) == [said]


def test_elements_that_a_load_leaves_unset_are_left_out_and_no_others(tmp_path: Path, loads: list[torch.nn.Module]):
    loads[0].table[6:] = torch.nan
    worker, path = Worker(model()), str(tmp_path / "cold")
    worker.probe_record()
    worker.probe_settle(path)
    other = model()
    other.table[6:] = 7
    assert compared(other, path) == []
    other.table[5:] = 7
    assert compared(other, path) == ["table: 1 of 8 elements differ"]


def test_what_an_answer_changes_is_left_out(tmp_path: Path):
    worker, path = Worker(model()), str(tmp_path / "cold")
    worker.probe_record()
    worker.model.impl.scales[0][2] = 5
    worker.probe_settle(path)
    other = model()
    other.impl.scales[0][2] = 6
    assert compared(other, path) == []
    other.impl.scales[0][1] = 6
    assert compared(other, path) == ["impl.scales[0]: 1 of 3 elements differ"]


def test_what_the_engine_computed_with_before_the_second_answer_counts(tmp_path: Path):
    worker, path = Worker(model()), str(tmp_path / "cold")
    worker.probe_record()
    worker.model.proj.weight.data.fill_(7)
    worker.probe_settle(path)
    assert compared(model(), path) == []


def test_of_several_checkpoints_counts_what_they_have_in_common(tmp_path: Path, cold: str):
    other, snapshot = str(tmp_path / "cold-1"), str(tmp_path / "snapshot")
    Worker(model(1)).probe_save(other)
    updated = model(5)
    Worker(updated).probe_save(snapshot)
    assert Worker(updated).probe_compare(snapshot, [cold, other], cold)["first"] == []
    updated.table[1] = 9
    assert Worker(updated).probe_compare(snapshot, [cold, other], cold)["first"] == ["table: 1 of 8 elements differ"]


@pytest.fixture
def zeroed(tmp_path: Path) -> tuple[str, str]:
    """Where cold engines of seeds 0 and 1 have written, on a rank that has zeros for a bias whatever is loaded."""
    paths = str(tmp_path / "cold-0"), str(tmp_path / "cold-1")
    for seed, path in enumerate(paths):
        Worker(with_bias(seed)).probe_save(path)
    return paths


def with_bias(seed: int) -> torch.nn.Module:
    built = model(seed)
    built.norm = torch.nn.Module()
    built.norm.weight = torch.nn.Parameter(torch.ones(6, dtype=torch.bfloat16) + seed, requires_grad=False)
    built.proj.bias = torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16), requires_grad=False)
    return built


def test_what_two_checkpoints_have_in_common_need_not_differ(zeroed: tuple[str, str]):
    of_one, of_other = zeroed
    found = Worker(with_bias(1)).probe_alike(of_one, of_other)
    assert found == {"rank": RANK, "weights": 2, "same": 0, "first": []}
    assert recording.read_weights(of_one, RANK).keys() == {"proj.weight", "proj.bias", "norm.weight"}


def test_a_weight_that_is_the_checkpoints_already_is_found(zeroed: tuple[str, str]):
    of_one, of_other = zeroed
    half_moved = with_bias(1)
    half_moved.norm.weight.data.copy_(torch.ones(6))
    assert Worker(half_moved).probe_alike(of_one, of_other)["first"] == ["norm.weight"]
    found = Worker(with_bias(0)).probe_alike(of_one, of_other)
    assert found == {"rank": RANK, "weights": 2, "same": 2, "first": ["norm.weight", "proj.weight"]}


def test_of_one_checkpoint_nothing_can_be_told(zeroed: tuple[str, str]):
    assert Worker(with_bias(0)).probe_alike(zeroed[0], zeroed[0])["weights"] == 0


def test_a_snapshot_has_all_that_it_is_compared_with(tmp_path: Path, cold: str):
    snapshot, built = str(tmp_path / "snapshot"), model(3)
    Worker(built).probe_save(snapshot)
    built.impl.pointer += 1
    assert Worker(built).probe_compare(snapshot, [snapshot], cold)["first"] == []
    built.derived[0] = -1
    assert Worker(built).probe_compare(snapshot, [snapshot], cold)["first"] == ["derived: 1 of 6 elements differ"]


def test_memory_that_is_not_set_is_told_from_memory_that_is():
    with recording.unset_is_nan():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_masks_join_to_what_either_leaves_out():
    first, second = torch.tensor([True, False]), torch.tensor([False, False])
    joined = both({"a": first, "b": WHOLE}, {"a": second, "b": first, "c": second})
    assert joined["a"].tolist() == [True, False]
    assert joined["b"].shape == WHOLE.shape
    assert joined["c"].tolist() == [False, False]


def test_a_tensor_that_one_cold_engine_lacks_is_left_out():
    one = {"a": Kept.of(torch.ones(2)), "b": Kept.of(torch.ones(2))}
    masks = unsteady_of(one, {"a": one["a"]})
    assert [*masks] == ["b"]
    assert differing_beside({"a": one["a"]}, one, masks) == []
    assert differing_beside({"a": one["a"]}, one, {}) == ["b: a cold engine has it, the engine does not"]


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.complex128],
)
def test_one_bit_of_any_dtype_is_seen(dtype: torch.dtype):
    tensor = (
        torch.zeros(2, 3, dtype=torch.complex128).view(torch.uint8)[:, : 3 * dtype.itemsize].contiguous().view(dtype)
    )
    other = tensor.clone()
    other.view(torch.uint8).view(-1)[-1] = 1
    differs = Kept.of(tensor).differing(Kept.of(other))
    assert differs.tolist() == [False] * 5 + [True]


def test_tensors_on_meta_and_empty_ones_have_no_values():
    built = model()
    built.ghost, built.empty = torch.ones(2, device="meta"), torch.ones(0)
    assert not {"ghost", "empty", "proj.weight"} & beside_of(built, weights_of(built)).keys()


def test_addresses_are_those_of_every_tensor_on_the_device():
    built = model()
    built.elsewhere, built.empty = torch.ones(2, device="meta"), torch.ones(0)
    found = Worker(built).probe_addresses()
    assert found.keys() == {"proj.weight", "table", "derived", "impl.scales[0]", "impl.pointer"}
    assert found["table"] == built.table.data_ptr()


def test_a_weight_that_an_update_has_left_without_data_differs():
    """As vLLM's reload leaves parameters after a refused update."""
    expected = {"a.weight": torch.ones(2, 3)}
    assert [*recording.differing_weights([("a.weight", torch.ones(2, 3, device="meta"))], expected)] == [
        "a.weight: expected 6 elements, found none: it is on the meta device"
    ]
