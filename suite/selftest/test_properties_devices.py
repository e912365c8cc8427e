"""A handle is opened on the device that its memory lies on, whatever either process sees, or it is refused.

Judged by CUDA's rules as cuda_rules states them. What is faked is CUDA: which devices a process has, and what is behind
an imported handle. The sender, the ids, the extension and the opening of handles are the real ones.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, assume, given
from hypothesis import strategies as st
from torch.multiprocessing import reductions

from extensions import colocate, devices
from extensions.colocate import HandleSender
from extensions.devices import device_id
from extensions.handles import CUDA_FIELDS, HandleError
from extensions.manifest import ManifestError
from suite.processes import wire
from suite.selftest.cuda_rules import Gpu, Physical, enumerated, listing, physical_devices
from suite.selftest.fakes import Worker, begin, fitted, tensors, untouched
from suite.selftest.properties import examples
from suite.stages import available_stages
from suite.stages.hardware import Machine, parse_listing, visible_devices

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICE_INDEX = CUDA_FIELDS.index("device_index") + 1
MEMORY_HANDLE = CUDA_FIELDS.index("memory_handle") + 1


# ---- machines, and what may be said about them


@st.composite
def machines(draw: st.DrawFn) -> list[Gpu]:
    """One to four GPUs, some in slices; their UUIDs begin alike, so that abbreviations may be ambiguous."""
    numbers = itertools.count()

    def uuid() -> str:
        begin = draw(st.text("ab", min_size=4, max_size=4))
        return f"{begin}0000-0000-0000-0000-{next(numbers):012}"

    of_each = st.just(0) if draw(st.booleans()) else st.sampled_from([0, 0, 1, 2, 3])
    cuts = draw(st.lists(of_each, min_size=1, max_size=4))
    return [Gpu(uuid(), tuple(uuid() for _ in range(cut))) for cut in cuts]


@st.composite
def identifiers(draw: st.DrawFn, machine: list[Gpu]) -> str:
    """One entry of CUDA_VISIBLE_DEVICES, right or wrong."""
    name = draw(
        st.sampled_from([*(f"GPU-{gpu.uuid}" for gpu in machine), *(d.name for d in physical_devices(machine))])
    )
    index = draw(st.integers(-1, len(machine)))
    spelling = draw(
        st.sampled_from(["{i}"] * 4 + ["{n}"] * 4 + ["{a}"] * 4 + ["+{i}", "0{i}", "{i}x", "", "none", "GPU-"])
    )
    text = spelling.format(i=index, n=name, a=name[: draw(st.integers(4, 10))])
    return draw(st.sampled_from(["", "", "", " ", "\t"])) + text + draw(st.sampled_from(["", "", "", " "]))


def visibilities(machine: list[Gpu]) -> st.SearchStrategy[str | None]:
    """Values of CUDA_VISIBLE_DEVICES; None for unset."""
    several = st.lists(identifiers(machine), max_size=5).map(",".join)
    of_all = st.permutations([*map(str, range(len(machine)))]).map(",".join)
    by_uuid = st.permutations([device.name for device in physical_devices(machine)]).map(",".join)
    return st.none() | several | of_all | by_uuid


@given(st.data())
@examples(5)
def test_what_the_suite_takes_for_visible_is_what_cuda_shows(data: st.DataObject):
    machine = data.draw(machines())
    value = data.draw(visibilities(machine))
    found = [device.uuid for device in visible_devices(value, parse_listing(listing(machine)))]
    shown = [device.name for device in enumerated(value, machine)]
    if any(device.is_slice for device in physical_devices(machine)):
        # One process enumerates one slice; the suite lists what it may give to one process each.
        assert bool(found) == bool(shown)
        assert [name for name in found if name in shown] == shown
    else:
        assert found == shown
    for name in found:
        assert [device.name for device in enumerated(name, machine)] == [name]


@given(st.data())
def test_a_stage_names_its_devices_so_that_cuda_shows_just_them(data: st.DataObject):
    machine = data.draw(machines())
    listed = parse_listing(listing(machine))
    usable = visible_devices(data.draw(visibilities(machine)), listed)
    for stage in available_stages(Machine(tuple(usable), cpu_cores=2)):
        if stage.kind == "cpu":
            continue
        assert set(stage.engine_devices + stage.trainer_devices) <= {device.uuid for device in usable}
        for engine in range(stage.engines):
            shown = enumerated(stage.visible_to_engine(engine), machine)
            assert tuple(device.name for device in shown) == stage.devices_of_engine(engine)
        for called, name in zip(stage.trainer_visible, stage.trainer_devices, strict=True):
            assert [device.name for device in enumerated(called, machine)] == [name]


# ---- two processes


class Process:
    """CUDA as one process sees it: `own` is the ordinal of the device that it computes on.

    parents: whether CUDA gives a slice the UUID of its GPU, as cuDeviceGetUuid did before it had a second version.
    """

    def __init__(self, visible: str | None, machine: list[Gpu], own: int, parents: bool) -> None:
        self.visible, self.machine, self.own, self.parents = visible, machine, own, parents
        self.shown = enumerated(visible, machine)

    @property
    def physical(self) -> Physical:
        return self.shown[self.own]

    @property
    def names_slice(self) -> bool:
        """Whether the environment names a slice by its UUID."""
        return (self.visible or "").strip().startswith("MIG-")

    @contextlib.contextmanager
    def entered(self) -> Iterator[pytest.MonkeyPatch]:
        """As if this code ran in that process."""
        with pytest.MonkeyPatch.context() as patch:
            if self.visible is None:
                patch.delenv(VISIBLE, raising=False)
            else:
                patch.setenv(VISIBLE, self.visible)
            patch.setattr(torch.cuda, "get_device_properties", self._properties)
            patch.setattr(torch.cuda, "current_device", lambda: self.own)
            patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
            yield patch

    def _properties(self, index: int) -> SimpleNamespace:
        if not 0 <= index < len(self.shown):
            raise AssertionError("Invalid device id")
        device = self.shown[index]
        of_gpu = device.is_slice and self.parents
        return SimpleNamespace(uuid=self.machine[device.gpu].uuid if of_gpu else device.uuid)


class Memory:
    """What lies on devices, by the handles to it; notes on which device each handle was opened."""

    def __init__(self) -> None:
        self._exported: dict[bytes, tuple[Physical, torch.Tensor]] = {}
        self.opened: list[tuple[Physical, Physical]] = []  # (where the memory lies, where it was opened)

    def export(self, tensor: torch.Tensor, process: Process) -> tuple[None, tuple]:
        """torch's reduce_tensor, in the process that owns the tensor; the receiver's function is not known here."""
        handle = f"memory {len(self._exported)}".encode().ljust(64)
        self._exported[handle] = (process.physical, tensor)
        fields = {
            "shape": tuple(tensor.shape), "stride": tensor.stride(), "storage_offset": 0,
            "storage_class": torch.UntypedStorage, "dtype": tensor.dtype, "device_index": process.own,
            "memory_handle": handle, "storage_bytes": tensor.numel() * tensor.element_size(),
            "storage_offset_bytes": 0, "requires_grad": False, "ref_counter_handle": b"/torch_1_2_3",
            "ref_counter_offset": 0, "event_handle": bytes(64), "event_sync_required": True,
        }  # fmt: skip
        assert tuple(fields) == CUDA_FIELDS
        return None, (torch.Tensor, *fields.values())

    def open(self, arguments: tuple, process: Process) -> torch.Tensor:
        """torch's rebuild_cuda_tensor, in the process that opens the handle."""
        index = arguments[DEVICE_INDEX]
        if not 0 <= index < len(process.shown):
            raise RuntimeError("CUDA error: invalid device ordinal")
        lies, tensor = self._exported[arguments[MEMORY_HANDLE]]
        self.opened.append((lies, process.shown[index]))
        return tensor if lies == process.shown[index] else torch.full_like(tensor, torch.nan)


