"""The attention that recomputes its softmax, against its definition by plain autograd and finite differences."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_oracle import drawn_factors, explicit, second_order
from fastreg.errors import FastregError
from fastreg.fused_attention import FusedAttention, fits
from fastreg.kernels import (
    Pattern,
    attention_backward,
    attention_double_backward,
    attention_forward,
    backend,
    registry,
)
from tolerances import Comparison, assert_all_close, perturbed

Shape = tuple[int, int, int, int, int, int]
SEED = torch.tensor([0x1234567890ABCDEF])


def spans(*lengths: int) -> Tensor:
    ends = torch.tensor(lengths).cumsum(0)
    bounds = torch.stack((ends - torch.tensor(lengths), ends))
    return bounds.repeat_interleave(torch.tensor(lengths), 1).int()


def seen(*shape: int) -> Tensor:
    """Half of the entries; query 1 sees none."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[..., 1, :] = False
    return mask


def added(*shape: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return numbers.masked_fill(numbers > 1, -math.inf)


# Samples, heads of queries and of keys, queries, keys, width; what is seen.
CASES: dict[str, tuple[Shape, Pattern]] = {
    "one": ((1, 1, 1, 1, 1, 1), Pattern()),
    "full": ((2, 3, 3, 5, 7, 4), Pattern()),
    "causal": ((1, 2, 2, 33, 33, 20), Pattern(right=0)),
    "causal_long_keys": ((1, 2, 2, 4, 7, 3), Pattern(right=0)),
    "causal_short_keys": ((1, 2, 2, 7, 4, 3), Pattern(right=0)),
    "grouped": ((2, 6, 2, 5, 7, 4), Pattern(right=0)),
    "window": ((1, 2, 1, 19, 23, 4), Pattern(left=4, right=2)),
    "window_beyond_the_keys": ((1, 1, 1, 9, 4, 3), Pattern(left=2)),
    "spans": ((2, 2, 1, 20, 20, 4), Pattern(spans=spans(1, 12, 7), right=0)),
    "spans_that_are_empty": ((1, 1, 1, 4, 4, 3), Pattern(spans=torch.tensor([[0, 0, 2, 2], [2, 2, 2, 2]]).int())),
    "bool_mask": ((2, 4, 2, 5, 9, 4), Pattern(mask=seen(2, 1, 5, 9))),
    "bool_mask_of_keys": ((2, 2, 2, 5, 9, 4), Pattern(mask=seen(2, 1, 2, 9)[:, :, :1], right=0)),
    "bool_mask_of_queries": ((2, 2, 2, 5, 9, 4), Pattern(mask=seen(2, 1, 5, 2)[..., :1])),
    "float_mask": ((2, 4, 2, 5, 9, 4), Pattern(mask=added(1, 4, 5, 9), left=3)),
    "dropout": ((2, 4, 2, 5, 9, 4), Pattern(seed=SEED, dropout=0.4)),
    "dropout_of_all": ((1, 1, 1, 3, 4, 2), Pattern(seed=SEED, dropout=1.0)),
    "everything": (
        (2, 4, 2, 18, 18, 5), Pattern(added(2, 1, 18, 18), spans(10, 8), SEED, 1.0, 6, 0, 0.2)
    ),
    "blocks_causal": ((1, 2, 1, 300, 300, 8), Pattern(right=0)),
    "blocks_window": ((1, 1, 1, 300, 270, 8), Pattern(left=40, right=9)),
    "blocks_spans": ((1, 2, 2, 300, 300, 8), Pattern(spans=spans(3, 150, 7, 140), right=0)),
    "blocks_mask_and_dropout": ((2, 1, 1, 260, 20, 8), Pattern(mask=seen(2, 1, 260, 20), seed=SEED, dropout=0.3)),
    **{f"width_{e}": ((1, 2, 1, 5, 6, e), Pattern(right=0)) for e in (16, 80, 96, 256)},
}  # fmt: skip


def operands(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, and the directions for the output and for the gradients of each."""
    samples, heads, shared, queries, keys, width = shape
    draw = torch.Generator().manual_seed(0)
    of_queries, of_keys = (samples, heads, queries, width), (samples, shared, keys, width)
    every = [
        torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)
        for s in (of_queries, of_keys, of_keys, of_queries, of_queries, of_keys, of_keys)
    ]
    return [t.requires_grad_() for t in every[:3]], every[3:]


def fused(pattern: Pattern) -> Callable[..., Tensor]:
    return lambda q, k, v: FusedAttention.apply(q, k, v, *pattern)[0]


def by_definition(shape: Shape, pattern: Pattern) -> Callable[..., Tensor]:
    factors = drawn_factors((shape[0], shape[1], *shape[3:5]), pattern) if pattern.dropout else 1.0
    return lambda q, k, v: explicit(q, k, v, pattern, factors)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["native", "reference"])
def test_every_derivative_is_that_of_the_definition(form: str, name: str) -> None:
    shape, pattern = CASES[name]
    pattern = pattern._replace(scale=shape[5] ** -0.5)
    inputs, directions = operands(shape)
    want = second_order(by_definition(shape, pattern), inputs, directions)
    with backend(form):
        got = second_order(fused(pattern), inputs, directions)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, float(b.detach().abs().max())))


SMALL = [name for name, (shape, _) in CASES.items() if math.prod(shape) < 2000]


@pytest.mark.parametrize("name", SMALL)
def test_finite_differences(name: str) -> None:
    shape, pattern = CASES[name]
    inputs, _ = operands((1, *shape[1:3], *(min(n, 5) for n in shape[3:5]), min(shape[5], 2)))
    mask = None if pattern.mask is None else pattern.mask[:1, :, : inputs[0].shape[2], : inputs[1].shape[2]]
    pattern = pattern._replace(mask=mask, scale=0.6)
    assert gradcheck(fused(pattern), inputs)
    assert gradgradcheck(fused(pattern), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "grouped", "float_mask", "dropout", "width_80"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    shape, pattern = CASES[name]
    inputs, directions = operands(shape, dtype)
    got = second_order(fused(pattern._replace(scale=0.4)), inputs, directions)
    judge = by_definition(shape, pattern._replace(scale=0.4))
    wide = [[t.detach().double().requires_grad_() for t in inputs], [t.double() for t in directions]]
    want, moved = second_order(judge, *wide), second_order(judge, *([perturbed(t) for t in of] for of in wide))
    parts = zip(got, want, moved, strict=True)
    assert all(t.dtype == dtype for t in got)
    assert_all_close(
        [Comparison(f"{name}[{i}]", *(t.detach() for t in part), 2 * max(shape)) for i, part in enumerate(parts)]
    )


@pytest.mark.parametrize("form", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_that_see_no_key(form: str, dtype: torch.dtype) -> None:
    (q, k, v), (d, vq, vk, vv) = (
        [t.detach() for t in of] for of in operands((1, 2, 1, 4, 6, 3), dtype)
    )
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    mask[0, 0, 2] = False
    with backend(form):
        out, lse = attention_forward(q, k, v, *Pattern(mask=mask))
        dq, *_ = attention_backward(q, k, v, lse, d, *Pattern(mask=mask))
        results = attention_double_backward(q, k, v, lse, d, vq, vk, vv, *Pattern(mask=mask))
    assert lse.isposinf().nonzero()[:, 2].tolist() == [2, 2]
    assert all(t[:, :, 2].count_nonzero() == 0 for t in (out, dq, *results[:2]))
    assert all(t.isfinite().all() for t in (out, dq, *results))


def test_what_dropout_leaves() -> None:
    pattern = Pattern(seed=SEED, dropout=0.3)
    shape = (3, 4, 40, 50)
    factors = drawn_factors(shape, pattern)
    kept = factors > 0.5
    torch.testing.assert_close(factors, kept.double() / 0.7, rtol=1e-12, atol=1e-12)
    # Four standard errors of a rate over 24000 draws, and of those over the pairs of two neighbours in each dimension.
    assert abs(float(kept.double().mean()) - 0.7) < 4 * math.sqrt(0.21 / kept.numel())
    for a, b in (kept.narrow(dimension, 0, 2).unbind(dimension) for dimension in range(4)):
        assert abs(float((a & b).double().mean()) - 0.49) < 4 * math.sqrt(0.49 * 0.51 / a.numel())
    assert torch.equal(drawn_factors(shape, pattern), factors)
    assert not torch.equal(drawn_factors(shape, pattern._replace(seed=SEED + 2**40)), factors)


def test_an_entry_is_dropped_by_its_place_alone() -> None:
    whole = drawn_factors((2, 3, 150, 20), Pattern(seed=SEED, dropout=0.5))
    assert torch.equal(drawn_factors((1, 3, 140, 17), Pattern(seed=SEED, dropout=0.5)) > 0, whole[:1, :, :140, :17] > 0)


@pytest.mark.parametrize("name", ["grouped", "blocks_causal", "everything"])
def test_threads_change_no_bit(name: str) -> None:
    shape, pattern = CASES[name]
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(second_order(fused(pattern), *operands(shape, torch.float32)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


MEASURED = """
import resource, torch
from fastreg.kernels import Pattern, attention_backward, attention_double_backward, attention_forward
x, pattern = torch.randn(1, 1, 8192, 16), Pattern(scale=0.25, right=0)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
out, lse = attention_forward(x, x, x, *pattern)
attention_backward(x, x, x, lse, x, *pattern)
attention_double_backward(x, x, x, lse, x, x, x, x, *pattern)
print(peak() - before)
"""


def test_memory_is_linear_in_the_length() -> None:
    said = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True).stdout
    # One matrix of scores would be 256 MiB; four blocks of 132 rows are 17.
    assert float(said) < 64


def test_heads_that_are_views_of_one_packed_tensor() -> None:
    packed = torch.randn(2, 7, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def second(attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        (grad,) = torch.autograd.grad(attend(q, k, v).square().sum(), packed, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), packed)[0]

    got = second(fused(Pattern(scale=5**-0.5, right=0)))
    with sdpa_kernel(SDPBackend.MATH):
        want = second(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["native", "reference"])
@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0)])
def test_without_queries_or_keys(queries: int, keys: int, form: str) -> None:
    q, k = torch.randn(1, 2, queries, 4), torch.randn(1, 2, keys, 4)
    with backend(form):
        out, lse = attention_forward(q, k, k, *Pattern(right=0))
        results = attention_double_backward(q, k, k, lse, q, q, k, k, *Pattern(right=0))
    assert lse.isposinf().all()
    assert [tuple(t.shape) for t in results] == [(1, 2, n, 4) for n in (queries, queries, keys, keys)]
    assert all(t.count_nonzero() == 0 for t in (out, *results))


@pytest.mark.parametrize("form", ["native", "reference"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(right=0), Pattern(mask=torch.ones(1, 1, 7, 7).bool())])
def test_results_are_contiguous_whatever_the_operands_are(pattern: Pattern, form: str) -> None:
    q, k, v, d, vq, vk, vv = torch.randn(7, 2, 7, 3, 4).transpose(2, 3).unbind()
    with backend(form):
        out, lse = attention_forward(q, k, v, *pattern)
        results = [out, lse, *attention_backward(q, k, v, lse, d, *pattern)]
        results += attention_double_backward(q, k, v, lse, d, vq, vk, vv, *pattern)
    assert not q.is_contiguous() and all(t.is_contiguous() for t in results)


def test_what_it_serves() -> None:
    q, k = torch.zeros(2, 6, 4, 5), torch.zeros(2, 3, 7, 5)
    assert fits(q, q, q, grouped=False) and fits(q.bfloat16(), q.bfloat16(), q.bfloat16(), grouped=False)
    assert fits(q, k, k, grouped=True) and not fits(q, k, k, grouped=False)
    assert not fits(k, q, q, grouped=True)
    assert not fits(q[0], q[0], q[0], grouped=False)
    assert not fits(q, q, q[..., :3], grouped=False)
    assert not fits(q, q[:1], q[:1], grouped=False)
    assert not fits(q, q.double(), q.double(), grouped=False)
    assert not fits(q, q[:, :, :0], q[:, :, :0], grouped=False)


X, Y = torch.zeros(2, 4, 3, 5), torch.zeros(2, 3, 3, 5)
REFUSED = {
    "heads that do not divide": ((X, Y, Y), Pattern(), "k must be .* divisor of H = 4"),
    "shapes of keys and values": ((X, X, Y), Pattern(), "v must be"),
    "dtypes": ((X, X.double(), X), Pattern(), "k must be torch.float32"),
    "mask": ((X, X, X), Pattern(mask=torch.zeros(2, 4, 3, 2)), "mask must be"),
    "mask of integers": ((X, X, X), Pattern(mask=torch.zeros(2, 4, 3, 3).int()), "mask must be bool or floating"),
    "mask of three dimensions": ((X, X, X), Pattern(mask=torch.zeros(2, 3, 3)), "mask must be"),
    "spans of two lengths": ((X, X[:, :, :2], X[:, :, :2]), Pattern(spans=torch.zeros(2, 3).int()), "k with spans"),
    "spans of int64": ((X, X, X), Pattern(spans=torch.zeros(2, 3).long()), "spans must be torch.int32"),
    "dropout without seed": ((X, X, X), Pattern(dropout=0.1), "dropout must be a probability that comes with a seed"),
    "dropout beyond one": ((X, X, X), Pattern(seed=SEED, dropout=1.1), "dropout must be"),
    "seed": ((X, X, X), Pattern(seed=SEED.int(), dropout=0.1), "seed must be torch.int64"),
    "gradient": ((X.clone().requires_grad_(), X, X), Pattern(), "detached from autograd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    tensors, pattern, message = REFUSED[name]
    with pytest.raises(FastregError, match=f"attention_forward: .*{message}" if name != "gradient" else message):
        attention_forward(*tensors, *pattern)


def test_a_log_sum_exp_of_another_dtype_is_refused() -> None:
    with pytest.raises(FastregError, match="attention_backward: lse must be torch.float32"):
        attention_backward(X, X, X, X[..., 0].double(), X, *Pattern())


def test_the_compiled_form_takes_every_example() -> None:
    for name in ("attention_forward", "attention_backward", "attention_double_backward"):
        op = registry()[name]
        (native,) = [i for i in op.implementations if i.name == "native"]
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert all(native.why_not(*args) is None for args in op.examples(dtype, "cpu"))
