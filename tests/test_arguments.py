"""Arguments of the wrong kind, and losses that do not belong to the recorded forward, are refused where they enter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME
from fastreg.errors import FastregError

WEIGHT = 0.7


def mlp_batch(samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    case = BY_NAME["mlp_gelu"]
    return case.model(), *case.batch(samples)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None])
def test_micro_batch_size_is_a_positive_integer(size: object) -> None:
    with pytest.raises(FastregError, match="micro_batch_size must be"):
        fastreg.Regularizer(mlp_batch()[0], fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.1", None, True])
def test_weight_is_a_finite_number(weight: object) -> None:
    with pytest.raises(FastregError, match="weight must be"):
        fastreg.GradNorm(weight=weight)


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 1.5}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_every_and_fraction_have_ranges(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(FastregError, match=f"{name} must be"):
        fastreg.Regularizer(mlp_batch()[0], fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, **settings)


def test_no_penalty_and_no_parameter() -> None:
    model, x, _ = mlp_batch()
    with pytest.raises(FastregError, match="penalt"):
        fastreg.Regularizer(model, [], micro_batch_size=2)
    with pytest.raises(FastregError, match="requires?.grad"):
        model.requires_grad_(False)
        fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
        model(x)


@pytest.mark.parametrize("outputs", ["missing", "labels"])
def test_fisher_trace_needs_logits(outputs: str) -> None:
    model, x, y = mlp_batch()
    reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=WEIGHT), micro_batch_size=2)
    logits = model(x)
    with pytest.raises(FastregError, match="outputs must be"):
        reg(F.cross_entropy(logits, y), None if outputs == "missing" else logits.argmax(-1))


def attached() -> tuple[fastreg.Regularizer, nn.Module, Tensor, Tensor]:
    model, x, y = mlp_batch()
    return fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2), model, x, y


def test_losses_that_cannot_be_used() -> None:
    """No graph, not a number, an integer, the wrong shape, not a tensor."""
    reg, model, x, y = attached()
    bad = {
        "requires? grad": lambda outputs: F.cross_entropy(outputs.detach(), y),
        "nan": lambda outputs: F.cross_entropy(outputs, y) * float("nan"),
        "float": lambda outputs: (outputs.argmax(-1) == y).sum(),
        "scalar|shape": lambda outputs: F.cross_entropy(outputs, y, reduction="none")[:4],
        "tensor": lambda outputs: F.cross_entropy(outputs, y).item(),
    }
    for words, loss in bad.items():
        outputs = model(x)
        with pytest.raises(FastregError, match=f"(?i)loss must .*({words})"):
            reg(loss(outputs), outputs)


def test_reduction_and_counts_are_checked() -> None:
    reg, model, x, y = attached()
    for arguments, words in [
        ({"reduction": "none"}, "reduction must be"),
        ({"counts": torch.ones(5)}, "counts must be"),
        ({"counts": [1, 1, 1, 1, 1, 1]}, "counts must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
    ]:
        outputs = model(x)
        with pytest.raises(FastregError, match=words):
            reg(F.cross_entropy(outputs, y), outputs, **arguments)


def test_the_loss_of_another_model() -> None:
    reg, model, x, y = attached()
    other, _, _ = mlp_batch()
    model(x)
    with pytest.raises(FastregError, match="forward|model"):
        reg(F.cross_entropy(other(x), y))


def test_parameters_handed_in_from_outside() -> None:
    """`functional_call` runs the model on other tensors than its own parameters."""
    reg, model, x, y = attached()
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    outputs = torch.func.functional_call(model, copies, x)
    with pytest.raises(FastregError, match="parameter"):
        reg(F.cross_entropy(outputs, y), outputs)


def test_one_forward_is_regularised_once() -> None:
    reg, model, x, y = attached()
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs)
    with pytest.raises(FastregError, match="once|twice|again|already"):
        reg(F.cross_entropy(outputs, y), outputs)


def test_a_forward_that_was_not_recorded() -> None:
    model, x, y = mlp_batch()
    outputs = model(x)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    with pytest.raises(FastregError, match="forward"):
        reg(F.cross_entropy(outputs, y), outputs)


def after_a_checked_step() -> tuple[fastreg.Regularizer, nn.Module, Tensor, Tensor]:
    """The self-check of the first step is over: what follows must be right without it."""
    reg, model, x, y = attached()
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs)
    return reg, model, x, y


@pytest.mark.parametrize("start", [attached, after_a_checked_step])
@pytest.mark.parametrize("samples", [6, 3])
def test_the_loss_of_an_earlier_forward(start: Callable, samples: int) -> None:
    """Two forwards, then the loss of the first: exact, or refused; never the second one's norms."""
    reg, model, x, y = start()
    want = oracle.penalty_gradient(mlp_batch()[0], F.cross_entropy, x, y, 2, weight=WEIGHT)
    first = model(x)
    model(x.flip(0)[:samples])
    try:
        reg(F.cross_entropy(first, y), first).backward()
    except FastregError:
        return
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


@pytest.mark.parametrize("start", [attached, after_a_checked_step])
@pytest.mark.parametrize("samples", [6, 3])
def test_a_loss_of_two_forwards(start: Callable, samples: int) -> None:
    """D(real) + D(fake): exact if both have as many samples, or refused."""
    reg, model, x, y = start()
    loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(-x[:samples]), y[:samples])

    def both(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, 0], targets) + F.cross_entropy(outputs[:, 1], targets)

    stacked = torch.stack([x, -x], 1)
    want = oracle.penalty_gradient(mlp_batch()[0], both, stacked, y, 2, weight=WEIGHT)
    try:
        reg(loss).backward()
    except FastregError:
        return
    assert samples == 6
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


@pytest.mark.parametrize("start", [attached, after_a_checked_step])
def test_parts_called_from_outside(start: Callable) -> None:
    """The model's layers called one by one are one forward if they see the same samples."""
    reg, model, x, y = start()
    want = oracle.penalty_gradient(mlp_batch()[0], F.cross_entropy, x, y, 2, weight=WEIGHT)
    hidden = x
    for layer in model:
        hidden = layer(hidden)
    reg(F.cross_entropy(hidden, y), hidden).backward()
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


@pytest.mark.parametrize("checked", [True, False])
def test_parts_called_from_outside_on_folded_samples(checked: bool) -> None:
    """Tokens folded into the batch between two calls: exact, or refused, with and without the self-check."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 2, 4).double(), torch.randint(3, (6, 2))

    def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    want = oracle.penalty_gradient(model, token_mean, x, y, 2, weight=WEIGHT)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    if not checked:
        outputs = model(x)
        reg(token_mean(outputs, y), outputs)
    try:
        outputs = model[2](torch.tanh(model[0](x)).flatten(0, 1))
        reg(F.cross_entropy(outputs, y.flatten())).backward()
    except FastregError:
        return
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


def test_an_empty_batch() -> None:
    reg, model, x, y = attached()
    with pytest.raises(FastregError, match="sample"):
        outputs = model(x[:0])
        reg(F.cross_entropy(outputs, y[:0]), outputs)


def test_a_refusal_leaves_the_model_usable() -> None:
    """After an error in the middle of a forward nothing stays switched on."""
    reg, model, x, y = attached()
    with pytest.raises(RuntimeError):
        model(x[:, :3])
    want = oracle.penalty_gradient(mlp_batch()[0], F.cross_entropy, x, y, 2, weight=WEIGHT)
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    assert oracle.relative_error(oracle.collected_gradient(model), want) < 1e-10
    reg.remove()
    assert torch.equal(model(x), mlp_batch()[0](x))
