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
from extensions.model import regions, twin
from extensions.plan import Plan, PlanError, plan_of
from suite import models
from suite.models import TIED
from suite.selftest.properties import examples
from suite.selftest.vllm_models import NO_ENGINE, Held

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
    ranks: tuple[int, int] = (1, 1),
    checkpoint: dict[str, tuple[int, ...]] | None = None,
    **announced: torch.Tensor,
) -> Plan:
    """The plan of a loader for `upper`, `lower` and `scale`, or for others; None leaves a tensor out.

    ranks: how many tensor-parallel and pipeline ranks there are; the plan is of the first. checkpoint: shapes in the
    engine's own.
    """

    @contextlib.contextmanager
    def twin_of(model: object, config: object, rank: tuple[int, int] | None = None) -> Iterator[Twin]:
        twin = Twin(loader)
        twin.rank = rank or (0, 0)
        yield twin

    layouts = {name: (HALF, shape) for name, shape in (checkpoint or {}).items()}
    monkeypatch.setattr(planning, "twin_of", twin_of)
    monkeypatch.setattr(planning, "checkpoint_layouts", lambda model: layouts)
    usual = {"upper": torch.empty(3, 4, dtype=HALF), "lower": torch.empty(3, 4, dtype=HALF)}
    named = usual | {"scale": torch.empty(4, dtype=HALF)} | announced
    tensor_parallel, pipeline = ranks
    parallel = SimpleNamespace(
        tensor_parallel_size=tensor_parallel, pipeline_parallel_size=pipeline, enable_expert_parallel=False
    )
    manifest = manifest_of((name, tensor) for name, tensor in named.items() if tensor is not None)
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(model="checkpoint"))
    return plan_of(torch.nn.Module(), config, manifest)


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
        (in_place, [("scale", 0, (4,), ("mul_ of the tensor itself",))]),
        (replace_tensor, [("scale", 0, (4,), ("clone", "replaces the tensor"))]),
        (replace_data, [("scale", 0, (4,), ("replaces the tensor",))]),
        (also_into_table, [("scale", 0, (4,), ()), ("table", 0, (3,), ("computed from scale",))]),
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
    monkeypatch.setattr(Twin, "load_weights", lambda *_: 1 / 0)
    with pytest.raises(PlanError, match=r"^load_weights took no tensor and raised ZeroDivisionError: division by zero"):
        planned(monkeypatch)
    with pytest.raises(ManifestError):
        plan_of(torch.nn.Module(), None, [])


def test_a_model_that_can_not_be_built_without_memory_says_so(monkeypatch: pytest.MonkeyPatch):
    @contextlib.contextmanager
    def twin_of(*_: object) -> Iterator[Twin]:
        raise twin.TwinFailed(NotImplementedError("Cannot copy out of meta tensor; no data!"))
        yield

    monkeypatch.setattr(planning, "twin_of", twin_of)
    manifest = manifest_of([("a", torch.empty(1))])
    with pytest.raises(PlanError, match=r"^a copy of the model can't be built without memory: NotImpl.*: Cannot copy"):
        plan_of(torch.nn.Module(), None, manifest)


def test_scales_of_the_cache_may_be_left_out_where_there_is_no_checkpoint(monkeypatch: pytest.MonkeyPatch):
    class BaseKVCacheMethod:
        """As vLLM's."""

    tree = torch.nn.Module()
    tree.attn, tree.other = Twin(sound), Twin(sound)
    tree.attn.quant_method = BaseKVCacheMethod()
    assert twin.kv_scales(tree) == ["attn.rows", "attn.scale"]
    monkeypatch.setattr(planning, "kv_scales", lambda twin: ["scale"])
    assert planned(monkeypatch, scale=None).problems() == []
    assert planned(monkeypatch, checkpoint={"scale": (4,)}, scale=None).problems() != []


