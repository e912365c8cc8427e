"""A positional checksum changes with each bit and each place, adds up from parts, and takes little memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from extensions.model.regions import Region
from extensions.model.twin import Fill
from extensions.plan import PlanError
from suite import models
from suite.actors import arrived, checksum
from suite.actors.checksum import added
from suite.actors.trainer import Trainer
from suite.processes.blame import SuiteFault
from suite.selftest import vllm_models

DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (*shape, 1)).view(dtype)[..., 0].contiguous()


@pytest.fixture(params=[False, True], ids=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setitem(checksum.PIECE_ELEMENTS, "cpu", 7)


IN_PIECES = pytest.mark.usefixtures("pieces")


@IN_PIECES
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bit_counts(dtype: torch.dtype):
    tensor = random(5, 6, dtype=dtype)
    before, flat = checksum.checksum(tensor), tensor.view(torch.uint8).view(-1)
    for at in range(0, len(flat), 5):
        flat[at] ^= 1 << at % 8
        assert checksum.checksum(tensor) != before
        flat[at] ^= 1 << at % 8
    assert checksum.checksum(tensor) == before


@IN_PIECES
def test_each_place_counts():
    tensor = random(8, 9)
    orders = [tensor, tensor.roll(1, 0), tensor.roll(1, 1), tensor.flip(0), tensor.flip(1), tensor[torch.randperm(8)]]
    orders += [torch.cat([tensor[:4], tensor[6:], tensor[4:6]]), tensor[:, [1, 0, *range(2, 9)]]]
    different = {str(order.view(torch.int16).tolist()) for order in orders}
    assert len({checksum.checksum(order) for order in orders}) == len(different) > 5
    assert checksum.checksum(tensor.t()) != checksum.checksum(tensor)


def test_a_sum_that_stays_the_same_is_not_enough():
    """Two elements change by the same amount, one up and one down."""
    for apart in range(1, 200):
        tensor = torch.full((200,), 1000, dtype=torch.int16)
        before = checksum.checksum(tensor)
        tensor[0] += 1
        tensor[apart] -= 1
        assert checksum.checksum(tensor) != before


def signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


@IN_PIECES
def test_it_is_what_plain_integers_say():
    values = [3, -7, 0, 2**31 - 1, -(2**31), 12]
    total = 0
    for position, value in enumerate(values):
        weight = signed(position * checksum.MIXER)
        weight = signed((weight ^ (weight >> 29)) * checksum.MIXER) | 1
        total += weight * value
    assert checksum.checksum(torch.tensor(values, dtype=torch.int32).view(2, 3)) == signed(total)


@IN_PIECES
def test_a_view_has_the_checksum_of_its_elements():
    tensor = random(12, 10)
    view = tensor[::2, 1:].t()
    assert checksum.checksum(view) == checksum.checksum(view.contiguous())


@IN_PIECES
def test_parts_add_up_to_the_whole():
    tensor = random(6, 8)
    rows = [checksum.checksum(tensor[at : at + 2], 8 * at, [8, 1]) for at in (0, 2, 4)]
    columns = [checksum.checksum(tensor[:, at : at + 4].contiguous(), at, [8, 1]) for at in (0, 4)]
    assert added(rows) == added(columns) == checksum.checksum(tensor)


def test_nothing_and_a_single_element_have_one():
    assert checksum.checksum(torch.empty(0, 3)) == 0
    assert checksum.checksum(torch.tensor(1, dtype=torch.int8)) == checksum.checksum(
        torch.tensor([1], dtype=torch.int8)
    )


def test_elements_of_sixteen_bytes_are_refused():
    with pytest.raises(TypeError, match="1 to 8 bytes"):
        checksum.checksum(torch.ones(1, dtype=torch.complex128))


def test_a_piece_takes_less_than_it_may(monkeypatch: pytest.MonkeyPatch):
    assert checksum.PIECE_ELEMENTS["cpu"] * 8 * checksum.TEMPORARIES == 64 * 2**20
    monkeypatch.setitem(checksum.PIECE_ELEMENTS, "cpu", 100)
    sizes = [piece.numel() for piece, _ in checksum._pieces(random(30, 70), 0, [70, 1])]
    assert max(sizes) <= 100
    assert sum(sizes) == 30 * 70
    assert max(piece.numel() for piece, _ in checksum._pieces(random(2, 1, 1000), 0, [1000, 1000, 1])) <= 100


# ---- where an engine computes with it


def region(tensor: torch.Tensor) -> Region:
    size = tensor.element_size()
    return Region(tensor.storage_offset() * size, tuple(tensor.shape), tuple(s * size for s in tensor.stride()), size)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, dict[str, torch.Tensor], list[Fill]]:
    """A model whose weight is two sent ones, of which it holds the left half, and the plan that says so."""
    sent = {"q": random(4, 6), "k": random(2, 6)}
    held = torch.cat([sent["q"], sent["k"]])[:, :3].contiguous()
    fills = [
        Fill("qk.weight", region(held[:4]), (("q", region(sent["q"][:, :3])),)),
        Fill("qk.weight", region(held[4:]), (("k", region(sent["k"][:, :3])),)),
    ]
    monkeypatch.setattr(arrived, "plan_of", lambda model, config, manifest: SimpleNamespace(fills=fills))
    monkeypatch.setattr(arrived, "effective_weights", lambda model: model.items())
    return {"qk.weight": held}, sent, fills


@IN_PIECES
def test_fused_and_sharded_weights_have_the_checksums_of_what_was_sent(fused):
    held, sent, _ = fused
    rest = {name: checksum.checksum(tensor[:, 3:], 3, [6, 1]) for name, tensor in sent.items()}
    found = arrived.checksums_of(held, None, [])
    assert {name: added([found[name], rest[name]]) for name in sent} == {
        name: checksum.checksum(tensor) for name, tensor in sent.items()
    }
    held["qk.weight"].view(torch.int16)[4, 0] ^= 1
    changed = arrived.checksums_of(held, None, [])
    assert [name for name in sent if changed[name] != found[name]] == ["k"]


@pytest.mark.parametrize(
    "change", [{"conversion": ("cast float32 to bfloat16",)}, {"region": Region(0, (2, 6), (6, 2), 2)}]
)
def test_what_is_converted_or_laid_out_otherwise_is_not_told(fused, change: dict):
    held, _, fills = fused
    fills[0] = Fill(**(vars(fills[0]) | change))
    with pytest.raises(SuiteFault, match=r"q can't be told in qk\.weight"):
        arrived.checksums_of(held, None, [])


def test_a_plan_that_cannot_be_made_is_the_suites_fault_and_a_weight_of_another_dtype_is_not(fused, monkeypatch):
    held, _, _ = fused
    held["qk.weight"] = held["qk.weight"].float()
    with pytest.raises(RuntimeError, match=r"contiguous weight of 2 bytes an element, found torch\.float32"):
        arrived.checksums_of(held, None, [])

    def fail(*_: object) -> None:
        raise PlanError("load_weights took no tensor")

    monkeypatch.setattr(arrived, "plan_of", fail)
    with pytest.raises(SuiteFault, match="could not plan where tensors go: PlanError: load_weights took no tensor"):
        arrived.checksums_of(held, None, [])


def test_a_trainer_has_those_of_the_checkpoint_that_it_holds(tmp_path: Path):
    spec, trainer = models.MODELS[models.TIED], Trainer()
    trainer.load_random(str(models.write_config(spec, tmp_path)), "bfloat16", 1)
    assert trainer.checksums() == of_checkpoint(spec.name, 1)


def of_checkpoint(model: str, seed: int) -> dict[str, int]:
    shapes = models.tensors(models.MODELS[model])
    return {name: checksum.checksum(models.values(name, shape, seed, torch.bfloat16)) for name, shape in shapes}


@pytest.mark.skipif(vllm_models.NO_ENGINE is not None, reason=str(vllm_models.NO_ENGINE))
@pytest.mark.parametrize("name", ["qwen3-tied-tiny", "llama-tiny"])
def test_a_live_model_has_the_checksums_of_its_checkpoint_and_of_an_update(held: vllm_models.Held, name: str):
    held.build(name, 0)
    assert held.checksums() == of_checkpoint(name, 0)
    held.begin(1)
    held.send()
    held.end()
    assert held.checksums() == of_checkpoint(name, 1)
