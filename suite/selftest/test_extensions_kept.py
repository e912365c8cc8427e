"""A plan is made once for a manifest and kept while it holds; what no plan can be made for is judged by the headers."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from extensions import kept
from extensions.kept import Kept, accepted
from extensions.manifest import ManifestError
from extensions.model.headers import INDEX, checkpoint_layouts
from extensions.model.regions import Memory, Region
from extensions.model.twin import Fill
from extensions.plan import Plan, PlanError

HALF = torch.bfloat16
ANNOUNCED = {f"weight{index}": (HALF, (3, 4)) for index in range(400)}


class Model(torch.nn.Module):
    """Layers of one weight each, and a buffer."""

    def __init__(self, layers: int = 400) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 3, bias=False) for _ in range(layers))
        self.register_buffer("table", torch.zeros(3))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list:
    """The manifests that a plan was made for."""
    made: list = []
    monkeypatch.setattr(kept, "accepted", lambda model, config, announced, whole=True: made.append(announced))
    return made


# ---- kept


def test_a_plan_is_made_once_for_a_manifest(made: list):
    model, plans = Model(), Kept()
    for announced in (ANNOUNCED, dict(ANNOUNCED), dict(reversed(ANNOUNCED.items()))):
        plans.whole(model, None, announced)
    assert made == [ANNOUNCED]
    other = ANNOUNCED | {"weight0": (torch.float32, (3, 4))}
    plans.whole(model, None, other)
    plans.whole(model, None, ANNOUNCED)
    assert made == [ANNOUNCED, other, ANNOUNCED]


def grown(model: Model) -> None:
    model.layers[7].weight = torch.nn.Parameter(torch.zeros(5, 4))


def reshaped(model: Model) -> None:
    model.layers[7].weight.data = model.layers[7].weight.data.view(4, 3)


def moved(model: Model) -> None:
    model.layers[7].weight.data = model.layers[7].weight.data.clone()


def replaced(model: Model) -> None:
    model.layers[7].weight = torch.nn.Parameter(torch.zeros(3, 4))


def moved_buffer(model: Model) -> None:
    model.table = model.table.clone()


def removed(model: Model) -> None:
    del model.layers[7].weight


def transposed(model: Model) -> None:
    weight = model.layers[7].weight
    weight.data = weight.data.as_strided((3, 4), (1, 3))


def retyped(model: Model) -> None:
    model.table = model.table.view(torch.int32)


@pytest.mark.parametrize("change", [grown, reshaped, transposed, retyped, moved, replaced, moved_buffer, removed])
def test_a_plan_is_dropped_when_a_tensor_of_the_model_has_moved(made: list, change):
    model, plans = Model(), Kept()
    held = [tensor.data for tensor in (*model.parameters(), *model.buffers())]  # no address is used a second time
    plans.whole(model, None, ANNOUNCED)
    plans.alone(model, None, {"weight0": (HALF, (3, 4))})
    change(model)
    plans.whole(model, None, ANNOUNCED)
    plans.whole(model, None, ANNOUNCED)
    plans.alone(model, None, {"weight0": (HALF, (3, 4))})
    assert len(made) == 4
    assert held


class Slow(torch.nn.Parameter):
    """A parameter whose class sees every look at it, as vLLM's do."""

    looks = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.looks += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_to_look_whether_tensors_have_moved_calls_nothing_of_their_classes():
    model, plans = Model(2), Kept()
    model.layers[0].weight = Slow(torch.zeros(3, 4))
    plans._keep(model)
    Slow.looks = 0
    assert plans.holds(model)
    model.layers[0].weight.data = torch.zeros(3, 4)
    moved = Slow.looks
    assert not plans.holds(model)
    assert Slow.looks == moved == 1, "expected the one look of setting .data"


def test_values_may_change_under_a_plan(made: list):
    model, plans = Model(), Kept()
    plans.whole(model, None, ANNOUNCED)
    with torch.no_grad():
        model.layers[7].weight.fill_(1)
    plans.whole(model, None, ANNOUNCED)
    assert len(made) == 1


def test_a_plan_of_another_model_is_not_taken(made: list):
    plans = Kept()
    plans.whole(Model(), None, ANNOUNCED)
    plans.whole(Model(), None, ANNOUNCED)
    assert len(made) == 2


