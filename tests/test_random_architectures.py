"""Architectures nobody thought of: drawn at random, compared with the oracle in float64.

A falsifying example prints its specification.
"""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor, nn

import fastreg
import oracle
from architectures import ACTIVATIONS, CLASSES, Spec, Tokens, build
from cases import cross_entropy, square

EXACT = 1e-10
WEIGHT = 0.5
# Explaining a failure re-runs it hundreds of times; a shrunk example says enough.
DRAWS = settings(
    max_examples=120, derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink]
)


def check(model: nn.Module, inputs: Tensor, micro_batch_size: int, loss: str, reduction: str) -> None:
    """The engine's gradient and norms against the oracle's."""
    shape = model(inputs).shape
    losses = cross_entropy if loss == "cross_entropy" else square
    targets = torch.randint(CLASSES, shape[:-1]) if losses is cross_entropy else torch.randn(shape).double()

    def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return losses(outputs, targets).mean()

    arguments = (model, mean_loss, inputs, targets, micro_batch_size)
    want = oracle.penalty_gradient(*arguments, weight=WEIGHT, reduction=reduction)
    norms = oracle.sq_norms(*arguments)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=micro_batch_size)
    outputs = model(inputs)
    values = losses(outputs, targets)
    reg(values.sum() if reduction == "sum" else values.mean(), outputs, reduction=reduction).backward()
    oracle.assert_same_gradient(oracle.collected_gradient(model), want, EXACT)
    torch.testing.assert_close(reg.sq_norms, norms, rtol=EXACT, atol=1e-15)


flag = st.booleans()
bits = st.integers(0, 15)
activations = st.tuples(st.just("activation"), st.sampled_from(sorted(ACTIVATIONS)))
elementwise = st.tuples(st.just("elementwise"), bits, bits)
prelu = st.tuples(st.just("prelu"), flag)
samples = st.integers(1, 7)
losses = st.sampled_from(["cross_entropy", "square"])
reductions = st.sampled_from(["mean", "sum"])
freezing = st.one_of(st.just(0), st.integers(0, 2**16 - 1))


def nested(parts: st.SearchStrategy, image: bool) -> st.SearchStrategy:
    """Residual and repeated bodies of shape-preserving parts."""
    kinds = st.sampled_from(["residual", "twice"])
    return st.tuples(kinds, st.lists(parts, min_size=0, max_size=2).map(tuple), st.just(image))


vector_norms = st.one_of(
    st.tuples(st.just("layer_norm"), st.just(1), flag), st.tuples(st.just("rms_norm"))
)
vector_layers = st.one_of(
    st.tuples(st.just("linear"), st.integers(3, 6), flag),
    st.tuples(st.just("low_rank"), st.integers(3, 6)),
    activations, vector_norms, elementwise, prelu,
    nested(st.one_of(activations, vector_norms, elementwise), image=False),
)
convolutions = st.tuples(
    st.just("convolution"), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 2), st.integers(1, 2), flag,
)
transposed = st.tuples(
    st.just("transposed"), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), flag
)
image_norms = st.one_of(
    st.tuples(st.just("group_norm")), st.tuples(st.just("instance_norm")), st.tuples(st.just("batch_norm"), flag)
)
image_layers = st.one_of(
    convolutions, transposed, activations, image_norms, elementwise, prelu,
    nested(st.one_of(activations, image_norms), image=True),
)
token_layers = st.one_of(
    st.tuples(st.just("attention"), flag, flag), activations, vector_norms, elementwise,
    st.tuples(st.just("layer_norm"), st.just(2), flag),
    nested(st.one_of(st.tuples(st.just("attention"), flag, flag), vector_norms), image=False),
)


@DRAWS
@given(
    specs=st.lists(vector_layers, min_size=1, max_size=5), lead=st.lists(st.integers(1, 3), max_size=2),
    count=samples, size=st.integers(1, 8), head=st.sampled_from(["flatten", "last"]),
    frozen=freezing, loss=losses, reduction=reductions, seed=st.integers(0, 99),
)
def test_vectors(specs, lead, count, size, head, frozen, loss, reduction, seed) -> None:
    torch.manual_seed(seed)
    shape = (*lead, 4)
    model = build([], specs, torch.randn(2, *shape), head, frozen)
    check(model, torch.randn(count, *shape).double(), min(size, count + 1), loss, reduction)


def without_batch_statistics(spec: Spec) -> Spec:
    """The description with batch norm in evaluation mode."""
    if spec[0] == "batch_norm":
        return ("batch_norm", False)
    if spec[0] in ("residual", "twice"):
        return (spec[0], tuple(without_batch_statistics(part) for part in spec[1]), spec[2])
    return spec


@DRAWS
@given(
    specs=st.lists(image_layers, min_size=1, max_size=4), dimensions=st.integers(1, 3),
    count=samples, size=st.integers(1, 8), frozen=freezing, loss=losses, reduction=reductions,
    seed=st.integers(0, 99),
)
def test_images(specs, dimensions, count, size, frozen, loss, reduction, seed) -> None:
    torch.manual_seed(seed)
    shape = {1: (2, 7), 2: (2, 5, 4), 3: (2, 4, 3, 4)}[dimensions]
    size = min(size, count + 1)
    if min(size, count) == 1 or count % size == 1:
        specs = [without_batch_statistics(spec) for spec in specs]
    model = build([], specs, torch.randn(2, *shape), "flatten", frozen)
    check(model, torch.randn(count, *shape).double(), size, loss, reduction)


@DRAWS
@given(
    specs=st.lists(token_layers, min_size=1, max_size=3),
    positions=st.sampled_from(["none", "embedding", "parameter"]), padding=st.sampled_from([None, 0]),
    count=samples, size=st.integers(1, 8), head=st.sampled_from(["flatten", "last"]), tied=flag,
    frozen=freezing, loss=losses, reduction=reductions, seed=st.integers(0, 99),
)
def test_tokens(specs, positions, padding, count, size, head, tied, frozen, loss, reduction, seed) -> None:
    torch.manual_seed(seed)
    vocabulary, length = CLASSES, 3
    index = torch.randint(vocabulary, (count, length))
    first = Tokens(vocabulary, length, 4, positions, padding)
    model = build([first], specs, index[:1], head, frozen)
    if tied and head == "last":
        # Frozen or not, the one weight is now embedding and head at once.
        model[-1].weight = first.double().tokens.weight
    check(model, index, min(size, count + 1), loss, reduction)
