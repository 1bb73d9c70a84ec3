"""Regularizer(method="perturb"): its gradient is the sequential double backward's, up to the error of a difference."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastreg
import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import FastregError
from test_distributed import assert_mean_over_ranks, join, problem, spawn

SAMPLES, WEIGHT = 6, 0.7
EPS = torch.finfo(torch.float64).eps
# ||w|| over the displacement at which the gradient is another one: every derivative more brings one such factor.
# Largest where a norm or a softmax follows few features.
CURVED = 64
# Relative to the penalty's part of the gradient. Truncation is of the order CURVED * radius, for central differences
# of its square, and the default radius is where rounding, eps / radius, is no larger.
BOUNDS = {"forward": CURVED * EPS ** (1 / 2), "central": CURVED**2 * EPS ** (2 / 3)}
# A padded row of a table that is also the head: its lookups count as constants in an exact derivative, and move with
# the weights. What is found at moved weights is tested against moved weights.
MOVING = "tied_padding"
KINKED = {"mlp_relu", "batch_norm_train", "batch_norm_eval", "conv2d_depthwise", "prelu", "transformer_encoder",
          "transformer_encoder_norm_first"}  # fmt: skip
GRID = [(case, size) for case in CASES for size in (6, 4, 3, 1) if size >= case.min_group]
SMOOTH = [(case, size) for case, size in GRID if case.name not in KINKED | {MOVING}]


def perturbed(model: nn.Module, penalty: object, size: int, **options: object) -> fastreg.Regularizer:
    return fastreg.Regularizer(model, penalty, micro_batch_size=size, method="perturb", **options)


def gradient(model: nn.Module, case: Case, penalty: object, size: int, **options: object) -> oracle.Gradient:
    inputs, targets = case.batch(SAMPLES)
    reg = perturbed(model, penalty, size, **options)
    reg(lambda: case.loss_fn(model(inputs), targets)).backward()
    reg.remove()
    return oracle.collected_gradient(model)


def loss_gradient(case: Case, size: int) -> oracle.Gradient:
    """Of the loss alone, one micro-batch after another."""
    model = case.model()
    losses, n = oracle.micro_batch_losses(model, case.loss_fn, *case.batch(SAMPLES), size)
    return oracle.gradient_of(torch.stack(losses) @ n / n.sum(), oracle.trainable(model), False)


def exact(case: Case, size: int, **options: object) -> oracle.Gradient:
    return oracle.penalty_gradient(case.model(), case.loss_fn, *case.batch(SAMPLES), size, **options)


def error(got: oracle.Gradient, want: oracle.Gradient, loss: oracle.Gradient) -> float:
    """Relative to the penalty's part."""
    parts = [{name: g[name] - loss[name] for name in loss} for g in (got, want)]
    return oracle.relative_error(*parts)


@pytest.mark.parametrize(("case", "size"), SMOOTH, ids=lambda v: getattr(v, "name", v))
def test_differences_are_the_double_backward(case: Case, size: int) -> None:
    want, loss = exact(case, size, weight=WEIGHT), loss_gradient(case, size)
    for difference, bound in BOUNDS.items():
        got = gradient(case.model(), case, fastreg.GradNorm(WEIGHT), size, difference=difference)
        assert error(got, want, loss) < bound, difference


@pytest.mark.parametrize("case", [case for case, size in SMOOTH if size == 4], ids=lambda c: c.name)
def test_fisher_trace_alone_and_beside_another(case: Case) -> None:
    loss, other = loss_gradient(case, 4), exact(case, 4, weight=WEIGHT)
    fisher = fastreg.FisherTrace(2 * WEIGHT, seed=5)
    alone = gradient(case.model(), case, fisher, 4)
    want = exact(case, 4, weight=2 * WEIGHT, penalty="fisher_trace", labels=fisher.last_labels)
    assert error(alone, want, loss) < BOUNDS["forward"]
    both = [fastreg.GradNorm(WEIGHT), fastreg.FisherTrace(2 * WEIGHT, seed=5)]
    together = {name: want[name] + other[name] - loss[name] for name in loss}
    assert error(gradient(case.model(), case, both, 4), together, loss) < BOUNDS["forward"]


