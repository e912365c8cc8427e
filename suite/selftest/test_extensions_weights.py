"""The weights that a model computes with: each once, packed ones read back, and none at all is not zero."""

import pytest
import torch

from extensions.model import weights
from extensions.model.weights import IDENTITY_ROWS, all_zero, effective_weights


class Packed(torch.nn.Module):
    """As a linear layer of vLLM's CPU backend: its parameter is empty, or kept beside the packed weight."""

    def __init__(self, weight: torch.Tensor, keep: bool = False) -> None:
        super().__init__()
        self.input_size_per_partition = weight.shape[1]
        self.weight = torch.nn.Parameter(weight.clone() if keep else weight.new_empty(0), requires_grad=False)
        self._packed = weight.clone()
        self.quant_method = self
        self.cpu_linear = True

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert (layer, bias) == (self, None)
        return x @ self._packed.t()


def model(**parameters: torch.Tensor | torch.nn.Module) -> torch.nn.Module:
    built = torch.nn.Module()
    for name, value in parameters.items():
        if isinstance(value, torch.nn.Module):
            built.add_module(name, value)
        else:
            built.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return built


@pytest.fixture(autouse=True)
def applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM's classes: every packed layer is applied, unless it says otherwise."""
    monkeypatch.setattr(weights, "_is_applied", lambda model, module: getattr(module, "applied", True))


# ---- which weights there are


def test_parameters_come_as_they_are():
    weight = torch.randn(3, 4)
    found = dict(effective_weights(model(a=weight, inner=model(b=torch.ones(2)))))
    assert list(found) == [".a", "inner.b"]
    assert found[".a"].data_ptr() == weight.data_ptr()


def test_a_weight_under_two_names_comes_once():
    tied = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    built = model(embed=torch.nn.Module(), head=torch.nn.Module())
    built.embed.weight = built.head.weight = tied
    assert [name for name, _ in effective_weights(built)] == ["embed.weight"]


def test_empty_parameters_are_not_taken_for_each_other():
    assert len(list(effective_weights(model(a=torch.empty(0), b=torch.empty(0, 3))))) == 2


def test_parts_of_one_storage_are_different_weights():
    whole = torch.randn(4, 4)
    assert len(list(effective_weights(model(a=whole[:2], b=whole[2:], c=whole)))) == 3


@pytest.mark.parametrize("columns", [1, 7, IDENTITY_ROWS, IDENTITY_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_weight_is_read_back_bit_by_bit(columns: int, dtype: torch.dtype):
    weight = torch.randn(5, columns, dtype=dtype)
    ((name, found),) = effective_weights(model(proj=Packed(weight)))
    assert name == "proj.weight"
    assert found.dtype == dtype
    assert torch.equal(found, weight)


def test_a_weight_that_is_looked_up_and_applied_comes_twice():
    weight = torch.randn(5, 4)
    built = model(head=Packed(weight, keep=True))
    built.head.weight.data.zero_()
    found = dict(effective_weights(built))
    assert list(found) == ["head.weight", "head.weight (applied)"]
    assert not found["head.weight"].any()
    assert torch.equal(found["head.weight (applied)"], weight)


def test_a_packed_copy_that_is_never_applied_does_not_count():
    built = model(embed=Packed(torch.randn(5, 4), keep=True))
    built.embed.applied = False
    assert [name for name, _ in effective_weights(built)] == ["embed.weight"]


# ---- zero


def test_nothing_looked_at_is_not_zero():
    assert not all_zero(torch.nn.Module())
    assert not all_zero(model(a=torch.empty(0), b=torch.empty(0, 3)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
)
def test_one_element_that_is_not_zero_is_found(dtype: torch.dtype):
    zero = torch.zeros(3, 4).to(dtype)
    assert all_zero(model(a=zero))
    other = zero.clone().view(torch.uint8)
    other.view(-1)[-1] = 0x38
    assert not all_zero(model(a=zero, b=other.view(dtype)))


def test_minus_zero_is_zero_and_nan_is_not():
    assert all_zero(model(a=torch.full((3,), -0.0)))
    assert not all_zero(model(a=torch.full((3,), torch.nan)))


def test_a_packed_weight_is_looked_at_though_its_parameter_is_empty():
    assert all_zero(model(proj=Packed(torch.zeros(5, 4))))
    assert not all_zero(model(norm=torch.zeros(4), proj=Packed(torch.ones(5, 4))))


def test_a_packed_copy_that_was_not_updated_is_found():
    built = model(head=Packed(torch.ones(5, 4), keep=True))
    built.head.weight.data.zero_()
    assert not all_zero(built)


def test_scales_of_quantised_weights_are_left_out():
    scales = model(weight=torch.zeros(4), weight_scale=torch.ones(4), weight_scale_inv=torch.ones(4))
    assert all_zero(scales)
    assert not all_zero(model(weight_scale=torch.zeros(4)))
