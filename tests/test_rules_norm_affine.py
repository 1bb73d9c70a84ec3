"""Norm layers fused with their tracked scale and bias, in what the tests of all norm layers do not reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastreg.errors import FastregError
from fastreg.kernels import backend, norm_affine, norm_affine_backward, norm_affine_double_backward
from fastreg.session import Phase
from norm_nets import SAMPLES, build
from rule_oracle import PerSample, assert_close, assert_same, received, recorded

FUSED = ("layer", "layer_no_bias", "layer_two_dimensions", "layer_shared", "rms", "group", "group_first", "instance")


@pytest.mark.parametrize("name", FUSED)
def test_tracked_scale_and_bias_are_one_operation_with_the_normalisation(name: str) -> None:
    net, x = build(name)
    with recorded(net, 2) as recorder:
        recorder.trace = traced = []
        net(x)
    assert "NormAffine" in {one.rule for one in traced}
    assert "Scale" not in {one.rule for one in traced}


@pytest.mark.parametrize("chosen", [(0,), (1, 2), (0, 2)])
@pytest.mark.parametrize("name", FUSED)
def test_chosen_micro_batches(name: str, chosen: tuple[int, ...]) -> None:
    """The rest has norm zero, and the penalty is that of the chosen alone."""
    net, x = build(name)
    with recorded(net, 2) as recorder:
        loss, session = net(x).mean(), recorder.session
        session.selected = chosen
        with session.during(Phase.CHAIN):
            (norms,) = torch.autograd.grad(loss, session.probe, create_graph=True)
        penalty = torch.autograd.grad(norms.sum(), net.parameters(), allow_unused=True, materialize_grads=True)
    want, total = torch.zeros(3, dtype=torch.float64), 0.0
    for k in chosen:
        gradients = torch.autograd.grad(net(x.split(2)[k]).sum() / SAMPLES, net.parameters(), create_graph=True)
        square = sum(g.square().sum() for g in gradients)
        want[k], total = square.detach(), total + square
    assert_close([norms.detach()], [want])
    assert_close(penalty, torch.autograd.grad(total, net.parameters(), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", FUSED)
def test_norms_of_each_parameter_add_up(name: str) -> None:
    net, x = build(name)
    with recorded(net, 2) as recorder:
        loss, session = net(x).mean(), recorder.session
        session.per_parameter = {}
        with session.during(Phase.CHAIN):
            (norms,) = torch.autograd.grad(loss, session.probe)
    want = torch.zeros_like(norms)
    for k, rows in enumerate(x.split(2)):
        for parameter in net.parameters():
            (gradient,) = torch.autograd.grad(net(rows).sum() / SAMPLES, parameter)
            want[k] += gradient.square().sum()
            session.per_parameter[id(parameter)][k] -= gradient.square().sum()
    assert_close([norms], [want])
    left = torch.stack(list(session.per_parameter.values()))
    assert float(left.abs().max()) <= 1e-10 * float(want.max())


@pytest.mark.parametrize("norm, shape", [
    (nn.LayerNorm(300), (300,)),
    (nn.RMSNorm(300), (300,)),
    (nn.GroupNorm(3, 12), (12, 5, 7)),
    (nn.GroupNorm(1, 3), (3, 1, 100)),
], ids=str)  # fmt: skip
def test_large_batches_agree_with_the_reference(norm: nn.Module, shape: tuple[int, ...]) -> None:
    """Several tasks and both threads of the compiled code."""
    net = PerSample(norm).double()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(1200, *shape, dtype=torch.float64, requires_grad=True)
    threads = torch.get_num_threads()
    answers = []
    for count, name in ((2, "native"), (1, "native"), (1, "reference")):
        torch.set_num_threads(count)
        with backend(name):
            answers.append(received(net, x, 500))
    torch.set_num_threads(threads)
    assert_same(answers[0], answers[2])
    assert_same(answers[1], answers[2])


X, W = torch.ones(3, 4, 2), torch.ones(4)
M, G = torch.ones(3, 2), torch.ones(1, 4)


@pytest.mark.parametrize("call, message", [
    (lambda: norm_affine(X, W, None, 3, 0.0, True), "groups must be a divisor of C = 4, got 3"),
    (lambda: norm_affine(X, W[:3], None, 2, 0.0, True), "weight must be"),
    (lambda: norm_affine(X, W, W.double(), 2, 0.0, True), "bias must be torch.float32"),
    (lambda: norm_affine_backward(X, M.double(), M, W, X, [0, 3], True), "mean and rstd must be torch.float32"),
    (lambda: norm_affine_backward(X, M[:2], M, W, X, [0, 3], True), "mean must be"),
    (lambda: norm_affine_backward(X, M, M, W, X[:2], [0, 3], True), "d must be"),
    (lambda: norm_affine_backward(X, M, M, W, X, [0, 2], True), "offsets must be ascending from 0 to 3"),
    (lambda: norm_affine_double_backward(X, M, M, W, X, X, G, G, [0, 1, 3], True), "v_scale must be"),
    (lambda: norm_affine_double_backward(X, M, M, W, X, X, G, G.double(), [0, 3], True), "v_bias must be"),
])  # fmt: skip
def test_arguments_that_do_not_fit(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FastregError, match=message):
        call()
