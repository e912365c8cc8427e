"""Triton's kernels for sparse updates: one pass over the memory finds what differs, for many tensors at once.

Two launches find it. The first reads both tensors, as words of 8 bytes where they are aligned, and writes a bit for
each element; the second reads these bits, and of the tensors only what differs. The elements of a tensor are cut into
tiles, one for each program. A third kernel writes elements to where they belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl

from extensions.elements import Found, Pair, Segment

ROWS, LANES = 128, 32  # of a tile: a row's bits are one int32
TILE = ROWS * LANES
BLOCK = 1024  # elements that one program writes
WORD_BYTES = 8
FAR = 2**31 - 1  # a step that no position reaches
KINDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # by the bytes of an element


@triton.jit
def _compare(parts, of_tile, bits, counts, rows: tl.constexpr, word: tl.constexpr, per: tl.constexpr):
    """Write the bits of a tile, and how many are set. A row of `parts` is that of `_Part.row`."""
    tile = tl.program_id(0)
    row = parts + tl.load(of_tile + tile).to(tl.int64) * 5
    now = tl.load(row).to(tl.pointer_type(word))
    before = tl.load(row + 1).to(tl.pointer_type(word))
    words: tl.constexpr = 32 // per  # in a row
    size: tl.constexpr = 64 // per  # of an element in bits, where a word has several
    line = tl.arange(0, rows)
    column = tl.arange(0, words)
    at = (tile - tl.load(row + 2)) * (rows * words) + line[:, None] * words + column[None, :]
    there = at < tl.load(row + 3)
    differs = tl.load(now + at, mask=there, other=0) ^ tl.load(before + at, mask=there, other=0)
    found = tl.zeros([rows, words], dtype=tl.int32)
    ones = tl.zeros([rows, words], dtype=tl.int32)
    for part in tl.static_range(per):
        if per == 1:
            unlike = (differs != 0).to(tl.int32)
        else:
            unlike = (((differs >> (part * size)) & ((1 << size) - 1)) != 0).to(tl.int32)
        found |= unlike << (column[None, :] * per + part)
        ones += unlike
    tl.store(bits + tile.to(tl.int64) * rows + line, tl.sum(found, axis=1))
    tl.store(counts + tile, tl.sum(tl.sum(ones, axis=1), axis=0))


@triton.jit
def _collect(parts, of_tile, bits, starts, positions, values, rows: tl.constexpr, element: tl.constexpr):
    """Write positions and values of what differs in a tile, and the values into what was there before."""
    tile = tl.program_id(0)
    row = parts + tl.load(of_tile + tile).to(tl.int64) * 5
    now = tl.load(row).to(tl.pointer_type(element))
    before = tl.load(row + 1).to(tl.pointer_type(element))
    line = tl.arange(0, rows)
    lane = tl.arange(0, 32)
    differs = (tl.load(bits + tile.to(tl.int64) * rows + line)[:, None] >> lane[None, :]) & 1
    in_row = tl.sum(differs, axis=1)
    rank = (tl.cumsum(in_row, axis=0) - in_row)[:, None] + tl.cumsum(differs, axis=1) - differs
    at = (tile - tl.load(row + 2)) * (rows * 32) + line[:, None] * 32 + lane[None, :]
    value = tl.load(now + at, mask=differs != 0, other=0)
    tl.store(before + at, value, mask=differs != 0)
    to = tl.load(starts + tile) + rank
    tl.store(positions + to, (at + tl.load(row + 4)).to(tl.int32), mask=differs != 0)
    tl.store(values + to, value, mask=differs != 0)


@triton.jit
def _write(
    segments, of_block, positions, values, wrong,
    block: tl.constexpr, dims: tl.constexpr, is_run: tl.constexpr, element: tl.constexpr,
):  # fmt: skip
    """Write a block of a segment. A row of `segments`: first block, begin, count, elements, offset, address, steps."""
    program = tl.program_id(0)
    row = segments + tl.load(of_block + program).to(tl.int64) * (6 + 3 * dims)
    begin = tl.load(row + 1)
    lane = (program - tl.load(row)) * block + tl.arange(0, block)
    there = lane < tl.load(row + 2)
    at = tl.load(positions + begin + lane, mask=there, other=0)
    inside = (at >= 0) & (at < tl.load(row + 3))
    tl.store(wrong + lane * 0, 1, mask=there & (inside == 0))
    left = at - tl.load(row + 4).to(tl.int32)
    here = there & inside & (left >= 0)
    to = tl.zeros([block], dtype=tl.int64)
    for dim in tl.static_range(dims):
        index = left
        if not is_run:
            index = left // tl.load(row + 6 + 3 * dim).to(tl.int32)
        left -= index * tl.load(row + 6 + 3 * dim).to(tl.int32)
        here &= index < tl.load(row + 7 + 3 * dim)
        to += index.to(tl.int64) * tl.load(row + 8 + 3 * dim)
    here &= left == 0
    value = tl.load(values + begin + lane, mask=there, other=0)
    tl.store(tl.load(row + 5).to(tl.pointer_type(element)) + to, value, mask=here)


@dataclass(frozen=True)
class _Part:
    """A part of a pair that is compared word by word, of `per` elements a word.

    pair: its number. now, before: addresses. first: the position of its first element.
    """

    pair: int
    now: int
    before: int
    words: int
    first: int
    per: int

    @property
    def tiles(self) -> int:
        return -(-self.words * self.per // TILE)

    def row(self, first_tile: int) -> list[int]:
        """As the kernels read it."""
        return [self.now, self.before, first_tile, self.words, self.first]


def _parts(pair: int, now: torch.Tensor, before: torch.Tensor) -> list[_Part]:
    """Words of several elements where both are aligned for that, and the elements that are left."""
    size, addresses = now.element_size(), (now.data_ptr(), before.data_ptr())
    per = WORD_BYTES // size
    words = len(now) // per if per > 1 and not any(address % WORD_BYTES for address in addresses) else 0
    left = len(now) - words * per
    behind = (address + words * WORD_BYTES for address in addresses)
    found = [_Part(pair, *addresses, words, 0, per), _Part(pair, *behind, left, words * per, 1)]
    return [part for part in found if part.words]


class FusedElements:
    """As `extensions.elements.PlainElements`, on a GPU."""

    def changed(self, pairs: Sequence[Pair], at_most: int) -> Found | None:
        """As Elements. The host waits for the device once, or twice where tensors are not of whole words."""
        with torch.cuda.device_of(pairs[0][0]):
            return self._changed(pairs, at_most)

    def write(self, segments: Sequence[Segment], positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As Elements."""
        wrong = torch.zeros(1, dtype=torch.int32, device=positions.device)
        with torch.cuda.device_of(positions):
            for is_run in (True, False):
                some = [segment for segment in segments if segment.count and segment.into.is_run == is_run]
                if some:
                    _write_all(some, positions, values, wrong, is_run)
        return wrong

    def _changed(self, pairs: Sequence[Pair], at_most: int) -> Found | None:
        parts = [part for pair, (now, before) in enumerate(pairs) for part in _parts(pair, now, before)]
        like, by_part, compared = pairs[0][0], dict.fromkeys(parts, 0), []
        for per in sorted({part.per for part in parts}):
            one = _Compared([part for part in parts if part.per == per], like)
            compared.append(one)
            by_part.update(zip(one.parts, one.counts(), strict=True))
        starts = dict(zip(parts, accumulate(by_part.values(), initial=0), strict=False))
        total = sum(by_part.values())
        if total > at_most:
            return None
        positions = torch.empty(total, dtype=torch.int32, device=like.device)
        values = torch.empty(total, dtype=like.dtype, device=like.device)
        for one in compared:
            one.collect([starts[part] for part in one.parts], positions, values)
        counts = [0] * len(pairs)
        for part, count in by_part.items():
            counts[part.pair] += count
        return Found(counts, positions, values)


