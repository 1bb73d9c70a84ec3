"""Activation checkpointing: modules re-run inside the backward, where the model's own forward is long over."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastreg
import oracle
from cases import BY_NAME
from fastreg.errors import FastregError
from fastreg.models import GPT, GPTConfig

WEIGHT = 0.7
PENALTY = fastreg.GradNorm(weight=WEIGHT)
BATCH = BY_NAME["mlp_gelu"].batch(6)


def step(
    model: nn.Module, x: Tensor, y: Tensor, size: int, penalty: fastreg.Penalty = PENALTY
) -> oracle.Gradient:
    """The gradient of two regularised steps, of which the second is returned: the first one is also checked."""
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=size)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        outputs = model(x)
        reg(F.cross_entropy(outputs, y), outputs).backward()
    return oracle.collected_gradient(model)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 6))
        self.first, self.head, self.use_reentrant = nn.Linear(5, 6), nn.Linear(6, 3), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.use_reentrant))


def test_reentrant_checkpointing() -> None:
    with pytest.raises(FastregError, match="use_reentrant=False"):
        step(Checkpointed(True).double(), *BATCH, 2)


@pytest.mark.parametrize("size", [6, 4, 1])
def test_checkpointing_without_reentrance_is_exact(size: int) -> None:
    torch.manual_seed(0)
    model, (x, y) = Checkpointed(False).double(), BATCH
    want = oracle.penalty_gradient(model, F.cross_entropy, x, y, size, weight=WEIGHT)
    assert oracle.relative_error(step(model, x, y, size), want) < 1e-10


PENALTIES = {
    "variance": lambda: fastreg.GradNorm(weight=WEIGHT, centered=True),
    "without replacement": lambda: fastreg.WithoutReplacement(weight=WEIGHT, lr=2.0, rank=20, seed=0),
    "frozen": lambda: fastreg.FisherTrace(weight=WEIGHT, seed=0, gradient="frozen"),
    "true": lambda: fastreg.FisherTrace(weight=WEIGHT, seed=0, gradient="true"),
    "jacobian": lambda: fastreg.UnitJacobian(weight=WEIGHT, directions=2, seed=0),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty_is_the_same_with_checkpointing(penalty: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = Checkpointed(False).double(), BATCH
    plain = Checkpointed(False).double()
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda x: plain.head(plain.body(torch.tanh(plain.first(x))))
    want = step(plain, x, y, 2, PENALTIES[penalty]())
    assert oracle.relative_error(step(model, x, y, 2, PENALTIES[penalty]()), want) < 1e-10


def test_checkpointing_a_bare_function_of_a_parameter() -> None:
    """It is re-run outside every module, unrecorded: exact, or refused by fastreg or by checkpoint itself."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(lambda z: torch.sin(z * self.w), x, use_reentrant=False))

    torch.manual_seed(0)
    model, (x, y) = Model().double(), BATCH
    want = oracle.penalty_gradient(model, F.cross_entropy, x, y, 2, weight=WEIGHT)
    try:
        got = step(model, x, y, 2)
    except (FastregError, CheckpointError) as refusal:
        assert "metadata" in str(refusal) or "checkpoint" in str(refusal)
    else:
        oracle.assert_same_gradient(got, want)


def test_attention_in_a_module_without_parameters() -> None:
    """Its second run must be recorded like its first, in the d-chain and in the backward that follows."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, width=8, layers=2, heads=2)).double()
    x, y = torch.randint(13, (6, 6)), torch.randint(13, (6, 6))
    want = oracle.penalty_gradient(model, mean_token_loss, x, y, 2, weight=WEIGHT)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    reg(mean_token_loss(model(x), y)).backward()
    assert oracle.relative_error(oracle.collected_gradient(model), want) < 1e-10


def mean_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
