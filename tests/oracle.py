"""The oracle: plain PyTorch, one micro-batch after another, nothing of fastreg in it.

Definitions (Smith et al. 2021, arXiv:2101.12176; Novack et al. 2022, arXiv:2211.15853): a batch of
B samples is cut into m = ceil(B / b) consecutive micro-batches of b samples, the last one ragged.
C_k is the mean loss of the samples of micro-batch k, g_k its gradient, R = (1/m) sum_k ||g_k||^2,
and C the mean over all B samples. A batch norm layer in training mode sees one micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFn = Callable[[Tensor, Tensor], Tensor]
Gradient = dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, once, by its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cut(samples: int, micro_batch_size: int) -> list[slice]:
    """Consecutive slices of `micro_batch_size` samples; the last one holds what is left."""
    return [slice(i, min(i + micro_batch_size, samples)) for i in range(0, samples, micro_batch_size)]


def micro_batch_losses(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    micro_batch_size: int,
    counts: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """C_k for every micro-batch, and its weight n_k in C = sum_k n_k C_k / sum_k n_k.

    `loss_fn` returns the mean loss of what it is given. n_k is the number of samples in k, or the
    sum of their `counts` when the mean is over tokens: `loss_fn` is then that token mean.
    """
    per_sample = torch.ones(len(inputs), dtype=torch.float64) if counts is None else counts
    pieces = cut(len(inputs), micro_batch_size)
    losses = [loss_fn(model(inputs[piece]), targets[piece]) for piece in pieces]
    return losses, torch.stack([per_sample[piece].sum() for piece in pieces])


def gradient_of(loss: Tensor, parameters: Mapping[str, Tensor], create_graph: bool) -> Gradient:
    """Gradient by name, zeros where the loss does not depend on the parameter."""
    grads = torch.autograd.grad(
        loss, list(parameters.values()), create_graph=create_graph, allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def micro_batch_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    micro_batch_size: int,
    counts: Tensor | None = None,
) -> list[Gradient]:
    """g_k for k = 1..m, without a graph."""
    with sdpa_kernel(SDPBackend.MATH):
        losses, _ = micro_batch_losses(model, loss_fn, inputs, targets, micro_batch_size, counts)
        return [gradient_of(loss, trainable(model), create_graph=False) for loss in losses]


def sq_norms_by_parameter(*args, **kwargs) -> Gradient:
    """||g_k||^2 split over the parameters: name -> [m]; arguments as `micro_batch_gradients`."""
    grads = micro_batch_gradients(*args, **kwargs)
    return {name: torch.stack([g[name].square().sum() for g in grads]) for name in grads[0]}


def sq_norms(*args, **kwargs) -> Tensor:
    """||g_k||^2 for k = 1..m: [m]; arguments as `micro_batch_gradients`."""
    return torch.stack(list(sq_norms_by_parameter(*args, **kwargs).values())).sum(0)


def label_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over all predictions of -log p(label | x): [b, ..., C], [b, ...] -> []."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def penalty_value(losses: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """R = (1/m) sum_k ||grad C_k||^2, differentiable."""
    squares = []
    for loss in losses:
        grads = gradient_of(loss, parameters, create_graph=True)
        squares.append(sum(g.square().sum() for g in grads.values()))
    return torch.stack(squares).mean()


def penalty_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    micro_batch_size: int,
    *,
    penalty: str = "grad_norm",
    weight: float = 1.0,
    reduction: str = "mean",
    counts: Tensor | None = None,
    labels: Tensor | None = None,
) -> Gradient:
    """Gradient of loss + weight * R, name -> tensor.

    The loss is C, or with `reduction="sum"` C times the number of samples (of counts). R is that of
    C_k for `penalty="grad_norm"`, and for `"fisher_trace"` that of -log p(labels | x), labels fixed.
    """
    parameters = trainable(model)
    with sdpa_kernel(SDPBackend.MATH):
        losses, n = micro_batch_losses(model, loss_fn, inputs, targets, micro_batch_size, counts)
        total = torch.stack(losses) @ n.to(losses[0].dtype)
        loss = total if reduction == "sum" else total / n.sum()
        penalised = losses
        if penalty == "fisher_trace":
            penalised, _ = micro_batch_losses(model, label_loss, inputs, labels, micro_batch_size)
        value = penalty_value(penalised, parameters)
        # A constant gradient (a linear loss) has no graph, and its penalty no gradient.
        whole = loss + weight * value if value.requires_grad else loss
        return {name: g.detach() for name, g in gradient_of(whole, parameters, False).items()}


def exact_fisher_trace(model: nn.Module, inputs: Tensor) -> Tensor:
    """tr F = (1/B) sum_i sum_y p(y | x_i) ||grad log p(y | x_i)||^2, every label enumerated."""
    total = torch.zeros((), dtype=inputs.dtype)
    for x in inputs.split(1):
        log_p = F.log_softmax(model(x), dim=-1)[0]
        for y in range(len(log_p)):
            grads = gradient_of(log_p[y], trainable(model), create_graph=False)
            total += log_p[y].exp().detach() * sum(g.square().sum() for g in grads.values())
    return total / len(inputs)


def relative_error(got: Gradient, want: Gradient) -> float:
    """||got - want|| / ||want|| over the flattened gradient; 0 if both are zero."""
    difference = torch.stack([(got[name] - want[name]).norm() for name in want]).norm()
    return float(difference / _positive(torch.stack([w.norm() for w in want.values()]).norm()))


def parameter_errors(got: Gradient, want: Gradient, floor: float = 1e-3) -> dict[str, float]:
    """||got_p - want_p|| / max(||want_p||, floor ||want||) for every parameter p.

    The floor is for parameters whose true gradient is zero, such as a bias in front of a
    normalisation: rounding there has nothing to be relative to.
    """
    whole = torch.stack([w.norm() for w in want.values()]).norm()
    return {
        name: float((got[name] - w).norm() / _positive(torch.maximum(w.norm(), floor * whole)))
        for name, w in want.items()
    }


def _positive(norm: Tensor) -> Tensor:
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def collected_gradient(model: nn.Module) -> Gradient:
    """What the last `backward` left in `.grad`, zeros where it left nothing; the fields are cleared."""
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(model).items()
    }
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradient(got: Gradient, want: Gradient, tolerance: float = 1e-10) -> None:
    """Equal names, and equal values to `tolerance`, over the whole gradient and parameter by parameter."""
    assert got.keys() == want.keys()
    assert relative_error(got, want) <= tolerance
    errors = parameter_errors(got, want)
    assert max(errors.values()) <= tolerance, errors
