"""Attention by tiles against float64 autograd through a softmax that is stored: every pattern, width and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import test_ops
from fastreg.errors import FastregError
from fastreg.kernels import backend, registry
from fastreg.kernels._examples import normal
from fastreg.kernels._launch import recorded
from fastreg.kernels.attention import Pattern, attention_forward
from tolerances import Comparison, assert_all_close, perturbed

pytest.importorskip("triton")

from fastreg.kernels.attention import triton as tiled

poisoned_allocations = test_ops.poisoned_allocations
pytestmark = [pytest.mark.gpu] if test_ops.ON_GPU else []
DEVICE = "cuda" if test_ops.ON_GPU else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Either half has bits that a sign or a product of 32 bits would lose.
SEED = -0x6EDCBA9876543210
Shape = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Case:
    """A call: samples, heads, heads of keys, queries, keys, features; what is seen."""

    name: str
    dtype: torch.dtype
    shape: Shape
    fields: dict[str, object]

    def pattern(self) -> Pattern:
        """With tensors of the fields that name one."""
        drawn = {name: tensor(self.shape) for name, tensor in self.fields.items() if callable(tensor)}
        return Pattern(**{"scale": self.shape[5] ** -0.5, **self.fields, **drawn})

    def __str__(self) -> str:
        return self.name


def padding(shape: Shape) -> Tensor:
    """Keys that no query of a sample sees; the last sample sees none."""
    lengths = torch.arange(shape[0]).flip(0) * 5
    return (torch.arange(shape[4]) < lengths[:, None]).view(shape[0], 1, 1, shape[4]).to(DEVICE)


def transposed(shape: Shape) -> Tensor:
    """A mask for each head, about two thirds of it, keys before queries in memory."""
    seen = torch.arange(shape[1] * shape[4] * shape[3]) ** 2 % 7 % 3 != 1
    return seen.view(1, shape[1], shape[4], shape[3]).mT.to(DEVICE)


def biases(shape: Shape) -> Tensor:
    """Numbers added to the scores of a sample, of which a few are -inf."""
    drawn = normal(F32, DEVICE)(shape[0], 1, shape[3], shape[4])
    return drawn.masked_fill(drawn > 1, -torch.inf)


def documents(shape: Shape) -> Tensor:
    """Three documents, the middle one a third of the tokens."""
    ends = torch.tensor([shape[3] // 3 - 1, 2 * shape[3] // 3 + 1, shape[3]])
    lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    return torch.stack([ends - lengths, ends]).repeat_interleave(lengths, 1).int().to(DEVICE)


def seeded(_shape: Shape) -> Tensor:
    """The key of dropout."""
    return torch.tensor([SEED], device=DEVICE)


DROPPED = {"seed": seeded, "dropout": 0.3}
# Past a tile on both sides in every dtype; widths with and without padding, whole and in parts.
CASES = [
    Case("full", F32, (1, 2, 1, 18, 33, 8), {}),
    Case("causal", F32, (1, 1, 1, 35, 18, 8), {"right": 0}),
    Case("left", F32, (1, 1, 1, 33, 20, 5), {"left": 3}),
    Case("right", F32, (1, 1, 1, 18, 35, 8), {"right": 2, "scale": -0.7}),
    Case("window", F32, (1, 1, 1, 35, 35, 8), {"left": 2, "right": 1}),
    Case("wide window", F32, (1, 1, 1, 17, 9, 8), {"left": 1000, "right": 9}),
    Case("padding", F32, (3, 1, 1, 3, 9, 8), {"mask": padding}),
    Case("transposed", F32, (1, 4, 2, 18, 7, 8), {"mask": transposed, "right": 3}),
    Case("biases", F32, (2, 1, 1, 7, 19, 8), {"mask": biases}),
    Case("documents", F32, (1, 2, 1, 37, 37, 8), {"spans": documents, "right": 0}),
    Case("dropout", F32, (1, 2, 1, 18, 19, 8), DROPPED),
    Case("everything", F32, (1, 2, 1, 20, 20, 8), {"mask": biases, "spans": documents, "left": 9, **DROPPED}),
    Case("no keys", F32, (1, 2, 1, 3, 0, 8), {}),
    Case("bfloat16", BF16, (1, 2, 1, 70, 67, 16), {"left": 40, "right": 0}),
    Case("bfloat16 documents", BF16, (1, 1, 1, 70, 70, 16), {"spans": documents, "right": 0, **DROPPED}),
    Case("width 80", BF16, (1, 2, 1, 3, 67, 80), {"mask": transposed}),
    Case("width 96", F16, (1, 1, 1, 70, 5, 96), {"right": 0}),
    Case("width 130", F32, (1, 1, 1, 1, 2, 130), {}),
    Case("width 160", F16, (1, 1, 1, 2, 3, 160), {"right": 0}),
    Case("width 256", BF16, (1, 1, 1, 3, 5, 256), {"mask": biases, **DROPPED}),
]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> int:
    """First word of Philox4x32-10 (Salmon et al. 2011), in integers without a size."""
    for turn in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        keys = [(k + turn * step) % 2**32 for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        counter = (
            second >> 32 ^ counter[1] ^ keys[0], second % 2**32, first >> 32 ^ counter[3] ^ keys[1], first % 2**32
        )  # fmt: skip
    return counter[0]


def kept(shape: Shape, pattern: Pattern) -> Tensor:
    """What dropout leaves, ``[B, H, T, U]``, one entry after another."""
    sizes, seed = (*shape[:2], shape[3], shape[4]), int(pattern.seed) % 2**64
    counters = torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist()
    words = [philox((u, t, b * shape[1] + h, 0), (seed % 2**32, seed >> 32)) for b, h, t, u in counters]
    return torch.tensor(words).view(sizes) >= round(pattern.dropout * 2**32)


def visible(shape: Shape, pattern: Pattern) -> Tensor:
    """Which keys a query sees, ``[B, H, T, U]``."""
    i, j = torch.arange(shape[3])[:, None], torch.arange(shape[4])
    seen = torch.ones(shape[0], shape[1], shape[3], shape[4], dtype=torch.bool)
    if pattern.left >= 0:
        seen &= i - j <= pattern.left
    if pattern.right >= 0:
        seen &= j - i <= pattern.right
    if pattern.spans is not None:
        first, end = pattern.spans.cpu()
        seen &= (first[:, None] <= j) & (j < end[:, None])
    if pattern.mask is not None:
        seen &= pattern.mask.cpu() > (False if pattern.mask.dtype == torch.bool else -torch.inf)
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, shape: Shape, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, all scores stored, keys repeated for every head that they serve."""
    seen = visible(shape, pattern)
    k, v = (x.repeat_interleave(shape[1] // shape[2], 1) for x in (k, v))
    scores = torch.einsum("bhte,bhue->bhtu", q, k) * pattern.scale
    if pattern.mask is not None and pattern.mask.is_floating_point():
        scores = scores + pattern.mask.cpu().double().nan_to_num(neginf=0)
    # Where nothing is seen a softmax is NaN: the entry that is added to those rows takes all of it.
    blind = ~seen.any(3, keepdim=True)
    joined = torch.cat([scores.masked_fill(~seen, -torch.inf), torch.where(blind, 0.0, -torch.inf).double()], 3)
    lse = joined.logsumexp(3).masked_fill(blind[..., 0], torch.inf)
    weights = joined.softmax(3)[..., :-1]
    if pattern.dropout:
        weights = weights * kept(shape, pattern) / (1 - pattern.dropout)
    return weights @ v, lse


def derivatives(operands: list[Tensor], shape: Shape, pattern: Pattern) -> list[tuple[Tensor, ...]]:
    """What the three ops must return, by torch's derivatives of :func:`dense`."""
    q, k, v, d, *directions = (x.cpu().double().requires_grad_() for x in operands)
    out, lse = dense(q, k, v, shape, pattern)
    first = torch.autograd.grad(out, (q, k, v), d, create_graph=True)
    paired = sum((g * x.detach()).sum() for g, x in zip(first, directions, strict=True))
    second = torch.autograd.grad(paired, (d, q, k, v))
    return [tuple(x.detach() for x in found) for found in ((out, lse), first, second)]


def drawn(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, d, vq, vk, vv."""
    draw = normal(dtype, DEVICE)
    queries, keys = (shape[0], shape[1], shape[3], shape[5]), (shape[0], shape[2], shape[4], shape[5])
    return [draw(*(queries if side == "q" else keys)) for side in "qkkqqkk"]


def computed(operands: list[Tensor], lse: Tensor, pattern: Pattern) -> list[tuple[Tensor, ...]]:
    """Results of the three ops; the log-sum-exp given to the derivatives is the dense one."""
    (q, k, v, d, *directions), lse = operands, lse.to(DEVICE, F32)
    return [
        tiled.attention_forward(q, k, v, *pattern),
        tiled.attention_backward(q, k, v, lse, d, *pattern),
        tiled.attention_double_backward(q, k, v, lse, d, *directions, *pattern),
    ]


def compared(operands: list[Tensor], shape: Shape, pattern: Pattern) -> list[Comparison]:
    """The ops' results beside the dense ones, and those of operands moved by a rounding."""
    wanted = derivatives(operands, shape, pattern)
    moved = derivatives([perturbed(x.cpu().double()) for x in operands], shape, pattern)
    got, found, reduced = computed(operands, wanted[0][1], pattern), [], max(shape)
    for op, *results in zip(("forward", "backward", "double"), got, wanted, moved, strict=True):
        for place, (got, want, near) in enumerate(zip(*results, strict=True)):
            # Infinite log-sum-exps must be in the same places, and then compare as zeros.
            assert torch.equal(got.cpu().isposinf(), want.isposinf())
            finite = (x.cpu().nan_to_num(posinf=0, nan=torch.nan) for x in (got, want, near))
            found.append(Comparison(f"{op}[{place}]", *finite, reduced))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_the_derivatives_of_the_dense_form(case: Case) -> None:
    assert_all_close(compared(drawn(case.shape, case.dtype), case.shape, case.pattern()))


# Scores that a query does not see may leave float32; they are replaced.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("op", ["attention_forward", "attention_backward", "attention_double_backward"])
def test_large_scores_and_gradients_with_a_large_mean(op: str) -> None:
    shape, pattern = (1, 1, 1, 20, 20, 4), Pattern(right=0, scale=0.5)
    q, k, v, d, vq, vk, vv = drawn(shape, F32)
    (_, lse), *_ = derivatives([20 * q, k + 3, v + 30, d, vq, vk, vv], shape, pattern)
    args = [20 * q, k + 3, v + 30, lse.to(q), d, vq, vk + 30, vv - 30]
    args = {"attention_forward": args[:3], "attention_backward": args[:5]}.get(op, args)
    # The log-sum-exp has been rounded: the oracle is what stored scores make of that one.
    assert_all_close(test_ops.compare(registry()[op], op, (*args, *pattern), getattr(tiled, op)(*args, *pattern)))


@pytest.mark.parametrize("dropout", [1e-3, 0.5, 0.999, 1.0])
def test_dropout_keeps_the_entries_of_philox(dropout: float) -> None:
    shape = (2, 4, 2, 3, 35, 35)
    pattern = Pattern(seed=seeded(shape), dropout=dropout)
    q, k = torch.zeros(2, 4, 3, 35, device=DEVICE), torch.zeros(2, 2, 35, 35, device=DEVICE)
    # Every entry of the softmax is 1/35, and the values are the columns of the identity: the output is M / 35.
    out, _ = tiled.attention_forward(q, k, torch.eye(35, device=DEVICE).expand_as(k), *pattern)
    want = kept(shape, pattern) & (dropout < 1)
    assert torch.equal(out.cpu() > 0, want)
    torch.testing.assert_close(35 * out.cpu(), want / (1 - dropout) if dropout < 1 else torch.zeros_like(out.cpu()))


# The interpreter's maximum of a row of NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("which", ["documents", "window"])
def test_tiles_that_nobody_sees_are_not_visited(which: str) -> None:
    shape, inner = (1, 1, 1, 192, 192, 8), slice(64, 128)
    first = torch.arange(192, dtype=torch.int32, device=DEVICE) // 64 * 64
    pattern = Pattern(spans=torch.stack([first, first + 64])) if which == "documents" else Pattern(left=0, right=0)
    clean = drawn(shape, F32)
    wanted = derivatives(clean, shape, pattern)
    # Zero times NaN is NaN: the inner rows, whole tiles, are right only if nothing multiplies them by the others.
    spoilt = [torch.full_like(x, torch.nan) for x in clean]
    for x, source in zip(spoilt, clean, strict=True):
        x[:, :, inner] = source[:, :, inner]
    results = computed(spoilt, wanted[0][1], pattern)
    for got, want in zip(sum(results, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(got[:, :, inner].cpu().double(), want[:, :, inner], rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_the_others() -> None:
    shape = (2, 2, 1, 3, 4, 8)
    operands, pattern = drawn(shape, F32), Pattern(right=0)
    lse = derivatives(operands, shape, pattern)[0][1]
    whole = computed(operands, lse, pattern)
    alone = computed([x[1:] for x in operands], lse[1:], pattern)
    assert all(torch.equal(a[1:], b) for a, b in zip(sum(whole, ()), sum(alone, ()), strict=True))


def test_nothing_of_the_size_of_the_scores_is_allocated() -> None:
    q, lse = torch.empty(1, 1, 8192, 64, device="meta"), torch.empty(1, 1, 8192, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    pattern = Pattern(seed=seed, right=0, dropout=0.5)
    with recorded() as launches:
        tiled.attention_forward(q, q, q, *pattern)
        tiled.attention_backward(q, q, q, lse, q, *pattern)
        tiled.attention_double_backward(q, q, q, lse, q, q, q, q, *pattern)
    assert len(launches) == 1 + 4 + 5
    assert max(x.numel() for launch in launches for x in launch.args if isinstance(x, Tensor)) == q.numel()


def test_heads_wider_than_the_tiles_are_refused() -> None:
    q = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with backend("triton"), pytest.raises(FastregError, match="at most 256 features, not 257"):
        attention_forward(q, q, q, *Pattern())
