"""What cannot be computed is refused by name and with a remedy; nothing wrong is ever returned silently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastreg
import oracle
from cases import BY_NAME
from fastreg.errors import FastregError

WEIGHT = 0.7


def step(model: nn.Module, loss_fn: Callable, inputs: Tensor, targets: Tensor, size: int = 2) -> oracle.Gradient:
    """Attach, run one regularised step, detach; the gradient it left."""
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    outputs = model(inputs)
    reg(loss_fn(outputs, targets), outputs).backward()
    return oracle.collected_gradient(model)


def refused(model: nn.Module, loss_fn: Callable, inputs: Tensor, targets: Tensor, size: int = 2) -> str:
    """The message of the refusal, in lower case."""
    with pytest.raises(FastregError) as caught:
        step(model, loss_fn, inputs, targets, size)
    return str(caught.value).lower()


def mlp_batch(samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    case = BY_NAME["mlp_gelu"]
    return case.model(), *case.batch(samples)


class GradientInForward(torch.autograd.Function):
    """A fused cross entropy: the forward already computes the gradient, the backward only scales it."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = (logits.softmax(-1) - F.one_hot(targets, logits.shape[-1])) / len(logits)
        ctx.save_for_backward(gradient)
        return F.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return d * ctx.saved_tensors[0], None


class OnceSquare(torch.autograd.Function):
    """Mean square whose backward cannot be differentiated, which autograd notices only if d requires grad."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return d * 2 * x / x.numel()


class TwiceSine(torch.autograd.Function):
    """A well-behaved function: its backward is made of differentiable operations on saved inputs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, d: Tensor) -> Tensor:
        return d * ctx.saved_tensors[0].cos()


class Calls(nn.Module):
    """An MLP whose hidden activations pass through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(5, 6), nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(torch.tanh(self.first(x))))


def test_a_loss_that_computes_its_gradient_in_the_forward() -> None:
    model, x, y = mlp_batch()
    message = refused(model, GradientInForward.apply, x, y)
    assert "gradientinforward" in message
    assert "in the forward" in message


def test_chunked_linear_cross_entropy() -> None:
    """With options it computes the gradient chunk by chunk in the forward."""
    model, x, y = mlp_batch()
    head, options = torch.eye(3).double(), nn.LinearCrossEntropyOptions()

    def chunked(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(outputs, head, targets, options=options)

    message = refused(model, chunked, x, y)
    assert "linear_cross_entropy" in message
    assert "in the forward" in message


@pytest.mark.parametrize("use", ["head", "decay"])
def test_a_parameter_read_by_the_loss(use: str) -> None:
    """A use outside the recorded forward (a head, a decay term): its part of g_k would be missing."""
    model, x, y = mlp_batch()
    weight, model[4].forward = model[4].weight, lambda hidden: hidden

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        if use == "head":
            return F.cross_entropy(F.linear(hidden, weight), targets)
        return F.cross_entropy(hidden, targets) + weight.square().sum()

    assert "4.weight" in refused(model, loss, x, y)


def test_a_pairwise_distance_to_a_parameter() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return -torch.cdist(x, self.centres)

    message = refused(Prototypes().double(), F.cross_entropy, *mlp_batch()[1:])
    assert "centres" in message
    assert "cdist" in message


def test_a_head_that_is_differentiable_once() -> None:
    model, x, y = mlp_batch()
    message = refused(model, lambda outputs, _: OnceSquare.apply(outputs), x, y)
    assert "oncesquare" in message
    assert "once_differentiable" in message


def test_a_twice_differentiable_function_is_exact() -> None:
    torch.manual_seed(0)
    model, (_, x, y) = Calls(TwiceSine.apply).double(), mlp_batch()
    want = oracle.penalty_gradient(model, F.cross_entropy, x, y, 2, weight=WEIGHT)
    assert oracle.relative_error(step(model, F.cross_entropy, x, y), want) < 1e-10


def test_embedding_bag() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)).double()
    message = refused(model, F.cross_entropy, torch.randint(7, (6, 5)), torch.randint(3, (6,)))
    assert "embedding_bag" in message or "embeddingbag" in message
    assert "0.weight" in message


def test_ctc_loss() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5).double()

    def ctc(outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = outputs.log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(log_p, targets, torch.full((6,), 8), torch.full((6,), 2))

    assert "ctc" in refused(model, ctc, torch.randn(6, 8, 4).double(), torch.randint(1, 5, (6, 2)))


def test_compiled_model() -> None:
    model, x, y = mlp_batch()
    assert "compile" in refused(torch.compile(model, backend="aot_eager"), F.cross_entropy, x, y)


def test_submodule_compiled() -> None:
    model, x, y = mlp_batch()
    model[0] = torch.compile(model[0], backend="aot_eager")
    assert "compile" in refused(model, F.cross_entropy, x, y)


def test_distributed_static_graph() -> None:
    model, x, y = mlp_batch()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, static_graph=True)
        assert "static_graph" in refused(wrapped, F.cross_entropy, x, y)
    finally:
        dist.destroy_process_group()


def test_synchronised_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.SyncBatchNorm(4), nn.Linear(4, 3)).double()
    assert "syncbatchnorm" in refused(model, F.cross_entropy, *mlp_batch()[1:])


class Centred(nn.Module):
    """Subtracts the mean over the batch: samples interact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x - x.mean(0))


class TwoViews(nn.Module):
    """Puts two views of the batch one behind the other: row i is not sample i."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tanh(self.first(torch.cat([x, x.flip(1)]))).chunk(2)
        return self.second(left * right)


class SequenceFirst(nn.Module):
    """`nn.TransformerEncoder` in its default layout, [T, B, D], inside a batch-first model."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("model", [Centred, TwoViews], ids=lambda model: model.__name__)
def test_samples_that_are_not_rows(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert "sample" in refused(model().double(), F.cross_entropy, *mlp_batch()[1:])


@pytest.mark.parametrize("length", [6, 12, 5])
def test_sequence_first_layout(length: int) -> None:
    """Six samples, and lengths that are equal to, a multiple of, and unrelated to that number."""
    torch.manual_seed(0)
    x, y = torch.randn(6, length, 4).double(), torch.randint(3, (6,))
    message = refused(SequenceFirst().double(), F.cross_entropy, x, y)
    assert "batch" in message or "sample" in message


@pytest.mark.parametrize("size", [1, 5])
def test_batch_norm_of_one_vector(size: int) -> None:
    """The last micro-batch of six vectors in fives holds one: it has no variance."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    message = refused(model, F.cross_entropy, *mlp_batch()[1:], size=size)
    assert "batch" in message
    assert "micro_batch_size" in message