def sent(memory: Memory, trainer: Process, form: str) -> dict:
    """The handles of a trainer's tensors, as the engine gets them."""
    with trainer.entered() as patch:
        patch.setattr(reductions, "reduce_tensor", lambda tensor: memory.export(tensor, trainer))
        device = torch.device("cuda", trainer.own)
        if form == "plain":
            return wire.decode(wire.encode(HandleSender(device).handles(tensors(3).items())))
        pairs = {name: memory.export(tensor, trainer) for name, tensor in tensors(3).items()}
        return {device_id(device): pairs}


def updated(memory: Memory, handles: dict, engine: Process, explicit: bool) -> Worker:
    """A worker that took these handles; ManifestError where it refused them and left all as it was."""
    with engine.entered() as patch:
        opening = lambda *arguments: memory.open(arguments, engine)  # noqa: E731
        patch.setattr(reductions, "rebuild_cuda_tensor", opening)
        arrived = {
            device: {
                name: (opening, handle[1]) if isinstance(handle, tuple) else handle for name, handle in named.items()
            }
            for device, named in handles.items()
        }
        worker = fitted(patch)
        worker.device = torch.device("cuda", engine.own) if explicit else torch.device("cuda")
        begin(worker)
        try:
            worker.update_weights_from_ipc_handles(arrived)
        except ManifestError:
            worker.abort_update()
            assert memory.opened == [], "expected nothing to be opened where the handles are refused"
            assert untouched(worker)
            raise
        worker.end_update()
        return worker


