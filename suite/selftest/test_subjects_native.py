"""vLLM's native transfer, as every release from 0.20 to 0.33 takes it: fakes refuse what theirs would refuse."""

import base64
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions.manifest import manifest_of
from suite import ROOT
from suite.models import TIED
from suite.selftest.fakes import fake_module
from suite.session import waivers
from suite.stages import STAGES
from suite.subjects import known_subjects, native, native_gloo, native_ipc, native_nccl, native_planned, native_senders
from suite.subjects.native_versions import Api, api_of

RELEASES = [(0, minor) for minor in range(20, 34)]
TENSORS = [("a.weight", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T), ("b.weight", torch.ones(4))]
MANIFEST = manifest_of(TENSORS)
NATIVE = {name: subject for name, subject in known_subjects().items() if name.startswith("native-")}
DENSE = ("native-nccl", "native-nccl-packed")
UUID = "GPU-0000"


def buffers(release: tuple[int, int], first: int, last: int) -> set[str]:
    """The fields of packing, where a release has them."""
    has = first <= release[1] <= last
    return {"packed", "packed_buffer_size_bytes", "packed_num_buffers"} if has else set()


def accepted(backend: str, release: tuple[int, int]) -> tuple[set[str], set[str]]:
    """The fields of a release's init and update information; what is not among them, vLLM refuses."""
    minor, described = release[1], {"names", "dtype_names", "shapes"}
    kernel = {"is_checkpoint_format"} if minor == 20 else set()
    if backend == "ipc":
        update = described | kernel | {"ipc_handles", "ipc_handles_pickled"}
        update |= {"tensor_sizes"} if minor >= 22 else set()
        update |= {"packed"} if 22 <= minor <= 26 else set()
        return ({"packed"} if minor >= 27 else set()), update
    init = {"master_address", "master_port", "rank_offset", "world_size"} | buffers(release, 28, 33)
    if backend == "sparse_nccl":
        return init, described | {"num_updates_list"}
    return init, described | kernel | buffers(release, 20, 27)


@dataclass
class Llm:
    """vllm.LLM of a release, as far as updates go. `fails` names a call that raises."""

    release: tuple[int, int]
    backend: str
    called: list[str] = field(default_factory=list)
    told: dict[str, dict] = field(default_factory=dict)
    active: bool = False
    fails: str = ""

    devices = ()

    def call_llm(self, method: str, *args: Any) -> None:
        minor = self.release[1]
        bracket = method in ("start_weight_update", "start_draft_weight_update", "finish_weight_update")
        assert not (bracket and minor < (26 if "draft" in method else 21)), f"vLLM 0.{minor} has no {method}()"
        self.called.append(method)
        if bracket:
            assert not args, f"expected no arguments of {method}() in any release, found {args}"
            starting = method.startswith("start")
            if starting == self.active:
                raise RuntimeError("start_weight_update called while a weight update is already active"
                                   if starting else "finish_weight_update called without a matching start")  # fmt: skip
            self.active = starting
        elif method == "init_weight_transfer_engine":
            self._take("init_info", args, accepted(self.backend, self.release)[0])
        else:
            assert method == "update_weights", method
            self._take("update_info", args, accepted(self.backend, self.release)[1])
            if self.fails == method:
                self.active = self.active and minor < 23
                raise RuntimeError("no module or parameter named ghost")

    def _take(self, key: str, args: tuple, fields: set[str]) -> None:
        (request,) = args
        assert [*request] == [key], request
        unknown = request[key].keys() - fields
        assert not unknown, f"Invalid {key} for vLLM {self.release}: {unknown}"
        self.told[key] = request[key]


