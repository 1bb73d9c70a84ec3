"""What one writes without this library: the steps that ours are compared with."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark.presets import Problem, mean_cross_entropy


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step, and what it can show beside the gradient it leaves in ``.grad``.

    Attributes:
        model: where the gradient is left.
        run: clears the gradients, then forward, loss and backward; or what gives the product.
        sq_norms: squared norms ``[B]`` of the per-sample gradients of the last run.
        drawn: what the last run's penalty depends on besides weights and batch: labels ``[B, ...]``, unit vectors
            ``[m, C]``, or Ritz vectors ``[r, P]``.
        product: the product of a matrix with vectors that the last run formed, flat, one parameter after another.
        forget: drops what runs leave for the next one beside the gradients.
    """

    model: nn.Module
    run: Callable[[], None]
    sq_norms: Callable[[], torch.Tensor] | None = None
    drawn: Callable[[], torch.Tensor] | None = None
    product: Callable[[], torch.Tensor] | None = None
    forget: Callable[[], None] | None = None

    def clear(self) -> None:
        """Free everything that runs have left."""
        self.model.zero_grad(set_to_none=True)
        if self.forget is not None:
            self.forget()


def plain(problem: Problem) -> Step:
    """Forward, loss, backward: the yardstick."""
    model = problem.model

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with problem.precision():
            loss = mean_cross_entropy(model(problem.inputs), problem.targets)
        loss.backward()

    return Step(model, run)


def plain_compiled(problem: Problem) -> Step:
    """The plain step of ``torch.compile(model)``."""
    return plain(dataclasses.replace(problem, model=torch.compile(problem.model)))


def sequential(problem: Problem) -> Step:
    """Gradient-norm penalty by one double backward per micro-batch."""
    return Step(problem.model, lambda: double_backward(problem, None))


def sequential_fisher(problem: Problem) -> Step:
    """Fisher-trace penalty by one double backward per micro-batch, labels drawn from the model."""
    drawn: list[torch.Tensor] = []

    def draw(outputs: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.distributions.Categorical(logits=outputs.detach()).sample())
        return drawn[-1]

    def run() -> None:
        drawn.clear()
        double_backward(problem, draw)

    return Step(problem.model, run, drawn=lambda: torch.cat(drawn))


def double_backward(
    problem: Problem, labels_of: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    """Leave the gradient of loss + weight * mean_k ||g_k||^2 in ``.grad``, micro-batch by micro-batch.

    g_k is the gradient of micro-batch k's own mean loss or, with ``labels_of``, of its mean loss
    on the labels that this function returns for its outputs. Attention runs on the MATH backend:
    the fused ones have no second derivative.
    """
    model = problem.model
    parameters = list(model.parameters())
    model.zero_grad(set_to_none=True)
    with sdpa_kernel(SDPBackend.MATH):
        for inputs, targets in problem.chunks():
            with problem.precision():
                outputs = model(inputs)
                loss = penalised = mean_cross_entropy(outputs, targets)
                if labels_of is not None:
                    penalised = mean_cross_entropy(outputs, labels_of(outputs))
            grads = torch.autograd.grad(penalised, parameters, create_graph=True)
            sq_norm = torch.stack([g.square().sum() for g in grads]).sum()
            ((loss + problem.weight * sq_norm) / problem.micro_batches).backward()


class SplitLayerNorm(nn.Module):
    """A layer norm over the last dimension whose scale and shift are operations of their own.

    torch 2.13 takes the second derivative of a vmapped ``layer_norm`` without an error and wrongly,
    in ``grad`` of ``vmap(grad)`` and in ``jvp`` of ``jacrev``, which vmaps too: the gradient of the
    scale is then composed from a saved mean and deviation that no longer depend on the input
    (related: pytorch/functorch#534). Split like this, it is right.

    Args:
        norm: the layer norm to stand in for; its parameters are taken over.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps) * self.weight + self.bias


def split_layer_norms(model: nn.Module) -> None:
    """Put a :class:`SplitLayerNorm` in the place of every layer norm."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, SplitLayerNorm(child))


def functorch(problem: Problem) -> Step:
    """Gradient-norm penalty by ``torch.func.grad`` of a penalty vmapped over micro-batches."""
    return _functorch_step(problem, torch.func.grad(_penalised_loss(problem)))


def functorch_compiled(problem: Problem) -> Step:
    """:func:`functorch` under ``torch.compile``."""
    gradient = torch.compile(torch.func.grad(_penalised_loss(problem)), fullgraph=True)
    return _functorch_step(problem, gradient)


def functional_loss(problem: Problem) -> Callable[..., torch.Tensor]:
    """The mean loss as a function of (parameters, inputs, targets)."""

    def loss(
        parameters: Mapping[str, torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        with problem.precision():
            outputs = torch.func.functional_call(problem.model, parameters, (inputs,))
            return mean_cross_entropy(outputs, targets)

    return loss


def _penalised_loss(problem: Problem) -> Callable[..., torch.Tensor]:
    """loss + weight * R as a function of (parameters, inputs [m, b, ...], targets [m, b, ...])."""
    value_and_grad = torch.func.grad_and_value(functional_loss(problem))
    per_micro_batch = torch.func.vmap(value_and_grad, in_dims=(None, 0, 0))

    def penalised(
        parameters: Mapping[str, torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        grads, losses = per_micro_batch(parameters, inputs, targets)
        sq_norms = sum(g.square().flatten(1).sum(dim=1) for g in grads.values())
        return losses.mean() + problem.weight * sq_norms.mean()

    return penalised


def _functorch_step(
    problem: Problem, gradient: Callable[..., Mapping[str, torch.Tensor]]
) -> Step:
    model = problem.model
    split_layer_norms(model)
    inputs = problem.inputs.unflatten(0, (problem.micro_batches, -1))
    targets = problem.targets.unflatten(0, (problem.micro_batches, -1))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH):
            grads = gradient(parameters, inputs, targets)
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name].detach()

    return Step(model, run)
