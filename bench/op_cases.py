"""Calls of every op at the sizes that the benchmark's models make, with what each must cost at least."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastreg.kernels import registry
from fastreg.kernels.attention import Pattern

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
        rivals: by name, what one would call instead; its outputs are those of the op, or the first of them.
    """

    op: str
    label: str
    draw: Callable[[torch.dtype, str], Arguments]
    elements: int
    flops: int = 0
    rivals: Mapping[str, Callable[..., object]] = dataclasses.field(default_factory=dict)

    def bound(self, dtype: torch.dtype, bytes_per_s: float, flops_per_s: float) -> str:
        """What the floor is made of."""
        moved, multiplied = self.elements * dtype.itemsize / bytes_per_s, self.flops / flops_per_s
        return "memory" if moved > multiplied else "arithmetic"

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
        OpCase(
            "outer_sum",
            label,
            lambda t, d: (*two(t, d), offsets),
            ends + weight,
            dense,
            {"torch.mm, no norms": _weight_gradient, "torch.mm, torch.bmm, norms": _gradient_and_norms},
        ),
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
            lambda t, d: (*three(t, d), offsets, False, None, None),
            rows * (2 * fan_in + 2 * fan_out),
            min(2 * grams, 2 * dense),
            {"torch.bmm twice": _two_products},
        ),
    ]


def _weight_gradient(a: Tensor, d: Tensor, _offsets: Sequence[int]) -> Tensor:
    return d.mT @ a


def _gradient_and_norms(a: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    a_parts, d_parts = (x.unflatten(0, (len(offsets) - 1, -1)) for x in (a, d))
    return d.mT @ a, torch.bmm(d_parts.mT, a_parts).float().square().sum((1, 2))


def _two_products(q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], *_rest: object) -> Tensor:
    q, k, v = (x.unflatten(0, (len(offsets) - 1, -1)) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT), v).flatten(0, 1)


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
            "segment_sum",
            f"S={rows} N={width} m={m}",
            lambda t, d: (*_normal(t, d, shape), offsets),
            size,
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


def _norm_cases(samples: int, channels: int, places: int, groups: int, m: int) -> list[OpCase]:
    """A norm layer with scale and bias, its backward with norms, and its double backward."""
    offsets, size = equal_offsets(samples, m), samples * channels * places
    label, shape = f"S={samples} C={channels} P={places} G={groups} m={m}", (samples, channels, places)

    def forward(dtype: torch.dtype, device: str) -> Arguments:
        return (*_normal(dtype, device, shape, (channels,), (channels,)), groups, 1e-5, True)

    def backward(dtype: torch.dtype, device: str, extra: int) -> Arguments:
        x, weight, *others = _normal(dtype, device, shape, (channels,), *[shape] * (1 + extra))
        grouped = x.float().view(samples, groups, -1)
        var, mean = torch.var_mean(grouped, 2, correction=0)
        cotangents = [torch.randn(m, channels, device=device) for _ in range(2 * extra)]
        return (x, mean, (var + 1e-5).rsqrt(), weight, *others, *cotangents, offsets, True)

    return [
        OpCase("norm_affine", label, forward, 2 * size),
        OpCase("norm_affine_backward", label, lambda t, d: backward(t, d, 0), 3 * size),
        OpCase("norm_affine_double_backward", label, lambda t, d: backward(t, d, 1), 5 * size),
    ]


