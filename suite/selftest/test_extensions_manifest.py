"""A manifest goes through as it was made; one with anything wrong in it is refused, and the entry is named."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extensions.dtypes import FLOATING_SOURCES, dtype_name, dtype_of
from extensions.manifest import SHOWN, ManifestError, check, manifest_of, parse
from suite import wire

DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1).filter(str.isprintable)
shapes = st.lists(st.integers(0, 2**48 - 1), max_size=5)
dtypes = st.sampled_from(DTYPES)
entries = st.lists(
    st.fixed_dictionaries({"name": names, "dtype": dtypes.map(dtype_name), "shape": shapes}),
    min_size=1, max_size=6, unique_by=lambda entry: entry["name"],
)  # fmt: skip

MODEL = {"embed": (8, 4), "norm": (4,), "odd": None}
TIED = {"head": (8, 4)}


def announced(**changes: object) -> dict:
    """What fits MODEL, with changes: name="gone" takes one away."""
    fitting = {name: (torch.bfloat16, shape or (3, 3)) for name, shape in MODEL.items()} | changes
    return {name: value for name, value in fitting.items() if value != "gone"}


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


@given(entries)
def test_any_manifest_goes_through_as_plain_data(manifest: list[dict]):
    parsed = parse(wire.decode(wire.encode(manifest)))
    assert list(parsed) == [entry["name"] for entry in manifest], "expected the order of sending"
    found = [{"name": n, "dtype": dtype_name(dtype), "shape": list(shape)} for n, (dtype, shape) in parsed.items()]
    assert found == [entry | {"dtype": dtype_name(dtype_of(entry["dtype"]))} for entry in manifest]


@given(st.dictionaries(names, st.tuples(st.lists(st.integers(0, 4), max_size=3), dtypes), min_size=1, max_size=5))
def test_the_manifest_of_tensors_says_what_they_are(layout: dict[str, tuple[list[int], torch.dtype]]):
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()}
    parsed = parse(manifest_of(tensors.items()))
    assert parsed == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


WRONG_ENTRIES = [None, [], "name", {}, {"name": "a"}, 3]
WRONG_FIELDS = {
    "name": [None, "", 3, b"a", "a\nb", "a\0", "\u202eb", ["a"]],
    "dtype": [None, "", "bf16", "Tensor", 2, ["float32"], b"float32"],
    "shape": [None, 3, "33", [-1], [2**48], [1.0], [True], ["1"], [[1]], {1: 1}, [None]],
}
corruptions = st.one_of(
    st.sampled_from(WRONG_ENTRIES).map(lambda wrong: lambda entry: wrong),
    *(
        st.sampled_from(wrong).map(lambda value, field=field: lambda entry: entry | {field: value})
        for field, wrong in WRONG_FIELDS.items()
    ),
    st.sampled_from(["name", "dtype", "shape"]).map(
        lambda gone: lambda entry: {key: value for key, value in entry.items() if key != gone}
    ),
    names.map(lambda more: lambda entry: entry | {f"{more}!": 1}),
)


@given(entries, st.data())
def test_any_corrupted_manifest_is_refused_with_the_entry_named(manifest: list[dict], data: st.DataObject):
    index = data.draw(st.integers(0, len(manifest) - 1))
    wrong = copy.deepcopy(manifest)
    wrong[index] = data.draw(corruptions)(wrong[index])
    with pytest.raises(ManifestError, match=rf"^manifest entry {index}\b") as caught:
        parse(wrong)
    assert len(str(caught.value)) < 1000
    if isinstance(wrong[index], dict) and wrong[index].keys() == {"name", "dtype", "shape"}:
        name = manifest[index]["name"]
        assert wrong[index]["name"] != name or name in str(caught.value)


@given(entries, st.data())
def test_a_name_that_is_there_twice_is_named(manifest: list[dict], data: st.DataObject):
    twice = data.draw(st.sampled_from(manifest))
    other = twice | {"shape": data.draw(shapes)}
    wrong = data.draw(st.permutations([*manifest, other]))
    with pytest.raises(ManifestError) as caught:
        parse(wrong)
    assert str(caught.value) == f"1 duplicate name: {twice['name']}"


@pytest.mark.parametrize("thing", [None, [], (), {}, "manifest", 3, {"name": "a"}, iter([])])
def test_what_is_no_list_of_entries_is_refused(thing: object):
    with pytest.raises(ManifestError, match="a manifest is a non-empty list of entries"):
        parse(thing)


# ---- checking


@given(st.sampled_from(FLOATING_SOURCES), st.booleans(), st.permutations(list(MODEL)))
def test_what_fits_the_model_passes_in_any_order(dtype: torch.dtype, head: bool, order: list[str]):
    fitting = {name: (dtype, MODEL[name] or (7,)) for name in order}
    check(fitting | ({"head": (dtype, (8, 4))} if head else {}), MODEL, TIED)


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
        check(announced(**changes), MODEL, TIED)
    assert str(caught.value).startswith("the update does not fit the model: ")
    assert said in str(caught.value)


def test_all_misfits_are_named_together():
    wrong = announced(norm="gone", embed=(torch.int8, (4, 8)), ghost=(torch.bfloat16, (1,)))
    with pytest.raises(ManifestError) as caught:
        check(wrong, MODEL, TIED)
    for said in ("missing name: norm", "unknown name: ghost", "embed: expected shape", "embed: expected a dtype"):
        assert said in str(caught.value)


def test_many_misfits_are_counted():
    many = {f"weight{index}": (3,) for index in range(100)}
    with pytest.raises(ManifestError, match=r"100 missing names: weight0, .*weight7 and 92 more$"):
        check(announced(), MODEL | many, TIED)
    wrong = dict.fromkeys(many, (torch.bfloat16, (4,)))
    with pytest.raises(ManifestError, match=f"; and {100 - SHOWN} more problems$") as caught:
        check(wrong, many, {})
    assert len(str(caught.value)) < 1000