@pytest.fixture(params=RELEASES, ids=lambda r: f"0.{r[1]}")
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A release of vLLM, taken for the installed one."""
    for module in (native, native_gloo, native_ipc, native_nccl, native_planned, native_senders):
        monkeypatch.setattr(module, "installed", lambda: Api(request.param), raising=False)
    native_senders.source_class.cache_clear()
    yield request.param
    native_senders.source_class.cache_clear()


def half(subject: native.Native, llm: Llm) -> native.NativeEngine:
    return subject.engine_half(llm)


def announced(subject: native.Native) -> list[dict]:
    handle = {
        "kind": "cuda_ipc", "shape": [1], "stride": [1], "storage_offset": 0, "dtype": "bfloat16", "device_index": 3,
        "memory_handle": b"m", "storage_bytes": 2, "storage_offset_bytes": 0, "ref_counter_handle": b"r",
        "ref_counter_offset": 0, "event_handle": b"e", "event_sync_required": True,
    }  # fmt: skip
    handles = {UUID: {entry["name"]: handle for entry in MANIFEST}}
    return [{"manifest": MANIFEST, **({"handles": handles} if subject.announces else {})}]


def told_handles(llm: Llm) -> list[dict]:
    """The handles that vLLM was told of, as its workers take them: by tensor and device. None for other backends."""
    json.dumps(llm.told["update_info"])  # what a server is told travels as JSON
    pickled = llm.told["update_info"].get("ipc_handles_pickled")
    return pickle.loads(base64.b64decode(pickled)) if pickled else []


# ---- the engine's half


@pytest.mark.parametrize("name", NATIVE)
def test_an_update_is_the_calls_that_a_release_has(release: tuple[int, int], name: str):
    subject, minor = NATIVE[name], release[1]
    llm = Llm(release, subject.backend)
    engine = half(subject, llm)
    engine.connect("127.0.0.1", 1234, 3, 5)
    assert engine.receive(announced(subject)) == MANIFEST
    for _ in range(2):
        engine.begin(MANIFEST)
        engine.transfer(MANIFEST)
        engine.end()
    round_of_calls = ["update_weights"] if minor < 21 else [*native.METHODS[1:]]
    assert llm.called == ["init_weight_transfer_engine", *round_of_calls * 2]
    told = llm.told["update_info"]
    assert (told["names"], told["dtype_names"], told["shapes"]) == (
        ["a.weight", "b.weight"], ["bfloat16", "float32"], [[3, 2], [4]]
    )  # fmt: skip
    if subject.backend != "ipc":
        meeting = {"master_address": "127.0.0.1", "master_port": 1234, "rank_offset": 3, "world_size": 5}
        assert meeting.items() <= llm.told["init_info"].items()


@pytest.mark.parametrize("name", DENSE)
def test_both_halves_say_alike_whether_tensors_are_packed(release: tuple[int, int], name: str):
    subject = NATIVE[name]
    llm = Llm(release, subject.backend)
    engine = half(subject, llm)
    engine.connect("127.0.0.1", 1234, 1, 2)
    engine.begin(MANIFEST)
    engine.transfer(MANIFEST)
    asked, other = ("init_info", "update_info") if release >= (0, 28) else ("update_info", "init_info")
    assert llm.told[asked]["packed"] is subject.packed
    assert "packed" not in llm.told[other]


@pytest.mark.parametrize("name", [*DENSE, "native-gloo", "native-ipc"])
def test_an_update_of_a_draft_model_goes_by_the_names_of_its_checkpoint(name: str):
    subject = NATIVE[name]
    llm = Llm((0, 33), subject.backend)
    updating, (announcement,) = half(subject, llm), announced(subject)
    manifest = [entry | {"name": f"{native.DRAFT}{entry['name']}"} for entry in MANIFEST]
    handles = announcement.get("handles", {})
    named = {uuid: {f"{native.DRAFT}{n}": handle for n, handle in of.items()} for uuid, of in handles.items()}
    updating.receive([announcement | {"manifest": manifest} | ({"handles": named} if handles else {})])
    updating.begin(manifest)
    updating.transfer(manifest)
    updating.end()
    assert llm.called == ["start_draft_weight_update", "update_weights", "finish_weight_update"]
    assert llm.told["update_info"]["names"] == [entry["name"] for entry in MANIFEST]
    assert all(of.keys() == {UUID.removeprefix("GPU-")} for of in told_handles(llm))


def test_a_sparse_update_counts_the_elements_of_every_patch():
    llm = Llm((0, 33), "sparse_nccl")
    engine = half(NATIVE["native-sparse"], llm)
    engine.transfer(MANIFEST)
    assert llm.told["update_info"]["num_updates_list"] == [6, 4]


def test_a_handle_has_the_form_of_its_release(release: tuple[int, int]):
    llm = Llm(release, "ipc")
    engine = half(NATIVE["native-ipc"], llm)
    engine.receive(announced(engine.subject))
    engine.transfer(MANIFEST)
    ((device, found),) = told_handles(llm)[1].items()
    assert device == UUID.removeprefix("GPU-"), "expected a device as torch spells it"
    function, arguments = found if release < (0, 22) else (torch.multiprocessing.reductions.rebuild_cuda_tensor, found)
    assert function is torch.multiprocessing.reductions.rebuild_cuda_tensor
    assert (arguments[0], arguments[6], arguments[7]) == (torch.Tensor, 3, b"m")


def test_a_tensor_without_a_handle_is_the_workers_to_refuse():
    llm = Llm((0, 33), "ipc")
    engine = half(NATIVE["native-ipc"], llm)
    engine.receive([{"manifest": MANIFEST, "handles": {}}])
    engine.transfer(MANIFEST)
    assert told_handles(llm) == [{}, {}]


def test_an_update_that_failed_leaves_the_way_free_for_the_next(release: tuple[int, int]):
    llm = Llm(release, "nccl", fails="update_weights")
    engine = half(NATIVE["native-nccl"], llm)
    engine.begin(MANIFEST)
    with pytest.raises(RuntimeError, match="ghost"):
        engine.transfer(MANIFEST)
    engine.abort()
    llm.fails = ""
    engine.begin(MANIFEST)
    engine.transfer(MANIFEST)
    engine.end()
    assert not llm.active


def test_an_update_that_was_called_off_is_finished_once():
    llm = Llm((0, 32), "nccl")
    engine = half(NATIVE["native-nccl"], llm)
    engine.begin(MANIFEST)
    with pytest.raises(RuntimeError, match="already active"):
        engine.begin(MANIFEST)
    engine.abort()
    engine.abort()
    assert llm.called == ["start_weight_update", "start_weight_update", "finish_weight_update"]
    assert not llm.active


# ---- the trainer's half


class Outgoing:
    """Tensors as a trainer's half gets them."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(TENSORS)

    def manifest(self) -> list[dict]:
        return MANIFEST


