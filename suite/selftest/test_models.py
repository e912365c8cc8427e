"""The model catalogue: what it writes is what transformers expects, and every weight is as it was announced."""

import itertools
import math

import pytest
import torch

from suite import models
from suite.models import MODELS
from suite.models.values import CHUNK_ELEMENTS

pytestmark = pytest.mark.selftest

TINY = [name for name, spec in MODELS.items() if spec.purpose == "tiny"]
COMPUTED = [name for name in TINY if MODELS[name].computed]
# As the released checkpoints' indices say (total_size / 2).
PUBLISHED_ELEMENTS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-1m": 1_000_000,
    "qwen3-10m": 10_000_000,
    "qwen3-100m": 100_000_000,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine take longer than one alone at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(directory, dtype=torch.bfloat16):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )


@pytest.mark.parametrize("name", COMPUTED)
def test_transformers_loads_a_written_checkpoint(name, tmp_path):
    spec = MODELS[name]
    model, info = load(models.write_checkpoint(spec, 1, tmp_path))
    assert not any(info.values()), f"{name}: transformers found missing, unexpected or mismatched keys: {info}"
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.elements
    weights = dict(model.named_parameters())
    for tensor, shape in (item for item in models.tensors(spec) if item[0] in weights):
        assert torch.equal(weights[tensor], models.values(tensor, shape, 1, "bfloat16")), tensor


@pytest.mark.parametrize("name", sorted(PUBLISHED_ELEMENTS))
def test_sizes_are_what_the_names_say(name):
    expected = PUBLISHED_ELEMENTS[name]
    tolerance = 0.03 if MODELS[name].purpose == "ladder" else 0
    assert abs(MODELS[name].elements - expected) <= tolerance * expected, f"{MODELS[name].elements:,}"


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_tensors_are_named_once_and_halve(spec):
    names = [name for name, _ in models.tensors(spec)]
    assert len(set(names)) == len(names)
    assert any(name.endswith("lm_head.weight") for name in names) == (not spec.tied)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    experts = ("moe_intermediate_size", "num_experts", "n_routed_experts", "num_local_experts")
    odd = [key for key in (*sizes, *experts, "v_head_dim") if spec.config.get(key, 0) % 2]
    assert not odd, f"{spec.name}: {odd} cannot be split between two ranks"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TINY)
def test_seeds_differ_in_every_element_of_bfloat16(name, dtype):
    for tensor, shape in models.tensors(MODELS[name]):
        of_seeds = [models.values(tensor, shape, seed, dtype).to(torch.bfloat16) for seed in (4, 1, 2, 7)]
        for one, other in itertools.combinations(of_seeds, 2):
            equal = int((one == other).sum())
            assert not equal, f"{name}: {tensor}: {equal} of {math.prod(shape)} elements equal between two seeds"
        assert all(bool((values != 0).all()) for values in of_seeds), tensor


def test_values_repeat_and_depend_on_the_name():
    one = models.values("a.weight", (64, 32), 3, "bfloat16")
    assert torch.equal(one, models.values("a.weight", (64, 32), 3, torch.bfloat16))
    other = models.values("b.weight", (64, 32), 3, "bfloat16")
    assert (one == other).float().mean() < 0.02, "two names share their values"
    # Pinned: baselines and oracles of different versions of the suite compare only while the bits stay.
    assert one.flatten()[:4].tolist() == [-0.1279296875, -0.28125, 0.255859375, -0.052734375]


def test_bfloat16_is_the_rounding_of_float32():
    exact = models.values("a.weight", (256, 64), 2, "float32")
    assert torch.equal(exact.bfloat16(), models.values("a.weight", (256, 64), 2, "bfloat16"))
    truncated = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    rounded_up = (exact.bfloat16().float().abs() > exact.abs()).float().mean()
    assert not (exact == truncated).any(), "a float32 weight that bfloat16 holds exactly cannot show how it was rounded"
    assert 0.4 < rounded_up < 0.6


def test_a_shard_holds_the_bits_of_the_whole(monkeypatch):
    whole = models.values("a.weight", (40, 32), 1, "bfloat16")
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 100)
    shard = torch.empty(10, 32, dtype=torch.bfloat16)
    models.fill_values(shard, "a.weight", (40, 32), 1, start=20 * 32)
    assert torch.equal(shard, whole[20:30])


def test_reading_a_spec_back(tmp_path):
    spec = MODELS["qwen3-moe-tiny"]
    read = models.read_spec(models.write_config(spec, tmp_path))
    assert models.tensors(read) == models.tensors(spec)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(KeyError, match=r"gpt2.*expected one of"):
        models.read_spec(tmp_path)


@pytest.mark.parametrize("name", COMPUTED)
def test_greedy_decisions_are_clear_cut_and_neither_constant_nor_saturated(name, tmp_path):
    model, _ = load(models.write_checkpoint(MODELS[name], 1, tmp_path))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, MODELS[name].config["vocab_size"], (16, 24), generator=generator)
    gaps = []
    with torch.no_grad():
        for _ in range(16):
            best = model(tokens).logits[:, -1].float().topk(2)
            gaps.append(best.values[:, 0] - best.values[:, 1])
            tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    found = torch.cat(gaps)
    assert (found >= 0.5).float().mean() > 0.75, "most choices should stand out of bfloat16's rounding"
    assert found.median() < 4, "choices this certain hide small changes of the weights"
    assert tokens[:, 24:].unique().numel() > 60, "the model says the same whatever it is asked"
