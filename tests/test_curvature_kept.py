"""Operators on a model keep its recorded forward from one product to the next, and draw the same dropout in each."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_oracle import Piece
from fastreg.curvature import Hessian
from fastreg.errors import FastregError
from test_curvature_matrices import DROPOUT, EXACT, MATRICES, SAME, assert_near, columns, cut, every_matrix, small


def counted(module: nn.Module) -> list[int]:
    """The batch sizes of its forwards from now on."""
    sizes: list[int] = []
    module.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    return sizes


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Of an optimizer, which leaves no gradient."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def scale(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def load(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def test_a_single_batch_is_run_once() -> None:
    model, batch, case = small("mlp_gelu")
    runs, operator = counted(model[2]), Hessian(model, case.loss_fn, batch)
    first = operator @ columns(operator)
    assert torch.equal(operator @ columns(operator), first)
    operator.dense()
    assert runs == [7]


def test_several_batches_are_run_once_per_call() -> None:
    model, batch, case = small("mlp_gelu")
    runs, operator = counted(model[2]), Hessian(model, case.loss_fn, cut(batch, 3, 4))
    for _ in range(2):
        operator @ columns(operator, 5)
    assert runs == [3, 4, 3, 4]


@every_matrix
@pytest.mark.parametrize("change", [step, scale, load])
def test_changed_parameters_are_noticed(kind: str, change: Callable) -> None:
    model, batch, case = small("mlp_gelu")
    operator = MATRICES[kind](model, case.loss_fn, batch)
    before = operator @ columns(operator)
    change(model, batch)
    runs, after = counted(model[2]), operator @ columns(operator)
    assert runs == [7] and (after - before).abs().max() > 1e-3 * before.abs().max()
    assert torch.equal(MATRICES[kind](model, case.loss_fn, batch) @ columns(operator), after)


def test_a_parameter_the_matrix_is_not_about_is_noticed() -> None:
    model, batch, case = small("mlp_gelu")
    build = lambda: Hessian(model, case.loss_fn, batch, parameters=model[4].parameters())  # noqa: E731
    operator = build()
    before = operator.dense()
    scale(model, batch)
    assert not torch.equal(operator.dense(), before)
    assert torch.equal(operator.dense(), build().dense())


@every_matrix
@pytest.mark.parametrize("change", ["mode", "buffer", "data"])
def test_a_changed_mode_or_buffer_is_noticed(kind: str, change: str) -> None:
    model, batch, case = small("batch_norm_eval")
    build = lambda: MATRICES[kind](model, case.loss_fn, batch)  # noqa: E731
    operator = build()
    before = operator @ columns(operator)
    if change == "mode":
        model.train()
    elif change == "buffer":
        model[1].running_var.mul_(2)
    else:
        model[0].weight.data = 2 * model[0].weight.data
    after = operator @ columns(operator)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    assert torch.equal(build() @ columns(operator), after)


def test_parameters_the_model_no_longer_has_are_refused() -> None:
    model, batch, case = small("mlp_gelu")
    operator = Hessian(model, case.loss_fn, batch)
    operator @ columns(operator)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(FastregError, match="parameters must be parameters of the model"):
        operator @ columns(operator)


@every_matrix
def test_a_deleted_operator_leaves_nothing(kind: str) -> None:
    model, batch, case = small("mlp_gelu")
    inner: list[weakref.ref] = []
    handle = model[1].register_forward_hook(lambda module, args, output: inner.append(weakref.ref(output)))
    operator = MATRICES[kind](model, case.loss_fn, batch)
    operator @ columns(operator)
    handle.remove()
    gc.disable()
    try:
        assert inner[0]() is not None
        del operator
        assert inner[0]() is None
    finally:
        gc.enable()
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


def test_a_graph_that_is_outdated_is_given_back() -> None:
    model, batch, case = small("mlp_gelu")
    inner: list[weakref.ref] = []
    model[1].register_forward_hook(lambda module, args, output: inner.append(weakref.ref(output)))
    operator = Hessian(model, case.loss_fn, batch)
    for _ in range(3):
        operator @ columns(operator)
        scale(model, batch)
    assert [ref() is None for ref in inner] == [True, True, False]


@pytest.mark.parametrize("kind", ["hessian", "ggn", "exact", "sampled"])
def test_buffers_stay(kind: str) -> None:
    model, batch, case = small("batch_norm_train")
    before = {name: value.clone() for name, value in model.named_buffers()}
    operator = MATRICES[kind](model, case.loss_fn, cut(batch, 3, 4))
    operator @ columns(operator)
    assert before and all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@every_matrix
@pytest.mark.parametrize("sizes", [(7,), (3, 4)], ids=["one", "several"])
def test_dropout_in_training_leaves_a_symmetric_operator(kind: str, sizes: tuple[int, ...]) -> None:
    model, batch, case = small(DROPOUT)
    data = batch if len(sizes) == 1 else cut(batch, *sizes)
    operator, state = MATRICES[kind](model, case.loss_fn, data), torch.get_rng_state()
    matrix = operator.dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert_near(matrix, matrix.T, SAME)
    torch.rand(3)
    assert torch.equal(operator.dense(), matrix)
    scale(model, batch)
    assert not torch.equal(operator.dense(), matrix)
    model.load_state_dict(case.model().state_dict())
    assert torch.equal(operator.dense(), matrix)
    assert not torch.equal(MATRICES[kind](model, case.loss_fn, data, seed=1).dense(), matrix)
    assert not torch.equal(MATRICES[kind](copy.deepcopy(model).eval(), case.loss_fn, data).dense(), matrix)


def test_dropout_is_drawn_from_the_seed_and_anew_for_every_batch() -> None:
    model, batch, case = small(DROPOUT)
    operator, want = Hessian(model, case.loss_fn, [batch, batch], seed=7), []
    vector = columns(operator, 1)[:, 0]
    with torch.random.fork_rng():
        for number in range(2):
            torch.manual_seed(7 + number)
            want.append(Piece(model, case, *batch).hessian_product(vector))
    assert_near(operator @ vector, sum(want) / 2, EXACT)
    assert (want[0] - want[1]).abs().max() > 0.01 * want[0].abs().max()
