"""Norm layers against a loop over micro-batches with `create_graph=True`, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.micro_batches import MicroBatches
from fastreg.normalize import normalize_micro_batches, normalize_rows
from norm_nets import IMAGE, NETS, SAMPLES, Functional, after_conv, build
from rule_oracle import (
    PerSample,
    assert_close,
    assert_same,
    check_exact,
    check_float32,
    check_statistics,
    check_twice_differentiable,
    expected,
    received,
    recorded,
    statistics,
)


@pytest.mark.parametrize("size", [1, 2, 3, SAMPLES])
@pytest.mark.parametrize("name", NETS)
def test_norms_and_gradients(name: str, size: int) -> None:
    net, x = build(name)
    x.requires_grad_()
    check_exact(net, x, size)


@pytest.mark.parametrize("norm", [
    lambda x, b: F.layer_norm(x, (3,), None, b),
    lambda x, b: F.group_norm(x.mT, 3, None, b).mT,
])  # fmt: skip
def test_a_bias_without_a_scale(norm: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    """torch's own double backward fails on these calls; adding the bias outside is the same function."""
    net, x = build("layer")
    net.layers[1] = Functional(lambda x, w, b: norm(x * w, None) + b).double()
    want = expected(net, x, 2)
    net.layers[1].function = lambda x, w, b: norm(x * w, b)
    assert_same(received(net, x, 2), want)
    assert_close([statistics(net, x, 2)[0]], [want.norms])


@pytest.mark.parametrize("frozen", ["weight", "bias", "layers.0", "layers.1"])
@pytest.mark.parametrize("name", ["layer", "rms", "group", "batch", "batch_evaluated"])
def test_frozen_parameters_and_constant_input(name: str, frozen: str) -> None:
    net, x = build(name)
    for parameter_name, parameter in net.named_parameters():
        parameter.requires_grad_(frozen not in parameter_name)
    # Freezing every bias leaves weights and the other way round: something is always learned.
    check_exact(net, x, 2)


@pytest.mark.parametrize("size", [2, SAMPLES])
@pytest.mark.parametrize("name", NETS)
def test_statistics_ride_on_the_backward(name: str, size: int) -> None:
    net, x = build(name)
    check_statistics(net, x, size)


@pytest.mark.parametrize("name", NETS)
def test_recorded_operations_differentiate_twice(name: str) -> None:
    net, x = build(name)
    check_twice_differentiable(net, x.requires_grad_())


@pytest.mark.parametrize("name", ["layer", "rms", "group", "batch", "batch_evaluated", "instance"])
def test_float32_is_as_good_as_its_plain_form(name: str) -> None:
    net, x = build(name)
    check_float32(net, x, margin=4)


@pytest.mark.parametrize("center", [True, False])
def test_rows_differentiate_twice(center: bool) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: normalize_rows(t, 4, 0.1, center), x)
    assert gradgradcheck(lambda t: normalize_rows(t, 12, 0.1, center), x)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_differentiate_twice(size: int) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: normalize_micro_batches(t, MicroBatches(3, size), 0.1)[0], x)
    assert gradgradcheck(lambda t: normalize_micro_batches(t, MicroBatches(3, size), 0.1)[0], x)


def test_batch_statistics_do_not_cancel() -> None:
    """A mean of a thousand deviations costs float32 three digits of the variance, not all of them."""
    x = torch.randn(8, 2, 16) + 1000
    _, mean, var = normalize_micro_batches(x, MicroBatches(8, 4), 1e-5)
    halves = x.double().unflatten(0, (2, 4)).transpose(1, 2).flatten(2)
    assert torch.allclose(mean.double(), halves.mean(2), rtol=1e-6)
    assert torch.allclose(var.double(), halves.var(2, correction=0), rtol=1e-3)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True, momentum=0.3)])
def test_running_statistics_take_a_step_per_micro_batch(norm: nn.Module) -> None:
    net, x = after_conv(norm).double(), torch.randn(SAMPLES, *IMAGE, dtype=torch.float64)
    norm.reset_running_stats()
    for rows in x.split(2):
        net(rows)
    want = [norm.running_mean.clone(), norm.running_var.clone()]
    norm.reset_running_stats()
    with recorded(net, 2):
        net(x)
    assert_close([norm.running_mean, norm.running_var], want)


def test_checkpointing_counts_running_statistics_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = after_conv(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    torch.manual_seed(0)
    net, x = Checkpointed().double(), torch.randn(SAMPLES, *IMAGE, dtype=torch.float64)
    with recorded(net, 2):
        loss = net(x).sum()
        norm = net.net.layers[1]
        want = norm.running_mean.clone(), norm.running_var.clone()
        loss.backward()
    assert torch.equal(norm.running_mean, want[0])
    assert torch.equal(norm.running_var, want[1])


@pytest.mark.parametrize("name", ["layer", "rms", "group", "batch"])
def test_bfloat16_activations_keep_their_dtype(name: str) -> None:
    net, x = build(name)
    norm = net.layers[1].float()
    hidden = net.layers[0](x).detach().bfloat16().requires_grad_()
    with recorded(norm, 2) as recorder:
        out = norm(hidden)
        assert out.dtype == torch.bfloat16
        (norms,) = torch.autograd.grad(out.square().sum(), recorder.session.probe, allow_unused=True)
        assert norms is None or norms.isfinite().all()
    rows = hidden.detach().double().split(2)
    assert_close([out.detach().double()], [torch.cat([norm.double()(h) for h in rows]).detach()], 2**-7)


def test_one_value_per_channel_is_refused() -> None:
    net = PerSample(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with recorded(net, 2), pytest.raises(FastregError, match="micro_batch_size=2 with a last micro-batch of 1"):
        net(torch.randn(SAMPLES, 3))


def test_a_norm_over_the_batch_is_refused() -> None:
    net = nn.LayerNorm((SAMPLES, 3))
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match="without its batch dimension"):
        net(torch.randn(SAMPLES, 3))


@pytest.mark.parametrize("function", [
    lambda w: F.layer_norm(w, (3,)),
    lambda w: F.rms_norm(w, (3,)),
    lambda w: F.group_norm(w[None], 1)[0],
    lambda w: F.batch_norm(w[:, None], None, None, training=True)[:, 0],
])  # fmt: skip
def test_a_norm_of_a_parameter_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    net = Functional(lambda x, w, b: x * function(w) + b)
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match="'w'.*not linear"):
        net(torch.randn(SAMPLES, 3))
