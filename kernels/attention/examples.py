"""Example inputs of the attention ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._examples import normal
from fastreg.kernels.attention import reference
from fastreg.kernels.attention.pattern import Pattern

# Either word of it has bits set.
_SEED = 0x1234567890ABCDEF


def examples_forward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The cases of the backward in which every query sees a key: comparisons of infinities mean nothing."""
    return [(*args[:3], *args[5:]) for args in examples_backward(dtype, device) if bool(args[3].isfinite().all())]


def examples_backward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The cases of the double backward without its directions."""
    return [(*args[:5], *args[8:]) for args in examples_double(dtype, device)]


def examples_double(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Every kind of pattern; one query, odd lengths and widths, whole tiles, shared heads, no head."""
    return [_example(dtype, device, shape, pattern) for shape, pattern in _cases(dtype, device)]


def _cases(dtype: torch.dtype, device: str) -> Iterator[tuple[tuple[int, ...], Pattern]]:
    """Samples, heads of queries and of keys, queries, keys, width; what is seen."""
    draw, seed = normal(dtype, device), torch.tensor([_SEED], device=device)
    yield (1, 1, 1, 1, 1, 1), Pattern()
    yield (2, 4, 2, 7, 7, 8), Pattern(right=0)
    yield (1, 2, 1, 13, 20, 17), Pattern(left=3, right=2)
    yield (2, 2, 2, 33, 33, 40), Pattern(spans=_spans((1, 13, 5, 14), device), right=0)
    yield (2, 4, 2, 9, 20, 5), Pattern(mask=_seen(9, 20, device))
    yield (1, 2, 2, 20, 9, 16), Pattern(mask=draw(1, 2, 1, 9), seed=seed, dropout=0.3)
    yield (1, 1, 1, 64, 64, 64), Pattern(right=0)
    yield (2, 1, 1, 3, 5, 96), Pattern()
    yield (1, 3, 1, 35, 19, 3), Pattern(right=0)
    yield (2, 6, 2, 17, 17, 16), Pattern(seed=seed, right=0, dropout=0.1)
    yield (2, 2, 1, 6, 7, 24), Pattern(mask=draw(2, 2, 6, 7).masked_fill(_seen(6, 7, device), -math.inf))
    yield (1, 2, 2, 40, 40, 32), Pattern(spans=_spans((40,), device), left=7, right=0, seed=seed, dropout=0.5)
    yield (1, 1, 1, 4, 4, 8), Pattern(seed=seed, dropout=1.0)
    yield (0, 2, 2, 4, 4, 8), Pattern(right=0)


def _spans(lengths: tuple[int, ...], device: str) -> Tensor:
    """Documents of these lengths, one after the other."""
    ends = torch.tensor(lengths).cumsum(0)
    end = ends.repeat_interleave(torch.tensor(lengths))
    first = (ends - torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths))
    return torch.stack((first, end)).to(device=device, dtype=torch.int32)


def _seen(queries: int, keys: int, device: str) -> Tensor:
    """``[2, 1, T, U]``: about two thirds; in the first sample one query sees every key and another none."""
    mask = (torch.arange(2 * queries * keys) ** 2 % 7 % 3 != 1).view(2, 1, queries, keys)
    mask[0, 0, 1], mask[0, 0, queries - 2] = True, False
    return mask.to(device)


def _example(dtype: torch.dtype, device: str, shape: tuple[int, ...], pattern: Pattern) -> tuple[object, ...]:
    samples, heads, shared, queries, keys, width = shape
    draw = normal(dtype, device)
    q, d, vq = (draw(samples, heads, queries, width) for _ in range(3))
    k, v, vk, vv = (draw(samples, shared, keys, width) for _ in range(4))
    pattern = pattern._replace(scale=1 / math.sqrt(width))
    _, lse = reference.attention_forward(q.double(), k.double(), v.double(), *pattern)
    return q, k, v, lse.to(accumulator(dtype)), d, vq, vk, vv, *pattern