class Wire:
    """What left a trainer, and how it was made."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, torch.Tensor]] = []
        self.made: dict[str, Any] = {}
        self.client: Any = None


def fake_vllm(monkeypatch: pytest.MonkeyPatch, release: tuple[int, int]) -> Wire:
    """The trainer's side of a release of vLLM in place of the installed one."""
    wire = Wire()
    modules = static_vllm(wire) if release < (0, 28) else trainer_vllm(wire, release)
    for name, members in modules.items():
        fake_module(monkeypatch, f"vllm.distributed.weight_transfer.{name}", **members)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return wire


def static_vllm(wire: Wire) -> dict[str, dict[str, Any]]:
    class NCCLWeightTransferEngine:
        @staticmethod
        def trainer_init(init_info: dict) -> str:
            wire.made = dict(init_info)
            return "group"

        @staticmethod
        def trainer_send_weights(iterator: Iterator, trainer_args: dict) -> None:
            assert next(iter(trainer_args.values())) == "group"
            wire.made |= trainer_args
            wire.sent += [(name, tensor) for name, tensor in iterator]

    return {"nccl_engine": {"NCCLWeightTransferEngine": NCCLWeightTransferEngine}}


def trainer_vllm(wire: Wire, release: tuple[int, int]) -> dict[str, dict[str, Any]]:
    class WeightSource:
        def __init_subclass__(cls) -> None:
            cached = isinstance(cls.__dict__["metadata"], cached_property)
            if cached != (release >= (0, 33)):
                raise TypeError("metadata must be a functools.cached_property from 0.33, and a method before")

    class Engine:
        def __init__(self, client: Any, source: Any) -> None:
            self.client, self.source = client, source

        def send_weights(self, patches: list | None = None) -> None:
            if patches is not None:
                wire.sent += [(patch.name, patch) for patch in patches]
                self.client.update_weights({})
                return
            new = release >= (0, 33)
            meta = self.source.metadata if new else self.source.metadata()
            self.client.start_weight_update()
            found = [*(self.source.iter_full() if new else self.source)]
            assert [(m.name, m.dtype, m.shape) for m in meta] == [(n, t.dtype, tuple(t.shape)) for n, t in found]
            wire.sent += found
            self.client.update_weights({"names": [m.name for m in meta]})
            self.client.finish_weight_update()

    class WeightTransferTrainerFactory:
        @staticmethod
        def trainer_init(init_info: Any, *, client: Any, source: Any = None) -> Engine:
            wire.made, wire.client = vars(init_info), client
            client.init_weight_transfer_engine({})
            return Engine(client, source)

    meeting = [("master_address", str), ("master_port", int), ("world_size", int)]
    info = make_dataclass("NCCLTrainerInitInfo", [*meeting, ("packed", bool, True), ("rank", int, field(kw_only=True))])
    sparse = make_dataclass("SparseNCCLTrainerInitInfo", [*meeting, ("rank", int, field(kw_only=True))])
    patch = make_dataclass("SparseWeightPatch", ["name", "indices", "values", "full_shape"])
    return {
        "base": {"WeightSource": WeightSource, "ParamMeta": make_dataclass("ParamMeta", ["name", "dtype", "shape"])},
        "factory": {"WeightTransferTrainerFactory": WeightTransferTrainerFactory},
        "nccl_engine": {"NCCLTrainerInitInfo": info},
        "sparse_nccl_engine": {"SparseNCCLTrainerInitInfo": sparse, "SparseWeightPatch": patch},
    }


