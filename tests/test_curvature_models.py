"""batched_hvp, ggn_vp, fisher_vp: what they do to a model, kinds of models and losses, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases import BY_NAME, Case
from curvature_oracle import Piece, hessian_product
from fastreg import Monitor
from fastreg.curvature import batched_hvp, fisher_vp
from fastreg.errors import FastregError
from test_curvature_products import PRODUCTS, SAMPLES, dimension, error, every_product, normal

# The model


class Noisy(nn.Module):
    """Dropout and batch norm: random numbers and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.tanh(self.norm(self.first(x))), 0.5, self.training))


def hooked(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_product
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_the_model_is_left_as_it_was(training: bool, grad_mode: type, kind: str) -> None:
    """Gradients, buffers, hooks and modes; of torch's random numbers, only the model's own are drawn."""
    torch.manual_seed(0)
    model, (x, y) = Noisy().double().train(training), BY_NAME["mlp_gelu"].batch(SAMPLES)
    model.last.bias.grad = kept = torch.ones(3).double()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    plain, vector = copy.deepcopy(model), normal(dimension(model))
    torch.manual_seed(1)
    want = hessian_product(F.cross_entropy(plain(x), y), list(plain.parameters()), vector)
    after = torch.rand(4)
    for options in ({}, {"micro_batch_size": 3, "reduce": "mean"}):
        vectors = torch.stack([vector] * 2, 1) if options else vector
        torch.manual_seed(1)
        with grad_mode():
            got = PRODUCTS[kind](model, F.cross_entropy, (x, y), vectors, **options)
        assert torch.equal(after, torch.rand(4))
        if kind == "hessian" and not options:
            assert error(got, want) < 1e-10
        assert not got.requires_grad
        assert not hooked(model)
        assert model.training is training
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {"last.bias"}
        assert model.last.bias.grad is kept and torch.equal(kept, torch.ones(3))
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("reduce", [None, "mean", "sum"])
def test_gradients_without_grad_mode(reduce: str | None) -> None:
    case = BY_NAME["mlp_gelu"]
    make = lambda: batched_hvp(case.model(), case.loss_fn, case.batch(SAMPLES), "grad", 2, reduce=reduce)  # noqa: E731
    want = make()
    with torch.no_grad():
        torch.testing.assert_close(make(), want, rtol=0, atol=0)


class Output(dict):
    """What libraries of models return."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Output:
        return Output(extra=x, logits=self.inner(x))


@every_product
def test_outputs_with_logits(kind: str) -> None:
    """The loss of a Hessian is given what the model returns; the others' is given the logits."""
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    loss = lambda outputs, y: case.loss_fn(getattr(outputs, "logits", outputs), y)  # noqa: E731
    rows = normal(3, dimension(model))
    for options in ({}, {"micro_batch_size": 2}):
        want, got = (
            PRODUCTS[kind](one, loss, case.batch(SAMPLES), rows.T, **options) for one in (model, Wrapped(model))
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_loss_that_uses_the_outputs_several_times(kind: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        smooth = (outputs.exp() * outputs.tanh()).sum(-1).mean()
        return F.cross_entropy(outputs, targets) + 0.3 * smooth + outputs.square().mean() * outputs.sin().mean()

    case = BY_NAME["mlp_gelu"]
    model, (x, y) = case.model(), case.batch(SAMPLES)
    piece = Piece(case.model(), Case("", case.build, case.shape, sample_losses=loss), x, y)
    vector = normal(dimension(model))
    want = piece.hessian() if kind == "hessian" else piece.ggn()
    assert error(PRODUCTS[kind](model, loss, (x, y), vector), want @ vector) < 1e-10


class Checkpointed(nn.Module):
    """An MLP whose middle is re-run in every backward, unless ``reentrant`` is None."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.first, self.head, self.reentrant = nn.Linear(5, 6), nn.Linear(6, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        again = self.reentrant is not None
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant) if again else self.body(x))


@every_product
def test_activation_checkpointing(kind: str) -> None:
    torch.manual_seed(0)
    model = Checkpointed(False).double()
    plain = Checkpointed(None).double()
    plain.load_state_dict(model.state_dict())
    rows = normal(dimension(model), 3)
    for options in ({}, {"micro_batch_size": 2}, {"micro_batch_size": 2, "reduce": "sum"}):
        got, want = (
            PRODUCTS[kind](one, F.cross_entropy, BY_NAME["mlp_gelu"].batch(SAMPLES), rows, **options)
            for one in (model, plain)
        )
        assert error(got, want) < 1e-12
    assert not hooked(model)


# Refusals


def refused(model: nn.Module, said: str, kind: str = "hessian", **changes: object) -> None:
    """With this message, and with nothing left on the model."""
    case = BY_NAME["mlp_gelu"]
    x, y = case.batch(SAMPLES)
    options = {"loss_fn": F.cross_entropy, "batch": (x, y), "vectors": normal(dimension(model), 3)} | changes
    before = hooked(model)
    with pytest.raises(FastregError, match=said):
        PRODUCTS[kind](model, **options)
    assert hooked(model) == before


@every_product
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vectors": normal(78)}, r"vectors must be \[79\] torch.float64 on cpu, got \[78\]"),
        ({"vectors": normal(79).float()}, r"must be \[79\] torch.float64 on cpu, got \[79\] torch.float32"),
        ({"vectors": normal(3, 79)}, r"must be \[79, 79\] .*, got \[3, 79\]"),
        ({"vectors": {"weight": normal(79)}}, "missing .'0.bias'.*, unknown .'weight'."),
        ({"vectors": [normal(6, 5)]}, "one tensor per parameter, 6, got 1"),
        ({"vectors": 3}, "must be a tensor, a dict .*, got int"),
        ({"micro_batch_size": 4}, "one per micro-batch, 2, got 3"),
        ({"micro_batch_size": 2, "vectors": normal(79)}, "one per micro-batch, 3, got 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer >= 1 or None, got 0"),
        ({"micro_batch_size": True}, "micro_batch_size must be an integer >= 1 or None, got True"),
        ({"reduce": "mean"}, "reduce must go with a micro_batch_size, got 'mean' and None"),
        ({"reduce": "median", "micro_batch_size": 2}, "reduce must be 'mean', 'sum' or None, got 'median'"),
        ({"parameters": [nn.Parameter(torch.ones(2))]}, "must be parameters of the model that require grad"),
        ({"parameters": []}, "must have a parameter that requires grad, got none"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], said: str, kind: str) -> None:
    refused(BY_NAME["mlp_gelu"].model(), said, kind, **changes)


def test_wrong_names() -> None:
    model = BY_NAME["mlp_gelu"].model()
    refused(model, "vectors must be tensors or 'grad', got 'gradient'", vectors="gradient")
    refused(model, "reduce must go with a micro_batch_size", vectors="grad", reduce="sum")
    with pytest.raises(FastregError, match=r"kind must be one of \('sampled', 'empirical', 'exact'\), got 'true'"):
        fisher_vp(model, None, BY_NAME["mlp_gelu"].batch(SAMPLES), normal(79), kind="true")
    assert not hooked(model)


class GradientInForward(torch.autograd.Function):
    """A fused cross entropy: the backward only scales what the forward has found."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(-1) - F.one_hot(targets, 3)) / len(logits))
        return F.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return d * ctx.saved_tensors[0], None


class OnceSine(torch.autograd.Function):
    """Autograd notices that the backward cannot be differentiated only if d requires grad."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> Tensor:
        return d * ctx.saved_tensors[0].cos()


class Function(nn.Module):
    """Of the outputs of a layer."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.first(x))


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical"])
@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="none"), r"must return a scalar mean, got shape \(6,\)"),
        (lambda z, y: z, "must be a scalar or have one entry per sample"),
        (lambda z, y: F.cross_entropy(z, y) * float("nan"), "loss must be a number, got NaN"),
        (lambda z, y: 1.0, "must be a floating point tensor .*, got float"),
        (lambda z, y: F.cross_entropy(z.detach(), y), "must require grad"),
    ],
)
def test_wrong_losses(loss_fn: Callable, said: str, kind: str) -> None:
    refused(BY_NAME["mlp_gelu"].model(), said, kind, loss_fn=loss_fn)


