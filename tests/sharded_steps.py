"""Steps of every kind on sharded models, and what one process with the whole batch finds in plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastreg
import fastreg.optim
import oracle
from sam_oracle import sequential_gradient
from sharded import WHOLE, Shared, Sliced, loss_fn, problem, shard, whole

B, WEIGHT, RHO, RATE, STEPS = 2, 0.3, 0.1, 0.5, 2
ROOT, CHECKPOINTED = {"blocks": False}, {"checkpointed": True}


def plain_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor) -> None:
    base.zero_grad()
    loss_fn(model(x), y).backward()


def sam_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor, adaptive: bool = False) -> None:
    optimizer = fastreg.optim.SAM(base, model, RHO, micro_batch_size=B, adaptive=adaptive)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    try:
        optimizer.backward(closure)
    finally:
        optimizer.remove()


def adaptive_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor) -> None:
    sam_backward(model, base, x, y, adaptive=True)


def exact_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor, left_whole: bool = False) -> None:
    """Also of models that are not sharded."""
    sharded = hasattr(model, "set_reshard_after_backward")
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=B)
    base.zero_grad()
    if sharded:
        model.set_reshard_after_backward(False)
    out = model(x)
    loss = reg(loss_fn(out, y), out)
    if sharded:
        model.set_reshard_after_backward(not left_whole)
    loss.backward()
    reg.remove()


def keeping_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor) -> None:
    """Whole parameters stay from one step to the next, where they are out of date."""
    exact_backward(model, base, x, y, left_whole=True)


def accumulated_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor) -> None:
    """As :func:`exact_backward`, one micro-batch after another, reduced over ranks with the last."""
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=B)
    base.zero_grad()
    for rows in (part := oracle.cut(len(x), B)):
        model.set_requires_gradient_sync(rows is part[-1])
        model.set_reshard_after_backward(False)
        out = model(x[rows])
        loss = reg(loss_fn(out, y[rows]) / len(part), out, scale=1 / len(part))
        model.set_reshard_after_backward(True)
        loss.backward()
    reg.remove()


def perturbed(difference: str, penalty: Callable[[], object] = lambda: fastreg.GradNorm(WEIGHT)) -> Callable[..., None]:
    """A backward of ``method="perturb"``."""

    def backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor) -> None:
        reg = fastreg.Regularizer(model, penalty(), micro_batch_size=B, method="perturb", difference=difference)
        base.zero_grad()
        try:
            reg(lambda: loss_fn(model(x), y)).backward()
        finally:
            reg.remove()

    return backward


def looked_ahead_gradient(model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    """Mean over micro-batches of ``grad C_k`` at ``w + 2 WEIGHT grad C_k``, in plain autograd."""
    found = []
    for rows in oracle.cut(len(x), B):
        moved = copy.deepcopy(model)
        parameters = oracle.trainable(moved)
        gradient = oracle.gradient_of(loss_fn(moved(x[rows]), y[rows]), parameters, False)
        with torch.no_grad():
            for name, p in parameters.items():
                p += 2 * WEIGHT * gradient[name]
        found.append(oracle.gradient_of(loss_fn(moved(x[rows]), y[rows]), parameters, False))
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def penalised_gradient(model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    """Of loss and penalty, in plain autograd."""
    return oracle.penalty_gradient(model, loss_fn, x, y, B, weight=WEIGHT)


def sam_gradient(model: nn.Module, x: Tensor, y: Tensor, adaptive: bool = False) -> oracle.Gradient:
    """SAM's, in plain autograd."""
    return sequential_gradient(model, loss_fn, x, y, B, RHO, adaptive)


def mixed_backward(model: nn.Module, base: Optimizer, x: Tensor, y: Tensor) -> None:
    """Gradients that wait to be reduced, half a loss's, before a penalised one times 2, and a loss after it."""
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=B, method="perturb", every=2)
    reg.load_state_dict(reg.state_dict() | {"calls": 1})

    def run() -> Tensor:
        return loss_fn(model(x), y)

    base.zero_grad()
    model.set_requires_gradient_sync(False)
    (reg(run) / 2).backward()
    (2 * reg(run)).backward()
    model.set_requires_gradient_sync(True)
    reg(run).backward()
    reg.remove()


