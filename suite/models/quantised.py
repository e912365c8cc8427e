"""Checkpoints whose linear layers are quantised: which tensors stand for one weight, and what a config says of it.

fp8: FP8 in blocks of 128 by 128, each with a scale that the weight is multiplied by. awq: 4 bits, eight to an int32,
with zero points and scales for each group of inputs.
"""

from collections.abc import Iterator
from typing import Any

from suite.models.values import Shape

BLOCK, GROUP, PACKED = 128, 64, 8
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
LINEAR = "_proj.weight"
SCALE_INV, INTEGERS = "weight_scale_inv", (".qweight", ".qzeros")


def tensors(name: str, shape: Shape, method: str) -> Iterator[tuple[str, Shape]]:
    """The tensors that stand for a weight [out, in]; of a layer that is not quantised, itself."""
    if not name.endswith(LINEAR):
        yield name, shape
        return
    layer, (rows, columns) = name.removesuffix("weight"), shape
    if method == "fp8":
        yield name, shape
        yield f"{layer}{SCALE_INV}", (-(-rows // BLOCK), -(-columns // BLOCK))
    else:
        yield f"{layer}qweight", (columns, rows // PACKED)
        yield f"{layer}qzeros", (columns // GROUP, rows // PACKED)
        yield f"{layer}scales", (columns // GROUP, rows)


def dtype_of(name: str, method: str, dtype: str) -> str:
    """The dtype of such a tensor, of a checkpoint whose other tensors are of `dtype`."""
    if name.endswith(INTEGERS):
        return "int32"
    if name.endswith(SCALE_INV):
        return "float32"
    return "float8_e4m3fn" if method == "fp8" and name.endswith(LINEAR) else dtype
