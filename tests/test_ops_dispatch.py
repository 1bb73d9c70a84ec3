"""The registry's rule of choice, forcing a backend, and the refusals of the public functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastreg.errors import FastregError
from fastreg.kernels import (
    Implementation,
    backend,
    explain,
    index_sqnorm,
    normalize_backward,
    outer_apply,
    outer_sqnorm,
    outer_sum,
    registry,
    segment_dot,
)

ROWS = torch.ones(4, 3)
HALVES = [0, 2, 4]


def test_first_able_and_not_slower_implementation_is_chosen() -> None:
    chosen = {line.name: line for line in explain("outer_sqnorm", ROWS, ROWS, HALVES, False)}
    assert chosen["native"].chosen and not chosen["reference"].chosen


def test_measured_loss_steers_the_choice_but_not_a_forced_backend() -> None:
    long = torch.ones(2400, 1300)
    args = (long, long, [0, 600, 1200, 1800, 2400], False)
    lines = {line.name: line for line in explain("outer_sqnorm", *args)}
    assert lines["reference"].chosen
    assert "rows per segment" in lines["native"].reason
    with backend("native"):
        assert [line.name for line in explain("outer_sqnorm", *args) if line.chosen] == ["native"]


def test_forced_backend_that_cannot_run_names_those_that_can() -> None:
    low = ROWS.bfloat16()
    with backend("native"), pytest.raises(FastregError, match=r"float32 and float64.*available: .*reference"):
        segment_dot(low, low, HALVES)


def test_forced_backend_an_op_does_not_have() -> None:
    present = {i.name for i in registry()["segment_dot"].implementations}
    for name in {"cuda", "triton"} - present:
        with backend(name), pytest.raises(FastregError, match="no such implementation"):
            segment_dot(ROWS, ROWS, HALVES)


def test_backend_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), backend("reference"):
        raise ZeroDivisionError
    assert any(line.chosen and line.name == "native" for line in explain("segment_dot", ROWS, ROWS, HALVES))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(FastregError, match="must be one of"), backend("fortran"):
        pass
    with pytest.raises(FastregError, match="must be one of"):
        explain("no_such_op")


def test_registry_cannot_be_written_through() -> None:
    with pytest.raises(TypeError):
        registry()["outer_sum"] = None  # type: ignore[index]


def test_tracked_input_is_refused_instead_of_losing_its_gradient() -> None:
    tracked = ROWS.clone().requires_grad_()
    with pytest.raises(FastregError, match="detached from autograd"):
        outer_sqnorm(tracked, ROWS, HALVES)
    with torch.no_grad():
        assert outer_sqnorm(tracked, ROWS, HALVES).shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: outer_sqnorm(ROWS, ROWS[:3], HALVES), r"d must be \[S, O\] = \[4, any\], got \[3, 3\]"),
        (lambda: outer_sum(ROWS, ROWS.double(), HALVES), "outer_sum: d must be torch.float32 as a"),
        (lambda: outer_sum(ROWS.long(), ROWS, HALVES), "outer_sum: a must be float32"),
        (lambda: outer_apply(ROWS, ROWS[:, :2], ROWS, HALVES), "outer_apply: k must be"),
        (lambda: segment_dot(ROWS, ROWS, [0, 2, 3]), "segment_dot: offsets must be ascending from 0 to 4"),
        (lambda: segment_dot(ROWS, ROWS, [0, 3, 2, 4]), "offsets must be two or more ascending"),
        (lambda: segment_dot(ROWS, ROWS, [1, 4]), "segment_dot: offsets must be ascending from 0 to 4"),
        (lambda: index_sqnorm(torch.zeros(4), ROWS, HALVES), "index_sqnorm: index must be int64"),
        (lambda: normalize_backward(ROWS, ROWS[:, 0].double(), ROWS, True), "rstd must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FastregError, match=message):
        call()


def test_implementation_names_are_known() -> None:
    names = {i.name for op in registry().values() for i in op.implementations}
    assert names <= {"cuda", "triton", "native", "reference"}
    assert all(isinstance(i, Implementation) for op in registry().values() for i in op.implementations)