def mixed_gradient(model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    plain = oracle.penalty_gradient(model, loss_fn, x, y, B, weight=0.0)
    doubled = oracle.penalty_gradient(model, loss_fn, x, y, B, weight=2 * WEIGHT)
    return {name: 1.5 * plain[name] + 2 * doubled[name] for name in plain}


def adaptive_gradient(model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    return sam_gradient(model, x, y, adaptive=True)


# name -> backward, its oracle, one more block, options of ``shard``, relative error
CASES = {
    "SAM": (sam_backward, sam_gradient, None, {}, 1e-10),
    "SAM, shared": (sam_backward, sam_gradient, Shared, {}, 1e-10),
    "SAM, sliced in the root": (sam_backward, sam_gradient, Sliced, ROOT, 1e-10),
    "adaptive SAM": (adaptive_backward, adaptive_gradient, None, {}, 1e-10),
    "adaptive SAM, sliced in the root": (adaptive_backward, adaptive_gradient, Sliced, ROOT, 1e-10),
    "SAM, parameters whole": (sam_backward, sam_gradient, None, WHOLE, 1e-10),
    "exact": (exact_backward, penalised_gradient, None, WHOLE, 1e-10),
    "exact, sliced": (exact_backward, penalised_gradient, Sliced, WHOLE, 1e-10),
    "exact, left whole": (keeping_backward, penalised_gradient, None, WHOLE, 1e-10),
    "exact, accumulated": (accumulated_backward, penalised_gradient, None, WHOLE, 1e-10),
    "exact, checkpointed": (exact_backward, penalised_gradient, None, WHOLE | CHECKPOINTED, 1e-10),
    "lookahead, checkpointed": (perturbed("lookahead"), looked_ahead_gradient, None, CHECKPOINTED, 1e-10),
    "lookahead": (perturbed("lookahead"), looked_ahead_gradient, None, {}, 1e-10),
    "lookahead, parameters whole": (perturbed("lookahead"), looked_ahead_gradient, None, WHOLE, 1e-10),
    # Measured: 7e-7 and 3e-8, of differences themselves.
    "forward difference": (perturbed("forward"), penalised_gradient, None, {}, 1e-5),
    "central difference": (perturbed("central"), penalised_gradient, None, {}, 1e-6),
    "central difference, shared": (perturbed("central"), penalised_gradient, Shared, {}, 1e-6),
    "forward difference, accumulated": (mixed_backward, mixed_gradient, None, {}, 1e-5),
}


def trained(name: str, rank: int, count: int, **mesh: object) -> dict[str, list[Tensor]]:
    """Gradients and parameters after every step."""
    backward, _, more, options, _ = CASES[name]
    model, x, y = problem(more)
    model = shard(model, **options, **mesh)
    parameters = list(model.parameters())
    found = {"gradients": [], "parameters": []}
    for number in range(STEPS):
        base = torch.optim.SGD(parameters, lr=RATE)
        backward(model, base, *(part.roll(number, 0).chunk(count)[rank] for part in (x, y)))
        found["gradients"] += [whole(p.grad) for p in parameters]
        base.step()
        found["parameters"] += [whole(p) for p in parameters]
    return found


def assert_those_of_one_process(found: list[dict[str, list[Tensor]]], name: str) -> None:
    """``found`` on every rank is what plain autograd and SGD give."""
    _, gradient, more, _, tolerance = CASES[name]
    model, x, y = problem(more)
    wanted = {"gradients": [], "parameters": []}
    for number in range(STEPS):
        gradients = gradient(model, x.roll(number, 0), y.roll(number, 0))
        with torch.no_grad():
            for key, p in model.named_parameters():
                p -= RATE * gradients[key]
        wanted["gradients"] += [gradients[key] for key, _ in model.named_parameters()]
        wanted["parameters"] += [p.detach().clone() for p in model.parameters()]
    for got in found:
        for key, values in wanted.items():
            for one, other in zip(got[key], values, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())
