"""LoRA adapters on disk, and the checkpoints that they are merged into."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from suite import models
from suite.models.adapters import CONFIG, PREFIX, RANK, WEIGHTS, write_adapter, write_merged

SPEC = models.MODELS["qwen3-untied-tiny"]
DOWN = "model.layers.1.mlp.down_proj"


def test_an_adapter_has_a_pair_for_every_linear_layer(tmp_path: Path):
    found = load_file(write_adapter(SPEC, 1, tmp_path) / WEIGHTS)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == RANK
    assert len(found) == 2 * 7 * SPEC.config["num_hidden_layers"]
    assert found[f"{PREFIX}{DOWN}.lora_A.weight"].shape == (RANK, 256)
    assert found[f"{PREFIX}{DOWN}.lora_B.weight"].shape == (128, RANK)


def test_adapters_of_two_seeds_differ_in_every_element_and_none_is_zero(tmp_path: Path):
    one, other = (load_file(write_adapter(SPEC, seed, tmp_path) / WEIGHTS) for seed in (1, 2))
    zeros = load_file(write_adapter(SPEC, None, tmp_path) / WEIGHTS)
    assert one.keys() == other.keys() == zeros.keys()
    for name, matrix in one.items():
        assert (matrix != other[name]).all()
        assert (matrix != 0).all()
        assert (zeros[name] == 0).all()


def test_a_merged_checkpoint_is_the_other_with_the_product_added(tmp_path: Path):
    base = load_file(models.write_checkpoint(SPEC, 0, tmp_path / "base") / "model.safetensors")
    pair = load_file(write_adapter(SPEC, 1, tmp_path / "adapter") / WEIGHTS)
    merged = load_file(write_merged(SPEC, 0, 1, tmp_path / "merged") / "model.safetensors")
    a, b = (pair[f"{PREFIX}{DOWN}.lora_{part}.weight"].double() for part in "AB")
    expected = (base[f"{DOWN}.weight"].double() + b @ a).to(torch.bfloat16)
    torch.testing.assert_close(merged[f"{DOWN}.weight"], expected)
    same = [name for name, weight in base.items() if torch.equal(weight, merged[name])]
    assert len(same) == len(base) - len(pair) // 2
