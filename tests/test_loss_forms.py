"""Every form in which a loss may come: vectors, token means, scaled, accumulated, clipped, of a part of a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME, Case

EXACT = 1e-10
WEIGHT = 0.7
SAMPLES = 6


@pytest.mark.parametrize("size", [6, 4, 1])
@pytest.mark.parametrize("name", ["mlp_relu", "gpt_tied", "batch_norm_eval"])
def test_per_sample_losses(name: str, size: int) -> None:
    """A vector of losses, one per sample, stands for its mean."""
    case = BY_NAME[name]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    outputs = model(inputs)
    reg(case.sample_losses(outputs, targets), outputs).mean().backward()
    want = oracle.penalty_gradient(model, case.loss_fn, inputs, targets, size, weight=WEIGHT)
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


@pytest.mark.parametrize("size", [6, 4, 1])
def test_token_counts(size: int) -> None:
    """Padded tokens are ignored, so the mean is over tokens and micro-batches hold different numbers of them."""
    case = BY_NAME["gpt_tied"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    lengths = torch.tensor([5, 2, 1, 4, 3, 5])
    targets = targets.masked_fill(torch.arange(5) >= lengths[:, None], -100)

    def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)

    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    outputs = model(inputs)
    reg(token_mean(outputs, targets), outputs, counts=lengths).backward()
    got = oracle.collected_gradient(model)
    arguments = (model, token_mean, inputs, targets, size, lengths)
    want = oracle.penalty_gradient(*arguments[:-1], weight=WEIGHT, counts=lengths)
    oracle.assert_same_gradient(got, want)
    torch.testing.assert_close(reg.sq_norms, oracle.sq_norms(*arguments), rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("size", [6, 4, 1])
def test_class_weights_are_counts(size: int) -> None:
    """The weighted mean divides by the weights of the targets it has seen: these are the counts."""
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    weights = torch.tensor([1.0, 2.5, 0.5], dtype=torch.float64)

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=weights)

    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    outputs = model(inputs)
    counts = weights[targets]
    reg(weighted(outputs, targets), outputs, counts=counts).backward()
    want = oracle.penalty_gradient(model, weighted, inputs, targets, size, weight=WEIGHT, counts=counts)
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


class Named(nn.Module):
    """Keyword inputs, and a mapping or an object with logits as output."""

    def __init__(self, as_mapping: bool) -> None:
        super().__init__()
        self.body, self.as_mapping = BY_NAME["mlp_gelu"].model(), as_mapping

    def forward(self, *, features: Tensor, mask: Tensor | None = None) -> object:
        logits = self.body(features if mask is None else features * mask)
        return {"logits": logits} if self.as_mapping else SimpleNamespace(loss=None, logits=logits)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_keyword_inputs_and_structured_outputs(as_mapping: bool) -> None:
    case = BY_NAME["mlp_gelu"]
    inputs, targets = case.batch(SAMPLES)
    model, mask = Named(as_mapping), torch.ones(SAMPLES, 1, dtype=torch.float64)
    penalties = [fastreg.GradNorm(weight=WEIGHT), fastreg.FisherTrace(weight=0.0, seed=1)]
    reg = fastreg.Regularizer(model, penalties, micro_batch_size=4)
    outputs = model(mask=mask, features=inputs)
    logits = outputs["logits"] if as_mapping else outputs.logits
    reg(case.loss_fn(logits, targets), outputs).backward()
    assert reg.penalties[1].last_labels.shape == targets.shape
    want = oracle.penalty_gradient(case.model(), case.loss_fn, inputs, targets, 4, weight=WEIGHT)
    oracle.assert_same_gradient(oracle.collected_gradient(model.body), want)


def test_a_micro_batch_without_tokens_has_norm_zero() -> None:
    case = BY_NAME["gpt_tied"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    targets = targets.index_fill(0, torch.tensor([2, 3]), -100)
    lengths = (targets != -100).sum(1)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    outputs = model(inputs)
    reg(F.cross_entropy(outputs.flatten(0, 1), targets.flatten()), outputs, counts=lengths).backward()
    assert reg.sq_norms[1] == 0.0
    assert (reg.sq_norms[[0, 2]] > 0.0).all()
    assert all(g.isfinite().all() for g in oracle.collected_gradient(model).values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scale_is_taken_out_of_the_norms(reduction: str) -> None:
    """loss / 4 with scale = 1/4: the norms of the loss itself, and a quarter of the whole gradient."""
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
    outputs = model(inputs)
    losses = case.sample_losses(outputs, targets)
    loss = (losses.sum() if reduction == "sum" else losses.mean()) / 4
    reg(loss, outputs, scale=0.25, reduction=reduction).backward()
    got = oracle.collected_gradient(model)
    want = oracle.penalty_gradient(
        model, case.loss_fn, inputs, targets, 4, weight=WEIGHT, reduction=reduction
    )
    oracle.assert_same_gradient(got, {name: g / 4 for name, g in want.items()})
    norms = oracle.sq_norms(model, case.loss_fn, inputs, targets, 4)
    torch.testing.assert_close(reg.sq_norms, norms, rtol=EXACT, atol=0.0)


def accumulate(case: Case, model: nn.Module, size: int) -> list[tuple[Tensor, Tensor]]:
    """Two unequal batches, their gradients accumulated with losses divided by two; returns the batches."""
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    inputs, targets = case.batch(9)
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    for x, y in batches:
        outputs = model(x)
        reg(case.loss_fn(outputs, y) / 2, outputs, scale=0.5).backward()
    return batches


def mean_gradient(case: Case, model: nn.Module, batches: list, size: int) -> oracle.Gradient:
    """Mean over the batches of the oracle's gradients."""
    grads = [oracle.penalty_gradient(model, case.loss_fn, *batch, size, weight=WEIGHT) for batch in batches]
    return {name: sum(g[name] for g in grads) / len(grads) for name in grads[0]}


