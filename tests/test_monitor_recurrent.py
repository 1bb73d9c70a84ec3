"""Norms of recurrent layers, whose product over time has a backward of its own beside torch's operations."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from case_models import Recurrent
from fastreg import Monitor


class Twice(nn.Module):
    """One layer, called on its own outputs."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = layer(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x)[0])[0].mean(1))


@pytest.mark.parametrize("per_layer", [False, True], ids=["whole", "per layer"])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("build", [Recurrent, Twice])
def test_a_pass_for_input_gradients_is_not_counted(
    build: type[nn.Module], layer: type[nn.Module], per_layer: bool
) -> None:
    torch.manual_seed(0)
    model, y = build(layer).double(), torch.randint(3, (6,))
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    want = defaultdict(float)
    for name, squared in oracle.sq_norms_by_parameter(model, F.cross_entropy, x.detach(), y, 1).items():
        want["sample_norms"] += squared
        if per_layer:
            want["micro_batch_grad_norm/" + name.rpartition(".")[0]] += squared.mean()
    monitor = Monitor(model, ("sample_norms", "micro_batch_grad_norm"), per_layer=per_layer)
    loss = F.cross_entropy(model(x), y)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    found = monitor.step()
    for name, squared in want.items():
        torch.testing.assert_close(found[f"fastreg/{name}"].square(), squared, rtol=1e-11, atol=0)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_pass_for_input_gradients_alone_keeps_nothing(layer: type[nn.Module]) -> None:
    model = Recurrent(layer)
    Monitor(model, ("sample_norms",))
    x = torch.randn(6, 3, 4, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    kept = weakref.ref(x)
    del x
    gc.collect()
    assert kept() is None