def test_what_was_refused_is_judged_anew(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise ManifestError("no")

    model, plans = Model(), Kept()
    monkeypatch.setattr(kept, "accepted", refuse)
    for _ in range(2):
        with pytest.raises(ManifestError, match="no"):
            plans.whole(model, None, ANNOUNCED)


def test_tensors_on_their_own_have_plans_of_their_own(made: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "MAX_ALONE", 2)
    model, plans = Model(), Kept()
    plans.whole(model, None, ANNOUNCED)
    for name in ("weight0", "weight1", "weight0", "weight1"):
        plans.alone(model, None, {name: ANNOUNCED[name]})
    assert len(made) == 3
    plans.alone(model, None, {"weight2": ANNOUNCED["weight2"]})
    plans.alone(model, None, {"weight0": ANNOUNCED["weight0"]})
    assert len(made) == 5, "expected no more than so many to be kept"


def test_a_kept_plan_is_found_in_less_than_a_millisecond(made: list):
    model, plans = Model(), Kept()
    plans.whole(model, None, ANNOUNCED)
    best_s = min(_elapsed_s(lambda: plans.whole(model, None, dict(ANNOUNCED))) for _ in range(20))
    assert best_s < 1e-3
    assert len(made) == 1


def _elapsed_s(do: object) -> float:
    start_s = time.perf_counter()
    do()
    return time.perf_counter() - start_s


# ---- judged by the checkpoint, where no plan can be made


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    weights = {"a": torch.zeros(2, 3, dtype=HALF), "b": torch.zeros(4), "lm_head.weight": torch.zeros(5, 3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def judged(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    tied: bool = False,
    whole: bool = True,
    dtype: torch.dtype = HALF,
    **changes: tuple[int, ...] | None,
) -> None:
    def unplanned(*_: object) -> None:
        raise PlanError("load_weights took no tensor")

    monkeypatch.setattr(kept, "planned", unplanned)
    config = SimpleNamespace(model=str(directory), hf_text_config=SimpleNamespace(tie_word_embeddings=tied))
    shapes = {"a": (2, 3), "b": (4,), "lm_head.weight": (5, 3)} | changes
    announced = {name: (dtype, shape) for name, shape in shapes.items() if shape is not None}
    assert accepted(Model(1), SimpleNamespace(model_config=config), announced, whole) is None


def test_without_a_plan_the_checkpoint_is_what_is_expected(monkeypatch: pytest.MonkeyPatch, directory: Path):
    judged(monkeypatch, directory)
    judged(monkeypatch, directory, tied=True)
    judged(monkeypatch, directory, tied=True, **{"lm_head.weight": None})
    judged(monkeypatch, directory, whole=False, b=None)
    for changes, says in (
        ({"b": None}, "1 missing name: b"), ({"ghost": (1,)}, "1 unknown name: ghost"),
        ({"a": (3, 2)}, r"a: expected shape \[2, 3\], found \[3, 2\]"), ({"lm_head.weight": None}, "missing name: lm_"),
    ):  # fmt: skip
        with pytest.raises(ManifestError, match=says):
            judged(monkeypatch, directory, **changes)


def test_without_a_plan_codes_are_expected_in_the_dtype_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, directory: Path
):
    codes = torch.float8_e4m3fn
    shapes = {"a": (2, 3), "b": (4,), "lm_head.weight": (5, 3)}
    save_file({n: torch.zeros(shape, dtype=codes) for n, shape in shapes.items()}, directory / "model.safetensors")
    judged(monkeypatch, directory, dtype=codes)
    with pytest.raises(ManifestError, match="a: expected a dtype of float8_e4m3fn, found bfloat16"):
        judged(monkeypatch, directory)


def test_without_a_plan_and_a_checkpoint_an_update_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with pytest.raises(ManifestError, match=r"took no tensor; and there is no checkpoint at .* to judge the update by"):
        judged(monkeypatch, tmp_path)
    for content, says in ((b"\xff" * 20, "a header of"), (b"\xff" * 7, "a header of"), (b"", "Expecting value")):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ManifestError, match=rf"took no tensor; and its checkpoint at .* cannot be read: .*{says}"):
            judged(monkeypatch, tmp_path)


def test_only_the_files_of_an_index_are_read(directory: Path):
    save_file({"stray": torch.zeros(1)}, directory / "consolidated.safetensors")
    assert checkpoint_layouts(str(directory)) == {
        "a": (HALF, (2, 3)), "b": (torch.float32, (4,)), "lm_head.weight": (torch.float32, (5, 3)),
    }  # fmt: skip
    save_file({"a": torch.zeros(7, dtype=torch.float8_e4m3fn)}, directory / "part.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert checkpoint_layouts(str(directory)) == {"a": (torch.float8_e4m3fn, (7,))}


# ---- what keeps its value


def with_scale(live: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, scales: tuple[str, ...] = ()) -> None:
    """An update that fills `layer.weight`, and not `layer.scale`, which the engine's own checkpoint has neither.

    scales: what vLLM's reload makes anew.
    """
    region = Region(0, (4,), (4,), 4)
    shapes = {"layer.weight": torch.empty(4, device="meta"), "layer.scale": torch.empty(1, device="meta")}
    plan = Plan(
        {"weight": (torch.float32, (4,))},
        [Fill("layer.weight", region, (("weight", region),))],
        {"layer.weight": Memory(16, 4), "layer.scale": Memory(4, 4)},
        shapes,
        kept={"layer.scale": 1},
        scales=[*scales],
    )
    monkeypatch.setattr(kept, "planned", lambda *_: plan)
    monkeypatch.setattr(kept, "live_tensors", lambda model: live)
    accepted(Model(1), None, plan.announced)


def test_a_weight_that_no_tensor_fills_keeps_its_value_or_the_update_is_refused(monkeypatch: pytest.MonkeyPatch):
    with_scale({"layer.weight": torch.zeros(0), "layer.scale": torch.ones(1)}, monkeypatch)
    for live in ({}, {"layer.scale": torch.ones(2)}, {"layer.scale": torch.ones(1, dtype=HALF)}):
        with pytest.raises(ManifestError, match=r"layer\.scale: no announced tensor fills it, and the engine has its"):
            with_scale(live, monkeypatch)


def test_scales_of_the_cache_are_made_anew_where_a_model_is_reloaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "processed_layers", lambda model: ["layer"])
    with_scale({}, monkeypatch, scales=("layer.scale",))
    monkeypatch.setattr(kept, "processed_layers", lambda model: [])
    with pytest.raises(ManifestError, match=r"layer\.scale: no announced tensor fills it"):
        with_scale({}, monkeypatch, scales=("layer.scale",))
