"""Quantised checkpoints: their tensors, dtypes and values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from suite import models

LAYER = "model.layers.1.mlp.down_proj."  # a weight of [128, 256]
KEPT = "model.layers.1.input_layernorm.weight"
EXPECTED = {
    "fp8": {"weight": (torch.float8_e4m3fn, (128, 256)), "weight_scale_inv": (torch.float32, (1, 2))},
    "awq": {
        "qweight": (torch.int32, (256, 16)), "qzeros": (torch.int32, (4, 16)), "scales": (torch.bfloat16, (4, 128)),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", EXPECTED)
def test_a_layer_is_written_as_the_method_has_it(method: str, tmp_path: Path):
    spec = models.MODELS[f"qwen3-{method}-tiny"]
    written = load_file(models.write_checkpoint(spec, 0, tmp_path) / "model.safetensors")
    found = {n.removeprefix(LAYER): (t.dtype, tuple(t.shape)) for n, t in written.items() if n.startswith(LAYER)}
    assert found == EXPECTED[method]
    assert written[KEPT].dtype == torch.bfloat16
    assert models.read_spec(tmp_path).quantised == method
    assert not models.read_spec(tmp_path).computed


@pytest.mark.parametrize("method", EXPECTED)
def test_scales_are_positive_and_two_seeds_differ_in_every_tensor(method: str, tmp_path: Path):
    spec = models.MODELS[f"qwen3-{method}-tiny"]
    one, other = (load_file(models.write_checkpoint(spec, s, tmp_path / str(s)) / "model.safetensors") for s in (0, 1))
    for name, tensor in one.items():
        assert not torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
        if "scale" in name:
            assert (tensor > 0).all(), name


def test_integers_are_the_same_in_slices():
    whole = models.values("x.qweight", (8, 4), 1, "int32")
    part = torch.empty(6, dtype=torch.int32)
    models.fill_values(part, "x.qweight", (8, 4), 1, start=10)
    assert torch.equal(whole.view(-1)[10:16], part)
