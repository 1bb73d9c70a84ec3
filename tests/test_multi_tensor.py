"""Passes over lists of tensors against torch's own optimizers and sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels import adamw_step_, backend, multi_axpy_, multi_dot, multi_sqnorm, sgd_step_
from fastreg.kernels.multi_tensor.lists import CHUNK

# One number, odd ones, none, whole chunks and one past, not aligned to a vector, and many.
SHAPES = [(1,), (3, 7), (0, 4), (CHUNK,), (CHUNK + 1,), (2, CHUNK - 5), *[(5,)] * 300]
BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("native", "cpu"), id="native"),
    *([pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []),
]
SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.3, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3, "maximize": True},
]
ADAMW = [
    {"lr": 0.1},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "maximize": True},
]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors are, with the backend forced."""
    name, device = request.param
    with backend(name):
        yield device


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cuda" and request.param == torch.float64:
        pytest.skip("fastreg._cuda takes float32; float64 is the reference's")
    return request.param


def draw(device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Normal numbers of every shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]


def tolerance(dtype: torch.dtype, steps: int = 1) -> dict[str, float]:
    """Some roundings of numbers of size one per step, or of sums of chunks of them."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 16 * steps * eps, "atol": 16 * steps * eps}


def test_norms_and_products(device: str, dtype: torch.dtype) -> None:
    xs, ys = draw(device, dtype, 0), draw(device, dtype, 1)
    squares = torch.stack([x.double().square().sum() for x in xs])
    products = torch.stack([(x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(multi_sqnorm(xs).double(), squares, **tolerance(dtype))
    # A sum of n products of random sign loses what its terms, not their sum, are worth.
    slack = {"rtol": 0.0, "atol": tolerance(dtype)["atol"] * (2 * CHUNK) ** 0.5}
    torch.testing.assert_close(multi_dot(xs, ys).double(), products, **slack)
    assert torch.equal(multi_dot(xs, ys), multi_dot(xs, ys))


@pytest.mark.parametrize("one", [True, False], ids=["one", "each"])
def test_axpy(device: str, dtype: torch.dtype, one: bool) -> None:
    ps, ds = draw(device, dtype, 0), draw(device, dtype, 1)
    c = torch.tensor(0.3, dtype=dtype, device=device)
    c = c if one else c * torch.arange(1, len(ps) + 1, dtype=dtype, device=device)
    want = [p + d * k for p, d, k in zip(ps, ds, c.expand(len(ps)), strict=True)]
    multi_axpy_(ps, ds, c)
    for p, w in zip(ps, want, strict=True):
        torch.testing.assert_close(p, w, **tolerance(dtype))


def trained(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], device: str, dtype: torch.dtype
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Parameters after three steps of torch's optimizer."""
    ps = [p.requires_grad_() for p in draw(device, dtype, 0)]
    optimizer = make(ps)
    for step in range(3):
        for p, g in zip(ps, draw(device, dtype, step + 1), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in ps], optimizer


@pytest.mark.parametrize("options", SGD, ids=lambda o: "-".join(list(o)[1:]) or "plain")
def test_sgd_is_torchs(device: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    want, _ = trained(lambda ps: torch.optim.SGD(ps, foreach=False, **options), device, dtype)
    ps = draw(device, dtype, 0)
    buffers = [torch.zeros_like(p) for p in ps] if "momentum" in options else None
    for step in range(3):
        grads = draw(device, dtype, step + 1)
        squares = sgd_step_(ps, grads, buffers, first=step == 0, **options)
        torch.testing.assert_close(squares, multi_sqnorm(grads), **tolerance(dtype))
    for p, w in zip(ps, want, strict=True):
        torch.testing.assert_close(p, w, **tolerance(dtype, steps=3))


@pytest.mark.parametrize("options", ADAMW, ids=["defaults", "all"])
def test_adamw_is_torchs(device: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    want, optimizer = trained(lambda ps: torch.optim.AdamW(ps, foreach=False, **options), device, dtype)
    ps = draw(device, dtype, 0)
    firsts, seconds = ([torch.zeros_like(p) for p in ps] for _ in range(2))
    for step in range(3):
        grads = draw(device, dtype, step + 1)
        squares = adamw_step_(ps, grads, firsts, seconds, step + 1, **options)
        torch.testing.assert_close(squares, multi_sqnorm(grads), **tolerance(dtype))
    for p, m, v, w, state in zip(ps, firsts, seconds, want, optimizer.state.values(), strict=True):
        for found, expected in ((p, w), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
            torch.testing.assert_close(found, expected, **tolerance(dtype, steps=3))


def test_autograd_sees_what_is_overwritten(device: str) -> None:
    p = torch.ones(3, device=device, requires_grad=True)
    squared = p.square().sum()
    sgd_step_([p], [torch.ones(3, device=device)], None, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_strided_and_low_precision_tensors_go_to_the_reference() -> None:
    p, d = torch.zeros(4, 3).T, torch.ones(3, 4)
    multi_axpy_([p], [d], torch.tensor(2.0))
    assert torch.equal(p, 2 * d)
    low = [torch.full((5,), 3.0, dtype=torch.bfloat16)]
    assert multi_sqnorm(low).tolist() == [45.0]
    with backend("native"), pytest.raises(FastregError, match="it takes contiguous tensors"):
        multi_axpy_([p], [d], torch.tensor(2.0))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: multi_sqnorm([]), "xs must hold at least one tensor, got none"),
        (lambda: multi_sqnorm([torch.ones(2, dtype=torch.int64)]), "xs must be floating, got torch.int64"),
        (lambda: multi_dot([torch.ones(2)], []), "ys must hold 1 tensors as xs, got 0"),
        (lambda: multi_dot([torch.ones(2)], [torch.ones(3)]), r"ys\[0\] must be torch.float32 \[2\] on cpu"),
        (lambda: multi_dot([torch.ones(2)], [torch.ones(2).double()]), "got torch.float64"),
        (lambda: sgd_step_([torch.ones(2)], [torch.ones(2)], None, lr=0.1, momentum=0.9), "buffers must be given"),
        (lambda: multi_axpy_([torch.ones(2)], [torch.ones(2)], torch.ones(3)), r"coefficients must be \[n\] = \[1\]"),
        (lambda: multi_axpy_([torch.ones(2)], [torch.ones(2)], torch.ones(1).double()), "must be torch.float32 on cpu"),
        (lambda: adamw_step_([torch.ones(1)], *[[torch.ones(1)]] * 3, 0, lr=0.1), "step must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(FastregError, match=said):
        call()


def test_parts_of_tensors_are_refused() -> None:
    """A kernel would read beyond the part that is there."""

    class DTensor(torch.Tensor):
        pass

    with pytest.raises(FastregError, match="must be whole, got a DTensor"):
        multi_sqnorm([torch.ones(3).as_subclass(DTensor)])
