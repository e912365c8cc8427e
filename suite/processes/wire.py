"""Plain data between pytest and the processes it starts: JSON in length-prefixed frames, never pickle.

A frame is the payload's length (8 bytes, big endian), its CRC-32 (4 bytes) and the payload (UTF-8 JSON). Strings,
numbers (NaN and the infinities too), booleans, None, lists and dicts with string keys pass as they are; tuples arrive
as lists; bytes travel as ``{"__bytes__": base64}``. Anything else is refused where it is sent, with the place it was
found at.
"""

import base64
import json
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

MAX_FRAME_BYTES = 1 << 31
COPIED_BYTES = 1 << 16
READ_BYTES = 1 << 20  # memory is taken as data arrives: a length is only what the other side says
_HEADER = struct.Struct(">QI")
_BYTES = "__bytes__"


class WireError(Exception):
    """What arrived is no frame of ours: garbage on the socket, a damaged frame, or one that broke off."""


def encode(obj: Any) -> bytes:
    """Return obj as JSON bytes. Raises TypeError naming the place of the first value that is no plain data."""
    return json.dumps(_plain(obj, "value"), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """The inverse of encode (tuples come back as lists). Raises WireError for what encode did not make."""
    try:
        return json.loads(data, object_pairs_hook=_restore)
    except (ValueError, RecursionError) as error:
        raise WireError(f"expected JSON, found {data[:80]!r} ({len(data)} bytes): {error}") from error


def send(sock: socket.socket, obj: Any) -> None:
    """Send obj as one frame. Raises TypeError for data that is not plain, OSError for a broken socket."""
    send_encoded(sock, encode(obj))


def send_encoded(sock: socket.socket, payload: bytes) -> None:
    """Send what encode() returned as one frame."""
    header = _HEADER.pack(len(payload), zlib.crc32(payload))
    if len(payload) <= COPIED_BYTES:  # at once: each call of the kernel, and of the receiver's, takes its time
        sock.sendall(header + payload)
        return
    sock.sendall(header)
    sock.sendall(payload)


def receive(sock: socket.socket, wait: Callable[[], None] = lambda: None) -> Any:
    """Return the next object. Raises EOFError when the other side is gone, WireError for a frame that is not whole.

    `wait` is called before each read of the socket and may raise to give up.
    """
    length, checksum = _HEADER.unpack(_read(sock, _HEADER.size, wait, at_boundary=True))
    if length > MAX_FRAME_BYTES:
        raise WireError(f"expected a frame of at most {MAX_FRAME_BYTES} bytes, found one of {length}")
    payload = _read(sock, length, wait, at_boundary=False)
    if zlib.crc32(payload) != checksum:
        raise WireError(f"expected CRC-32 {checksum:08x}, found {zlib.crc32(payload):08x} of {length} bytes: damaged")
    return decode(payload)


def _read(sock: socket.socket, count: int, wait: Callable[[], None], at_boundary: bool) -> bytes:
    data = bytearray()
    while len(data) < count:
        wait()
        received = sock.recv(min(count - len(data), READ_BYTES))
        if not received and at_boundary and not data:
            raise EOFError("the other side is gone")
        if not received:
            raise WireError(f"expected {count} bytes, found {len(data)}: the other side went away within a frame")
        data += received
    return bytes(data)


def _plain(obj: Any, where: str) -> Any:
    if obj is None or type(obj) in (str, int, float, bool):
        return obj
    if isinstance(obj, (bytes, bytearray, memoryview)):
        return {_BYTES: base64.b64encode(obj).decode()}
    if isinstance(obj, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(obj)]
    if isinstance(obj, dict):
        return {_key(key, where): _plain(value, f"{where}[{key!r}]") for key, value in obj.items()}
    if isinstance(obj, (str, int, float)):  # enums and other subclasses arrive as what they stand for
        return obj
    raise TypeError(f"expected plain data at {where}, found {type(obj).__module__}.{type(obj).__qualname__}")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"expected string keys in the dict at {where}, found {key!r}")
    if key == _BYTES:
        raise TypeError(f"expected no key {_BYTES!r} in the dict at {where}: it marks bytes on the wire")
    return key


def _restore(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} is there twice")
    if found.keys() != {_BYTES}:
        return found
    if not isinstance(found[_BYTES], str):
        raise ValueError(f"expected base64 under {_BYTES}, found {type(found[_BYTES]).__name__}")
    return base64.b64decode(found[_BYTES], validate=True)