@pytest.mark.parametrize("name", ["mlp_gelu", "residual_conv", "batch_norm_train", "gpt_tied", "transformer_encoder"])
def test_gradient_accumulation(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    batches = accumulate(case, model, 3)
    got = oracle.collected_gradient(model)
    # A micro-batch of one sample is left over in the first batch: not for batch norm on vectors, fine on images.
    oracle.assert_same_gradient(got, mean_gradient(case, model, batches, 3))


def test_clipping_acts_on_the_whole_gradient() -> None:
    case = BY_NAME["residual_conv"]
    model = case.model()
    batches = accumulate(case, model, 2)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    got = oracle.collected_gradient(model)
    want = mean_gradient(case, model, batches, 2)
    whole = math.sqrt(sum(g.square().sum().item() for g in want.values()))
    assert norm.item() == pytest.approx(whole, rel=EXACT)
    # clip_grad_norm_ divides by norm + 1e-6.
    oracle.assert_same_gradient(got, {name: g * (0.01 / (whole + 1e-6)) for name, g in want.items()})


def test_loss_scaling_after_the_penalty() -> None:
    """What a gradient scaler does: multiply the returned loss, divide the gradients."""
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
    outputs = model(inputs)
    (reg(case.loss_fn(outputs, targets), outputs) * 65536.0).backward()
    got = {name: g / 65536.0 for name, g in oracle.collected_gradient(model).items()}
    oracle.assert_same_gradient(got, oracle.penalty_gradient(model, case.loss_fn, inputs, targets, 4, weight=WEIGHT))


def test_attached_to_a_part_of_the_model() -> None:
    """R is that of the part's parameters; its gradient reaches the head behind the part all the same."""
    case = BY_NAME["mlp_gelu"]
    body, head = case.model(), nn.Linear(3, 3).double()
    inputs, targets = case.batch(SAMPLES)
    everything = {**{f"body.{n}": p for n, p in body.named_parameters()}, **dict(head.named_parameters())}
    losses = [
        case.loss_fn(head(torch.sin(body(inputs[piece]))), targets[piece]) for piece in oracle.cut(SAMPLES, 3)
    ]
    penalty = oracle.penalty_value(losses, dict(body.named_parameters()))
    want = oracle.gradient_of(torch.stack(losses).mean() + WEIGHT * penalty, everything, create_graph=False)
    reg = fastreg.Regularizer(body, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=3)
    outputs = head(torch.sin(body(inputs)))
    reg(case.loss_fn(outputs, targets), outputs).backward()
    oracle.assert_same_gradient({name: p.grad for name, p in everything.items()}, want)
