"""A manifest goes through as it was made; one with anything wrong in it is refused, and the entry is named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extensions.manifest import SHOWN, ManifestError, check, parse
from extensions.tensors import FLOATING_SOURCES, dtype_name, dtype_of

DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
MODEL = {name: (torch.bfloat16, shape) for name, shape in {"embed": (8, 4), "norm": (4,), "odd": (3, 3)}.items()}
TIED = MODEL | {"head": (torch.bfloat16, (8, 4))}


def announced(**changes: object) -> dict:
    """What fits MODEL, with changes: name="gone" takes one away."""
    return {name: value for name, value in (MODEL | changes).items() if value != "gone"}


# ---- dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_known_by_all_its_spellings(dtype: torch.dtype):
    for spelling in (dtype, str(dtype), dtype_name(dtype)):
        assert dtype_of(spelling) is dtype


@pytest.mark.parametrize(
    "value", ["", "torch.", "bf16", "float 32", "Tensor", "nn", "float32.is_complex", "torch.torch.float32", "__name__"]
)
def test_what_names_no_dtype_is_refused_by_name(value: str):
    with pytest.raises(ValueError, match=f"^{value!r} names no torch dtype; expected one like 'bfloat16'"):
        dtype_of(value)


@pytest.mark.parametrize("value", [None, 16, b"float32", float, ["float32"]])
def test_what_is_neither_text_nor_dtype_is_refused_by_type(value: object):
    with pytest.raises(TypeError, match=f"found {type(value).__name__}"):
        dtype_of(value)


# ---- parsing


@pytest.mark.parametrize("thing", [None, [], (), {}, "manifest", 3, {"name": "a"}, iter([])])
def test_what_is_no_list_of_entries_is_refused(thing: object):
    with pytest.raises(ManifestError, match="a manifest is a non-empty list of entries"):
        parse(thing)


# ---- checking


@given(st.sampled_from(FLOATING_SOURCES), st.booleans(), st.permutations(list(MODEL)))
def test_what_fits_the_model_passes_in_any_order(dtype: torch.dtype, head: bool, order: list[str]):
    fitting = {name: (dtype, MODEL[name][1]) for name in order}
    check(fitting | ({"head": (dtype, (8, 4))} if head else {}), TIED, {"head"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "gone"}, "1 missing name: norm"),
        ({"norm": "gone", "odd": "gone"}, "2 missing names: norm, odd"),
        ({"ghost": (torch.bfloat16, (3,))}, "1 unknown name: ghost"),
        ({"norm": (torch.bfloat16, (5,))}, "norm: expected shape [4], found [5]"),
        ({"norm": (torch.bfloat16, (4, 1))}, "norm: expected shape [4], found [4, 1]"),
        ({"norm": (torch.bfloat16, ())}, "norm: expected shape [4], found []"),
        ({"head": (torch.bfloat16, (4, 8))}, "head: expected shape [8, 4], found [4, 8]"),
        ({"norm": (torch.int32, (4,))}, "norm: expected a dtype of float64, float32, bfloat16, float16, found int32"),
        ({"odd": (torch.float8_e4m3fn, (9,))}, "odd: expected a dtype of float64, "),
        ({"norm": (torch.complex64, (4,))}, "found complex64"),
    ],
    ids=str,
)
def test_each_misfit_is_named(changes: dict, said: str):
    with pytest.raises(ManifestError) as caught:
        check(announced(**changes), TIED, {"head"})
    assert str(caught.value).startswith("the update does not fit the model: ")
    assert said in str(caught.value)


def test_what_the_model_has_in_no_floating_dtype_comes_in_its_own():
    codes = {"codes": (torch.float8_e4m3fn, (3,))}
    check(codes, codes, set())
    with pytest.raises(ManifestError, match="codes: expected a dtype of float8_e4m3fn, found bfloat16"):
        check({"codes": (torch.bfloat16, (3,))}, codes, set())


def test_all_misfits_are_named_together():
    wrong = announced(norm="gone", embed=(torch.int8, (4, 8)), ghost=(torch.bfloat16, (1,)))
    with pytest.raises(ManifestError) as caught:
        check(wrong, TIED, {"head"})
    for said in ("missing name: norm", "unknown name: ghost", "embed: expected shape", "embed: expected a dtype"):
        assert said in str(caught.value)


def test_many_misfits_are_counted():
    many = {f"weight{index}": (torch.bfloat16, (3,)) for index in range(100)}
    with pytest.raises(ManifestError, match=r"100 missing names: weight0, .*weight7 and 92 more$"):
        check(announced(), TIED | many, {"head"})
    wrong = dict.fromkeys(many, (torch.bfloat16, (4,)))
    with pytest.raises(ManifestError, match=f"; and {100 - SHOWN} more problems$") as caught:
        check(wrong, many, set())
    assert len(str(caught.value)) < 1000