def test_a_wrapper_that_would_process_a_layer_is_taken_off():
    """As vLLM puts it around the loaders of a model that it quantises while it loads, and of one that it reloads."""

    def online_process_loader() -> None:
        pass

    def own() -> None:
        pass

    tensor = torch.empty(1)
    online_process_loader.__wrapped__, tensor.weight_loader = own, online_process_loader
    twin.unwrap_loader(tensor)
    assert tensor.weight_loader is own
    twin.unwrap_loader(None)


def test_what_load_weights_drops_of_the_engines_own_checkpoint_is_to_be_left_out(monkeypatch: pytest.MonkeyPatch):
    def dropping(twin: Twin, name: str, tensor: torch.Tensor) -> None:
        if not name.endswith("g_idx"):
            sound(twin, name, tensor)

    index = torch.empty(1)
    plan = planned(monkeypatch, dropping, checkpoint={"g_idx": (1,)}, g_idx=index, other_g_idx=index)
    assert plan.problems() == [
        "g_idx: load_weights drops it, from the engine's own checkpoint too; leave it out of the update",
        "other_g_idx: unknown, load_weights writes it nowhere",
    ]


def test_a_dtype_that_can_not_be_the_weights_is_named(monkeypatch: pytest.MonkeyPatch):
    says = "scale: expected a dtype of float64, float32, bfloat16, float16, found "
    for dtype in (torch.int32, torch.float8_e4m3fn, torch.complex64, torch.bool):
        plan = planned(monkeypatch, scale=torch.empty(4, dtype=dtype))
        assert plan.problems() == [says + str(dtype).removeprefix("torch.")]


# ---- ranks


def of_rank(twin: Twin, name: str, tensor: torch.Tensor) -> None:
    """The first of two tensor-parallel ranks has the upper half of `rows`; only the second pipeline rank has scale."""
    if name == "rows":
        start = 6 * twin.rank[0]
        twin.rows.copy_(tensor[start : start + 6])
    elif twin.rank[1] == 1 or name != "scale":
        sound(twin, name, tensor)


def test_what_other_ranks_take_is_known_as_theirs(monkeypatch: pytest.MonkeyPatch):
    def of_two(rows: int, ranks: tuple[int, int], **others: object) -> list[str]:
        return planned(monkeypatch, of_rank, ranks, rows=torch.empty(rows, 4, dtype=HALF), upper=None, lower=None,
                       **others).problems()  # fmt: skip

    missing = "scale: missing, 4 of 4 elements are filled by no announced tensor"
    assert of_two(12, (2, 2)) == [missing]
    assert of_two(13, (2, 2)) == ["rows: other shape than expected, 4 of 52 elements of [13, 4] go nowhere", missing]
    assert of_two(12, (1, 2)) == ["rows: other shape than expected, 24 of 48 elements of [12, 4] go nowhere", missing]
    assert of_two(12, (2, 1))[0] == "scale: unknown, load_weights writes it nowhere"
    assert of_two(11, (2, 2))[0] == "rows: load_weights refuses it in shape [11, 4]: [5, 4] into [6, 4]"


def test_a_tensor_as_the_checkpoint_has_it_is_whole(monkeypatch: pytest.MonkeyPatch):
    """Other ranks are not planned for then, which takes time for each."""
    shapes = {"rows": (12, 4), "scale": (4,)}

    def problems(rows: int, ranks: tuple[int, int]) -> list[str]:
        tensor = torch.empty(rows, 4, dtype=HALF)
        return planned(monkeypatch, when_alone, ranks, shapes, rows=tensor, upper=None, lower=None).problems()

    def when_alone(twin: Twin, name: str, tensor: torch.Tensor) -> None:
        assert twin.rank == (0, 0), "expected no other rank to be looked at"
        of_rank(twin, name, tensor)

    assert problems(12, (2, 2)) == []
    assert "no other rank" in problems(13, (2, 2))[0]


