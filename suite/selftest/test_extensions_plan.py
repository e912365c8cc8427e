"""A plan says where each announced tensor goes, and names whatever would be stale, lost or written twice."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extensions import plan as planning
from extensions.manifest import ManifestError, manifest_of
from extensions.model import twin
from extensions.plan import Plan, PlanError, plan_of
from suite import models
from suite.models import TIED
from suite.selftest.properties import examples
from suite.selftest.vllm_models import NO_ENGINE, Held, holding

Named = Iterable[tuple[str, torch.Tensor]]
HALF, WHOLE = torch.bfloat16, torch.float32


# ---- models of a few tensors, with loaders of their own


class Twin(torch.nn.Module):
    """Two parameters and a buffer: `rows` 6 x 4, `scale` 4 and `table` 3, all bfloat16. The loader is a test's."""

    def __init__(self, loader: Callable[["Twin", str, torch.Tensor], object]) -> None:
        super().__init__()
        self.rows, self.scale = (
            torch.nn.Parameter(torch.empty(shape, dtype=HALF, device="meta"), requires_grad=False)
            for shape in ((6, 4), (4,))
        )
        self.register_buffer("table", torch.empty(3, dtype=HALF, device="meta"))
        self._loader = loader

    def load_weights(self, named: Named) -> None:
        for name, tensor in named:
            self._loader(self, name, tensor)


def sound(twin: Twin, name: str, tensor: torch.Tensor) -> None:
    """`upper` and `lower` are halves of `rows`."""
    into = {"upper": twin.rows[:3], "lower": twin.rows[3:], "scale": twin.scale}[name]
    assert into.shape == tensor.shape, f"expected {list(into.shape)}"
    into.data.copy_(tensor)


def planned(
    monkeypatch: pytest.MonkeyPatch,
    loader: Callable[[Twin, str, torch.Tensor], object] = sound,
    tensor_parallel: int = 1,
    **announced: torch.Tensor,
) -> Plan:
    """The plan of a loader for `upper`, `lower` and `scale`, or for others; None leaves a tensor out."""

    @contextlib.contextmanager
    def twin_of(*_: object) -> Iterator[Twin]:
        yield Twin(loader)

    monkeypatch.setattr(planning, "twin_of", twin_of)
    usual = {"upper": torch.empty(3, 4, dtype=HALF), "lower": torch.empty(3, 4, dtype=HALF)}
    named = usual | {"scale": torch.empty(4, dtype=HALF)} | announced
    parallel = SimpleNamespace(
        tensor_parallel_size=tensor_parallel, pipeline_parallel_size=1, enable_expert_parallel=False
    )
    manifest = manifest_of((name, tensor) for name, tensor in named.items() if tensor is not None)
    return plan_of(torch.nn.Module(), SimpleNamespace(parallel_config=parallel), manifest)


def places(plan: Plan, name: str) -> list[tuple]:
    return [(fill.into, fill.region.offset, fill.region.shape, fill.conversion) for fill in plan.of(name)]


def test_each_tensor_has_its_place(monkeypatch: pytest.MonkeyPatch):
    plan = planned(monkeypatch)
    assert plan.problems() == []
    assert places(plan, "upper") == [("rows", 0, (3, 4), ())]
    assert places(plan, "lower") == [("rows", 24, (3, 4), ())]
    assert places(plan, "scale") == [("scale", 0, (4,), ())]


def test_a_cast_is_a_conversion(monkeypatch: pytest.MonkeyPatch):
    plan = planned(monkeypatch, scale=torch.empty(4, dtype=WHOLE))
    assert plan.problems() == []
    assert places(plan, "scale") == [("scale", 0, (4,), ("cast float32 to bfloat16",))]


def when(name: str, do: Callable[[Twin, torch.Tensor], object]) -> Callable[[Twin, str, torch.Tensor], object]:
    """The sound loader, but for one tensor."""
    return lambda twin, found, tensor: do(twin, tensor) if found == name else sound(twin, found, tensor)


