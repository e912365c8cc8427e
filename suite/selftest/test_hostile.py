"""What comes from strangers to an engine: refused in time, nothing executed, and the trainer is served."""

import contextlib
import os
import pickle
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import reduce_tensor

from extensions.bracket import UpdateError
from extensions.devices import device_id
from extensions.handles import HandleError
from extensions.manifest import ManifestError, manifest_of
from extensions.segments import SharedSegment
from suite.actors import link
from suite.actors.dialogue import ANNOUNCE, BEGUN, CALL_OFF, ENDED, GO, READY, REFUSED, Cancelled
from suite.actors.engine import StaleCache, WorkerError
from suite.actors.link import GREETING, LinkError, Listener
from suite.processes.blame import SuiteFault
from suite.selftest.engined import Engined, ProbedWorker
from suite.selftest.fakes import CPU, fitted, tensors, untouched
from suite.selftest.properties import examples
from suite.selftest.strangers import Bait, data_as, hostile_bytes

DEADLINE_S, SHORT_S = 30.0, 0.3


# ---- the engine's socket


@contextlib.contextmanager
def stranger(path: str, says: bytes) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(path)
        sock.sendall(says)
        yield sock


def test_only_this_user_can_connect(listener: Listener, socket_path: str):
    assert os.stat(socket_path).st_mode & 0o177 == 0


@pytest.mark.parametrize("what", hostile_bytes(b""))
def test_a_stranger_does_not_keep_the_trainer_out(listener: Listener, socket_path: str, bait: Bait, what: str):
    with stranger(socket_path, hostile_bytes(bait.pickled)[what]) as sock:
        trainer = link.connect(socket_path, DEADLINE_S)
        started = time.monotonic()
        engine = listener.accept(DEADLINE_S)
        assert time.monotonic() - started < 1
        trainer.send({"number": 1}, DEADLINE_S)
        assert engine.receive(DEADLINE_S) == {"number": 1}
        if what != "silence":
            with contextlib.suppress(ConnectionResetError):  # as Unix sockets close where something was not read
                assert sock.recv(1) == b"", "expected to be sent away"
        trainer.close()
        engine.close()


def test_strangers_alone_are_no_trainer(listener: Listener, socket_path: str, bait: Bait):
    with contextlib.ExitStack() as stack:
        said = hostile_bytes(bait.pickled)
        for says in said.values():
            stack.enter_context(stranger(socket_path, says))
        stack.enter_context(stranger(socket_path, b"gone")).close()
        with pytest.raises(SuiteFault, match=rf"no trainer connected within 0\.3 s; {len(said)} that did not greet"):
            listener.accept(SHORT_S)


def test_a_crowd_that_says_nothing_keeps_nobody_waiting(listener: Listener, socket_path: str):
    with contextlib.ExitStack() as stack:
        for _ in range(3 * link.STRANGERS):
            stack.enter_context(stranger(socket_path, b""))
        with pytest.raises(SuiteFault, match=r"no trainer connected within 0\.3 s$"):
            listener.accept(SHORT_S)
        trainer = link.connect(socket_path, DEADLINE_S)
        engine = listener.accept(DEADLINE_S)
        engine.send({"number": 2}, DEADLINE_S)
        assert trainer.receive(DEADLINE_S) == {"number": 2}
        assert len(listener._waiting) <= link.STRANGERS
        trainer.close()
        engine.close()


# ---- one that knows how to greet


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ProbedWorker:
    return fitted(monkeypatch, ProbedWorker)


@pytest.fixture
def engine(worker: ProbedWorker, socket_path: str) -> Iterator[Engined]:
    engine = Engined(worker, socket_path)
    yield engine
    engine.close()


@pytest.fixture
def segment() -> Iterator[SharedSegment]:
    segment = SharedSegment(1 << 12)
    yield segment
    segment.unlink()


def announcement(segment: SharedSegment, value: float = 1) -> dict:
    named = list(tensors(value).items())
    return {"manifest": manifest_of(named), "handles": {device_id(CPU): segment.fill(named)}}


def serve(engine: Engined, socket_path: str, segment: SharedSegment, worker: ProbedWorker) -> None:
    """A whole update by the rightful trainer."""
    trainer = link.connect(socket_path, DEADLINE_S)
    engine.accept(1)
    trainer.send({BEGUN: True}, DEADLINE_S)
    trainer.send({ANNOUNCE: announcement(segment, 2)}, DEADLINE_S)
    trainer.send({GO: True}, DEADLINE_S)
    engine.update(DEADLINE_S)
    assert [trainer.receive(DEADLINE_S) for _ in range(2)] == [{READY: True}, {ENDED: True}]
    assert all(torch.all(held == 2) for held in worker.model.held.values())
    trainer.close()


