"""The tests of sent.* send what they are about, and say so where a model or an update does not have it."""

from types import SimpleNamespace

import pytest
import torch

from suite.actors.probe import Probe
from suite.conformance import test_sent as judging
from suite.models import MODELS, TIED, manifest
from suite.selftest.test_extensions_weights import model

LATENT = "deepseek-v3-tiny"
BIASES = {f"model.layers.{layer}.self_attn.qkv_proj.bias": [512] for layer in range(2)}

DERIVED = {f"model.layers.{i}.self_attn.mla_attn.{name}": [4, 512, 128] for i in range(2) for name in judging.DERIVED}
SINKS = {f"model.layers.{layer}.attn.sinks": [4] for layer in range(2)}
FLOAT32 = {"model.layers.1.mlp.gate.e_score_correction_bias": [8]}
TABLE = {"model.layers.0.rotary_emb.cos_sin_cache": "a", "model.layers.0.attn._k_scale": "b"}


class Engine:
    """Stands in for a connected trainer and engine whose weights are right, but for what a test says.

    shapes: what is compared. bits: those of the elements of the last norm. sent: the bytes of an update. buffers: the
    digests that are found one time after the other.
    """

    seed, where, updates = 0, "[here]", 1
    stage = SimpleNamespace(kind="cpu")

    def __init__(
        self, name: str, shapes: dict | None = None, bits: tuple[int, ...] = (7,), sent: int = 0, buffers: tuple = ()
    ) -> None:
        self.spec, self.manifest, self.altered = MODELS[name], manifest(MODELS[name]), []
        self._shapes, self._bits, self._sent, self._buffers = shapes, bits, sent, [*buffers]

    def load(self, seed: int) -> None: ...

    def update(self, order: str = "", alter: dict | None = None) -> SimpleNamespace:
        self.altered.append(alter)
        return SimpleNamespace(bytes_sent=self._sent)

    def compared(self, seed: int) -> list[dict]:
        return [{"shapes": self._shapes}]

    def expect_exact(self, seed: int) -> None: ...

    def expect_same_behaviour(self) -> None: ...

    def call_engines(self, method: str, name: str = "", count: int = 0) -> list[list]:
        if method == "probe_buffers":
            return [[self._buffers.pop(0)]]
        if method == "probe_addresses":
            return [[dict.fromkeys(self._shapes, 64)]]
        return [[[*self._bits[:-1], *self._bits[-1:] * (count + 1 - len(self._bits))]]]


def bytes_of_three_dtypes() -> int:
    engine = Engine(TIED)
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4}
    elements = {t["name"]: t["shape"][0] * (t["shape"][1] if len(t["shape"]) > 1 else 1) for t in engine.manifest}
    return sum(elements[name] * sizes[dtype] for name, dtype in judging._mixed(engine).items())


def test_what_is_right_passes():
    judging.test_mixed_dtypes(Engine(TIED, sent=bytes_of_three_dtypes()), 1)
    judging.test_strides(Engine(TIED), 1)
    judging.test_large(Engine("qwen3-100m"), 1)
    judging.test_biases(Engine("qwen2-tiny", shapes=BIASES), 1)
    judging.test_parameters(Engine("gpt-oss-tiny", shapes=SINKS), 1)
    judging.test_float32(Engine(LATENT, shapes=FLOAT32), 1)
    judging.test_derived(Engine(LATENT, shapes=DERIVED), 1)
    judging.test_buffers(Engine(LATENT, buffers=(TABLE, TABLE, TABLE)), 1)


def test_an_update_is_of_three_dtypes_and_norms_are_in_float16():
    mixed = judging._mixed(Engine(TIED))
    assert set(mixed.values()) == {"bfloat16", "float16", "float32"}
    assert {name for name, dtype in mixed.items() if dtype == "float16"} == {
        n for n in mixed if n.endswith("norm.weight")
    }


def test_an_update_of_one_dtype_fails():
    with pytest.raises(AssertionError, match=f"expected: {bytes_of_three_dtypes()} bytes of three dtypes"):
        judging.test_mixed_dtypes(Engine(TIED, sent=2 * MODELS[TIED].elements), 1)


