"""Statistics of one batch, against loops of single backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.stats import RidingNorms

EXACT = 1e-10
SAMPLES = 6
INDEPENDENT = [case for case in CASES if case.min_group == 1]


@pytest.mark.parametrize("size", [6, 4, 1, 9])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_micro_batch_grad_norms(case: Case, size: int) -> None:
    if size < case.min_group:
        return
    model, batch = case.model(), case.batch(SAMPLES)
    want = oracle.sq_norms(model, case.loss_fn, *batch, size)
    try:
        got = fastreg.micro_batch_grad_norms(model, case.loss_fn, batch, size)
    except UnsupportedOperation:
        assert case.may_refuse
        return
    torch.testing.assert_close(got, want, rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("case", INDEPENDENT, ids=lambda case: case.name)
def test_per_sample_grad_norms(case: Case) -> None:
    model, batch = case.model(), case.batch(SAMPLES)
    want = oracle.sq_norms_by_parameter(model, case.loss_fn, *batch, 1)
    total = torch.stack(list(want.values())).sum(0)
    try:
        got = fastreg.per_sample_grad_norms(model, case.loss_fn, batch)
        by_parameter = fastreg.per_sample_grad_norms(model, case.loss_fn, batch, per_parameter=True)
    except UnsupportedOperation:
        assert case.may_refuse
        return
    torch.testing.assert_close(got, total, rtol=EXACT, atol=0.0)
    assert by_parameter.keys() == want.keys()
    scale = float(total.max())
    for name, norms in want.items():
        torch.testing.assert_close(by_parameter[name], norms, rtol=EXACT, atol=1e-25 * scale, msg=name)


def test_statistics_leave_the_model_alone() -> None:
    """No gradient, no hook, no mode, no random number is left behind; outputs are as before."""
    case = BY_NAME["transformer_encoder"]
    model, batch = case.model(), case.batch(SAMPLES)
    before, state = model(batch[0]), torch.get_rng_state()
    fastreg.micro_batch_grad_norms(model, case.loss_fn, batch, 2)
    fastreg.per_sample_grad_norms(model, case.loss_fn, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
    assert torch.equal(model(batch[0]), before)


def test_statistics_work_on_a_model_in_evaluation_mode() -> None:
    case = BY_NAME["batch_norm_eval"]
    model, batch = case.model().eval(), case.batch(SAMPLES)
    want = oracle.sq_norms(model, case.loss_fn, *batch, 1)
    torch.testing.assert_close(
        fastreg.per_sample_grad_norms(model, case.loss_fn, batch), want, rtol=EXACT, atol=0.0
    )
    assert not model.training


def test_per_sample_norms_of_batch_norm_in_training() -> None:
    """An image is normalised by its own pixels, as it is when it is trained on alone."""
    case = BY_NAME["batch_norm_train"]
    model, batch = case.model(), case.batch(SAMPLES)
    want = oracle.sq_norms(model, case.loss_fn, *batch, 1)
    torch.testing.assert_close(
        fastreg.per_sample_grad_norms(model, case.loss_fn, batch), want, rtol=EXACT, atol=0.0
    )


def classifier(name: str) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    return BY_NAME[name].model(), BY_NAME[name].batch(SAMPLES)


@pytest.mark.parametrize("name", ["mlp_relu", "residual_conv", "transformer_encoder", "one_linear"])
def test_exact_fisher_trace_enumerates_the_labels(name: str) -> None:
    model, batch = classifier(name)
    got = fastreg.fisher_trace(model, F.cross_entropy, batch, kind="exact")
    torch.testing.assert_close(got, oracle.exact_fisher_trace(model, batch[0]), rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("name", ["mlp_relu", "residual_conv", "transformer_encoder"])
def test_empirical_fisher_trace_is_the_mean_squared_norm(name: str) -> None:
    model, batch = classifier(name)
    got = fastreg.fisher_trace(model, F.cross_entropy, batch, kind="empirical")
    want = oracle.sq_norms(model, F.cross_entropy, *batch, 1).mean()
    torch.testing.assert_close(got, want, rtol=EXACT, atol=0.0)


def test_sampled_fisher_trace_is_unbiased() -> None:
    """The mean of 400 draws lies within four standard errors of the exact trace, and draws differ."""
    model, batch = classifier("mlp_relu")
    torch.manual_seed(11)
    draws = torch.stack(
        [fastreg.fisher_trace(model, F.cross_entropy, batch, kind="sampled") for _ in range(400)]
    )
    exact = oracle.exact_fisher_trace(model, batch[0])
    error = draws.std() / len(draws) ** 0.5
    assert error > 0.0
    assert abs(float(draws.mean() - exact)) < 4 * float(error)
    # The test can tell the trace from the empirical one.
    assert abs(float(fastreg.fisher_trace(model, F.cross_entropy, batch, kind="empirical") - exact)) > 4 * float(error)


def test_the_fisher_penalty_estimates_the_trace() -> None:
    """E ||grad (1/b) sum -log p(yh_i)||^2 = tr F / b: labels are independent given the logits."""
    model, (x, y) = classifier("mlp_relu")
    exact = fastreg.fisher_trace(model, F.cross_entropy, (x, y), kind="exact")
    reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=0.0, seed=2), micro_batch_size=3)
    draws = []
    for _ in range(400):
        outputs = model(x)
        reg(F.cross_entropy(outputs, y), outputs)
        draws.append(3 * reg.metrics["fastreg/fisher_trace"])
    draws = torch.stack(draws)
    assert abs(float(draws.mean() - exact)) < 4 * float(draws.std()) / len(draws) ** 0.5


@pytest.mark.parametrize("size", [6, 4, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_ride_on_the_training_backward(case: Case, size: int) -> None:
    """One ordinary backward leaves the plain gradient and the norms, also the second time."""
    if size < case.min_group:
        return
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    want = oracle.penalty_gradient(model, case.loss_fn, inputs, targets, size, weight=0.0)
    norms = oracle.sq_norms(model, case.loss_fn, inputs, targets, size)
    with RidingNorms(model, micro_batch_size=size) as riding:
        for _ in range(2):
            try:
                case.loss_fn(model(inputs), targets).backward()
            except UnsupportedOperation:
                assert case.may_refuse
                return
            torch.testing.assert_close(riding.read(), norms, rtol=EXACT, atol=0.0)
            oracle.assert_same_gradient(oracle.collected_gradient(model), want)


def test_riding_norms_under_accumulation() -> None:
    """Losses divided by two, two backwards: the norms are those of each undivided loss, the gradients add up."""
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    with RidingNorms(model, micro_batch_size=2) as riding:
        for piece in (slice(0, 2), slice(2, 6)):
            (case.loss_fn(model(inputs[piece]), targets[piece]) / 2).backward()
            want = oracle.sq_norms(case.model(), case.loss_fn, inputs[piece], targets[piece], 2)
            torch.testing.assert_close(riding.read(scale=0.5), want, rtol=EXACT, atol=0.0)
    halves = [
        oracle.penalty_gradient(case.model(), case.loss_fn, inputs[piece], targets[piece], 2, weight=0.0)
        for piece in (slice(0, 2), slice(2, 6))
    ]
    want = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


def test_bad_arguments() -> None:
    model, batch = classifier("mlp_relu")
    with pytest.raises(FastregError, match="kind must be"):
        fastreg.fisher_trace(model, F.cross_entropy, batch, kind="true")
    with pytest.raises(FastregError, match="micro_batch_size must be"):
        fastreg.micro_batch_grad_norms(model, F.cross_entropy, batch, 0)