class _Compared:
    """Parts of words of the same number of elements, compared."""

    def __init__(self, parts: list[_Part], like: torch.Tensor) -> None:
        tiles = [part.tiles for part in parts]
        firsts = [*accumulate(tiles, initial=0)]
        self.parts, self._size = parts, like.element_size()
        rows = [part.row(first) for part, first in zip(parts, firsts, strict=False)]
        self._table, self._of_tile = tables(rows, tiles, like.device)
        self._grid = (firsts[-1],)
        self._bits = torch.empty(firsts[-1] * ROWS, dtype=torch.int32, device=like.device)
        self._counts = torch.empty(firsts[-1], dtype=torch.int32, device=like.device)
        word = KINDS[self._size * parts[0].per]
        found = (self._bits, self._counts)
        _compare[self._grid](self._table, self._of_tile, *found, rows=ROWS, word=word, per=parts[0].per)
        self._before = torch.zeros(firsts[-1] + 1, dtype=torch.int64, device=like.device)  # found before each tile
        torch.cumsum(self._counts, 0, out=self._before[1:])
        self._at_firsts = self._before[torch.tensor(firsts, device=like.device)]

    def counts(self) -> list[int]:
        """How many elements differ in each part."""
        return self._at_firsts.diff().tolist()

    def collect(self, starts: list[int], positions: torch.Tensor, values: torch.Tensor) -> None:
        """Write what was found, that of each part from its start on."""
        shift = torch.tensor(starts, device=positions.device) - self._at_firsts[:-1]
        at = self._before[:-1] + shift[self._of_tile]
        given = (self._table, self._of_tile, self._bits, at, positions, values)
        _collect[self._grid](*given, rows=ROWS, element=KINDS[self._size])


def _write_all(
    segments: list[Segment], positions: torch.Tensor, values: torch.Tensor, wrong: torch.Tensor, is_run: bool
) -> None:
    dims = max(len(segment.into.steps) for segment in segments)
    blocks = [-(-segment.count // BLOCK) for segment in segments]
    rows = []
    for segment, first in zip(segments, accumulate(blocks, initial=0), strict=False):
        into = segment.into
        steps = [(FAR, 1, 0)] * (dims - len(into.steps)) + [*into.steps]
        told = [first, segment.begin, segment.count, into.elements, into.offset, into.memory.data_ptr()]
        rows.append([*told, *(number for step in steps for number in step)])
    table, of_block = tables(rows, blocks, positions.device)
    given = (table, of_block, positions, values, wrong)
    element = KINDS[values.element_size()]
    _write[(sum(blocks),)](*given, block=BLOCK, dims=dims, is_run=is_run, element=element)


def tables(rows: list[list[int]], programs: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels are told: a row for each part, and for each program the number of its part."""
    of_program = torch.repeat_interleave(
        torch.arange(len(rows), dtype=torch.int32, device=device),
        torch.tensor(programs, device=device),
        output_size=sum(programs),
    )
    return torch.tensor(rows, dtype=torch.int64, device=device), of_program
