"""Plain data over sockets: what goes in comes out, or is refused with the place of it."""

import math
import socket
import struct
import threading
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.processes import wire

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "__bytes__"), inner),
)


@given(PLAIN)
def test_plain_data_round_trips(obj):
    assert wire.decode(wire.encode(obj)) == obj


def test_tuples_arrive_as_lists_and_nan_as_nan():
    assert wire.decode(wire.encode((1, (2, math.inf)))) == [1, [2, math.inf]]
    assert math.isnan(wire.decode(wire.encode(math.nan)))


@pytest.mark.parametrize(
    ("obj", "where"),
    [
        ({"a": [0, object()]}, r"value\['a'\]\[1\], found builtins.object"),
        ({1, 2}, "value, found builtins.set"),
        ({"a": {1: "x"}}, r"value\['a'\], found 1"),
        ({"__bytes__": "eA=="}, "marks bytes"),
        (len, "value, found builtins.builtin_function"),
    ],
)
def test_other_data_is_refused_with_its_place(obj, where):
    with pytest.raises(TypeError, match=where):
        wire.encode(obj)


def test_a_large_message_survives_partial_reads():
    here, there = socket.socketpair()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = {"blob": bytes(range(256)) * 40_000, "numbers": list(range(10_000))}
    thread = threading.Thread(target=lambda: (wire.send(here, sent), wire.send(here, "next"), here.close()))
    with here, there:
        thread.start()
        assert wire.receive(there) == sent
        assert wire.receive(there) == "next"
        with pytest.raises(EOFError):
            wire.receive(there)
        thread.join(5)


def framed(payload: bytes, length: int | None = None) -> bytes:
    """A frame whose checksum is right, whatever is in it."""
    return struct.pack(">QI", len(payload) if length is None else length, zlib.crc32(payload)) + payload


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0", "expected 12 bytes, found 3: the other side went away"),
        (framed(b"abc", 5), "expected 5 bytes, found 3: the other side went away"),
        (framed(b"{x"), "expected JSON, found b'{x'"),
        (framed(b"\xff"), "expected JSON, found b'.xff'"),
        (framed(b"[" * 100_000), "expected JSON, .*recursion"),
        (framed(b"1" * 5000), "expected JSON, .*digits"),
        (framed(b'{"__bytes__":"!"}'), "expected JSON"),
        (framed(b'{"__bytes__":3}'), "expected base64 under __bytes__, found int"),
        (framed(b'{"a":1,"b":2,"a":1}'), "the key 'a' is there twice"),
        (struct.pack(">QI", 2, 7) + b"{}", "expected CRC-32 00000007, found a3a6bf43 of 2 bytes: damaged"),
        (b"\xff" * 16, "expected a frame of at most"),
    ],
)
def test_garbage_and_broken_frames_are_refused(data: bytes, said: str):
    here, there = socket.socketpair()
    with there:
        threading.Thread(target=lambda: (here.sendall(data), here.close())).start()
        with pytest.raises(wire.WireError, match=said):
            wire.receive(there)


def test_a_length_alone_takes_no_memory():
    here, there = socket.socketpair()
    with there:
        here.sendall(struct.pack(">QI", wire.MAX_FRAME_BYTES, 0) + b"abc")
        here.close()
        tracemalloc.start()
        with pytest.raises(wire.WireError, match="expected 2147483648 bytes, found 3"):
            wire.receive(there)
        assert tracemalloc.get_traced_memory()[1] < 4 * wire.READ_BYTES
        tracemalloc.stop()