def trainer(subject: native.Native, monkeypatch: pytest.MonkeyPatch, release: tuple[int, int]) -> tuple[Any, Wire]:
    wire = fake_vllm(monkeypatch, release)
    made = subject.trainer_half(SimpleNamespace(device=torch.device("cpu")))
    made.invite("127.0.0.1", 1234, 5)
    return made, wire


@pytest.mark.parametrize("name", DENSE)
def test_vllms_own_sender_sends(release: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch):
    sender, wire = trainer(NATIVE[name], monkeypatch, release)
    meeting = {"master_address": "127.0.0.1", "master_port": 1234, "world_size": 5}
    assert meeting.items() <= wire.made.items()
    for count in (1, 2):
        assert sender.send(Outgoing(), lambda: None) == 6 * 2 + 4 * 4
        assert [sent for sent, _ in wire.sent] == ["a.weight", "b.weight"] * count
    assert wire.made["packed"] is NATIVE[name].packed
    assert all(tensor.is_contiguous() for _, tensor in wire.sent), "NCCL reads a tensor's memory as it lies"
    assert torch.equal(wire.sent[0][1], TENSORS[0][1])


@pytest.mark.parametrize("release", [(0, 28), (0, 33)], indirect=True, ids=str)
@pytest.mark.parametrize("name", [*DENSE, "native-sparse"])
def test_vllms_sender_waits_for_the_engines_and_raises_what_they_refuse(
    release: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
):
    sender, _ = trainer(NATIVE[name], monkeypatch, release)

    def refused() -> None:
        raise ConnectionError("an engine refuses")

    with pytest.raises(ConnectionError, match="an engine refuses"):
        sender.send(Outgoing(), refused)


def test_a_sparse_patch_has_every_element(monkeypatch: pytest.MonkeyPatch):
    sender, wire = trainer(NATIVE["native-sparse"], monkeypatch, (0, 33))
    assert sender.send(Outgoing(), lambda: None) == 6 * 2 + 4 * 4
    for (name, tensor), (_, patch) in zip(TENSORS, wire.sent, strict=True):
        assert (patch.name, patch.full_shape, patch.indices.dtype) == (name, tuple(tensor.shape), torch.int32)
        assert torch.equal(torch.zeros(tensor.numel(), dtype=tensor.dtype).scatter(0, patch.indices.long(),
                           patch.values).reshape(tensor.shape), tensor)  # fmt: skip


