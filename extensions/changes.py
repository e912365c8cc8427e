"""What a sender has sent last, and where the next update differs from it, bit by bit."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from extensions.elements import INTEGERS, Elements, Found, Pair, integers
from extensions.manifest import Announced
from extensions.patches import EACH, WHOLE, Chunk, patch_bytes
from extensions.tensors import flat_bytes

RUN_BYTES = {"cuda": 2**31, "cpu": 2**26}  # of tensors that are compared together
MOST_OF_A_RUN = 0.9  # of its bytes: where all changes, that is seen before much of it has been collected
SPARSE_SHARE = 0.45  # of an update's bytes: where more differs it is sent whole. 15 % of elements of 2 bytes


@dataclass
class Changes:
    """What differs from the update before.

    counts: of each tensor, how many elements; WHOLE where all of it is sent. found: by the size of elements, their
    positions and values, those of one tensor after those of another.
    """

    counts: list[int]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """How many elements are sent one by one."""
        return sum(count for count in self.counts if count != WHOLE)

    def part(self, chunk: Chunk) -> list[torch.Tensor]:
        """Positions and values of a chunk."""
        return [column[chunk.begin : chunk.begin + chunk.count] for column in self.found[chunk.itemsize]]


class TooMany(Exception):
    """So many elements differ that a whole update is faster."""


class Sent:
    """A copy of every tensor as it was sent last, on the device that sends."""

    def __init__(self, announced: Announced, device: torch.device, elements: Elements) -> None:
        self.announced, self._device, self._elements = announced, device, elements
        self.tensors = {name: torch.empty(shape, dtype=d, device=device) for name, (d, shape) in announced.items()}
        self.flat = {name: _flat(tensor) for name, tensor in self.tensors.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, named: Iterable[tuple[str, torch.Tensor]], units: list[int] | None) -> Changes | None:
        """Take these tensors as what is sent next: all of them, in their order. The caller may change them afterwards.

        units: as in `Places`; None where nothing was sent before. Returns what differs, or None where the update has to
        be whole or is faster as a whole.
        """
        tensors = iter(named)
        if units is None:
            self._copy(tensors)
            return None
        comparing = _Comparing(self, self._elements, units)
        try:
            for name, tensor in tensors:
                comparing.add(name, tensor)
            return comparing.changes()
        except TooMany:
            comparing.copy_rest()
            self._copy(tensors)
            return None

    def _copy(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            self.tensors[name].copy_(tensor)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as integers of the size of its elements, or as bytes where they are larger."""
    return integers(tensor) if tensor.element_size() in INTEGERS else flat_bytes(tensor)


class _Comparing:
    """One comparison of all tensors with what was sent before. Some are compared together, in runs."""

    def __init__(self, sent: Sent, elements: Elements, units: list[int]) -> None:
        self._sent, self._elements = sent, elements
        self._units = dict(zip(sent.announced, units, strict=True))
        self._room_bytes = int(SPARSE_SHARE * sent.nbytes)
        self._run_bytes = RUN_BYTES["cuda" if sent._device.type == "cuda" else "cpu"]
        self._runs: dict[int, list[tuple[str, Pair]]] = {}  # waiting, by the size of elements
        self._waiting_bytes: Counter[int] = Counter()  # of each run
        self._counts: dict[str, int] = {}
        self._found: dict[int, list[Found]] = {}
        self._differ: dict[str, torch.Tensor] = {}  # of tensors that are sent whole: whether any element does
        self._rest: dict[str, torch.Tensor] = {}  # what was added and is not what was sent yet

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor, or have it wait for others. Raises TooMany."""
        before, now, itemsize = self._sent.flat[name], tensor.contiguous(), tensor.element_size()
        flat = _flat(now)
        if self._units[name] != EACH:
            self._differ[name] = (flat != before).any()
            before.copy_(flat)
            return
        self._rest[name] = now
        self._runs.setdefault(itemsize, []).append((name, (flat, before)))
        self._waiting_bytes[itemsize] += len(flat) * itemsize
        if self._waiting_bytes[itemsize] >= self._run_bytes:
            self._compare(itemsize)

    def changes(self) -> Changes:
        """What was found in all tensors. Raises TooMany."""
        for itemsize in [*self._runs]:
            self._compare(itemsize)
        whole = self._whole()
        self._expect_room(sum(self._sent.tensors[name].nbytes for name in whole))
        counts = [WHOLE if name in whole else self._counts.get(name, 0) for name in self._sent.announced]
        columns = {
            itemsize: (torch.cat([one.positions for one in found]), torch.cat([one.values for one in found]))
            for itemsize, found in self._found.items()
        }
        return Changes(counts, columns)

    def copy_rest(self) -> None:
        """Give what was sent the values of all tensors that were added."""
        for name, tensor in self._rest.items():
            self._sent.tensors[name].copy_(tensor)

    def _compare(self, itemsize: int) -> None:
        run, run_bytes = self._runs.pop(itemsize), self._waiting_bytes.pop(itemsize)
        most_bytes = min(self._room_bytes, int(MOST_OF_A_RUN * run_bytes))
        found = self._elements.changed([pair for _, pair in run], most_bytes // patch_bytes(1, itemsize))
        if found is None:
            raise TooMany
        self._expect_room(patch_bytes(sum(found.counts), itemsize))
        self._found.setdefault(itemsize, []).append(found)
        self._counts.update(zip((name for name, _ in run), found.counts, strict=True))
        for name, _ in run:
            del self._rest[name]

    def _expect_room(self, nbytes: int) -> None:
        self._room_bytes -= nbytes
        if self._room_bytes < 0:
            raise TooMany

    def _whole(self) -> set[str]:
        """The tensors of the units of which any element differs."""
        if not self._differ:
            return set()
        differ = torch.stack([*self._differ.values()]).tolist()
        units = {self._units[name] for name, one in zip(self._differ, differ, strict=True) if one}
        return {name for name, unit in self._units.items() if unit in units}
