"""Updates of vLLM's own models without an engine: they are exact, and one that fails is made good by the next."""

from functools import cache

import pytest

from suite import models
from suite.models import TIED
from suite.processes.call import RemoteError
from suite.selftest.vllm_models import NO_ENGINE, Held

BUFFER_BYTES = 2**13  # less than most tensors of tiny models have
# Models that take pictures are judged on engines alone, by cache.encoder.
NAMES = [name for name, spec in models.MODELS.items() if spec.purpose == "tiny" and not spec.sees]
# Copies past the loaders, derived tensors, views, a head that is repeated: architectures, and what is changed of them.
OF_THEIR_OWN = [
    ("MiMo-V2, dense",), ("GPT-OSS",), ("GPT-OSS", "adapters"), ("Mamba2",), ("DeepSeek V3",),
    ("Llama, a vocabulary of 501",), ("Qwen2.5, tied", "repeated head"), ("GPT-2", "repeated head"),
    ("Qwen2", "wide biases"), ("qwen3-fp8-tiny", "scales of the cache"),
]  # fmt: skip
FAILING = [TIED, "qwen3-moe-tiny"]  # dense and of experts, which are packed in different ways

pytestmark = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))


@pytest.fixture(params=FAILING)
def each(held: Held, request: pytest.FixtureRequest) -> Held:
    """One model after the other, loaded from seed 0."""
    held.build(request.param, 0)
    return held


@cache
def cold(held: Held, name: str, seed: int) -> dict[str, str]:
    """What a model computes with that was loaded from a checkpoint of this seed; it replaces the model held."""
    held.build(name, seed)
    return held.computes_with()


def update(held: Held, seed: int, in_pieces: bool = False) -> None:
    count = held.begin(seed)
    sent = held.send_in_pieces(BUFFER_BYTES) if in_pieces else held.send()
    assert sent == count == held.end()
    assert held.state() == "ready"


# ---- updates that succeed


@pytest.mark.parametrize("name", NAMES)
def test_updates_give_what_a_cold_load_gives_in_place(held: Held, name: str):
    after, before = cold(held, name, 1), cold(held, name, 0)
    held.build(name, 0)
    assert all(after[what] != before[what] for what in after)
    addresses = held.addresses()
    for seed, expected, in_pieces in ((1, after, False), (0, before, True), (1, after, False)):
        update(held, seed, in_pieces)
        assert held.computes_with() == expected
        assert held.addresses() == addresses, "expected the addresses that CUDA graphs would have captured"


@pytest.mark.parametrize("together", [1, 100])
def test_an_output_embedding_may_be_sent_though_it_is_tied(held: Held, together: int):
    """As a state dict has it: under its own name, beside the one that it is tied to."""
    expected = cold(held, TIED, 1)
    held.build(TIED, 0)
    announced = held.begin(1, True)
    sent = 0
    while count := held.send(together):
        sent += count
    assert held.end() == announced == sent
    assert held.computes_with() == expected
    announced = held.begin(1, True)
    assert held.send_in_pieces(BUFFER_BYTES) == announced == held.end()
    assert held.computes_with() == expected


def test_an_output_embedding_that_is_tied_may_come_after_the_one_it_is_tied_to_and_alone(held: Held):
    held.build(TIED, 0)
    assert held.load_directly("model.embed_tokens.weight", "lm_head.weight") == {"model.embed_tokens.weight": True}


def test_a_loader_needs_no_name(held: Held):
    expected = cold(held, TIED, 1)
    held.build(TIED, 0)
    assert held.hide_names_of_loaders() > 0
    update(held, 1)
    assert held.computes_with() == expected


def test_zero_is_told_from_parameters_that_are_packed_away(each: Held):
    assert each.reports_zero() is False
    each.update_to_zero()
    assert each.reports_zero() is True
    update(each, 1)
    assert each.reports_zero() is False
    assert each.zero_parameters() > 0
    assert each.reports_zero() is False, "expected the packed weights to be looked at"


# ---- updates that fail


def expect_unchanged(held: Held, before: dict[str, str]) -> None:
    assert held.state() == "ready"
    assert held.without_data() == []
    assert held.computes_with() == before


def expect_recovery(held: Held, name: str) -> None:
    assert held.state() == "inconsistent"
    assert held.without_data() == []
    update(held, 1)
    recovered = held.computes_with()
    assert recovered == cold(held, name, 1)


def test_an_update_given_up_at_once_leaves_all_as_it_was(each: Held):
    before = each.computes_with()
    each.begin()
    assert each.state() == "updating"
    assert each.abort() == "the weights are as they were before the update"
    expect_unchanged(each, before)


def test_a_begin_that_fails_halfway_leaves_all_as_it_was(each: Held):
    before = each.computes_with()
    each.break_begin()
    with pytest.raises(RemoteError, match="no room to begin"):
        each.begin()
    expect_unchanged(each, before)
    update(each, 1)


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("count", [1, 8])
def test_an_update_given_up_halfway_is_made_good_by_a_whole_one(held: Held, name: str, count: int):
    held.build(name, 0)
    held.begin()
    held.send(count)
    assert held.abort().startswith("part of the weights is new: the model is inconsistent")
    expect_recovery(held, name)


@pytest.mark.parametrize("name", FAILING)
def test_an_end_with_tensors_missing_says_which_and_is_made_good(held: Held, name: str):
    held.build(name, 0)
    held.send(held.begin() - 1)
    last = models.tensors(models.MODELS[name])[-1][0]
    with pytest.raises(RemoteError, match=f"1 announced tensors have not arrived, first {last}; part of the weights"):
        held.end()
    expect_recovery(held, name)


@pytest.mark.parametrize("name", FAILING)
def test_an_end_that_fails_is_made_good_by_a_whole_update(held: Held, name: str):
    held.build(name, 0)
    held.begin(2)
    held.send()
    held.break_end()
    with pytest.raises(RemoteError, match="no room to end"):
        held.end()
    expect_recovery(held, name)


def test_a_tensor_on_its_own_is_refused_where_layers_are_packed(each: Held):
    before = each.computes_with()
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises(RemoteError, match=r"\d+ layers of this model hold repacked or quantised weights, first"):
            each.send_alone(name)
    expect_unchanged(each, before)


def test_weights_are_not_looked_at_within_an_update(each: Held):
    each.begin()
    with pytest.raises(RemoteError, match="an update is under way: call end_update"):
        each.reports_zero()
    each.abort()


# ---- models that load in ways of their own


@pytest.mark.parametrize("changed", OF_THEIR_OWN, ids=", ".join)
def test_every_tensor_that_a_model_computes_with_is_new(held: Held, changed: tuple[str, ...]):
    found = held.judged(*changed)
    assert found["differing"] >= found["sent"] // 2, "expected two seeds to differ in most tensors"
    assert (found["stale"], found["state"]) == ([], "ready")