def test_a_loss_that_computes_its_gradient_in_the_forward() -> None:
    """Its second derivative by the outputs would be zero. Gradients of samples need none."""
    model, batch = BY_NAME["mlp_gelu"].model(), BY_NAME["mlp_gelu"].batch(SAMPLES)
    for kind in ("hessian", "ggn"):
        refused(model, "GradientInForward, whose backward does not involve", kind, loss_fn=GradientInForward.apply)
    got, want = (
        fisher_vp(model, loss_fn, batch, normal(79), kind="empirical")
        for loss_fn in (GradientInForward.apply, F.cross_entropy)
    )
    assert error(got, want) < 1e-14


@every_product
def test_models_without_a_second_derivative(kind: str) -> None:
    """Products with a Jacobian take one of the model too."""
    case, x = BY_NAME["mlp_gelu"], torch.randint(7, (6, 5))
    once = nn.Sequential(nn.Linear(5, 5), Function(OnceSine.apply)).double()
    refused(once, "OnceSine, whose backward is @once_differentiable", kind)
    refused(Checkpointed(True).double(), "use_reentrant=False", kind)
    refused(torch.compile(case.model(), backend="eager"), "must not be compiled", kind)
    batch = x, case.batch(SAMPLES)[1]
    refused(nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)).double(), "embedding_bag", kind, batch=batch)


@every_product
def test_a_second_recorder(kind: str) -> None:
    model = BY_NAME["mlp_gelu"].model()
    monitor = Monitor(model, micro_batch_size=1)
    refused(model, "one fastreg recorder at a time", kind)
    monitor.remove()
    assert not hooked(model)


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical", "ggn"])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda z: "logits", "outputs must be a tensor that depends on parameters, got str"),
        (lambda z: z.detach(), r"that depends on parameters, got \(6, 3\)"),
        (lambda z: z.argmax(-1), r"that depends on parameters, got \(6,\) torch.int64"),
    ],
)
def test_outputs_that_are_not_logits(function: Callable[[Tensor], object], said: str, kind: str) -> None:
    refused(Function(function).double(), said, kind)
    if kind != "ggn":
        refused(Function(lambda z: z.sum(-1)).double(), r"must be logits \[B, ..., C\], got \(6,\)", kind)
