"""Elements that differ are found bit by bit and written where they belong, by torch and by Triton's kernels alike."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extensions import elements
from extensions.elements import INTEGERS, Destination, PlainElements, Segment, elements_on, expect_right, integers
from extensions.model.places import Sample, steps_of
from extensions.model.regions import part, region_of
from extensions.patches import EACH, WHOLE, chunks_of, merged, units_of
from suite import ROOT
from suite.selftest.properties import examples
from suite.selftest.test_extensions_pieces import views

CPU = torch.device("cpu")
INTERPRET, DEADLINE_S = "TRITON_INTERPRET", 120
UPDATES = (
    "test_extensions_sparse.py::test_what_has_not_changed_is_not_sent",
    "test_extensions_sparse_faults.py::test_positions_outside_their_tensor_are_refused_and_touch_nothing",
)
DTYPES = tuple(INTEGERS.values())


INTERPRETED = os.environ.get(INTERPRET) == "1"  # whether this is the process in which Triton's kernels are tested


def examined() -> elements.Elements:
    """What is tested here: torch alone, or Triton's kernels as its interpreter carries them out on a CPU."""
    if not INTERPRETED:
        return PlainElements()
    return importlib.import_module("extensions.kernels").FusedElements()


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_holds_for_kernels():
    """In a process of its own: Triton looks at the variable when it is imported."""
    updates = [f"{Path(__file__).parent / test}" for test in UPDATES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *updates]
    environment = os.environ | {INTERPRET: "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, timeout=DEADLINE_S, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "5 skipped" in finished.stdout


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to compile")
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_kernels_compile_for_gpus(size: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = importlib.import_module("extensions.kernels")
    pointers = {"parts": "*i64", "starts": "*i64", "segments": "*i64", "values": f"*i{8 * size}"}
    element, per = kernels.KINDS[size], 8 // size
    rows = {"rows": kernels.ROWS}
    blocks = {"block": kernels.BLOCK, "element": element}
    for kernel, constants in (
        (kernels._compare, rows | {"word": kernels.KINDS[8], "per": per}),
        (kernels._compare, rows | {"word": element, "per": 1}),
        (kernels._collect, rows | {"element": element}),
        (kernels._write, blocks | {"dims": 1, "is_run": True}),
        (kernels._write, blocks | {"dims": 3, "is_run": False}),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "*i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        assert "ld.global" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_what_is_examined_does_what_torch_does():
    expect_right(examined(), CPU, DTYPES)


@pytest.mark.parametrize("wrong", ["counts", "write"])
def test_kernels_that_are_wrong_are_not_used(wrong: str):
    class Wrong(PlainElements):
        def changed(self, pairs: list, at_most: int) -> elements.Found:
            found = super().changed(pairs, at_most)
            return found if wrong != "counts" else elements.Found(found.counts[::-1], found.positions, found.values)

        def write(self, segments: list, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return super().write(segments, positions + (wrong == "write"), values)

    with pytest.raises(ValueError, match=r"other elements of torch.int16 were found or written than are right"):
        expect_right(Wrong(), CPU)


def test_without_a_gpu_torch_does_it():
    assert isinstance(elements_on(CPU), PlainElements)


@pytest.mark.parametrize("size", [0, 1, 3, 4095, 4096, 4097, 9001])
def test_all_sizes_and_addresses_are_compared_alike(size: int):
    for begin in (0, 1):  # the second is not aligned for words
        now = torch.randn(size + begin).to(torch.bfloat16)[begin:]
        pairs = []
        for _ in range(2):
            before = now.clone()
            before[:: max(1, size // 7)] += 1
            pairs.append((integers(now), integers(before)))
        plain = PlainElements().changed(pairs[:1], size)
        found = examined().changed(pairs[1:], size)
        assert (found.counts, found.positions.tolist()) == (plain.counts, plain.positions.tolist())
        assert found.values.tolist() == plain.values.tolist()
        assert torch.equal(pairs[1][1], pairs[1][0])


def test_more_than_are_wanted_are_not_collected():
    now, before = torch.ones(100, dtype=torch.int16), torch.zeros(100, dtype=torch.int16)
    assert examined().changed([(now, before)], 99) is None
    assert examined().changed([(now, before)], 100).counts == [100]


@pytest.mark.parametrize("position", [-1, 40, 2**31 - 1, -(2**31)])
def test_a_position_that_is_none_of_its_tensors_is_told_and_left_out(position: int):
    memory = torch.zeros(40, dtype=torch.int16)
    segment = Segment(0, 2, Destination.whole(memory))
    positions, values = torch.tensor([7, position], dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int16)
    assert examined().write([segment], positions, values).item()
    assert memory.nonzero().tolist() == [[7]]


# ---- through the regions of a plan


@examples(0.5)
@given(views(), st.booleans(), st.integers(0, 9))
def test_any_part_is_written_where_a_copy_writes_it(
    viewed: tuple[torch.Tensor, torch.Tensor], turned: bool, chosen: int
):
    source, view = viewed
    memory = torch.zeros(view.numel() + 3, dtype=torch.int32)
    wanted = memory[3:].view(view.shape[::-1]) if turned else memory[3:].view(view.shape)
    into = wanted.permute(*reversed(range(view.dim()))) if turned else wanted
    read, write = region_of(view), region_of(into)
    steps = steps_of(read, write)
    assert steps is not None
    some = [position for position in range(source.numel()) if position % 10 <= chosen]
    destination = Destination(source.numel(), read.offset // 4, steps, memory.view(torch.int32)[3:])
    positions, values = torch.tensor(some, dtype=torch.int32), source.view(-1)[some] + 1000
    expected = memory.clone()
    part(expected, write).copy_(torch.where(view % 10 <= chosen, view + 1000, 0))
    assert not examined().write([Segment(0, len(some), destination)], positions, values).item()
    assert torch.equal(memory, expected)


def test_parts_that_do_not_come_from_one_place_each_have_no_steps():
    whole = torch.zeros(4, 4)
    assert steps_of(region_of(whole[:1].expand(4, 4)), region_of(whole)) is None  # one element goes to several places
    assert steps_of(region_of(whole), region_of(whole[:1].expand(4, 4))) is None
    assert steps_of(region_of(whole.as_strided((2, 4), (2, 1))), region_of(torch.zeros(2, 4))) is None  # rows overlap


# ---- units and chunks


def test_units_that_meet_are_one():
    names = [*"abcdefg"]
    assert units_of([["b", "d"], ["f"], ["d", "e"]], names) == [EACH, 1, EACH, 1, 1, 5, EACH]
    assert merged([[EACH, 1, 1, EACH], [EACH, EACH, 2, 2]], 4) == [EACH, 1, 1, 1]
    assert merged([[EACH, EACH]], 2) == [EACH, EACH]


@given(st.lists(st.tuples(st.integers(WHOLE, 30), st.sampled_from((1, 2, 4))), max_size=8), st.integers(1, 9))
def test_chunks_are_all_elements_in_their_order(tensors: list[tuple[int, int]], limit: int):
    counts, sizes = [count for count, _ in tensors], [size for _, size in tensors]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("extensions.patches.CHUNK_ELEMENTS", limit)
        chunks = chunks_of(counts, sizes)
    assert all(0 < chunk.count <= limit for chunk in chunks)
    for itemsize in {*sizes}:
        own, reached, taken = [chunk for chunk in chunks if chunk.itemsize == itemsize], 0, dict.fromkeys(range(8), 0)
        for chunk in own:
            assert chunk.begin == reached
            reached += chunk.count
            for number, count in chunk.parts:
                taken[number] += count
        expected = {n: c for n, (c, size) in enumerate(tensors) if size == itemsize and c != WHOLE}
        assert {number: taken[number] for number in expected} == expected
        numbers = [number for chunk in own for number, _ in chunk.parts]
        assert numbers == sorted(numbers)


# ---- a sample of a model


def test_a_sample_sees_that_parameters_were_dropped_or_replaced():
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 2).to(torch.bfloat16))
    sample = Sample(model)
    assert sample.holds()
    for parameter in model.parameters():
        before = parameter.data.clone()
        parameter.data.copy_(torch.zeros_like(parameter))
        assert not sample.holds()
        parameter.data.copy_(before)
        assert sample.holds()
