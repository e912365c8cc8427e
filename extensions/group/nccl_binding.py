"""The few functions of NCCL that a group needs.

The ranks join by a communicator whose calls return before they have ended. vLLM's own binding makes communicators that
block: where a rank is missing, nothing ends their making.
"""

import ctypes
import os
from collections.abc import Sequence

SUCCESS, IN_PROGRESS = 0, 7
INT8 = 0  # ncclInt8, which moves bytes
ID_BYTES = 128
BLOCKING_VARIABLE = "NCCL_COMM_BLOCKING"


class UniqueId(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class Config(ctypes.Structure):
    """ncclConfig_t as NCCL 2.14 had it. Later ones take it: they fill in what its version and size do not cover."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("magic", ctypes.c_uint), ("version", ctypes.c_uint), ("blocking", ctypes.c_int),
    )  # fmt: skip


def config(blocking: bool) -> Config:
    """What a communicator is made with, whether its calls block or not."""
    return Config(size=ctypes.sizeof(Config), magic=0xCAFEBEEF, version=21400, blocking=blocking)


SIGNATURES = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRankConfig": [
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, UniqueId, ctypes.c_int, ctypes.POINTER(Config)
    ],
    "ncclCommGetAsyncError": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)],
    "ncclBroadcast": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
    ],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclCommAbort": [ctypes.c_void_p],
}  # fmt: skip
SPLIT_SIGNATURE = [  # of ncclCommSplit, which NCCL has since 2.18
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(Config)
]  # fmt: skip
TEXTS = {"ncclGetErrorString": [ctypes.c_int], "ncclGetLastError": [ctypes.c_void_p]}


class NcclError(RuntimeError):
    """What NCCL says of a call that failed."""


class Library:
    """NCCL's functions. Failures of all of them raise NcclError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the functions of `library`, which is a handle of this class alone."""
        self._functions = library
        self.splits = hasattr(library, "ncclCommSplit")
        signatures = SIGNATURES | ({"ncclCommSplit": SPLIT_SIGNATURE} if self.splits else {})
        for name, arguments in signatures.items():
            getattr(library, name).argtypes, getattr(library, name).restype = arguments, ctypes.c_int
        for name, arguments in TEXTS.items():
            getattr(library, name).argtypes, getattr(library, name).restype = arguments, ctypes.c_char_p

    def unique_id(self) -> bytes:
        """Open a meeting place for the ranks of one communicator: what all of them need to find it."""
        made = UniqueId()
        self.settled("ncclGetUniqueId", self._functions.ncclGetUniqueId(made))
        return bytes(made)

    def call(self, name: str, *arguments: object) -> int:
        """Call a function, without the interpreter's lock, and return its ncclResult_t."""
        return getattr(self._functions, name)(*arguments)

    def settled(self, name: str, result: int) -> bool:
        """Whether a call has succeeded, by its result; False while it is in progress. Raises NcclError otherwise."""
        if result in (SUCCESS, IN_PROGRESS):
            return result == SUCCESS
        says = [self._functions.ncclGetErrorString(result), self._functions.ncclGetLastError(None)]
        raise NcclError("; ".join([f"{name} failed", *(text.decode(errors="replace") for text in says if text)]))


class Comm:
    """One rank's ncclComm_t: of the ranks that join, then what `split` makes of it.

    After a call that returns False, and after the constructor and `split`, `settled` is asked until it is True.
    """

    def __init__(self, library: Library, world_size: int, rank: int, unique_id: bytes) -> None:
        """Begin to join the other ranks, on the current CUDA device. Raises NcclError."""
        if os.environ.get(BLOCKING_VARIABLE) == "1":
            raise NcclError(f"with {BLOCKING_VARIABLE}=1 no deadline would end a call into NCCL; unset it")
        self._library, self._rank = library, rank
        self._joined, self._child = ctypes.c_void_p(), ctypes.c_void_p()
        self._current = self._joined
        name, place = "ncclCommInitRankConfig", UniqueId.from_buffer_copy(unique_id)
        try:
            made = library.call(name, ctypes.byref(self._joined), world_size, place, rank, config(blocking=False))
            library.settled(name, made)
        except NcclError:
            self.abort()
            raise

    def split(self) -> None:
        """Begin to make a second communicator of the same ranks, for the broadcasts, whose calls block.

        NCCL starts a thread for every call on one that does not block: 130 to 600 microseconds instead of 20. NCCL
        before 2.18 can't split: there the first one broadcasts. Raises NcclError.
        """
        # The first one is kept until the end, for 200 MiB of the device: where NCCL_COMM_SPLIT_SHARE_RESOURCES=1 is set
        # it has its flag of an abort in common with the child, which would end with it.
        if self._library.splits:
            arguments = (self._joined, 0, self._rank, ctypes.byref(self._child), config(blocking=True))
            self._library.settled("ncclCommSplit", self._library.call("ncclCommSplit", *arguments))

    def settled(self) -> bool:
        """Whether the call before has succeeded; False while it is in progress. Raises NcclError where it failed."""
        state = ctypes.c_int(IN_PROGRESS)
        name = "ncclCommGetAsyncError"
        self._library.settled(name, self._library.call(name, self._current, ctypes.byref(state)))
        settled = self._library.settled("the call before", state.value)
        if settled and self._child:
            self._current = self._child
        return settled

    def broadcast(self, pointer: int, nbytes: int, src: int, stream: int) -> bool:
        """Broadcast the memory at `pointer` in place, on a CUDA stream. Returns whether NCCL has taken it."""
        name = "ncclBroadcast"
        result = self._library.call(name, pointer, pointer, nbytes, INT8, src, self._current, stream)
        return self._library.settled(name, result)

    def broadcast_all(self, places: Sequence[tuple[int, int]], src: int, stream: int) -> bool:
        """As `broadcast`, of memory in several places, (pointer, bytes) each, which NCCL moves by one kernel."""
        self._library.settled("ncclGroupStart", self._library.call("ncclGroupStart"))
        try:
            taken = [self.broadcast(pointer, nbytes, src, stream) for pointer, nbytes in places]
        finally:
            ended = self._library.call("ncclGroupEnd")
        return self._library.settled("ncclGroupEnd", ended) and all(taken)

    def abort(self) -> None:
        """End every call, and what runs on the device, without the other ranks. Nothing may be called afterwards."""
        # The child first: giving back the other's memory would wait for the child's broadcasts on the device. But as
        # long as a split is under way, the abort of the first one ends it, and only then it is known what it made.
        split = self._current is self._child
        for comm in (self._child, self._joined) if split else (self._joined, self._child):
            if comm:
                self._library.call("ncclCommAbort", comm)
