"""What a peer that is not the rightful one may say, and a pickle that shows whether anything unpickles it."""

import base64
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from suite.actors.link import GREETING
from suite.processes import wire

STORE_GREETING = b"\0" + struct.pack("<I", 0x3C85F7CE)  # the first thing that a client says to torch's TCPStore


class Bait:
    """Creates a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path, self.pickled = path, b""
        self.pickled = pickle.dumps(self)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.path),)

    @property
    def taken(self) -> bool:
        """Whether it has been unpickled."""
        return self.path.exists()


def framed(payload: bytes) -> bytes:
    """A frame of suite.processes.wire."""
    return struct.pack(">QI", len(payload), zlib.crc32(payload)) + payload


def hostile_bytes(pickled: bytes) -> dict[str, bytes]:
    """What a stranger may say on a socket, by a name for it."""
    return {
        "silence": b"", "garbage": random.Random(1).randbytes(3000), "http": b"GET / HTTP/1.1\r\nHost: trainer\r\n\r\n",
        "http answer": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "pickle": pickled, "zeros": bytes(64),
        "huge length": struct.pack(">QI", 2**62, 0), "largest length": struct.pack(">QI", wire.MAX_FRAME_BYTES, 0),
        "half a greeting": GREETING[:5], "a frame": framed(b"{}"), "store": STORE_GREETING,
        "store and garbage": STORE_GREETING + b"\xff" * 400,
        "store and a huge length": STORE_GREETING + b"\x01" + struct.pack("<Q", 2**62) * 3,
    }  # fmt: skip


def data_as(pickled: bytes) -> list:
    """A pickle as it may come along in plain data."""
    text = base64.b64encode(pickled).decode()
    return [pickled, text, [pickled], {"py/reduce": [{"py/function": "os.mkdir"}, text]}, pickled.decode("latin-1")]