def looked_ahead(case: Case, size: int, weight: float) -> oracle.Gradient:
    """``sum_k r_k g_k(w + 2 weight g_k / (m r_k))`` with ``r_k = b_k / B``, on moved copies of the model."""
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    gradients = oracle.micro_batch_gradients(model, case.loss_fn, inputs, targets, size)
    total = {name: torch.zeros_like(p) for name, p in oracle.trainable(model).items()}
    for rows, own in zip(oracle.cut(SAMPLES, size), gradients, strict=True):
        moved, share = copy.deepcopy(model), len(inputs[rows]) / SAMPLES
        with torch.no_grad():
            for name, p in oracle.trainable(moved).items():
                p += own[name] * (2 * weight / (len(gradients) * share))
        (found,) = oracle.micro_batch_gradients(moved, case.loss_fn, inputs[rows], targets[rows], size)
        total = {name: total[name] + share * found[name] for name in total}
    return total


@pytest.mark.filterwarnings("ignore:Regularizer. the network has kinks")
@pytest.mark.parametrize(
    ("case", "size"), [(c, n) for c, n in GRID if n in (4, 1)], ids=lambda v: getattr(v, "name", v)
)
def test_lookahead_is_the_gradient_at_moved_weights(case: Case, size: int) -> None:
    got = gradient(case.model(), case, fastreg.GradNorm(0.05), size, difference="lookahead")
    oracle.assert_same_gradient(got, looked_ahead(case, size, 0.05))


@pytest.mark.parametrize("name", sorted(KINKED))
def test_kinks_are_warned_of_once(name: str) -> None:
    case = BY_NAME[name]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    reg = perturbed(model, fastreg.GradNorm(WEIGHT), 3)
    with pytest.warns(UserWarning, match="the network has kinks") as noted:
        reg(lambda: case.loss_fn(model(inputs), targets)).backward()
    assert [warning.filename for warning in noted] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg(lambda: case.loss_fn(model(inputs), targets)).backward()
    assert all(g.isfinite().all() for g in oracle.collected_gradient(model).values())


@pytest.mark.parametrize("name", ["mlp_tanh_no_bias", "gpt_tied", "residual_conv"])
@pytest.mark.parametrize(("difference", "fall"), [("forward", 2), ("central", 4), ("lookahead", 2)])
def test_order_of_convergence(name: str, difference: str, fall: int) -> None:
    """Halving the step divides the error by 2 or 4."""
    case, errors = BY_NAME[name], []
    for step in (4e-4, 2e-4, 1e-4):
        weight, options = (step, {}) if difference == "lookahead" else (WEIGHT, {"radius": step})
        got = gradient(case.model(), case, fastreg.GradNorm(weight), 2, difference=difference, **options)
        errors.append(error(got, exact(case, 2, weight=weight), loss_gradient(case, 2)))
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([fall, fall], rel=0.05)


# Forms of the loss


