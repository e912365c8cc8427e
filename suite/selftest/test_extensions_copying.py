"""Every byte is copied to its place and no other one, by torch or by Triton's kernel as its interpreter has it."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from extensions import copying
from extensions.copying import PlainCopy, copy_of, expect_right
from suite import ROOT
from suite.selftest.test_extensions_elements import DEADLINE_S, INTERPRET, INTERPRETED

CPU = torch.device("cpu")
NAN = torch.tensor([0x7F81, 0xFF83 - 2**16], dtype=torch.int16).view(torch.bfloat16)  # bits that arithmetic changes


def examined() -> type:
    return importlib.import_module("extensions.fused_copy").FusedCopy if INTERPRETED else PlainCopy


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_holds_for_the_kernel():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {INTERPRET: "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, timeout=DEADLINE_S, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "skipped" in finished.stdout


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to compile")
def test_the_kernel_moves_16_bytes_at_once_on_a_gpu():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fused = importlib.import_module("extensions.fused_copy")
    constants = {"tile": fused.TILE, "aligned": fused.ALIGNED_BYTES}
    names = fused._copy.arg_names
    signature = {name: "constexpr" if name in constants else {"parts": "*i64"}.get(name, "*i32") for name in names}
    source = ASTSource(fused._copy, signature, {(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.WARPS}).asm["ptx"]
    assert "st.global.v2.b64" in made


@pytest.mark.parametrize("large_bytes", [1, 2**20])
def test_every_byte_is_copied_and_no_other_is_written(monkeypatch: pytest.MonkeyPatch, large_bytes: int):
    monkeypatch.setattr(copying, "LARGE_BYTES", large_bytes)
    expect_right(examined(), CPU)


@pytest.mark.skipif(not INTERPRETED, reason="without the kernel torch copies all")
def test_what_is_aligned_is_not_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    fused, left = importlib.import_module("extensions.fused_copy"), []

    def plain(pairs: list) -> PlainCopy:
        left.append([place.nbytes for place, _ in pairs])
        return PlainCopy(pairs)

    monkeypatch.setattr(fused, "PlainCopy", plain)
    expect_right(fused.FusedCopy, CPU)
    assert left[0] == [0, 1]
    assert len(left[1]) == 7
    monkeypatch.setattr(fused, "TILE", fused.TILE // 2)
    launch = fused._copy
    spoilt = {"__getitem__": lambda self, grid: lambda *args, **how: launch[grid](*args, **how | {"tile": 2048})}
    monkeypatch.setattr(fused, "_copy", type("Spoilt", (), spoilt)())
    with pytest.raises(ValueError, match="other bytes were copied"):
        expect_right(fused.FusedCopy, CPU)


@pytest.mark.parametrize("spoil", ["last byte", "one too many"])
def test_a_copy_that_is_wrong_is_found(spoil: str):
    def spoilt(pairs: list) -> copying.Copy:
        if spoil == "last byte":
            return PlainCopy([(place[:-1], tensor[:-1]) for place, tensor in pairs])
        return PlainCopy([*pairs[:-1], tuple(t.as_strided((len(t) + 1,), (1,)) for t in pairs[-1])])

    with pytest.raises(ValueError, match="other bytes were copied"):
        expect_right(spoilt, CPU)


def test_the_values_of_each_call_are_copied_with_the_bits_of_nans():
    tensor = NAN.repeat(40_000)
    place = torch.zeros_like(tensor)
    copy = examined()([(place, tensor)])
    for _ in range(2):
        copy()
        assert torch.equal(place.view(torch.int16), tensor.view(torch.int16))
        tensor.view(torch.int16).neg_()


def test_nothing_is_copied_where_there_is_nothing():
    copy_of([])()


def test_a_gpu_on_which_the_kernel_does_not_work_goes_without(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(copying, "expect_right", broken)
    with pytest.warns(UserWarning, match="without Triton's kernel, slower: RuntimeError: no compiler"):
        assert copying._fused_on(torch.device("cuda", 7)) is None


@pytest.mark.parametrize("strided", ["transposed", "expanded", "place"])
def test_a_tensor_that_is_not_contiguous_is_copied_by_its_strides(strided: str):
    values = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64)
    tensor = {"transposed": values.t(), "expanded": values[:1].expand_as(values)}.get(strided, values)
    place = torch.zeros(64, 64, dtype=torch.int32)
    examined()([(place.t() if strided == "place" else place, tensor)])()
    assert torch.equal(place.t() if strided == "place" else place, tensor)