class OpenedElsewhere(AssertionError):
    """A handle was opened on another device than its memory lies on: weights are silently wrong."""


class RefusedWithoutNeed(AssertionError):
    """Trainer and engine are on one device and the engine says that they aren't."""


def judge(trainer: Process, engine: Process, form: str, explicit: bool) -> None:
    """The requirement: the same physical device, or a refusal that leaves all as it was; and no needless refusal."""
    memory = Memory()
    handles = sent(memory, trainer, form)
    try:
        worker = updated(memory, handles, engine, explicit)
    except ManifestError as refusal:
        said = str(refusal)
    else:
        for lies, opened in memory.opened:
            if not lies == opened == trainer.physical == engine.physical:
                raise OpenedElsewhere(f"it lies on {lies}, was opened on {opened}")
        assert len(memory.opened) == len(tensors())
        assert all(torch.all(held == 3) for held in worker.model.held.values())
        return
    assert said.startswith("expected handles for device ")
    # A slice's id says that it is one only where CUDA_VISIBLE_DEVICES does, and may be an abbreviation there.
    by_name = trainer.names_slice and engine.names_slice and not trainer.parents
    if trainer.physical == engine.physical and (by_name or not trainer.physical.is_slice):
        raise RefusedWithoutNeed(said)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Process, Process]:
    """A trainer and an engine on one machine, each with a device to compute on: half of them the same, if they can."""
    machine, parents = draw(machines()), draw(st.booleans())
    values = [draw(visibilities(machine)) for _ in range(2)]
    trainers, engines = (enumerated(value, machine) for value in values)
    assume(trainers and engines)
    common = [device for device in trainers if device in engines]
    alike = common and draw(st.booleans())
    own = draw(st.sampled_from(common if alike else trainers))
    other = own if alike else draw(st.sampled_from(engines))
    places = (trainers.index(own), engines.index(other))
    first, second = (Process(value, machine, place, parents) for value, place in zip(values, places, strict=True))
    return first, second


forms = st.sampled_from(["plain", "pair"])


@given(pairs(), forms, st.booleans())
@examples(5)
def test_a_handle_is_opened_where_its_memory_lies_or_refused(both: tuple[Process, Process], form: str, explicit: bool):
    judge(*both, form, explicit)


@given(pairs(), st.data())
def test_only_the_whole_id_of_the_own_device_will_do(both: tuple[Process, Process], data: st.DataObject):
    """Not its ordinal, its UUID without the prefix or cut short, nor another spelling."""
    trainer, engine = both
    memory = Memory()
    (handles,) = sent(memory, trainer, "plain").values()
    with engine.entered():
        own = device_id(torch.device("cuda", engine.own))
    wrong = [
        own[4:],
        own[:8],
        own[:-1],
        own.upper(),
        f" {own}",
        str(engine.own),
        f"cuda:{engine.own}",
        "",
        "GPU-",
        own + "0",
    ]
    with pytest.raises(ManifestError, match="expected handles for device"):
        updated(memory, {data.draw(st.sampled_from(wrong)): handles}, engine, explicit=True)