def test_value_metrics_and_norms_are_those_of_the_exact_method() -> None:
    case = BY_NAME["gpt_tied"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    penalties = lambda: [fastreg.GradNorm(WEIGHT), fastreg.FisherTrace(0.2, seed=5)]  # noqa: E731
    reg = perturbed(model, penalties(), 4)
    loss = reg(lambda: case.loss_fn(model(inputs), targets))
    reg.remove()
    other = fastreg.Regularizer(model, penalties(), micro_batch_size=4)
    outputs = model(inputs)
    want = other(case.loss_fn(outputs, targets), outputs)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(reg.metrics, other.metrics)
    torch.testing.assert_close(reg.sq_norms, other.sq_norms)


@pytest.mark.parametrize("difference", ["forward", "central", "lookahead"])
@pytest.mark.parametrize("form", ["scaled", "sum", "per sample", "counts"])
def test_forms_of_the_loss(form: str, difference: str) -> None:
    case, weight = BY_NAME["gpt_tied"], 1e-6 if difference == "lookahead" else WEIGHT
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    counts = torch.tensor([5, 2, 1, 4, 3, 5])
    padded = targets.masked_fill(torch.arange(5) >= counts[:, None], -100)
    token_mean = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=-100)  # noqa: E731
    losses = lambda: case.sample_losses(model(inputs), targets)  # noqa: E731
    run, asked, factor, known = {
        "scaled": (lambda: 0.25 * losses().mean(), {"scale": 0.25}, 0.25, {}),
        "sum": (lambda: losses().sum(), {"reduction": "sum"}, 1.0, {"reduction": "sum"}),
        "per sample": (losses, {}, 1.0, {}),
        "counts": (lambda: token_mean(model(inputs), padded), {"counts": counts}, 1.0, {"counts": counts}),
    }[form]
    reg = perturbed(model, fastreg.GradNorm(weight), 4, difference=difference)
    reg(run, **asked).mean().backward()
    got = {name: g / factor for name, g in oracle.collected_gradient(model).items()}
    reg.remove()
    loss_fn, labels = (token_mean, padded) if form == "counts" else (case.loss_fn, targets)
    want, loss = (
        oracle.penalty_gradient(model, loss_fn, inputs, labels, 4, weight=w, **known) for w in (weight, 0.0)
    )
    # Where the penalty's part is small, the rest of the gradient rounds.
    assert error(got, want, loss) < (1e-4 if difference == "lookahead" else BOUNDS[difference])


@pytest.mark.parametrize("difference", ["forward", "central", "lookahead"])
def test_without_a_penalty_or_a_gradient(difference: str) -> None:
    """Neither a weight of zero nor a batch without a gradient takes away or spoils the loss's own gradient."""
    case = BY_NAME["mlp_gelu"]
    got = gradient(case.model(), case, fastreg.GradNorm(0.0), 2, difference=difference)
    oracle.assert_same_gradient(got, loss_gradient(case, 2))
    model = nn.Linear(3, 1, bias=False).double()
    perturbed(model, fastreg.GradNorm(WEIGHT), 2, difference=difference)(
        lambda: model(torch.zeros(4, 3).double()).square().mean()
    ).backward()
    assert torch.equal(model.weight.grad, torch.zeros(1, 3).double())


def test_every_second_call() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    reg = perturbed(model, fastreg.GradNorm(WEIGHT), 2, every=2)
    for weight in (2 * WEIGHT, 0.0, 2 * WEIGHT):
        reg(lambda: case.loss_fn(model(inputs), targets)).backward()
        want = exact(case, 2, weight=weight)
        assert oracle.relative_error(oracle.collected_gradient(model), want) < BOUNDS["forward"]


@pytest.mark.parametrize("off", ["eval", "no_grad", "enabled"])
def test_the_identity_runs_the_callable_once(off: str) -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model().train(off != "eval"), case.batch(SAMPLES)
    reg, calls = perturbed(model, fastreg.GradNorm(WEIGHT), 2), []
    reg.enabled = off != "enabled"
    with torch.set_grad_enabled(off != "no_grad"):
        loss = reg(lambda: calls.append(1) or case.loss_fn(model(inputs), targets))
    assert calls == [1]
    assert reg.metrics == {}
    assert torch.equal(loss, case.loss_fn(model(inputs), targets))
    if off != "no_grad":
        loss.backward()
        oracle.assert_same_gradient(oracle.collected_gradient(model), loss_gradient(case, SAMPLES))


def test_backward_multiplies_and_accumulates_and_runs_once() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    one = gradient(model, case, fastreg.GradNorm(WEIGHT), 2)
    reg = perturbed(model, fastreg.GradNorm(WEIGHT), 2)
    for factor in (1024.0, 3.0):
        loss = reg(lambda: case.loss_fn(model(inputs), targets))
        (factor * loss).backward()
    oracle.assert_same_gradient(oracle.collected_gradient(model), {name: 1027 * g for name, g in one.items()})
    with pytest.raises(FastregError, match="backward must run once"):
        loss.backward()