@pytest.mark.parametrize("what", hostile_bytes(b""))
def test_what_follows_a_greeting_is_refused_in_time(
    engine: Engined, worker: ProbedWorker, socket_path: str, segment: SharedSegment, bait: Bait, what: str
):
    with stranger(socket_path, GREETING + hostile_bytes(bait.pickled)[what]):
        engine.accept(1)
        started = time.monotonic()
        with pytest.raises((LinkError, SuiteFault), match=r"the trainer (sent nothing|is gone|sent \[\])"):
            engine.update(SHORT_S)
        assert time.monotonic() - started < SHORT_S + 1
        assert worker.model.calls == []
        assert untouched(worker)
    serve(engine, socket_path, segment, worker)


def test_a_prefix_cache_that_keeps_the_old_weights_keys_is_no_success(
    engine: Engined, socket_path: str, segment: SharedSegment
):
    engine._llm.reset_prefix_cache = lambda: False
    trainer = link.connect(socket_path, DEADLINE_S)
    engine.accept(1)
    for message in ({BEGUN: True}, {ANNOUNCE: announcement(segment)}, {GO: True}):
        trainer.send(message, DEADLINE_S)
    with pytest.raises(StaleCache, match=r"expected reset_prefix_cache\(\) to answer True, found False"):
        engine.update(DEADLINE_S)
    assert [next(iter(trainer.receive(DEADLINE_S))) for _ in range(2)] == [READY, REFUSED]
    trainer.close()


@pytest.mark.parametrize(
    ("method", "args", "doing"),
    [
        ("probe_compare", ("/missing", [], ""), "read what another engine computes with"),
        ("probe_alike", ("/missing", ""), "read what another engine computes with"),
        ("probe_receive", (64,), "receive a roofline's broadcast"),
        ("probe_copy", (-1,), "copy for a roofline"),
    ],
)
def test_what_only_the_suite_could_not_do_in_a_worker_is_said(engine: Engined, method: str, args: tuple, doing: str):
    with pytest.raises(SuiteFault, match=f"{method}: rank 0: SuiteFault: could not {doing}"):
        engine.rpc(method, *args)


WRONG_MESSAGES = {
    "nothing": lambda good, data: {},
    "no handles": lambda good, data: {"manifest": good["manifest"]},
    "more": lambda good, data: good | {"run": data},
    "as manifest": lambda good, data: good | {"manifest": data},
    "as an entry": lambda good, data: good | {"manifest": [*good["manifest"], data]},
    "as handles": lambda good, data: good | {"handles": data},
    "as a device's handles": lambda good, data: good | {"handles": {device_id(CPU): data}},
    "as a handle": lambda good, data: good | {"handles": {device_id(CPU): {"a.weight": data}}},
    "under a name": lambda good, data: good | {"handles": {device_id(CPU): {str(data): {}}}},
    "for another device": lambda good, data: good | {"handles": {"GPU-1": good["handles"][device_id(CPU)]}},
}


@pytest.mark.parametrize("form", range(len(data_as(b""))))
@pytest.mark.parametrize("what", WRONG_MESSAGES)
def test_a_pickle_where_data_is_expected_is_refused_and_left_alone(
    engine: Engined, worker: ProbedWorker, socket_path: str, segment: SharedSegment, bait: Bait, what: str, form: int
):
    wrong = WRONG_MESSAGES[what](announcement(segment), data_as(bait.pickled)[form])
    hostile = link.connect(socket_path, DEADLINE_S)
    engine.accept(1)
    hostile.send({BEGUN: True}, DEADLINE_S)
    hostile.send({ANNOUNCE: wrong}, DEADLINE_S)
    hostile.send({GO: True}, DEADLINE_S)
    with pytest.raises((ValueError, WorkerError)) as caught:
        engine.update(DEADLINE_S)
    answers = [hostile.receive(DEADLINE_S)]
    if REFUSED not in answers[0]:
        answers.append(hostile.receive(DEADLINE_S))
    assert str(caught.value) in answers[-1][REFUSED], "expected the peer to be told"
    assert len(str(caught.value)) < 1500
    assert "load" not in worker.model.calls
    assert untouched(worker)
    hostile.close()
    serve(engine, socket_path, segment, worker)


