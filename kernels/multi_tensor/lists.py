"""Lists of tensors as the compiled passes take them: addresses, and chunks of about equal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# Elements of a chunk: 128 KB of every list in float32, so that its start costs little, and a model of a million
# parameters still has one for every third multiprocessor of an H200. Not measured.
CHUNK = 1 << 15


@dataclass(frozen=True)
class Chunks:
    """How tensors of some sizes are cut.

    Attributes:
        table: [count, 3] int64: tensor, first element, number of elements.
        bounds: [n + 1] int64: which chunks are whose.
    """

    table: Tensor
    bounds: Tensor

    @property
    def count(self) -> int:
        """Chunks in all."""
        return self.table.shape[0]


@lru_cache(maxsize=64)
def chunks(sizes: tuple[int, ...], device: torch.device) -> Chunks:
    """The chunks of tensors of these sizes, on a device."""
    table = [
        (number, start, min(CHUNK, size - start))
        for number, size in enumerate(sizes)
        for start in range(0, size, CHUNK)
    ]
    bounds = [0, *accumulate(-(-size // CHUNK) for size in sizes)]
    on_device = (torch.tensor(x, dtype=torch.int64, device=device) for x in (table, bounds))
    cut, ends = on_device
    return Chunks(cut.reshape(-1, 3), ends)


def addresses(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[lists, n]`` int64, where the tensors are; on a GPU it is on its way when this returns."""
    device = lists[0][0].device
    found = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    host = torch.tensor(found, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