@given(machines(), st.booleans(), st.data())
def test_two_devices_never_have_one_id(machine: list[Gpu], parents: bool, data: st.DataObject):
    """Whoever sees them. Where CUDA gives slices their GPU's UUID, those that were named by MIG-... are told apart."""
    ids: dict[str, set[Physical]] = {}
    for device in physical_devices(machine):
        visible = data.draw(st.sampled_from([device.name, str(device.gpu)]))
        for own, physical in enumerate(enumerated(visible, machine)):
            process = Process(visible, machine, own, parents)
            with process.entered():
                ids.setdefault(device_id(torch.device("cuda", own)), set()).add(physical)
    assert all(len(found) == 1 for found in ids.values())


# ---- the property finds what it is there for


def by_the_senders_ordinal(patch: pytest.MonkeyPatch) -> None:
    """A device goes by its ordinal in the process that has it."""
    named = lambda device: f"GPU-{torch.cuda.current_device() if device.index is None else device.index}"  # noqa: E731
    patch.setattr(colocate, "device_id", named)
    patch.setattr(devices, "device_id", named)
    patch.setattr(f"{__name__}.device_id", named)


def without_the_remap(patch: pytest.MonkeyPatch) -> None:
    """The pair is called as it came."""
    original = colocate.open_handle
    called = lambda handle, device: handle[0](*handle[1]) if isinstance(handle, tuple) else original(handle, device)  # noqa: E731
    patch.setattr(colocate, "open_handle", called)


def by_the_first_device(patch: pytest.MonkeyPatch) -> None:
    """Handles are opened on the process's device 0."""
    original = colocate.open_handle
    patch.setattr(colocate, "open_handle", lambda handle, device: original(handle, torch.device("cuda", 0)))


def by_abbreviated_ids(patch: pytest.MonkeyPatch) -> None:
    """Ids are compared by their first characters."""
    original = Worker.update_weights_from_ipc_handles

    def abbreviated(worker: Worker, ipc_handles: dict) -> int:
        own = worker.report_device_id()
        return original(worker, {own if key[:8] == own[:8] else key: named for key, named in ipc_handles.items()})

    patch.setattr(Worker, "update_weights_from_ipc_handles", abbreviated)


def by_the_gpus_uuid(patch: pytest.MonkeyPatch) -> None:
    """What CUDA gives is believed, also where all slices of a GPU have its UUID."""

    def named(device: torch.device) -> str:
        index = torch.cuda.current_device() if device.index is None else device.index
        return f"GPU-{torch.cuda.get_device_properties(index).uuid}"

    patch.setattr(colocate, "device_id", named)
    patch.setattr(f"{__name__}.device_id", named)


def by_nothing(patch: pytest.MonkeyPatch) -> None:
    """All handles are refused."""
    patch.setattr(Worker, "report_device_id", lambda _: "GPU-own")


@pytest.mark.parametrize(
    ("break_it", "found"),
    [
        (by_the_senders_ordinal, OpenedElsewhere), (without_the_remap, OpenedElsewhere),
        (by_the_first_device, OpenedElsewhere), (by_abbreviated_ids, OpenedElsewhere),
        (by_the_gpus_uuid, OpenedElsewhere), (by_nothing, RefusedWithoutNeed),
    ],
)  # fmt: skip
def test_the_property_finds(break_it: Callable, found: type[AssertionError], monkeypatch: pytest.MonkeyPatch):
    @given(pairs(), forms, st.booleans())
    @examples(5, phases=[Phase.generate], report_multiple_bugs=False)
    def broken(both: tuple[Process, Process], form: str, explicit: bool) -> None:
        try:
            judge(*both, form, explicit)
        except (AssertionError, RuntimeError, HandleError) as error:
            if isinstance(error, found):
                raise

    break_it(monkeypatch)
    with pytest.raises(found):
        broken()
