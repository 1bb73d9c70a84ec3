"""What varies from step to step: sampled labels, steps without a penalty, a random part of the micro-batches."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME

WEIGHT = 0.7
CASE = BY_NAME["mlp_gelu"]


def gradient(reg: fastreg.Regularizer, model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    """The gradient one step leaves."""
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    return oracle.collected_gradient(model)


def attached(**settings) -> tuple[fastreg.Regularizer, nn.Module, Tensor, Tensor]:
    """Eight samples in four micro-batches."""
    model = CASE.model()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, **settings)
    return reg, model, *CASE.batch(8)


def expected(x: Tensor, y: Tensor, size: int, weight: float) -> oracle.Gradient:
    return oracle.penalty_gradient(CASE.model(), CASE.loss_fn, x, y, size, weight=weight)


def test_fisher_trace_seeds() -> None:
    """The same seed draws the same labels; the next step draws others."""
    x, y = CASE.batch(8)
    drawn = []
    for seed in (3, 3, 4):
        model = CASE.model()
        reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=WEIGHT, seed=seed), micro_batch_size=2)
        labels = []
        for _ in range(4):
            gradient(reg, model, x, y)
            labels.append(reg.penalties[0].last_labels)
        drawn.append(torch.stack(labels))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_every_third_step() -> None:
    """The steps in between are plain; over three steps the penalty has the same weight as on every one."""
    reg, model, x, y = attached(every=3)
    grads = [gradient(reg, model, x, y) for _ in range(6)]
    plain = expected(x, y, 8, 0.0)
    full = expected(x, y, 2, 3 * WEIGHT)
    for i, got in enumerate(grads):
        want = full if i % 3 == 0 else plain
        assert oracle.relative_error(got, want) < 1e-10


def test_a_fraction_is_unbiased() -> None:
    """Half of four micro-batches: six subsets, whose mean is the full gradient."""
    reg, model, x, y = attached(fraction=0.5)
    norms = oracle.sq_norms(CASE.model(), CASE.loss_fn, x, y, 2)
    penalties = {
        round(float(norms[list(pair)].mean()), 9): pair for pair in itertools.combinations(range(4), 2)
    }
    assert len(penalties) == 6
    seen: dict[tuple[int, int], oracle.Gradient] = {}
    for _ in range(200):
        grads = gradient(reg, model, x, y)
        seen[penalties[round(float(reg.metrics["fastreg/grad_norm"]), 9)]] = grads
        if len(seen) == 6:
            break
    assert len(seen) == 6
    full = expected(x, y, 2, WEIGHT)
    mean = {name: sum(g[name] for g in seen.values()) / 6 for name in full}
    assert oracle.relative_error(mean, full) < 1e-10
    assert oracle.relative_error(next(iter(seen.values())), full) > 1e-4


@pytest.mark.parametrize("fraction", [0.01, 0.34, 0.67, 1.0])
def test_a_fraction_of_ragged_micro_batches(fraction: float) -> None:
    """At least one micro-batch is always taken; every drawn gradient is that of some subset."""
    model, (x, y) = CASE.model(), CASE.batch(7)
    cuts = oracle.cut(7, 3)
    plain = expected(x, y, 7, 0.0)
    singles = []
    for piece in cuts:
        alone = expected(x[piece], y[piece], 7, 1.0)
        without = expected(x[piece], y[piece], 7, 0.0)
        singles.append({name: alone[name] - without[name] for name in alone})
    reg = fastreg.Regularizer(
        model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=3, fraction=fraction
    )
    for _ in range(4):
        got = gradient(reg, model, x, y)
        errors = []
        for taken in range(1, 4):
            for chosen in itertools.combinations(range(3), taken):
                penalty = {name: sum(singles[k][name] for k in chosen) / taken for name in plain}
                want = {name: plain[name] + WEIGHT * penalty[name] for name in plain}
                errors.append(oracle.relative_error(got, want))
        assert min(errors) < 1e-10


def test_a_checkpoint_continues_bit_for_bit() -> None:
    """Counters, the choice of micro-batches and the label draw are restored by `load_state_dict`."""

    def build() -> tuple[nn.Module, fastreg.Regularizer]:
        model = CASE.model()
        penalties = [fastreg.GradNorm(weight=0.4), fastreg.FisherTrace(weight=0.5, seed=1)]
        return model, fastreg.Regularizer(model, penalties, micro_batch_size=2, every=2, fraction=0.5, seed=3)

    x, y = CASE.batch(8)
    model, reg = build()
    for _ in range(3):
        gradient(reg, model, x, y)
    state = copy.deepcopy(reg.state_dict())
    want = [gradient(reg, model, x, y) for _ in range(4)]
    fresh, resumed = build()
    resumed.load_state_dict(state)
    got = [gradient(resumed, fresh, x, y) for _ in range(4)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(got, want, strict=True) for name in a)


def test_some_of_the_parameters() -> None:
    """With `parameters=` the norms are of those alone; the gradient of R reaches all."""
    model, (x, y) = CASE.model(), CASE.batch(8)
    chosen = {name: p for name, p in model.named_parameters() if name in ("0.weight", "4.bias")}
    losses = [CASE.loss_fn(model(x[piece]), y[piece]) for piece in oracle.cut(8, 3)]
    n = torch.tensor([3.0, 3.0, 2.0], dtype=torch.float64)
    whole = torch.stack(losses) @ n / 8 + WEIGHT * oracle.penalty_value(losses, chosen)
    want = oracle.gradient_of(whole, dict(model.named_parameters()), create_graph=False)
    reg = fastreg.Regularizer(
        model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=3, parameters=chosen.values()
    )
    oracle.assert_same_gradient(gradient(reg, model, x, y), want)