def test_every_tensor_is_sent_from_memory_that_is_not_contiguous():
    engine = Engine(TIED)
    judging.test_strides(engine, 1)
    first, second = (altered["lay"] for altered in engine.altered[:2])
    assert set(first) == set(second) == {tensor["name"] for tensor in engine.manifest}
    assert {"transposed", "sliced"} == set(first.values())
    assert engine.altered[4] == {"lay": {"model.norm.weight": "expanded"}}


def test_an_expanded_tensor_with_other_elements_fails():
    with pytest.raises(AssertionError, match="its first element, 128 times\nfound: 2 different elements"):
        judging.test_strides(Engine(TIED, bits=(7, 9)), 1)


def test_a_model_without_a_large_tensor_proves_nothing():
    with pytest.raises(RuntimeError, match="expected a tensor of more than 16777216 bytes, found at most 131072"):
        judging.test_large(Engine(TIED), 1)


def test_the_published_model_has_a_tensor_of_more_than_the_buffers_on_gpus():
    (name,) = {name for names in judging.PUBLISHED.values() for name in names}
    engine = Engine(name)
    engine.stage = SimpleNamespace(kind="gpu")
    judging._expect_large(engine)


@pytest.mark.parametrize("missing", BIASES)
def test_a_bias_that_is_not_compared_is_noticed(missing: str):
    with pytest.raises(RuntimeError, match=f"expected ..{missing}.. among what is looked at"):
        judging.test_biases(Engine("qwen2-tiny", shapes=BIASES | {missing: [0]}), 1)


@pytest.mark.parametrize("missing", [*DERIVED, *FLOAT32])
def test_a_tensor_that_is_not_compared_is_noticed(missing: str):
    judges, shapes = (judging.test_derived, DERIVED) if missing in DERIVED else (judging.test_float32, FLOAT32)
    left = {name: shape for name, shape in shapes.items() if name != missing}
    with pytest.raises(RuntimeError, match=r"expected .* among what is looked at"):
        judges(Engine(LATENT, shapes=left), 1)


@pytest.mark.parametrize(("name", "shapes"), [("gpt-oss-tiny", {}), ("qwen3-next-tiny", SINKS), (TIED, SINKS)])
def test_a_sink_or_decay_that_is_not_there_is_noticed(name: str, shapes: dict):
    with pytest.raises(RuntimeError, match=r"expected .* among what is looked at"):
        judging.test_parameters(Engine(name, shapes=shapes), 1)


def test_a_model_without_float32_parameters_proves_nothing():
    with pytest.raises(RuntimeError, match="expected tensors among what is looked at"):
        judging.test_float32(Engine(TIED, shapes=FLOAT32), 1)


def test_a_buffer_that_is_not_looked_at_is_noticed():
    with pytest.raises(RuntimeError, match=r"expected \['cos_sin_cache'\] among what is looked at"):
        judging.test_buffers(Engine(LATENT, buffers=({"model.layers.0.attn._k_scale": "b"},)), 1)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("after", ["other", None])
def test_a_buffer_that_is_another_or_gone_fails(name: str, after: str | None):
    changed = {other: digest for other, digest in (TABLE | {name: after}).items() if digest}
    with pytest.raises(AssertionError, match=f"every buffer of rank 0 as it was\nfound: 1 others: .*{name}"):
        judging.test_buffers(Engine(LATENT, buffers=(TABLE, TABLE, changed)), 1)


def test_buffers_are_told_by_what_they_hold_and_those_of_parameters_are_left_out():
    built, probe = model(weight=torch.ones(2)), Probe()
    built.register_buffer("alias", built.weight.data[:1])
    built.register_buffer("table", torch.ones(4, dtype=torch.bfloat16))
    built.register_buffer("scale", torch.tensor(1.0))
    probe.model_runner = SimpleNamespace(get_model=lambda: built)
    before = probe.probe_buffers()
    assert before.keys() == {"table", "scale"}
    built.table[3] += 1
    assert [name for name, digest in probe.probe_buffers().items() if digest != before[name]] == ["table"]