def test_what_the_checkpoint_leaves_out_may_be_left_out(monkeypatch: pytest.MonkeyPatch):
    """A scale that keeps the value of the model's class. What the checkpoint has is missing all the same."""
    shapes = {"upper": (3, 4), "lower": (3, 4)}
    plan = planned(monkeypatch, checkpoint=shapes, scale=None)
    assert (plan.problems(), plan.kept, plan.left) == ([], {"scale": 4}, {"scale", "table"})
    assert planned(monkeypatch, checkpoint=shapes | {"scale": (4,)}, scale=None).problems() == [
        "scale: missing, 4 of 4 elements are filled by no announced tensor"
    ]
    assert planned(monkeypatch, checkpoint={"upper": (3, 4), "scale": (4,)}, upper=None).problems() == [
        "upper: missing, 12 of 24 elements of rows are filled by no announced tensor; the others are filled by lower"
    ]


# ---- what is copied by the plan, and what load_weights has to load


@pytest.mark.parametrize(
    ("load", "copied"),
    [
        (lambda twin, tensor: twin.scale.data.copy_(tensor), True),
        (lambda twin, tensor: twin.scale[torch.arange(4)].data.copy_(tensor), False),
        (through_function, False), (through_clone, False), (replace_data, False), (also_into_table, False),
        (lambda twin, tensor: (twin.scale.data.zero_(), twin.scale.data.copy_(tensor)), False),
        (lambda twin, tensor: twin.scale.data.copy_(tensor.clone().flip(0)), False),
    ],
)  # fmt: skip
def test_only_what_is_copied_element_by_element_is_left_to_the_plan(
    monkeypatch: pytest.MonkeyPatch, load: Callable, copied: bool
):
    plan = planned(monkeypatch, when("scale", load))
    assert ("scale" in plan.copied) == copied
    assert {"upper", "lower"} <= {*plan.copied}
    cast = planned(monkeypatch, when("scale", load), scale=torch.empty(4, dtype=WHOLE))
    assert ("scale" in cast.copied) == (copied and not cast.problems())


@pytest.mark.parametrize(
    ("load", "spoilt"),
    [
        (in_place, True), (replace_data, True), (through_function, False), (through_clone, False),
        (lambda twin, tensor: twin.scale.data.copy_(tensor[1:].zero_()[0]), True),
        (lambda twin, tensor: twin.scale.data.copy_(tensor), False),
    ],
)  # fmt: skip
def test_a_tensor_that_load_weights_writes_into_or_keeps_is_known(
    monkeypatch: pytest.MonkeyPatch, load: Callable, spoilt: bool
):
    assert planned(monkeypatch, when("scale", load)).spoilt == ({"scale"} if spoilt else set())


def test_what_needs_its_neighbours_is_loaded_together(monkeypatch: pytest.MonkeyPatch):
    """A loader that keeps one tensor until the other comes works in one call, and drops it between two."""

    def in_one_call(twin: Twin, named: Named) -> None:
        kept = dict(named)
        if {"upper", "lower"} <= kept.keys():
            twin.rows.data.copy_(torch.cat([kept["upper"], kept["lower"]]))
        if "scale" in kept:
            through_function(twin, kept["scale"])

    apart = planned(monkeypatch, when("scale", through_function))
    assert (apart.converted, apart.together) == (["scale"], False)
    monkeypatch.setattr(Twin, "load_weights", in_one_call)
    plan = planned(monkeypatch)
    assert (plan.problems(), plan.converted, plan.together) == ([], ["upper", "lower", "scale"], True)


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
    memory = regions.Memory(whole.numel() * dtype.itemsize, dtype.itemsize)
    found = regions.elements_filled([regions.region_of(part) for part in parts], memory)
    assert found == dict(zip(times.tolist(), elements.tolist(), strict=True))


# ---- vLLM's own models

vllm = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
NAMES = [TIED, "qwen3-untied-tiny", "llama-tiny", "qwen3-moe-tiny"]
QKV = "model.layers.1.self_attn.qkv_proj.weight"


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
        (
            {"model.layers.1.self_attn.k_proj.weight": None},
            "model.layers.1.self_attn.k_proj.weight",
            f"missing, 16384 of 65536 elements of {QKV} are filled by no announced tensor.* by .*self_attn.v_proj",
        ),
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
