"""The tests of tied, untied and expert models look at what they are about, and fail where it is wrong or not there."""

from types import SimpleNamespace

import pytest
import torch

from suite.actors.probe import Probe
from suite.conformance import test_update_models as judging
from suite.models import MODELS, TIED, tensors
from suite.selftest import fakes
from suite.selftest.test_extensions_weights import Packed, model

EXPERTS, UNTIED = "qwen3-moe-tiny", "qwen3-untied-tiny"
ROUTED = {
    f"model.layers.{layer}.mlp.{name}": shape
    for layer in range(2)
    for name, shape in {
        "gate.weight": [8, 128], "experts.w13_weight": [8, 256, 128], "experts.w2_weight": [8, 128, 128],
    }.items()
}  # fmt: skip


class Engine:
    """Stands in for a connected trainer and engine whose weights are right, but for what a test says.

    equal: rows of 8 that the output layer shares with the embedding. sent: tensors that the trainer sends.
    """

    seed, where, updates = 0, "[here]", 1

    def __init__(self, name: str, equal: int = 0, sent: int | None = None, shapes: dict | None = None) -> None:
        self.spec = MODELS[name]
        self.manifest = [{"name": tensor} for tensor, _ in tensors(self.spec)]
        self._equal, self._shapes = equal, shapes
        self._sent = len(self.manifest) if sent is None else sent

    def load(self, seed: int) -> None: ...

    def update(self) -> SimpleNamespace:
        return SimpleNamespace(tensors=self._sent)

    def compared(self, seed: int) -> list[dict]:
        return [{"shapes": self._shapes}]

    def expect_exact(self, seed: int) -> None: ...

    def expect_same_behaviour(self) -> None: ...

    def call_engines(self, method: str) -> list[list[dict]]:
        return [[{"rank": 0, "rows": 8, "equal": self._equal}]]


def test_what_is_right_passes():
    judging.test_tied(Engine(TIED, equal=8), 1)
    judging.test_untied(Engine(UNTIED), 1)
    judging.test_moe(Engine(EXPERTS, shapes=ROUTED), 1)


def test_a_tied_output_layer_with_rows_of_its_own_fails():
    with pytest.raises(AssertionError, match="applies all of the embedding's 8 rows\nfound: 7 of them on rank 0"):
        judging.test_tied(Engine(TIED, equal=7), 1)


def test_an_untied_output_layer_with_rows_of_the_embedding_fails():
    with pytest.raises(AssertionError, match="none of the embedding's 8 rows\nfound: 1 of them on rank 0"):
        judging.test_untied(Engine(UNTIED, equal=1), 1)


@pytest.mark.parametrize(
    ("test", "engine"),
    [
        (judging.test_tied, Engine(TIED, equal=8, sent=99)),
        (judging.test_tied, Engine(UNTIED, equal=8)),
        (judging.test_untied, Engine(TIED)),
    ],
)
def test_an_update_of_other_tensors_proves_nothing(test, engine: Engine):
    with pytest.raises(RuntimeError, match=r"expected an update of \d+ tensors with(out)? lm_head.weight"):
        test(engine, 1)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("found", [None, [7, 128, 128]])
def test_a_router_or_expert_that_is_not_compared_is_noticed(name: str, found: list[int] | None):
    shapes = {other: shape for other, shape in ROUTED.items() if other != name} | ({name: found} if found else {})
    with pytest.raises(RuntimeError, match="expected 8 experts and their router among what is compared"):
        judging.test_moe(Engine(EXPERTS, shapes=shapes), 1)


@pytest.mark.parametrize(("changed_rows", "equal"), [(0, 6), (2, 4), (6, 0)])
def test_the_probe_counts_the_rows_that_are_looked_up_and_applied_alike(changed_rows: int, equal: int):
    looked_up = torch.randn(6, 4, dtype=torch.bfloat16)
    applied = looked_up.clone()
    applied[:changed_rows] += 1
    built = model(model=model(embed_tokens=model(weight=looked_up)), lm_head=Packed(applied))
    probe = Probe()
    probe.rank, probe.model_runner = 1, SimpleNamespace(get_model=lambda: built)
    probe.vllm_config = fakes.VLLM_CONFIG
    assert probe.probe_embedding_and_head() == {"rank": 1, "rows": 6, "equal": equal}
