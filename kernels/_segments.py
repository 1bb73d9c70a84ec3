"""Segments: contiguous runs of rows given by host offsets, grouped so that equal ones run as a batch.

Micro-batches are all equal but the last, so their groups are views and one batched product serves
them all. Arbitrary offsets cost one gather per distinct length.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, pairwise

import torch
from torch import Tensor

from fastreg.errors import FastregError


@dataclass(frozen=True)
class Group:
    """Segments of one length.

    Args:
        size: rows per segment.
        ids: numbers of the segments, ascending.
        starts: their first rows.
    """

    size: int
    ids: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def adjacent(self) -> bool:
        """Whether the segments follow one another, so that their rows are one block."""
        return self.ids[-1] - self.ids[0] == len(self.ids) - 1

    def rows(self) -> list[int]:
        """Row numbers, segment by segment."""
        return [start + row for start in self.starts for row in range(self.size)]

    def take(self, x: Tensor) -> Tensor:
        """``[S, ...]`` to ``[len(ids), size, ...]``; a view where the segments are adjacent."""
        n = len(self.ids)
        if self.adjacent:
            block = x.narrow(0, self.starts[0], n * self.size)
        else:
            block = x[torch.tensor(self.rows(), dtype=torch.int64, device=x.device)]
        return block.reshape(n, self.size, *x.shape[1:])


@dataclass(frozen=True)
class Segments:
    """Segments of one set of offsets, grouped by length.

    Args:
        offsets: ``m + 1`` ascending row numbers, from 0 to S.
        groups: the segments by length, in order of first appearance.
        host: the offsets as a C array of int64.
    """

    offsets: tuple[int, ...]
    groups: tuple[Group, ...]
    host: array[int]

    @property
    def count(self) -> int:
        """m, the number of segments."""
        return len(self.offsets) - 1

    @property
    def pointer(self) -> int:
        """Address of the int64 offsets; valid as long as this object."""
        return self.host.buffer_info()[0]

    @property
    def longest(self) -> int:
        """Rows of the longest segment."""
        return max(group.size for group in self.groups)

    def split(self, x: Tensor) -> list[Tensor]:
        """``[S, ...]`` to one ``[n, size, ...]`` per group."""
        return [group.take(x) for group in self.groups]

    def on(self, device: torch.device) -> Tensor:
        """``[m + 1]`` int64: the offsets on a device, copied there once."""
        return _offsets_on(self.offsets, device)

    @cached_property
    def in_order(self) -> bool:
        """Whether the groups, one after another, are the segments in order."""
        return all(place == number for place, number in enumerate(self._ids()))

    def _ids(self) -> list[int]:
        return list(chain.from_iterable(group.ids for group in self.groups))

    def _rows(self) -> list[int]:
        return list(chain.from_iterable(group.rows() for group in self.groups))

    def per_segment(self, parts: list[Tensor]) -> Tensor:
        """One ``[n, ...]`` per group to ``[m, ...]`` in segment order."""
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined if self.in_order else _scattered(joined, self._ids())

    def per_row(self, parts: list[Tensor]) -> Tensor:
        """One ``[n, size, ...]`` per group to ``[S, ...]`` in row order."""
        flat = [part.flatten(0, 1) for part in parts]
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        return joined if self.in_order else _scattered(joined, self._rows())

    def spread(self, values: Tensor) -> Tensor:
        """``[m, ...]`` to ``[S, ...]``: every row gets its segment's entry."""
        if len(self.groups) == 1:
            return values.repeat_interleave(self.groups[0].size, 0)
        return values[self.segment_of_row(values.device)]

    def segment_of_row(self, device: torch.device) -> Tensor:
        """``[S]`` int64: the segment each row lies in."""
        lengths = torch.tensor([stop - start for start, stop in pairwise(self.offsets)], device=device)
        ids = torch.arange(self.count, device=device)
        return torch.repeat_interleave(ids, lengths, output_size=self.offsets[-1])


@lru_cache(maxsize=512)
def _offsets_on(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64, device=device)


def _scattered(joined: Tensor, places: list[int]) -> Tensor:
    index = torch.tensor(places, dtype=torch.int64, device=joined.device)
    return torch.empty_like(joined).index_copy(0, index, joined)


@lru_cache(maxsize=512)
def segments(offsets: tuple[int, ...]) -> Segments:
    """Group segments by length.

    Args:
        offsets: ``0 = o_0 <= ... <= o_m = S``.

    Raises:
        FastregError: fewer than two offsets, a first one other than 0, or a descending pair.
    """
    if len(offsets) < 2 or offsets[0] != 0 or any(stop < start for start, stop in pairwise(offsets)):
        raise FastregError(
            f"segments: offsets must be two or more ascending row numbers from 0, got {list(offsets[:16])} "
            "(offsets has one entry more than there are segments)"
        )
    starts: dict[int, list[tuple[int, int]]] = {}
    for number, (start, stop) in enumerate(pairwise(offsets)):
        starts.setdefault(stop - start, []).append((number, start))
    groups = tuple(Group(size, *map(tuple, zip(*found, strict=True))) for size, found in starts.items())
    return Segments(offsets, groups, array("q", offsets))


def uniform(rows: int, size: int) -> list[int]:
    """Offsets of ``ceil(rows / size)`` segments of ``size`` rows, the last one possibly shorter."""
    return [*range(0, rows, size), rows]


def of(offsets: Sequence[int]) -> Segments:
    """The cached segments of any sequence of offsets."""
    return segments(tuple(offsets))
