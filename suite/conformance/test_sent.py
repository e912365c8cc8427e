"""sent.*: whatever tensors an update has, and however the trainer holds them, the engine computes with their values."""

import math
from itertools import cycle

import pytest
import torch

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.pool import Pool
from suite.driver.sync import Sync
from suite.models import TIED

BIASED = "qwen2-tiny"
LARGE = "qwen3-100m"
PUBLISHED = dict.fromkeys(("gpu-split", "gpu-colocate-tp1"), ("qwen3-8b",))  # whose engines the measurements need too

# No buffer of a transport holds more: vLLM packs the tensors of an update into buffers of 1 GiB on GPUs; on CPUs a
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
    because="A transport that moves memory from an address on moves other elements, or those between, and no shape "
    "tells.",
    seen_in=("miles#1608", "vllm#50641", "verl#6919"),
    models=[TIED],
)
def test_strides(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update(alter={"lay": {name: "transposed" if matrix else "sliced" for name, matrix in _dense(sync)}})
        sync.expect_exact(seed)
        sync.update(alter={"lay": {name: "sliced" for name, _ in _dense(sync)}})
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
    text="A tensor that is larger than any buffer of a transport arrives whole: of more than 1 GiB on GPUs, of more "
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
    sync.trainer.hold_random(pool.config(sync.model), None)  # zeros
    sync.update()
    sync.expect_zero()
    sync.trainer.fill(1)
    sync.update()
    sync.expect_no_zero()


@requirement(
    "sent.biases",
    MUST,
    text="Biases are updated as weights are, and the engine's answers are the trainer's.",
    because="Code that chooses tensors by names that end in `.weight` leaves the old biases in place.",
    seen_in=("axolotl#3527",),
    models=[BIASED],
)
def test_biases(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        for rank in sync.compared(seed):
            _expect_biases(sync, rank["shapes"])
        sync.expect_exact(seed)
        sync.expect_same_behaviour()


def _mixed(sync: Sync) -> dict[str, str]:
    """A dtype by tensor. No bfloat16 value changes: those of norms lie around 1, where float16 has all of them."""
    others = cycle(("float32", "bfloat16"))
    names = [tensor["name"] for tensor in sync.manifest]
    return {name: "float16" if name.endswith(NORM) else next(others) for name in names}


def _expect_mixed(sync: Sync, bytes_sent: int) -> None:
    dtypes = _mixed(sync)
    size = {name: math.prod(shape) for name, shape in ((t["name"], t["shape"]) for t in sync.manifest)}
    expected = sum(size[name] * getattr(torch, dtype).itemsize for name, dtype in dtypes.items())
    expect(bytes_sent == expected, f"{expected} bytes of three dtypes", bytes_sent, sync.where)


def _dense(sync: Sync) -> list[tuple[str, bool]]:
    """(name, whether it is a matrix) of every tensor."""
    return [(tensor["name"], len(tensor["shape"]) == 2) for tensor in sync.manifest]


def _expect_large(sync: Sync) -> None:
    """The model has a tensor that no buffer holds."""
    room = BUFFER_BYTES[sync.stage.kind]
    largest = max(math.prod(t["shape"]) * getattr(torch, t["dtype"]).itemsize for t in sync.manifest)
    if largest <= room:
        raise RuntimeError(f"expected a tensor of more than {room} bytes, found at most {largest} {sync.where}")


def _expect_biases(sync: Sync, shapes: dict[str, list[int]]) -> None:
    """What was compared has the bias of every layer's queries, keys and values, which vLLM fuses into one."""
    found = [name for name, shape in shapes.items() if name.endswith("qkv_proj.bias") and shape[0]]
    layers = sync.spec.config["num_hidden_layers"]
    if len(found) != layers:
        raise RuntimeError(f"expected {layers} biases among what is compared, found {found} {sync.where}")
