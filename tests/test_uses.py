"""A parameter can meet the activations in any way: the answer is exact, or refused by the parameter's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from fastreg.errors import FastregError

WEIGHT = 0.7


class CustomLinear(torch.autograd.Function):
    """x w^T, differentiable twice; torch functions are not told that a parameter comes by."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return d @ w, d.T @ x


class Uses(nn.Module):
    """Hidden activations [B, 4] meet one parameter [4] or [4, 4] in a given way."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.w, self.use = nn.Parameter(torch.rand(shape) + 0.3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(torch.tanh(self.first(x)), self.w))


USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "norm": (lambda x, w: w.norm() * x, (4,)),
    "exp": (lambda x, w: w.exp() * x, (4,)),
    "softmax": (lambda x, w: F.linear(x, w.softmax(-1)), (4, 4)),
    "power": (lambda x, w: (x + 2) ** w, (4,)),
    "divide": (lambda x, w: x / w, (4,)),
    "divided": (lambda x, w: w / (x + 2), (4,)),
    "subtract": (lambda x, w: w - x, (4,)),
    "reversed_gate": (lambda x, w: w * x, (4,)),
    "where": (lambda x, w: torch.where(x.detach() > 0, x, w), (4,)),
    "concatenate": (lambda x, w: torch.cat([x[:, :2], w.expand(len(x), -1)[:, 2:]], 1), (4,)),
    "stack": (lambda x, w: torch.stack([x, w.expand_as(x)]).mean(0), (4,)),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (4, 4)),
    "matmul": (lambda x, w: x @ w, (4, 4)),
    "matmul_left": (lambda x, w: (w @ x.T).T, (4, 4)),
    "mv": (lambda x, w: torch.mv(x, w)[:, None] * x, (4,)),
    "bmm": (lambda x, w: torch.bmm(x[:, None], w.expand(len(x), 4, 4))[:, 0], (4, 4)),
    "addcmul": (lambda x, w: torch.addcmul(x, x, w), (4,)),
    "lerp": (lambda x, w: torch.lerp(x, w, 0.3), (4,)),
    "scaled_weight": (lambda x, w: F.linear(x, w * 0.5), (4, 4)),
    "masked_weight": (lambda x, w: F.linear(x, w * torch.eye(4).double()), (4, 4)),
    "summed_weight": (lambda x, w: F.linear(x, w + w.T), (4, 4)),
    "normalised_weight": (lambda x, w: F.linear(x, F.normalize(w)), (4, 4)),
    "sliced_weight": (lambda x, w: F.pad(F.linear(x, w[:2]), (0, 2)), (4, 4)),
    "gathered_weight": (lambda x, w: F.linear(x, w[torch.tensor([0, 0, 1, 3])]), (4, 4)),
    "flipped_weight": (lambda x, w: F.linear(x, w.flip(0)), (4, 4)),
    "cast_weight": (lambda x, w: F.linear(x.float(), w.float()).double(), (4, 4)),
    "detached_weight": (lambda x, w: F.linear(x, w.detach()) + x * w[0], (4, 4)),
    "without_grad": (lambda x, w: x @ w + _no_grad(lambda: x @ w), (4, 4)),
    "as_bias": (lambda x, w: F.linear(x, torch.eye(4).double(), w), (4,)),
    "bilinear": (lambda x, w: F.bilinear(x, x, w.expand(4, 4, 4)), (4, 4)),
    "rows_of_tokens": (lambda x, w: (x.view(-1, 2) @ w[:2, :2]).view(-1, 4), (4, 4)),
    "in_place": (lambda x, w: x.clone().mul_(w), (4,)),
    "times_row_mean": (lambda x, w: x + (x.mean(1, keepdim=True) * w), (4,)),
    "repeated": (lambda x, w: x * w.repeat(2), (2,)),
    "prelu": (lambda x, w: F.prelu(x, w), (4,)),
    "aten_operator": (lambda x, w: torch.ops.aten.linear.default(x, w), (4, 4)),
    "custom_function": (lambda x, w: CustomLinear.apply(x, w), (4, 4)),
    "vmapped": (lambda x, w: torch.func.vmap(lambda row: w @ row)(x), (4, 4)),
    "keyword": (lambda x, w: F.linear(input=x, weight=w, bias=None), (4, 4)),
    "layer_norm_weight": (lambda x, w: F.layer_norm(x, (4,), weight=w), (4,)),
    "heads_first": (lambda x, w: (x.view(-1, 2, 2).movedim(1, 0) @ w[:2, :2]).movedim(0, 1).flatten(1), (4, 4)),
    "batch_last": (lambda x, w: (x.T * w[:, None]).T, (4,)),
    "batch_in_the_middle": (lambda x, w: (x.view(-1, 2, 2).movedim(0, 1) * w[:2]).movedim(1, 0).flatten(1), (4,)),
    "reversed_batch": (lambda x, w: (x.flip(0) * w).flip(0), (4,)),
    "used_twice": (lambda x, w: x * w + x.sin() * w, (4,)),
}


def _no_grad(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


# Uses that working code is full of: refusing these is a failure too.
ALWAYS = {
    "as_bias", "detached_weight", "flipped_weight", "keyword", "layer_norm_weight", "matmul", "reversed_gate",
    "rows_of_tokens", "sliced_weight", "used_twice",
}


def hidden_batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=draw).double(), torch.randint(3, (6,), generator=draw)


@pytest.mark.parametrize("name", USES)
def test_any_use_is_exact_or_refused(name: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = Uses(*USES[name]).double(), hidden_batch()
    want = oracle.penalty_gradient(model, F.cross_entropy, x, y, 4, weight=WEIGHT)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
    try:
        outputs = model(x)
        reg(F.cross_entropy(outputs, y), outputs).backward()
    except FastregError as refusal:
        assert name not in ALWAYS, refusal
        assert "'w'" in str(refusal) or "samples" in str(refusal)
    else:
        tolerance = 1e-5 if name == "cast_weight" else 1e-10
        assert oracle.relative_error(oracle.collected_gradient(model), want) < tolerance


def reparametrised(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_reparametrised_weight_is_refused_by_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, (x, y) = reparametrised(wrap), hidden_batch()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
    with pytest.raises(FastregError, match="parametrizations.weight.original"):
        outputs = model(x)
        reg(F.cross_entropy(outputs, y), outputs)


def test_a_scripted_module_is_refused() -> None:
    """Its operations run below Python, where no torch function is seen."""
    torch.manual_seed(0)
    body = torch.jit.trace(nn.Linear(5, 6).double(), torch.zeros(6, 5).double())
    model, (x, y) = nn.Sequential(body, nn.Tanh(), nn.Linear(6, 3).double()), hidden_batch()
    with pytest.raises(FastregError, match="(?i)script|0.weight|0.bias"):
        reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=4)
        outputs = model(x)
        reg(F.cross_entropy(outputs, y), outputs)


def test_a_loss_of_two_forwards() -> None:
    """Norms are those of both together. The check, which sees the second alone, says so; without it all is exact."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), hidden_batch()
    other = torch.randn_like(x)

    def loss(rows: slice) -> Tensor:
        return sum(F.cross_entropy(model(inputs[rows]), y[rows]) for inputs in (x, other))

    parameters = list(model.parameters())
    norms = []
    for start in range(0, len(x), 2):
        grads = torch.autograd.grad(loss(slice(start, start + 2)), parameters, create_graph=True)
        norms.append(sum(g.square().sum() for g in grads))
    total = loss(slice(None)) + WEIGHT * sum(norms) / len(norms)
    want = dict(zip(dict(model.named_parameters()), torch.autograd.grad(total, parameters), strict=True))
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    with pytest.raises(FastregError, match="several forwards.*check=False"):
        reg(loss(slice(None)))
    reg.remove()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, check=False)
    reg(loss(slice(None))).backward()
    assert oracle.relative_error(oracle.collected_gradient(model), want) < 1e-10
