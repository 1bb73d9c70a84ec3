"""How a batch of samples is cut into micro-batches, and the reductions that follow the cut.

Every tensor of a recorded forward keeps its samples along dimension 0: ``n = B * r`` rows, ``r`` of them per
sample (tokens folded into the batch, heads, ...). Micro-batch ``k`` owns a contiguous segment of those rows. All
micro-batches have the same size but the last, so each reduction is one call on a ``[m, rows, ...]`` view plus, when
the last micro-batch is ragged, one call on its own rows: never a loop over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import FastregError


class MicroBatches:
    """The cut of ``samples`` samples into micro-batches of ``size`` (the last one may be smaller).

    Args:
        samples: B, the number of samples in the batch.
        size: b, samples per micro-batch; at least 1. A size beyond B means one micro-batch.

    Attributes:
        count: m, the number of micro-batches.
        full: how many of them hold exactly ``size`` samples.
        tail: samples in the ragged last micro-batch, 0 if there is none.
    """

    __slots__ = ("samples", "size", "full", "tail", "count")

    def __init__(self, samples: int, size: int) -> None:
        if samples < 1:
            raise FastregError(f"recording: the batch must have at least one sample, got {samples}")
        self.samples = samples
        self.size = min(size, samples)
        self.full, self.tail = divmod(samples, self.size)
        self.count = self.full + (self.tail > 0)

    def rows_per_sample(self, tensor: Tensor, what: str = "tensor") -> int:
        """``r`` with ``tensor.shape[0] == B * r``; a batch dimension that is not a multiple of B is refused."""
        rows = tensor.shape[0] if tensor.dim() else 1
        per_sample, rest = divmod(rows, self.samples)
        if rest or not per_sample:
            raise FastregError(
                f"recording: {what} must keep its {self.samples} samples along dimension 0, got shape "
                f"{tuple(tensor.shape)} (put the batch first; a tensor computed from parameters alone has no samples)"
            )
        return per_sample

    def offsets(self, rows: int) -> tuple[int, ...]:
        """Row offsets ``[m + 1]`` of the segments of a tensor of ``rows`` rows."""
        return _offsets(self.samples, self.size, rows // self.samples)

    def sizes(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Samples per micro-batch, ``[m]``."""
        sizes = torch.full((self.count,), float(self.size), device=device, dtype=dtype)
        if self.tail:
            sizes[-1] = self.tail
        return sizes

    def subset(self, chosen: tuple[int, ...]) -> MicroBatches:
        """The cut that remains when only the micro-batches in ``chosen`` (increasing) are kept."""
        samples = len(chosen) * self.size
        if self.tail and chosen[-1] == self.count - 1:
            samples += self.tail - self.size
        return MicroBatches(samples, self.size)

    def map(self, function: Callable[..., Tensor], rows: tuple[Tensor, ...], segments: tuple[Tensor, ...]) -> Tensor:
        """Apply ``function`` to row tensors seen as ``[m, n / m, ...]`` and segment tensors ``[m, ...]``.

        ``function`` returns ``[m, n / m, ...]``; the result is flattened back to ``[n, ...]``.
        """
        pieces = [function(*cut).flatten(0, 1) for cut in self.cuts(rows, segments)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def fold(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Apply ``function`` to row tensors seen as ``[m, n / m, ...]``; it returns ``[m, ...]``."""
        pieces = [function(*cut) for cut in self.cuts(rows, ())]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def reduce(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Sum each segment of ``rows [n, ...]`` to ``[m, *shape]``; ``shape`` broadcasts against ``rows.shape[1:]``.

        A dimension of ``shape`` that is 1 or missing is summed over, as autograd does for a broadcast parameter.
        """
        rest = rows.dim() - 1
        padded = (1,) * (rest - len(shape)) + tuple(shape)
        summed = tuple(i + 2 for i, size in enumerate(padded) if size == 1 and rows.shape[i + 1] != 1)
        total = self.fold(lambda cut: cut.sum((1, *summed), keepdim=True).squeeze(1), rows)
        return total.reshape(self.count, *shape)

    def scaled(self, rows: Tensor, factors: Tensor, onto: Tensor | None = None) -> Tensor:
        """``onto + factors_k * rows`` for ``factors [m]``; ``onto`` is overwritten."""
        if not self.tail and rows.is_contiguous() and (onto is None or onto.is_contiguous()):
            flat = rows.view(self.count, -1)
            return times(flat, factors).view(rows.shape) if onto is None else _add_(onto, flat, factors)
        if onto is None:
            return self.map(times, (rows,), (factors,))
        return self.map(lambda o, r, c: o.addcmul_(r, aligned(c, r)), (onto, rows), (factors,))

    def scale_(self, rows: Tensor, factors: Tensor) -> Tensor:
        """``rows`` overwritten by ``factors_k * rows``."""
        if not self.tail and rows.is_contiguous():
            flat = rows.view(self.count, -1)
            flat.mul_(aligned(factors, flat))
            return rows
        for view, part in self.cuts((rows,), (factors,)):
            view.mul_(aligned(part, view))
        return rows

    def cuts(self, rows: tuple[Tensor, ...], segments: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Row tensors as views ``[m', n', ...]`` with the matching part of segment tensors: one or two groups."""
        if not self.tail:
            views = (tensor.unflatten(0, (self.count, -1)) for tensor in rows)
            return [(*views, *segments)]
        full = [tensor.shape[0] // self.samples * self.full * self.size for tensor in rows]
        head = (t[:n].unflatten(0, (self.full, -1)) for t, n in zip(rows, full))
        tail = (t[n:].unsqueeze(0) for t, n in zip(rows, full))
        return [(*head, *(s[: self.full] for s in segments)), (*tail, *(s[self.full :] for s in segments))]


@lru_cache(maxsize=256)
def _offsets(samples: int, size: int, per_sample: int) -> tuple[int, ...]:
    step = size * per_sample
    total = samples * per_sample
    return (*range(0, total, step), total)


class Selection:
    """Some of the micro-batches of a batch, and how rows and segment vectors are restricted to them.

    With ``chosen=None`` nothing is restricted and no copy is made; neighbouring micro-batches are taken as views.
    """

    __slots__ = ("whole", "chosen", "kept")

    def __init__(self, whole: MicroBatches, chosen: tuple[int, ...] | None) -> None:
        self.whole = whole
        self.chosen = chosen
        self.kept = whole if chosen is None else whole.subset(chosen)

    def take(self, rows: Tensor) -> Tensor:
        """The rows of the chosen micro-batches."""
        if self.chosen is None:
            return rows
        if self._adjacent:
            offsets = self.whole.offsets(rows.shape[0])
            return rows[offsets[self.chosen[0]] : offsets[self.chosen[-1] + 1]]
        return rows.index_select(0, self._row_index(rows.shape[0], rows.device))

    def put(self, rows: Tensor | None) -> Tensor | None:
        """Rows of the chosen micro-batches at their places among all rows, zeros elsewhere."""
        if self.chosen is None or rows is None:
            return rows
        total = rows.shape[0] // self.kept.samples * self.whole.samples
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, self._row_index(total, rows.device), rows)

    def take_segments(self, values: Tensor) -> Tensor:
        """The entries of ``values [m]`` that belong to the chosen micro-batches."""
        if self.chosen is None:
            return values
        if self._adjacent:
            return values[self.chosen[0] : self.chosen[-1] + 1]
        return values[list(self.chosen)]

    def put_segments(self, values: Tensor) -> Tensor:
        """``values`` of the chosen micro-batches at their places in ``[m]`` zeros."""
        if self.chosen is None:
            return values
        if self._adjacent:
            return F.pad(values, (self.chosen[0], self.whole.count - 1 - self.chosen[-1]))
        return values.new_zeros(self.whole.count).index_copy(0, torch.tensor(self.chosen, device=values.device), values)

    @property
    def _adjacent(self) -> bool:
        assert self.chosen is not None
        return self.chosen[-1] - self.chosen[0] == len(self.chosen) - 1

    def _row_index(self, total: int, device: torch.device) -> Tensor:
        offsets = self.whole.offsets(total)
        index = [torch.arange(offsets[k], offsets[k + 1]) for k in self.chosen or ()]
        return torch.cat(index).to(device)


def _add_(onto: Tensor, flat: Tensor, factors: Tensor) -> Tensor:
    onto.view(flat.shape).addcmul_(flat, aligned(factors, flat))
    return onto


def times(segments: Tensor, factors: Tensor) -> Tensor:
    """``factors_k * segments`` for ``factors [m]`` and ``segments [m, ...]``, in the dtype of the segments."""
    return (segments * aligned(factors, segments)).to(segments.dtype)


def aligned(factors: Tensor, segments: Tensor) -> Tensor:
    """``factors [m]`` as they broadcast against ``segments [m, ...]``, in their dtype or wider.

    Factors have the inverse of the loss scale in them, out of float16's range: its segments are multiplied in float32.
    """
    factors = factors if segments.dtype == torch.float16 else factors.to(segments.dtype)
    return factors.reshape(-1, *(1,) * (segments.dim() - 1))
