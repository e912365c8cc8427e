"""Strangers at the rendezvous, and strangers in its place: refused in time, nothing executed, and ranks still meet."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from extensions.group import LINGER_S, GroupError
from extensions.group.nccl import identifier
from suite.processes.call import Process, RemoteError, gather
from suite.processes.local import free_port
from suite.selftest.ranks import started
from suite.selftest.strangers import Bait, hostile_bytes

DEADLINE_S, TIMEOUT_S, SLACK_S = 30.0, 1.0, 1.5
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    with started(tmp_path_factory.mktemp("hostile"), 2) as processes:
        yield processes


def visit(stack: contextlib.ExitStack, port: int, pickled: bytes) -> None:
    """Have every sort of stranger connect and stay."""
    for says in hostile_bytes(pickled).values():
        sock = stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=DEADLINE_S))
        with contextlib.suppress(ConnectionError):
            sock.sendall(says)


def await_listener(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return socket.create_connection((LOOPBACK, port), timeout=1).close()
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens at {port}")


def listening(process: Process) -> set[int]:
    found = psutil.Process(process.pid).net_connections(kind="tcp")
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}


def failure(process: Process, rank: int, port: int) -> RemoteError:
    started = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        process.call("join", rank, 2, port, TIMEOUT_S, deadline_s=DEADLINE_S)
    assert time.monotonic() - started < max(TIMEOUT_S, LINGER_S) + SLACK_S
    assert len(caught.value.message) < 2000
    return caught.value


def works(ranks: list[Process]) -> bool:
    return all(map(all, gather([rank.submit("broadcast", "float32") for rank in ranks], DEADLINE_S)))


def test_strangers_do_not_keep_the_ranks_apart(ranks: list[Process], bait: Bait):
    """They come before the ranks have met, and once they have: to every port that is open then."""
    port = free_port()
    first = ranks[0].submit("join", 0, 2, port, DEADLINE_S)
    await_listener(port)
    with contextlib.ExitStack() as stack:
        visit(stack, port, bait.pickled)
        gather([first, ranks[1].submit("join", 1, 2, port, DEADLINE_S)], DEADLINE_S)
        assert works(ranks)
        ports = listening(ranks[0]) | listening(ranks[1])
        assert port in ports
        for each in ports:
            visit(stack, each, bait.pickled)
        assert works(ranks)
    assert works(ranks)
    gather([rank.submit("close") for rank in ranks], DEADLINE_S)


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("what", ["garbage", "http answer", "pickle", "zeros", "huge length", "store and garbage"])
def test_a_worker_does_not_take_a_stranger_for_the_trainer(ranks: list[Process], bait: Bait, what: str, stays: bool):
    says = hostile_bytes(bait.pickled)[what]
    with socket.create_server((LOOPBACK, 0)) as server:
        thread = threading.Thread(target=answer_all, args=(server, says, stays), daemon=True)
        thread.start()
        error = failure(ranks[1], 1, server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)
    assert error.kind in ("GroupError", "TimeoutError")
    assert re.search(r"^rank 1 of 2 at 127\.0\.0\.1:\d+: ", error.message)


def answer_all(server: socket.socket, says: bytes, stays: bool) -> None:
    """Say the same to everyone who connects, until the server is shut down."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        while True:
            sock, _ = server.accept()
            if stays:
                stack.enter_context(sock)
            with contextlib.suppress(ConnectionError):
                sock.sendall(says)
            if not stays:
                sock.close()


@pytest.mark.parametrize("key", ["joined/1", "refused"])
@pytest.mark.parametrize("form", ["pickle", "no text", "much"])
def test_what_another_rank_says_is_text(ranks: list[Process], bait: Bait, key: str, form: str):
    """One that knows the store's protocol, and is no worker."""
    says = {"pickle": bait.pickled, "no text": b"\xff\xfe\0", "much": b"much " * 100_000}[form]
    port = free_port()
    thread = threading.Thread(target=put, args=(port, key, says))
    thread.start()
    error = failure(ranks[0], 0, port)
    thread.join(DEADLINE_S)
    assert error.kind == "GroupError"
    assert error.message.startswith(f"rank 0 of 2 at {LOOPBACK}:{port}: ")


def put(port: int, key: str, says: bytes) -> None:
    await_listener(port)
    torch.distributed.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False).set(key, says)


@pytest.mark.parametrize("form", ["pickle", "short", "long", "no digits"])
def test_nccls_identifier_is_only_bytes(bait: Bait, form: str):
    """vLLM would unpickle it."""
    assert identifier(bait.pickled.ljust(128, b"\xff")[:128].hex()) == bait.pickled.ljust(128, b"\xff")[:128]
    says = {"pickle": bait.pickled.decode("latin-1"), "short": "00" * 127, "long": "00" * 129, "no digits": "zz" * 128}
    with pytest.raises(GroupError, match=r"^NCCL's identifier is 128 bytes in hexadecimal digits, found "):
        identifier(says[form])