def fill_and_copy(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale.data.fill_(0)
    twin.scale.data[:3].copy_(tensor[:3])


def through_function(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale.data.copy_(tensor)
    twin.scale.data.copy_(-twin.scale.exp())


def through_clone(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale.data.copy_(torch.empty_like(tensor).copy_(tensor).mul_(2))


def in_place(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale.data.copy_(tensor.mul_(2))


def replace_tensor(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale = torch.nn.Parameter(tensor.clone(), requires_grad=False)


def replace_data(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale.data = tensor


def also_into_table(twin: Twin, tensor: torch.Tensor) -> None:
    twin.scale.data.copy_(tensor)
    twin.table.copy_(twin.scale[1:])


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (through_function, [("scale", 0, (4,), ("exp", "neg"))]),
        (through_clone, [("scale", 0, (4,), ("copy_", "mul_"))]),
        (in_place, [("scale", 0, (4,), ("mul_",))]),
        (replace_tensor, [("scale", 0, (4,), ("clone", "replaces the tensor"))]),
        (replace_data, [("scale", 0, (4,), ("replaces the tensor",))]),
        (also_into_table, [("scale", 0, (4,), ()), ("table", 0, (3,), ())]),
    ],
)
def test_what_happens_on_the_way_is_followed(monkeypatch: pytest.MonkeyPatch, load: Callable, expected: list):
    plan = planned(monkeypatch, when("scale", load))
    assert plan.problems() == []
    assert places(plan, "scale") == expected


def test_padding_is_no_problem_and_what_is_not_read_is(monkeypatch: pytest.MonkeyPatch):
    narrow = planned(monkeypatch, when("scale", fill_and_copy), scale=torch.empty(3, dtype=HALF))
    assert narrow.problems() == []
    wide = planned(monkeypatch, when("scale", fill_and_copy))
    assert wide.problems() == ["scale: other shape than expected, 1 of 4 elements of [4] go nowhere"]
    assert planned(monkeypatch, when("scale", fill_and_copy), 2).problems() == [], "another rank may read the rest"


@pytest.mark.parametrize(
    ("load", "problems"),
    [
        (
            lambda twin, tensor: None,
            [
                "scale: unknown, load_weights writes it nowhere",
                "scale: missing, 4 of 4 elements are filled by no announced tensor",
            ],
        ),
        (
            lambda twin, tensor: twin.scale.data.zero_(),
            [
                "scale: unknown, load_weights writes it nowhere",
                "scale: missing, 4 of 4 elements are filled by no announced tensor",
            ],
        ),
        (
            lambda twin, tensor: (twin.scale.data.copy_(tensor), twin.rows[2, 1:].copy_(tensor[1:])),
            ["rows: 3 of 24 elements are filled more than once, by upper, lower, scale"],
        ),
        (
            lambda twin, tensor: (twin.scale.data.copy_(tensor), twin.rows[1:, 2].copy_(tensor.view(4, 1)[0])),
            [
                "scale: other shape than rows takes, [1] into [5]",
                "rows: 5 of 24 elements are filled more than once, by upper, lower, scale",
            ],
        ),
        (
            lambda twin, tensor: twin.scale[::2].copy_(tensor[::2]),
            [
                "scale: other shape than expected, 2 of 4 elements of [4] go nowhere",
                "scale: missing, 2 of 4 elements are filled by no announced tensor; the others are filled by scale",
            ],
        ),
        (
            lambda twin, tensor: setattr(twin, "scale", torch.nn.Parameter(tensor.repeat(2), requires_grad=False)),
            ["scale: other shape than scale takes, [8] into [4]"],
        ),
    ],
    ids=["dropped", "zeroed", "written twice", "stretched", "every other", "replaced by a larger"],
)  # fmt: skip
def test_what_a_loader_does_wrong_is_named(monkeypatch: pytest.MonkeyPatch, load: Callable, problems: list[str]):
    assert planned(monkeypatch, when("scale", load)).problems() == problems


def test_a_tensor_that_is_not_announced_is_missing_where_it_belongs(monkeypatch: pytest.MonkeyPatch):
    assert planned(monkeypatch, lower=None).problems() == [
        "rows: missing, 12 of 24 elements are filled by no announced tensor; the others are filled by upper"
    ]


def test_each_tensor_that_the_loader_refuses_is_named(monkeypatch: pytest.MonkeyPatch):
    ghosts = {"ghost": torch.empty(1), "scale": torch.empty(5)}
    assert planned(monkeypatch, **ghosts).problems() == [
        "scale: load_weights refuses it in shape [5]: AssertionError: expected [4]",
        "ghost: load_weights refuses it in shape [1]: KeyError: 'ghost'",
    ]


def test_many_refusals_end_the_recording(monkeypatch: pytest.MonkeyPatch):
    problems = planned(monkeypatch, **{f"ghost{index}": torch.empty(1) for index in range(20)}).problems()
    assert len(problems) == planning.SHOWN
    assert problems[-1] == "ghost7: load_weights refuses it in shape [1]: KeyError: 'ghost7'"


def test_what_can_not_be_planned_says_so(monkeypatch: pytest.MonkeyPatch):
    def online_process_loader() -> None:
        pass

    monkeypatch.setattr(Twin, "load_weights", lambda *_: 1 / 0)
    with pytest.raises(PlanError, match=r"^load_weights took no tensor and raised ZeroDivisionError: division by zero"):
        planned(monkeypatch)
    original = planning.named_tensors

    def quantised(twin: Twin) -> dict[str, torch.Tensor]:
        twin.scale.weight_loader = online_process_loader
        return original(twin)

    monkeypatch.setattr(planning, "named_tensors", quantised)
    with pytest.raises(PlanError, match=r"^scale: vLLM quantises this model while it loads"):
        planned(monkeypatch)
    with pytest.raises(ManifestError):
        plan_of(torch.nn.Module(), None, [])


# ---- counting


@st.composite
def views(draw: st.DrawFn, whole: torch.Tensor) -> torch.Tensor:
    """A part of a tensor: some of its indices in each dimension, at steps, in another order of dimensions, flat."""
    part = whole
    for dim, size in enumerate(whole.shape):
        start = draw(st.integers(0, size))
        part = part.narrow(dim, start, draw(st.integers(0, size - start)))
        part = part[(slice(None),) * dim + (slice(None, None, draw(st.sampled_from([1, 1, 1, 2, 3]))),)]
    part = part.permute(draw(st.permutations(range(part.ndim))))
    return part.view(-1) if part.is_contiguous() and draw(st.booleans()) else part


@given(st.data())
@examples(4)
def test_elements_are_counted_by_the_number_of_regions_that_they_lie_in(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    dtype = data.draw(st.sampled_from([torch.int8, torch.int16, torch.int64]))
    whole = torch.arange(torch.Size(shape).numel()).to(dtype).view(shape)
    parts = data.draw(st.lists(views(whole), max_size=5))
    indices = torch.cat([torch.empty(0, dtype=torch.long), *(part.flatten().long() for part in parts)])
    times, elements = indices.bincount(minlength=whole.numel()).unique(return_counts=True)
    memory = planning.Memory(whole.numel() * dtype.itemsize, dtype.itemsize)
    found = planning.elements_filled([twin.region_of(part) for part in parts], memory)
    assert found == dict(zip(times.tolist(), elements.tolist(), strict=True))


# ---- vLLM's own models

vllm = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
NAMES = [TIED, "qwen3-untied-tiny", "llama-tiny", "qwen3-moe-tiny"]
QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with holding(tmp_path_factory.mktemp("plans")) as held:
        yield held


@vllm
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_checkpoint_is_accounted_for(held: Held, name: str):
    """Anew each time, and the model does not notice: an update after it is exact."""
    held.build(name, 1)
    expected = held.computes_with()
    held.build(name, 0)
    before, registers = held.computes_with(), held.registers()
    for _ in range(2):
        plan = held.plan({})
        assert plan["problems"] == []
        assert list(plan["fills"]) == [name for name, _ in models.tensors(models.MODELS[name])]
        for tensor, shape in models.tensors(models.MODELS[name]):
            (fill,) = plan["fills"][tensor]
            assert (fill[2], fill[3]) == (list(shape), []), tensor
    assert (held.computes_with(), held.registers()) == (before, registers)
    assert held.begin(1) == held.send() == held.end()
    assert held.computes_with() == expected


@vllm
def test_parts_of_a_fused_layer_lie_behind_each_other(held: Held):
    held.build("qwen3-moe-tiny", 0)
    fills = held.plan({})["fills"]
    found = [fills[f"model.layers.1.self_attn.{part}_proj.weight"][0][:2] for part in "qkv"]
    assert found == [[QKV, 0], [QKV, 256 * 128 * 2], [QKV, (256 + 128) * 128 * 2]]
    experts = [f"model.layers.1.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up", "down")]
    offsets = [fills[expert][0][1] for expert in experts]
    assert offsets == [10 * 128 * 128 * 2, 11 * 128 * 128 * 2, 5 * 128 * 128 * 2]


@vllm
@pytest.mark.parametrize(
    ("changes", "names", "says"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, QKV, "missing, 16384 of 65536 elements .*self_attn.v_proj"),
        ({"model.norm.weight": None}, "model.norm.weight", "missing, 128 of 128 elements"),
        ({"model.norm.weight": [5]}, "model.norm.weight", r"load_weights refuses it in shape \[5\]"),
        ({"model.layers.0.ghost.weight": [3]}, "model.layers.0.ghost.weight", "refuses it .*There is no module"),
        ({"model.rotary_emb.inv_freq": [32]}, "model.rotary_emb.inv_freq", "unknown, load_weights writes it nowhere"),
        (
            {"model.layers.0.self_attn.q_proj.weight": [300, 128]},
            "model.layers.0.self_attn.q_proj.weight",
            r"other shape than expected, 5632 of 38400 elements of \[300, 128\] go nowhere",
        ),
        ({"lm_head.weight": [512, 64]}, "lm_head.weight", r"expected shape \[512, 128\], that of model.embed_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_one_wrong_tensor_is_the_one_problem(held: Held, changes: dict, names: str, says: str):
    held.build(TIED, 0)
    (problem,) = held.plan(changes)["problems"]
    assert problem.startswith(f"{names}: ")
    assert re.search(says, problem), problem


@vllm
def test_a_copy_without_memory_leaves_no_rotary_embedding_to_the_next_model(held: Held):
    held.build(TIED, 0)
    held.forget_ropes()
    held.plan({})
    assert held.registers()["ropes"] == []


@vllm
def test_a_tied_head_may_be_announced(held: Held):
    held.build(TIED, 0)
    plan = held.plan({"lm_head.weight": [512, 128]})
    assert plan["problems"] == []
    assert plan["fills"]["lm_head.weight"] == []
