"""How changed elements travel: as positions and values, of many tensors in one buffer, cut into chunks of bounded size.

Both ends know how many elements of each tensor come, and cut by these counts alone. Elements of one size travel
together: their positions in the flat tensor, int32, and their values as integers, tensor after tensor in the order of
the manifest.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch

from extensions.elements import INTEGERS
from extensions.group import Communicator

CHUNK_ELEMENTS = 2**24  # moved together; with values of 2 bytes they take 96 MiB
POSITION_BYTES = 4
WHOLE = -1  # instead of a tensor's count: the whole tensor travels
EACH = -1  # instead of a tensor's unit: it belongs to none, and travels element by element

Buffers = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Chunk:
    """Elements of one size that are moved together.

    itemsize: their bytes. begin: how many of this size came before. parts: (tensor's number, how many of its elements).
    """

    itemsize: int
    begin: int
    parts: list[tuple[int, int]]

    @property
    def count(self) -> int:
        """How many elements there are."""
        return sum(count for _, count in self.parts)


def chunks_of(counts: Sequence[int], itemsizes: Sequence[int]) -> list[Chunk]:
    """The chunks of an update, by the count and the size of each tensor's elements. WHOLE tensors are left out."""
    found: list[Chunk] = []
    for itemsize in sorted({*itemsizes}):
        begin, room = 0, 0
        for number, (count, size) in enumerate(zip(counts, itemsizes, strict=True)):
            left = count if size == itemsize and count != WHOLE else 0
            while left:
                if not room:
                    found.append(Chunk(itemsize, begin, []))
                    room = CHUNK_ELEMENTS
                taken = min(left, room)
                found[-1].parts.append((number, taken))
                begin, room, left = begin + taken, room - taken, left - taken
    return found


def units_of(together: Iterable[Iterable[str]], names: Sequence[str]) -> list[int]:
    """The number of the first tensor in each one's unit; EACH for those that are in none. Units that meet are one."""
    number = {name: index for index, name in enumerate(names)}
    before, united = [*range(len(names))], set()

    def first(index: int) -> int:
        while before[index] != index:
            index = before[index]
        return index

    for unit in together:
        members = [number[name] for name in unit if name in number]
        united.update(members)
        for one, other in pairwise(members):
            least, most = sorted((first(one), first(other)))
            before[most] = least
    return [first(index) if index in united else EACH for index in range(len(names))]


def merged(units: Iterable[Sequence[int]], count: int) -> list[int]:
    """The units of several ranks together: tensors that are one unit on any rank are one on all."""
    names, together = [str(index) for index in range(count)], []
    for of_rank in units:
        together += [(str(index), str(unit)) for index, unit in enumerate(of_rank) if unit != EACH]
    return units_of(together, names)


def patch_bytes(count: int, itemsize: int) -> int:
    """The bytes in which this many changed elements travel."""
    return count * (POSITION_BYTES + itemsize)


def received(group: Communicator, chunks: Sequence[Chunk], device: torch.device) -> Iterator[tuple[Chunk, Buffers]]:
    """Each chunk with its positions and values, as rank 0 sends them.

    On a GPU one chunk is received while the one before is used. The caller queues that use before it asks for more.
    """
    lanes, ahead = _Lanes(device, chunks), None
    for number, chunk in enumerate(chunks):
        buffers = lanes.buffers(number, chunk)
        with lanes.receiving():
            group.broadcast_all(buffers, src=0)
        lanes.arriving(number)
        if ahead is not None:
            yield lanes.arrived(*ahead)
        ahead = (number, chunk, buffers)
    if ahead is not None:
        yield lanes.arrived(*ahead)


class _Lanes:
    """Two pairs of buffers that are used in turn, and on a GPU a stream to receive on."""

    def __init__(self, device: torch.device, chunks: Sequence[Chunk]) -> None:
        sizes = {chunk.itemsize: 0 for chunk in chunks}
        for chunk in chunks:
            sizes[chunk.itemsize] = max(sizes[chunk.itemsize], chunk.count)
        most, nbytes = max(sizes.values(), default=0), max((s * count for s, count in sizes.items()), default=0)
        lanes = range(min(2, len(chunks)))
        self._positions = [torch.empty(most, dtype=torch.int32, device=device) for _ in lanes]
        self._values = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in lanes]
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._here: dict[int, torch.cuda.Event] = {}  # by lane: when what it holds has arrived
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)

    def buffers(self, number: int, chunk: Chunk) -> Buffers:
        """Where a chunk is received."""
        lane = number % 2
        values = self._values[lane][: chunk.count * chunk.itemsize].view(INTEGERS[chunk.itemsize])
        return self._positions[lane][: chunk.count], values

    def receiving(self) -> AbstractContextManager:
        """Have a broadcast run beside what uses the other buffers, after all that has been queued so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def arriving(self, number: int) -> None:
        """The broadcast has been queued."""
        if self._stream is not None:
            self._here[number % 2] = self._stream.record_event()

    def arrived(self, number: int, chunk: Chunk, buffers: Buffers) -> tuple[Chunk, Buffers]:
        """Have what is queued from now on wait for a chunk."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._here[number % 2])
        return chunk, buffers