@pytest.mark.parametrize(
    "decision",
    [
        {CALL_OFF: True},
        {GO: False},
        {GO: "yes"},
        {GO: 2},
        {GO: [0]},
        {},
        {GO: True, "more": 1},
        {ENDED: True},
        {ANNOUNCE: {}},
        {GO: True, CALL_OFF: True},
    ],
)
def test_anything_but_go_calls_the_update_off(
    engine: Engined, worker: ProbedWorker, socket_path: str, segment: SharedSegment, decision: dict
):
    hostile = link.connect(socket_path, DEADLINE_S)
    engine.accept(1)
    hostile.send({BEGUN: True}, DEADLINE_S)
    hostile.send({ANNOUNCE: announcement(segment)}, DEADLINE_S)
    hostile.send(decision, DEADLINE_S)
    with pytest.raises(Cancelled if decision == {CALL_OFF: True} else LinkError):
        engine.update(DEADLINE_S)
    assert untouched(worker)
    hostile.close()
    serve(engine, socket_path, segment, worker)


# ---- anywhere in an update


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """Where something can be put into plain data."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def with_put(value: object, at: tuple, put: object) -> object:
    if not at:
        return put
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = with_put(value[at[0]], at[1:], put)
    return copied


@given(st.data())
@examples(3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pickle_or_a_callable_anywhere_is_refused_and_left_alone(
    worker: ProbedWorker, segment: SharedSegment, bait: Bait, data: st.DataObject
):
    """In the worker, where an engine that unpickles would hand them over."""
    good = announcement(segment)
    at = data.draw(st.sampled_from([at for at in places(good) if at]))
    puts = [*data_as(bait.pickled), (pickle.loads, (bait.pickled,)), (os.mkdir, (str(bait.path),)), bait, os.mkdir]
    puts += [(torch.load, (bait.pickled,)), (eval, ("__import__('os')",)), (reduce_tensor(torch.ones(1))[0], (bait,))]
    wrong = with_put(good, at, data.draw(st.sampled_from(puts)))
    with pytest.raises((ManifestError, HandleError, UpdateError)):
        update(worker, wrong)
    assert not bait.taken
    worker.abort_update()
    assert untouched(worker)
    assert "load" not in worker.model.calls


def update(worker: ProbedWorker, announced: dict) -> None:
    worker.begin_update(announced["manifest"])
    worker.update_weights_from_ipc_handles(announced["handles"])
    worker.end_update()


def test_a_pickle_in_shared_memory_is_only_bytes(worker: ProbedWorker, segment: SharedSegment, bait: Bait):
    good = announcement(segment)
    segment._bytes[: len(bait.pickled)] = torch.frombuffer(bytearray(bait.pickled), dtype=torch.uint8)
    update(worker, good)
    found = worker.model.held["a.weight"].contiguous().view(torch.uint8).flatten()
    assert bytes(found.tolist()) == bait.pickled[: found.numel()]


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("a.weight", "float32", [2**62]), ("a.weight", "float32", [2**40, 2**40]), ("a.weight", "float32", [-1]),
        ("a.weight", "float32", "23"), ("a.weight", "float32", None), ("a.weight", "float32", [2.0, 3]),
        ("a.weight", "nonsense", [2, 3]), ("a.weight", None, [2, 3]), ("a.weight", "float32", [1] * 65),
    ],
)  # fmt: skip
def test_a_tensor_of_no_size_is_refused_before_memory_is_taken(
    worker: ProbedWorker, name: str, dtype: str, shape: list
):
    worker._weight_sync_group = SimpleNamespace(broadcast=lambda *_, **__: pytest.fail("received"))
    with pytest.raises((ValueError, TypeError), match=r"shape is a list of sizes|names no torch dtype|a dtype is"):
        worker.update_weight(name, dtype, shape)
    assert untouched(worker)


@pytest.mark.parametrize("name", ["a\nb", "a\0", "\x1b[2J", "", None, 3, b"a.weight", "a" * 1001])
def test_a_tensor_under_no_name_is_received_and_refused(worker: ProbedWorker, name: object):
    received = []
    worker._weight_sync_group = SimpleNamespace(
        broadcast=lambda tensor, src: received.append(tensor), wait=lambda: None
    )
    with pytest.raises(ManifestError, match=r"^a name is printable text, found ") as caught:
        worker.update_weight(name, "float32", [2, 3])
    assert str(caught.value).isprintable()
    assert len(received) == 1, "expected the trainer not to be left waiting"
    assert untouched(worker)
