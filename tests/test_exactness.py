"""Every case, every cut: the gradient, the norms and the loss equal those of the oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import UnsupportedOperation

EXACT = 1e-10
WEIGHT = 0.7
SAMPLES = 6
# One micro-batch, two, a ragged last one, one per sample.
SIZES = [6, 3, 4, 1]
GRID = [(case, size) for case in CASES for size in SIZES if size >= case.min_group]
SAMPLE_OF_CASES = ["mlp_gelu", "residual_conv", "batch_norm_train", "gpt_tied", "transformer_encoder"]


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses.sum() if reduction == "sum" else losses.mean()


def recorded_step(case: Case, model: nn.Module, reg, batch: tuple[Tensor, Tensor], reduction: str) -> Tensor:
    """One forward, regularised loss and backward. Returns the outputs."""
    inputs, targets = batch
    outputs = model(inputs)
    loss = reduce(case.sample_losses(outputs, targets), reduction)
    total = reg(loss, outputs, reduction=reduction)
    assert torch.equal(total.detach(), loss.detach()), "the value of the loss is not to change"
    total.backward()
    return outputs.detach()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("case", "size"), GRID, ids=lambda v: getattr(v, "name", v))
def test_grad_norm_equals_the_oracle(case: Case, size: int, reduction: str) -> None:
    model, batch = case.model(), case.batch(SAMPLES)
    want = oracle.penalty_gradient(
        model, case.loss_fn, *batch, size, weight=WEIGHT, reduction=reduction
    )
    norms = oracle.sq_norms(model, case.loss_fn, *batch, size)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    try:
        recorded_step(case, model, reg, batch, reduction)
    except UnsupportedOperation:
        assert case.may_refuse
        return
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)
    torch.testing.assert_close(reg.sq_norms, norms, rtol=EXACT, atol=0.0)
    torch.testing.assert_close(reg.metrics["fastreg/grad_norm"], norms.mean(), rtol=EXACT, atol=0.0)
    torch.testing.assert_close(reg.metrics["fastreg/penalty"], WEIGHT * norms.mean(), rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("case", [c for c in CASES if c.min_group == 1], ids=lambda case: case.name)
def test_recording_does_not_change_the_outputs(case: Case) -> None:
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    want = model(inputs).detach()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    try:
        got = recorded_step(case, model, reg, (inputs, targets), "mean")
    except UnsupportedOperation:
        assert case.may_refuse
        return
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [3, 4, 2])
def test_batch_norm_outputs_are_those_of_the_micro_batches(size: int) -> None:
    """Each micro-batch is normalised by its own statistics, as when trained one by one."""
    case = BY_NAME["batch_norm_train"]
    model, batch = case.model(), case.batch(SAMPLES)
    want = torch.cat([model(batch[0][piece]) for piece in oracle.cut(SAMPLES, size)]).detach()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    torch.testing.assert_close(recorded_step(case, model, reg, batch, "mean"), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [6, 4, 1])
@pytest.mark.parametrize("name", ["mlp_relu", "vit", "transformer_encoder", "residual_conv", "gpt_tied"])
def test_fisher_trace_equals_the_oracle(name: str, size: int, reduction: str) -> None:
    case = BY_NAME[name]
    model, batch = case.model(), case.batch(SAMPLES)
    reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=WEIGHT, seed=5), micro_batch_size=size)
    recorded_step(case, model, reg, batch, reduction)
    got, labels = oracle.collected_gradient(model), reg.penalties[0].last_labels
    want = oracle.penalty_gradient(
        model, case.loss_fn, *batch, size, weight=WEIGHT, reduction=reduction, penalty="fisher_trace", labels=labels
    )
    oracle.assert_same_gradient(got, want)
    norms = oracle.sq_norms(model, oracle.label_loss, batch[0], labels, size)
    torch.testing.assert_close(reg.metrics["fastreg/fisher_trace"], norms.mean(), rtol=EXACT, atol=0.0)


def test_fisher_trace_of_batch_norm() -> None:
    case = BY_NAME["batch_norm_train"]
    model, batch = case.model(), case.batch(SAMPLES)
    reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=WEIGHT, seed=5), micro_batch_size=3)
    recorded_step(case, model, reg, batch, "mean")
    got, labels = oracle.collected_gradient(model), reg.penalties[0].last_labels
    want = oracle.penalty_gradient(
        model, case.loss_fn, *batch, 3, weight=WEIGHT, penalty="fisher_trace", labels=labels
    )
    oracle.assert_same_gradient(got, want)


def test_several_penalties_add_up() -> None:
    case = BY_NAME["mlp_gelu"]
    model, batch = case.model(), case.batch(SAMPLES)
    penalties = [fastreg.GradNorm(weight=0.4), fastreg.FisherTrace(weight=0.9, seed=5)]
    reg = fastreg.Regularizer(model, penalties, micro_batch_size=4)
    recorded_step(case, model, reg, batch, "mean")
    got, labels = oracle.collected_gradient(model), reg.penalties[1].last_labels
    first = oracle.penalty_gradient(model, case.loss_fn, *batch, 4, weight=0.4)
    second = oracle.penalty_gradient(
        model, case.loss_fn, *batch, 4, weight=0.9, penalty="fisher_trace", labels=labels
    )
    plain = oracle.penalty_gradient(model, case.loss_fn, *batch, 4, weight=0.0)
    oracle.assert_same_gradient(got, {name: first[name] + second[name] - plain[name] for name in plain})


@pytest.mark.parametrize("name", SAMPLE_OF_CASES)
def test_float32_is_as_good_as_a_float32_loop(name: str) -> None:
    """Against the float64 oracle, the batched float32 gradient errs no more than 4x the float32 loop does."""
    case = BY_NAME[name]
    model, batch = case.model(torch.float32), case.batch(SAMPLES, torch.float32)
    exact_model = case.model(torch.float32).double()
    exact_batch = [t.double() if t.is_floating_point() else t for t in batch]
    want = oracle.penalty_gradient(exact_model, case.loss_fn, *exact_batch, 3, weight=WEIGHT)
    loop = oracle.penalty_gradient(model, case.loss_fn, *batch, 3, weight=WEIGHT)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=3)
    recorded_step(case, model, reg, batch, "mean")
    got = oracle.collected_gradient(model)
    # Both are rounded at about sqrt(length of the reductions) units in the last place.
    floor = math.sqrt(sum(g.numel() for g in want.values())) * torch.finfo(torch.float32).eps
    assert oracle.relative_error(got, want) <= 4 * max(oracle.relative_error(loop, want), floor)


def test_changing_batch_sizes() -> None:
    """One regularizer, batches of 6, 5, 1 and 4 samples in turn."""
    case = BY_NAME["transformer_encoder"]
    model = case.model()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
    for samples in (6, 5, 1, 4):
        batch = case.batch(samples)
        recorded_step(case, model, reg, batch, "mean")
        want = oracle.penalty_gradient(model, case.loss_fn, *batch, 4, weight=WEIGHT)
        oracle.assert_same_gradient(oracle.collected_gradient(model), want)
        assert len(reg.sq_norms) == math.ceil(samples / 4)


SHARED = [(BY_NAME[name], form) for name in ("gpt_tied", "tied_padding", "raw_parameters") for form in (True, False)]


@pytest.mark.parametrize(
    ("case", "by_rows"), [*((case, None) for case in CASES), *SHARED], ids=lambda v: getattr(v, "name", v)
)
def test_bfloat16_autocast_is_as_good_as_an_autocast_loop(
    case: Case, by_rows: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to bfloat16 in the same places, the batched gradient errs no more than three times as much as a loop.

    Uses of a shared parameter differ in dtype there: an embedding is looked up in float32, the head is a product.
    """
    if by_rows is not None:
        monkeypatch.setattr("fastreg.rules.joining.prefers_rows", lambda *_: by_rows)
    want = oracle.penalty_gradient(case.model(), case.loss_fn, *case.batch(SAMPLES), 3, weight=WEIGHT)
    model, (inputs, targets) = case.model(torch.float32), case.batch(SAMPLES, torch.float32)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
        loss = case.loss_fn(outputs, targets)
    reg(loss, outputs).backward()
    got = oracle.collected_gradient(model)
    assert reg.sq_norms.dtype == torch.float32
    reg.remove()
    with torch.autocast("cpu", torch.bfloat16):
        loop = oracle.penalty_gradient(model, case.loss_fn, inputs, targets, 3, weight=WEIGHT)
    assert oracle.relative_error(got, want) <= 3 * oracle.relative_error(loop, want)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "offset"])
def test_memory_layouts_of_the_input(layout: str) -> None:
    case = BY_NAME["residual_conv"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    if layout == "channels_last":
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        inputs = inputs.transpose(0, 3).contiguous().transpose(0, 3)
    elif layout == "expanded":
        inputs = inputs[:1].expand(SAMPLES, -1, -1, -1)
    else:
        inputs = F.pad(inputs, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    want = oracle.penalty_gradient(model, case.loss_fn, inputs, targets, 4, weight=WEIGHT)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
    recorded_step(case, model, reg, (inputs, targets), "mean")
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)
