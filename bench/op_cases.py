"""Calls of every op at the sizes that the benchmark's models make, with what each must cost at least."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Arguments = tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One call of one op.

    Attributes:
        op: name in ``fastreg.kernels.registry()``.
        label: the sizes, in words.
        draw: makes the arguments for a dtype and device, fresh random numbers each time.
        elements: floats that the call must read and write, each once.
        flops: multiplications and additions that cannot be left out.
    """

    op: str
    label: str
    draw: Callable[[torch.dtype, str], Arguments]
    elements: int
    flops: int = 0

    def floor_seconds(self, dtype: torch.dtype, bytes_per_s: float, flops_per_s: float) -> float:
        """Time below which no implementation gets: memory traffic or arithmetic, whichever is more."""
        return max(self.elements * dtype.itemsize / bytes_per_s, self.flops / flops_per_s)


def equal_offsets(rows: int, segments: int) -> list[int]:
    """Offsets of ``segments`` equal segments of ``rows`` rows."""
    return [rows * k // segments for k in range(segments + 1)]


def _normal(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def _linear_cases(rows: int, fan_in: int, fan_out: int, m: int) -> list[OpCase]:
    """The three products of a linear layer with ``rows`` rows in m segments."""
    offsets = equal_offsets(rows, m)
    ends, weight, s = rows * (fan_in + fan_out), fan_in * fan_out, rows // m
    label = f"S={rows} I={fan_in} O={fan_out} m={m}"
    # A segment's Gram matrices or its dense gradient, whichever takes less arithmetic; the Grams
    # are symmetric, so half of them is enough for a norm.
    grams, dense = s * rows * (fan_in + fan_out), 2 * rows * weight

    def two(dtype: torch.dtype, device: str) -> list[Tensor]:
        return _normal(dtype, device, (rows, fan_in), (rows, fan_out))

    def three(dtype: torch.dtype, device: str) -> list[Tensor]:
        return _normal(dtype, device, (rows, fan_in), (rows, fan_in), (rows, fan_out))

    return [
        OpCase("outer_sum", label, lambda t, d: (*two(t, d), offsets), ends + weight, dense),
        OpCase(
            "outer_sqnorm",
            label,
            lambda t, d: (*two(t, d), offsets, False),
            ends,
            min(grams, dense),
        ),
        OpCase(
            "outer_apply",
            label,
            lambda t, d: (*three(t, d), offsets, False),
            rows * (2 * fan_in + 2 * fan_out),
            min(2 * grams, 2 * dense),
        ),
    ]


def _row_cases(rows: int, width: int, m: int) -> list[OpCase]:
    """The memory-bound ops on ``rows`` rows of ``width`` features in m segments."""
    offsets = equal_offsets(rows, m)
    label, size = f"R={rows} N={width}", rows * width
    shape = (rows, width)

    def normalized(dtype: torch.dtype, device: str, extra: int) -> Arguments:
        drawn = _normal(dtype, device, *[shape] * (1 + extra))
        statistics = torch.rand(rows, device=device).add(0.5)
        return (drawn[0], statistics, *drawn[1:], True)

    return [
        OpCase("normalize", label, lambda t, d: (*_normal(t, d, shape), 1e-5, True), 2 * size),
        OpCase("normalize_backward", label, lambda t, d: normalized(t, d, 1), 3 * size),
        OpCase("normalize_double_backward", label, lambda t, d: normalized(t, d, 2), 5 * size),
        OpCase(
            "gelu_double_backward",
            label,
            lambda t, d: (*_normal(t, d, shape, shape, shape), False),
            5 * size,
        ),
        OpCase(
            "segment_dot",
            f"S={rows} N={width} m={m}",
            lambda t, d: (*_normal(t, d, shape, shape), offsets),
            2 * size,
        ),
        OpCase(
            "affine_sqnorm",
            f"S={rows} C={width} P=1 m={m}",
            lambda t, d: (*_normal(t, d, (*shape, 1), (*shape, 1)), offsets),
            2 * size,
        ),
        OpCase(
            "index_sqnorm",
            f"S={rows} D={width} m={m}, 1024 indices",
            lambda t, d: (torch.randint(1024, (rows,), device=d), *_normal(t, d, shape), offsets),
            2 * size,
        ),
    ]


# A small GPT's layers, an MLP's hidden layer sample by sample, and a norm over an image's pixels.
CPU_CASES = [
    *_linear_cases(1024, 256, 256, 8),
    *_linear_cases(1024, 256, 1024, 8),
    *_linear_cases(1024, 1024, 256, 8),
    *_linear_cases(256, 784, 512, 8),
    *_linear_cases(256, 512, 512, 256),
    *_row_cases(1024, 256, 8),
    *_row_cases(512, 8192, 8),
]

# GPT-2 small with 16 sequences of 512 tokens.
GPU_CASES = [
    *_linear_cases(8192, 768, 768, 8),
    *_linear_cases(8192, 768, 2304, 8),
    *_linear_cases(8192, 768, 3072, 32),
    *_linear_cases(8192, 3072, 768, 32),
    *_row_cases(8192, 768, 8),
    *_row_cases(8192, 3072, 32),
]
