"""sent.*: whatever tensors an update has, and however the trainer holds them, the engine computes with their values."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

import pytest
import torch

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect, expect_told
from suite.driver.pool import Pool
from suite.driver.sync import Sync
from suite.models import TIED
from suite.stages import GPU_OF_ONE_RANK

BIASED = "qwen2-tiny"
LARGE = "qwen3-100m"
PUBLISHED = dict.fromkeys(("gpu-split", "gpu-colocate-tp1"), ("qwen3-8b",))  # whose engines the measurements need too

ROUTED = {"cpu-tp1": ["deepseek-v3-tiny"], **dict.fromkeys(GPU_OF_ONE_RANK, ("glm4-moe-reduced",))}
PARTICULAR = {"cpu-tp1": ["gpt-oss-tiny"], **dict.fromkeys(GPU_OF_ONE_RANK, ("qwen3-next-reduced",))}
LATENT = {"cpu-tp1": ["deepseek-v3-tiny"], **dict.fromkeys(GPU_OF_ONE_RANK, ("deepseek-v3-reduced",))}
DERIVED = ("W_UV", "W_UK_T")  # by vLLM, from kv_b_proj
DERIVED_FOR_AMX = ("_w_uv_packed", "_w_uk_packed")  # on CPUs that have it
BUFFERS = ("cos_sin_cache", "_k_scale")
BESIDE_WEIGHTS = ("sinks", "A_log")

# No buffer holds more: vLLM packs the tensors of an update into buffers of 1 GiB on GPUs; on CPUs a
# socket sends from one of at most 4 MiB, and a segment of shared memory is as large as the update.
BUFFER_BYTES = {"cpu": 16 * 2**20, "gpu": 2**30}
NORM = "norm.weight"
WHOLE_EVERYWHERE = "model.norm.weight"  # not sharded, packed or quantised


@requirement(
    "sent.mixed_dtypes",
    MUST,
    text="An update with tensors announced in bfloat16, in float16 and in float32 is exact, whichever comes first.",
    because="A router stays in float32 where the other weights are bfloat16, and code that packs tensors, or sends "
    "them all alike, takes one dtype for the update.",
    seen_in=("prime-rl#3480", "prime-rl#3524"),
    models=[TIED],
)
def test_mixed_dtypes(sync: Sync, target: int) -> None:
    for seed, order in ((target, "reversed"), (sync.seed, "checkpoint"), (target, "shuffled:3")):
        sync.load(seed)
        moved = sync.update(order=order, alter={"cast": _mixed(sync)})
        _expect_mixed(sync, moved.bytes_sent)
        sync.expect_exact(seed)


@requirement(
    "sent.strides",
    MUST,
    text="Tensors that are not contiguous in the trainer's memory, such as a transposed view, a slice and an expanded "
    "one, arrive with the values that they have, each at its place.",
    because="What moves memory from an address on moves other elements, or those between, and no shape tells.",
    seen_in=("miles#1608", "vllm#50641", "verl#6919"),
    models=[TIED],
)
def test_strides(sync: Sync, target: int) -> None:
    lay = {tensor["name"]: "transposed" if len(tensor["shape"]) == 2 else "sliced" for tensor in sync.manifest}
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update(alter={"lay": lay})
        sync.expect_exact(seed)
        sync.update(alter={"lay": dict.fromkeys(lay, "sliced")})
        sync.expect_exact(seed)
    sync.update(alter={"lay": {WHOLE_EVERYWHERE: "expanded"}})
    length = sync.spec.config["hidden_size"]
    for found in sync.call_engines("probe_bits", WHOLE_EVERYWHERE, length)[0]:
        first = f"{WHOLE_EVERYWHERE} to be its first element, {length} times"
        expect(found == found[:1] * length, first, f"{len(set(found))} different elements", sync.where)
    sync.update()
    sync.expect_exact(sync.seed)


@requirement(
    "sent.large",
    MUST,
    text="A tensor that is larger than any buffer on the way arrives whole: of more than 1 GiB on GPUs, of more "
    "than 16 MiB elsewhere.",
    because="Packed and bucketed transfers have buffers of a fixed size, and the embedding of a large model does not "
    "fit into one.",
    seen_in=("verl#5980", "trl#7131", "vllm#37476"),
    models={"cpu-tp1": [LARGE]},
)
def test_large(sync: Sync, target: int) -> None:
    _expect_large(sync)
    for seed in (sync.seed, target):
        sync.load(seed)
        sync.update()
    sync.expect_exact(target)


@pytest.mark.requirement("sent.large", models=PUBLISHED)
def test_large_published(sync: Sync, pool: Pool) -> None:
    _expect_large(sync)
    sync.trainer.hold_random(pool.config(sync.model), 1)
    sync.update()
    sync.expect_sent()


@requirement(
    "sent.biases",
    MUST,
    text="Biases are updated as weights are, and the engine's answers are the trainer's.",
    because="Code that chooses tensors by names that end in `.weight` leaves the old biases in place.",
    seen_in=("axolotl#3527",),
    models=[BIASED],
)
def test_biases(sync: Sync, target: int) -> None:
    biases = [f"{layer}self_attn.qkv_proj.bias" for layer in _layers(sync)]  # vLLM fuses those of three
    for seed in (target, sync.seed):
        _update_exactly(sync, seed, biases)
        sync.expect_same_behaviour()


@requirement(
    "sent.parameters",
    MUST,
    text="Parameters that are neither weights nor biases, such as attention sinks and the decay of a recurrent layer, "
    "are updated with the others.",
    because="Models load them past the loader that reload knows, and code that chooses tensors by their names does not "
    "know theirs.",
    seen_in=("vllm#57795", "vllm#57805", "prime-rl#2714"),
    models=PARTICULAR,
)
def test_parameters(sync: Sync, target: int) -> None:
    sent = {_last(tensor["name"]) for tensor in sync.manifest}
    own = sorted(sent.intersection(BESIDE_WEIGHTS))
    for seed in (target, sync.seed):
        _update_exactly(sync, seed, own, named=_last)
    sync.expect_cold_answers(seed)


@requirement(
    "sent.float32",
    MUST,
    text="A parameter that the engine keeps in float32, such as a router and the bias that corrects its choice, gets "
    "the float32 number that was sent.",
    because="Senders cast whole models to bfloat16. A router's last bits decide between experts, and an optimiser "
    "moves those bits first.",
    seen_in=("prime-rl#3524", "prime-rl#3480", "sglang#31213"),
    models=ROUTED,
)
def test_float32(sync: Sync, target: int) -> None:
    sent = [tensor["name"] for tensor in sync.manifest if tensor["dtype"] == "float32"]
    for seed in (target, sync.seed):
        _update_exactly(sync, seed, sent)


@requirement(
    "sent.derived",
    MUST,
    text="Tensors that the engine derives from others when it loads them, such as the matrices of a latent attention, "
    "are derived anew after every update.",
    because="Nothing is sent under their names: who copies what arrives to where its name says leaves them stale.",
    seen_in=("sglang#6265", "vllm#42481", "vllm#48312"),
    models=LATENT,
)
def test_derived(sync: Sync, target: int) -> None:
    for held in sync.call_engines("probe_addresses")[0]:
        found = [_within_its_layer(name) for name in held]
        names = DERIVED_FOR_AMX if any(name.endswith(DERIVED_FOR_AMX) for name in found) else DERIVED
        _expect_among(sync, found, [f"{layer}{name}" for layer in _layers(sync) for name in names])
    for seed in (target, sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
    sync.expect_cold_answers(seed)


@requirement(
    "sent.buffers",
    MUST,
    text="A buffer that no update sends, such as a rotary table and a scale, is bit by bit what it was before.",
    because="Reloading builds modules anew, and fills the buffers that no tensor comes for with what memory holds. "
    "Short prompts do not read what is spoilt.",
    seen_in=("vllm#44371", "vime#446", "nemo-rl#2631"),
    models=LATENT,
)
def test_buffers(sync: Sync, target: int) -> None:
    before = sync.call_engines("probe_buffers")[0]
    for held in before:
        _expect_among(sync, [_last(name) for name in held], BUFFERS)
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        for rank, (held, found) in enumerate(zip(before, sync.call_engines("probe_buffers")[0], strict=True)):
            other = [name for name in {**held, **found} if held.get(name) != found.get(name)]
            expect(not other, f"every buffer of rank {rank} as it was", f"{len(other)} others: {other[:5]}", sync.where)


@requirement(
    "sent.spread",
    MUST,
    text="Two updates from a trainer of four ranks are exact, where each rank holds a part of every tensor and the"
    " engine has fewer ranks than the trainer.",
    because="Code that was tried with one or two ranks takes a rank for a device, a shard for a tensor, or the last one"
    " that spoke for all.",
    on="cpu",
    models={"cpu-tp1": [TIED]},
)
def test_spread(spread: Sync, target: int) -> None:
    for seed in (target, spread.seed):
        spread.load(seed)
        spread.update()
        spread.expect_exact(seed)


@requirement(
    "sent.unchanged",
    MUST,
    text="An update leaves every tensor that the trainer holds as it was, bit by bit: in float32, which the engine "
    "rounds, and in bfloat16.",
    because="Who casts, scales or merges in place sends the right weights, and training goes on from others. An engine"
    " that is given handles can write to the trainer's own memory.",
    models=[TIED],
)
def test_unchanged(sync: Sync, target: int) -> None:
    for dtype in ("float32", "bfloat16") if sync.spec.computed else ("bfloat16",):
        sync.load(target, dtype)
        before = sync.trainer.call("checksums")
        sync.update()
        sync.expect_exact(target)
        for rank, (held, found) in enumerate(zip(before, sync.trainer.call("checksums"), strict=True)):
            expect_told(held, "tensors that the trainer holds", sync.where)
            other = [name for name, number in held.items() if found.get(name) != number]
            as_before = f"every tensor of the trainer's rank {rank} as before, in {dtype}"
            expect(not other, as_before, f"{len(other)} of {len(held)} others: {other[:5]}", sync.where)


def _mixed(sync: Sync) -> dict[str, str]:
    """A dtype by tensor. No bfloat16 value changes: those of norms lie around 1, where float16 has all of them."""
    others = cycle(("float32", "bfloat16"))
    names = [tensor["name"] for tensor in sync.manifest]
    return {name: "float16" if name.endswith(NORM) else next(others) for name in names}


def _expect_mixed(sync: Sync, bytes_sent: int) -> None:
    dtypes = _mixed(sync)
    expected = sum(math.prod(t["shape"]) * getattr(torch, dtypes[t["name"]]).itemsize for t in sync.manifest)
    expect(bytes_sent == expected, f"{expected} bytes of three dtypes", bytes_sent, sync.where)


def _expect_large(sync: Sync) -> None:
    """The model has a tensor that no buffer holds."""
    room = BUFFER_BYTES[sync.stage.kind]
    largest = max(math.prod(t["shape"]) * getattr(torch, t["dtype"]).itemsize for t in sync.manifest)
    if largest <= room:
        raise RuntimeError(f"expected a tensor of more than {room} bytes, found at most {largest} {sync.where}")


def _layers(sync: Sync) -> list[str]:
    """What the names of tensors begin with, by layer."""
    return [f"model.layers.{layer}." for layer in range(sync.spec.config["num_hidden_layers"])]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _within_its_layer(name: str) -> str:
    """A tensor's name without what stands between its layer and its own last part."""
    return re.sub(r"^(model\.layers\.\d+\.).*\.", r"\1", name)


def _update_exactly(sync: Sync, seed: int, expected: Sequence[str], named: Callable[[str], str] = str) -> None:
    """An update to a seed is exact, and these are among the tensors with elements that are compared.

    Args:
        named: what a tensor is called in `expected`, given its name.
    """
    sync.load(seed)
    sync.update()
    for rank in sync.compared(seed):
        _expect_among(sync, [named(name) for name, shape in rank["shapes"].items() if math.prod(shape)], expected)
    sync.expect_exact(seed)


def _expect_among(sync: Sync, names: Iterable[str], expected: Sequence[str]) -> None:
    """Else a test would say nothing of what it is about."""
    missing = [name for name in expected if name not in names]
    if missing or not expected:
        raise RuntimeError(f"expected {missing or 'tensors'} among what is looked at, found {[*names]} {sync.where}")