# ---- where each makes sense


def test_the_stages_of_every_backend():
    fit = {name: {stage.name for stage in STAGES if not subject.unfit(stage)} for name, subject in NATIVE.items()}
    cpu = {stage.name for stage in STAGES if stage.kind == "cpu"}
    colocated = {stage.name for stage in STAGES if stage.name.startswith("gpu-colocate")} | {"gpu-serve"}
    apart = {stage.name for stage in STAGES} - cpu - colocated
    assert fit == {
        "native-gloo": cpu,
        "native-ipc": colocated,
        "native-planned": cpu | apart,
        **dict.fromkeys((*DENSE, "native-sparse"), apart),
    }


@pytest.mark.parametrize(
    ("name", "stage", "first"),
    [("native-gloo", "cpu-tp1", 22), ("native-planned", "cpu-tp1", 25), ("native-sparse", "gpu-split", 29)],
)
def test_what_an_early_release_cannot_do_says_so(release: tuple[int, int], name: str, stage: str, first: int):
    (place,) = [known for known in STAGES if known.name == stage]
    reason = NATIVE[name].unfit(place)
    assert bool(reason) == (release[1] < first)
    assert reason == "" or f"0.{first}" in reason


def test_ipc_needs_ray_in_some_releases(release: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    (place,) = [known for known in STAGES if known.name == "gpu-colocate-tp1"]
    monkeypatch.setattr(native_ipc, "find_spec", lambda name: None)
    assert bool(NATIVE["native-ipc"].unfit(place)) == (22 <= release[1] <= 26)
    monkeypatch.setattr(native_ipc, "find_spec", lambda name: object())
    assert NATIVE["native-ipc"].unfit(place) == ""


def test_what_every_backend_lacks():
    assert native.lacks(Api((0, 20))).keys() - native.lacks(Api((0, 21))).keys() == {"errors.nested"}
    assert native.lacks(Api((0, 25))).keys() - native.lacks(Api((0, 26))).keys() == {"draft.updated"}
    assert native.lacks(Api((0, 33))).keys() == {"update.zeroed", "names.free", "draft.stale"}


@pytest.mark.parametrize("name", NATIVE)
def test_which_backends_update_draft_models(name: str):
    expected = "" if name in ("native-sparse", "native-planned") else native.DRAFT
    assert NATIVE[name].draft_prefix() == expected


def test_no_times_are_taken_where_the_transport_is_the_suites():
    gloo = NATIVE["native-gloo"]
    assert gloo.model_for("", "qwen3-1m") == ""
    assert NATIVE["native-nccl"].model_for("", "qwen3-1m") == "qwen3-1m"


def test_tied_layers_are_judged_where_they_are_what_is_judged():
    gloo = NATIVE["native-gloo"]
    found = [gloo.model_for(requirement, TIED) for requirement in ("update.exact", "errors.shape", "update.tied")]
    assert found == ["qwen3-untied-tiny", "qwen3-untied-tiny", TIED]
    assert gloo.model_for("update.moe", "qwen3-moe-tiny") == "qwen3-moe-tiny"


def test_what_is_waived_is_judged():
    found = waivers.read(ROOT / "suite" / "subjects" / "waivers" / "native.toml")
    assert found, "expected waivers"
    for waiver in found:
        assert waiver.requirement not in NATIVE[waiver.subject].lacks, f"{waiver}: it is declared, and never judged"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.20.2", (0, 20)), ("0.25.1", (0, 25)), ("0.32.0+cpu", (0, 32)), ("0.33.1.dev4", (0, 33)),
        ("0.40.0", (0, 33)), ("1.0", (0, 33)),
    ],
)  # fmt: skip
def test_a_version_is_taken_for_its_release(version: str, expected: tuple[int, int]):
    assert api_of(version).release == expected
