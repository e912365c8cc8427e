"""The tests of sent.* send what they are about, and say so where a model or an update does not have it."""

from types import SimpleNamespace

import pytest

from suite.conformance import test_sent as judging
from suite.models import MODELS, TIED, manifest

BIASES = {f"model.layers.{layer}.self_attn.qkv_proj.bias": [512] for layer in range(2)}


class Engine:
    """Stands in for a connected trainer and engine whose weights are right, but for what a test says.

    shapes: what is compared. first: the bits of every element of the last norm. sent: the bytes of an update.
    """

    seed, where, updates = 0, "[here]", 1
    stage = SimpleNamespace(kind="cpu")

    def __init__(self, name: str, shapes: dict | None = None, bits: tuple[int, ...] = (7,), sent: int = 0) -> None:
        self.spec, self.manifest, self.altered = MODELS[name], manifest(MODELS[name]), []
        self._shapes, self._bits, self._sent = shapes, bits, sent

    def load(self, seed: int) -> None: ...

    def update(self, order: str = "", alter: dict | None = None) -> SimpleNamespace:
        self.altered.append(alter)
        return SimpleNamespace(bytes_sent=self._sent)

    def compared(self, seed: int) -> list[dict]:
        return [{"shapes": self._shapes}]

    def expect_exact(self, seed: int) -> None: ...

    def expect_same_behaviour(self) -> None: ...

    def call_engines(self, method: str, name: str, count: int) -> list[list[list[int]]]:
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
    with pytest.raises(RuntimeError, match="expected 2 biases among what is compared"):
        judging.test_biases(Engine("qwen2-tiny", shapes=BIASES | {missing: [0]}), 1)
