"""Floating point operations of a step: its matrix products and convolutions, ours among them.

torch's counter leaves out elementwise work and reductions, and so does this one. Ops of ours are counted as full
products (nothing is taken off for symmetry or causality) in the cheaper of their forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastreg.kernels import registry


def count(run: Callable[[], None]) -> int:
    """Floating point operations of ``run()``, a multiplication and its addition as two.

    Example:
        >>> import torch
        >>> from fastreg.benchmark.flops import count
        >>> count(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def _outer_sum(a: Tensor, d: Tensor, offsets: Sequence[int], **_out: object) -> int:
    return 2 * a.numel() * d.shape[1]


def _outer_sqnorm(a: Tensor, d: Tensor, offsets: Sequence[int], bias: bool, **_out: object) -> int:
    """Pairs of rows, or the gradients themselves."""
    inputs, outputs = a.shape[1], d.shape[1]
    return sum(min(2 * s * s * (inputs + outputs), 2 * s * inputs * outputs) for s in _sizes(offsets))


def _outer_apply(q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], *_rest: object, **_out: object) -> int:
    """``(Q K^T) V``, or ``Q (K^T V)``."""
    inputs, outputs = q.shape[1], v.shape[1]
    return sum(min(2 * s * s * (inputs + outputs), 4 * s * inputs * outputs) for s in _sizes(offsets))


def _conv_outer(x: Tensor, d: Tensor, kernel: Sequence[int], *_rest: object, **_out: object) -> int:
    return 2 * d.numel() * x.shape[2] * math.prod(kernel)


def _conv_apply(x: Tensor, weights: Tensor, *_rest: object, out_val: Tensor) -> int:
    return 2 * out_val.numel() * weights[0, 0].numel()


def _sizes(offsets: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(offsets)]


def _convolution_backward(d: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_out: object) -> int:
    """Each gradient costs what the forward does."""
    *_, transposed, _output_padding, _groups, wanted = rest
    return 2 * sum(wanted[:2]) * (x if transposed else d).numel() * weight[0].numel()


def _attention(q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_out: object) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_out: object) -> int:
    return sdpa_backward_flop_count(d.shape, q.shape, k.shape, v.shape)


def _our_attention(products: int) -> Callable[..., int]:
    """A formula: that many products of ``[T, E]`` with ``[E, U]``, or of ``[T, U]`` with ``[U, E]``, for each head."""

    def formula(q: Tensor, k: Tensor, *_rest: object, **_out: object) -> int:
        return 2 * products * q.numel() * k.shape[2]

    return formula


OURS = {
    "outer_sum": _outer_sum,
    "outer_sqnorm": _outer_sqnorm,
    "outer_apply": _outer_apply,
    "conv_outer": _conv_outer,
    "conv_apply": _conv_apply,
    "attention_forward": _our_attention(2),
    "attention_backward": _our_attention(5),
    "attention_double_backward": _our_attention(12),
}
FORMULAS: dict[Any, Any] = {
    # torch multiplies the gradient of a grouped weight by the groups once too often.
    torch.ops.aten.convolution_backward: _convolution_backward,
    # torch counts its attention on a GPU only.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **{op.overload.overloadpacket: OURS[name] for name, op in registry().items() if name in OURS},
}
for _formula in FORMULAS.values():
    # torch's mark of a formula that takes the arguments themselves in place of their shapes: offsets are values.
    _formula._get_raw = True