def _conv_cases(samples: int, channels: int, outputs: int, size: int, stride: int, m: int) -> list[OpCase]:
    """A 3 x 3 convolution's weight gradients per segment, and the same layer with a weight per segment."""
    geometry, small = ([stride, stride], [1, 1], [1, 1]), size // stride
    label = f"n={samples} C={channels} O={outputs} {size}x{size}/{stride} m={m}"
    images, weights = (m, samples // m, channels, size, size), (m, outputs, channels, 3, 3)
    out = (m, samples // m, outputs, small, small)
    elements = prod(images) + prod(weights) + prod(out)
    flops = 2 * prod(out) * channels * 9

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(2, 4).contiguous().movedim(4, 2)

    def gradients(dtype: torch.dtype, device: str) -> Arguments:
        x, d = _normal(dtype, device, images, out)
        return (channels_last(x), channels_last(d), [3, 3], *geometry)

    def applied(dtype: torch.dtype, device: str) -> Arguments:
        x, w = _normal(dtype, device, images, weights)
        return (channels_last(x), channels_last(w), None, *geometry)

    grouped = {name: {"grouped torch convolution": registry()[name].reference} for name in ("conv_outer", "conv_apply")}
    return [
        OpCase("conv_outer", label, gradients, elements, flops, grouped["conv_outer"]),
        OpCase("conv_apply", label, applied, elements, flops, grouped["conv_apply"]),
    ]


def _cross_entropy_cases(rows: int, classes: int) -> list[OpCase]:
    """A softmax head on ``rows`` predictions: with a draw, with its gradient, and the two derivatives."""
    label, size = f"R={rows} C={classes}", rows * classes

    def head(dtype: torch.dtype, device: str, *later: object) -> Arguments:
        return (*_normal(dtype, device, (rows, classes)), None, *later, 1, 2)

    def derivative(dtype: torch.dtype, device: str, extra: int) -> Arguments:
        z, *others = _normal(dtype, device, *[(rows, classes)] * (1 + extra))
        labels = torch.randint(classes, (rows,), device=device)
        return (z, z.float().logsumexp(1), labels, torch.rand(rows, device=device), *others)

    return [
        OpCase("cross_entropy", label, head, size),
        OpCase(
            "cross_entropy_gradient",
            label,
            lambda t, d: head(t, d, torch.rand(rows, device=d)),
            2 * size,
        ),
        OpCase("cross_entropy_backward", label, lambda t, d: derivative(t, d, 0), 2 * size),
        OpCase("cross_entropy_double_backward", label, lambda t, d: derivative(t, d, 1), 3 * size),
    ]


def _attention_cases(
    samples: int, heads: int, shared: int, length: int, width: int, documents: int = 1, dropout: float = 0.0
) -> list[OpCase]:
    """Causal attention within equal documents, its backward and double backward; ``shared`` heads of keys."""
    label = f"B={samples} H={heads} J={shared} T={length} E={width}"
    label += f" documents={documents}" * (documents > 1) + f" dropout={dropout}" * (dropout > 0)
    queries, keys = (samples, heads, length, width), (samples, shared, length, width)
    at_queries, at_keys = prod(queries), prod(keys)
    # Half of the pairs of a query and a key of one document.
    product = at_queries * length // documents
    rivals = {} if documents > 1 or dropout else {"F.scaled_dot_product_attention": _torchs_attention}

    def pattern(device: str) -> Pattern:
        first = torch.arange(length, device=device) * documents // length * length // documents
        spans = torch.stack([first, first + length // documents]).int() if documents > 1 else None
        seed = torch.tensor([1], device=device) if dropout else None
        return Pattern(spans=spans, seed=seed, scale=width**-0.5, right=0, dropout=dropout)

    def drawn(dtype: torch.dtype, device: str, directions: int) -> Arguments:
        q, k, v, *rest = _normal(dtype, device, queries, keys, keys, *(queries, queries, keys, keys)[:directions])
        lse = registry()["attention_forward"](q, k, v, *pattern(device))[1:] if directions else ()
        return (q, k, v, *lse, *rest, *pattern(device))

    moved = 2 * at_queries + 2 * at_keys, 3 * at_queries + 4 * at_keys, 5 * at_queries + 6 * at_keys
    return [
        OpCase("attention_forward", label, lambda t, d: drawn(t, d, 0), moved[0], 2 * product, rivals),
        OpCase("attention_backward", label, lambda t, d: drawn(t, d, 1), moved[1], 5 * product),
        OpCase("attention_double_backward", label, lambda t, d: drawn(t, d, 4), moved[2], 12 * product),
    ]


def _torchs_attention(q: Tensor, k: Tensor, v: Tensor, *_pattern: object) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# A small GPT's layers, an MLP's hidden layer sample by sample, and a norm over an image's pixels.
CPU_CASES = [
    *_linear_cases(1024, 256, 256, 8),
    *_linear_cases(1024, 256, 1024, 8),
    *_linear_cases(1024, 1024, 256, 8),
    *_linear_cases(256, 784, 512, 8),
    *_linear_cases(256, 512, 512, 256),
    *_row_cases(1024, 256, 8),
    *_row_cases(512, 8192, 8),
    *_norm_cases(1024, 256, 1, 1, 8),
    *_cross_entropy_cases(1024, 1024),
    *_attention_cases(8, 4, 4, 128, 64),
    *_conv_cases(64, 32, 32, 32, 1, 8),
]


def gpu_cases(shrink: int = 1) -> list[OpCase]:
    """A large model's weight gradients, GPT-2 small's layers (16 sequences of 512 tokens); rows over ``shrink``."""
    return [
        *_linear_cases(16384 // shrink, 4096, 4096, 16),
        *_linear_cases(65536 // shrink, 1024, 1024, 64),
        *_linear_cases(16384 // shrink, 1024, 1024, 32),
        *_linear_cases(8192 // shrink, 768, 3072, 32),
        *_linear_cases(4096 // shrink, 2048, 2048, 4096 // shrink),
        *_row_cases(8192 // shrink, 768, 8),
        *_row_cases(32768 // shrink, 4096, 32),
        *_norm_cases(8192 // shrink, 768, 1, 1, 8),
        *_norm_cases(32768 // shrink, 4096, 1, 1, 32),
        *_norm_cases(256 // min(shrink, 32), 256, 1024, 32, 8),
        *_conv_cases(256, 64, 64, 32 // min(shrink, 4), 1, 8),
        *_conv_cases(256, 128, 256, 16 // min(shrink, 4), 2, 8),
        *_conv_cases(256, 512, 512, 4, 1, 8),
        *_cross_entropy_cases(8192 // shrink, 32768),
        *_cross_entropy_cases(8192 // shrink, 131072),
        *_cross_entropy_cases(4096 // shrink, 50257),
        *_cross_entropy_cases(65536 // shrink, 48),
        *_attention_cases(16 // min(shrink, 16), 12, 12, 1024 // min(shrink, 16), 64),
        *_attention_cases(16 // min(shrink, 16), 12, 12, 1024 // min(shrink, 16), 64, documents=4),
        *_attention_cases(16 // min(shrink, 16), 12, 12, 1024 // min(shrink, 16), 64, dropout=0.1),
        *_attention_cases(1, 32 // min(shrink, 4), 8 // min(shrink, 4), 4096 // min(shrink, 32), 128),
    ]