# Random numbers and buffers


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_one_draw_of_masks_and_one_move_of_statistics(difference: str, several: bool) -> None:
    """As the exact method, which runs the model once; other masks in a pass would make the difference another one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)).double()
    other = copy.deepcopy(model)
    x, y = torch.randn(16, 5).double(), torch.randint(3, (16,))
    penalties = lambda: [fastreg.GradNorm(WEIGHT), fastreg.FisherTrace(0.2, seed=5)][: 1 + several]  # noqa: E731
    torch.manual_seed(1)
    perturbed(model, penalties(), 8, difference=difference)(lambda: F.cross_entropy(model(x), y)).backward()
    after = torch.rand(4)
    torch.manual_seed(1)
    reg = fastreg.Regularizer(other, penalties(), micro_batch_size=8, check=False)
    outputs = other(x)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    assert torch.equal(after, torch.rand(4))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])
    got, want = oracle.collected_gradient(model), oracle.collected_gradient(other)
    assert oracle.relative_error(got, want) < BOUNDS[difference]


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "sampled"}, "method must be 'exact' or 'perturb', got 'sampled'"),
        ({"difference": "backward"}, "difference must be one of .*, got 'backward'"),
        ({"radius": 0.0}, "radius must be a positive number or None, got 0.0"),
        ({"radius": -1.0}, "radius must be a positive number or None, got -1.0"),
        ({"fraction": 0.5}, "must have fraction=1 .*, got fraction=0.5"),
        ({"parameters": "last"}, "all parameters of the model .* and 1 parameters"),
        ({"difference": "lookahead", "radius": 0.1}, "takes one GradNorm, .* and radius=0.1"),
        ({"difference": "lookahead", "penalty": fastreg.FisherTrace(WEIGHT)}, r"takes one GradNorm, .*'fisher_trace'"),
        ({"difference": "lookahead", "penalty": [fastreg.GradNorm(WEIGHT)] * 2}, "takes one GradNorm"),
    ],
)
def test_wrong_arguments(options: dict[str, object], said: str) -> None:
    model = nn.Linear(2, 2)
    options = {"penalty": fastreg.GradNorm(WEIGHT), "method": "perturb"} | options
    if "parameters" in options:
        options["parameters"] = [model.bias]
    with pytest.raises(FastregError, match=said):
        fastreg.Regularizer(model, micro_batch_size=1, **options)


def test_wrong_callables() -> None:
    model = nn.Linear(2, 2)
    reg, x = perturbed(model, fastreg.GradNorm(WEIGHT), 1), torch.randn(4, 2)
    with pytest.raises(FastregError, match=r"must be given a callable, .*, got Tensor"):
        reg(model(x).sum())
    with pytest.raises(FastregError, match="must run the model on one batch, got forwards of 2 batch sizes"):
        reg(lambda: model(x).sum() + model(x[:3]).sum())
    with pytest.raises(FastregError, match="one entry per sample"):
        reg(lambda: model(x))
    with pytest.raises(FastregError, match="got forwards of 0 batch sizes"):
        reg(lambda: x.sum())
    with pytest.raises(FastregError, match="weights that differ"):
        (reg(lambda: model(x).square().sum(1)) * x[:, 0]).sum().backward()


# Several processes


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Two steps that accumulate."""
    for difference in ("forward", "central"):
        reg = perturbed(model, fastreg.GradNorm(WEIGHT), 2, difference=difference)
        reg(lambda: F.cross_entropy(model(x), y)).backward()
        reg.remove()


def worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    model, x, y = problem(rank)
    step(DistributedDataParallel(model), x, y)
    torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def alone(model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    step(model, x, y)
    return oracle.collected_gradient(model)


def test_gradients_are_the_mean_over_ranks(tmp_path: Path) -> None:
    assert_mean_over_ranks(spawn(worker, tmp_path), alone)
