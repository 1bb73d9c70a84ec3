"""Cross entropy to second order, its label draw and its in-place form, beyond what the op suite compares."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastreg
from fastreg.cross_entropy import cross_entropy, drawn_cross_entropy
from fastreg.errors import FastregError
from fastreg.kernels import backend, cross_entropy as head, cross_entropy_gradient, cross_entropy_gradient_, registry
from fastreg.kernels.cross_entropy import reference
from fastreg.kernels.cross_entropy.config import Config
from tolerances import Comparison, assert_all_close

# Triton kernels run compiled where there is a GPU, and in Triton's interpreter elsewhere.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = [pytest.mark.gpu] if TRITON_DEVICE == "cuda" else []
BACKENDS = ("reference", "native", pytest.param("triton", marks=ON_GPU))
LABELS = torch.tensor([0, 4, 2, -100, 1, 3])
FUNCTIONS = (lambda z: cross_entropy(z, LABELS).square(), lambda z: drawn_cross_entropy(z, 3, 4)[0].square())
# Chance of a false alarm; the draws are fixed, so a test either always passes or never.
ALARM = 1e-6


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a backend is tested, with that backend forced."""
    with backend(request.param):
        yield TRITON_DEVICE if request.param == "triton" else "cpu"


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of deviation two."""
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn(z: Tensor, seed: int = 7, draw: int = 0) -> Tensor:
    """The labels alone, on the CPU."""
    return head(z, None, seed, draw)[2].cpu()


def surprise(labels: Tensor, probabilities: Tensor) -> float:
    """Chance of a larger chi-square statistic if the labels follow the probabilities."""
    expected = probabilities.double() * labels.numel()
    statistic = ((labels.bincount(minlength=len(expected)) - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert tuple(map(int, reference.philox(tuple(torch.tensor(c) for c in counter), key))) == words


def test_drawn_labels_follow_the_softmax(device: str) -> None:
    row = logits(11)
    labels = drawn(row.to(device).expand(8000, 11))
    assert surprise(labels, row.softmax(0)) > ALARM
    # As many draws tell a softmax of another temperature apart.
    assert surprise(labels, (row / 1.3).softmax(0)) < ALARM


@pytest.mark.parametrize("counted", ["seed", "draw"])
def test_one_row_drawn_again_and_again_follows_the_softmax(counted: str) -> None:
    row = logits(1, 5)
    labels = torch.cat([drawn(row, **{counted: number}) for number in range(4000)])
    assert surprise(labels, row[0].softmax(0)) > ALARM


def test_neighbouring_rows_draws_and_seeds_are_independent() -> None:
    z = torch.zeros(40000, 4)
    base = drawn(z, 1, 1)
    for other in (base.roll(1), drawn(z, 1, 2), drawn(z, 2, 1), drawn(z, 1 + 2**32, 1), drawn(z, 1, 1 + 2**32)):
        assert surprise(base * 4 + other, torch.full((16,), 1 / 16)) > ALARM


@pytest.mark.parametrize("shape", [(70, 3), (7, 300), (1, 262144)])
def test_every_backend_draws_the_same_labels(device: str, shape: tuple[int, int]) -> None:
    z = logits(*shape)
    assert torch.equal(drawn(z.to(device), -5, 2**40), reference.cross_entropy(z.double(), None, -5, 2**40)[2])


def test_a_row_draws_the_same_label_in_any_batch(device: str) -> None:
    z = logits(33, 9).to(device)
    assert torch.equal(drawn(z)[:5], drawn(z[:5]))


@pytest.mark.parametrize("device", [pytest.param("triton", marks=ON_GPU)], indirect=True)
def test_labels_do_not_depend_on_the_launch_grid(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits(13, 130).to(device)
    kernels = importlib.import_module("fastreg.kernels.cross_entropy.triton")
    found = []
    for rows, block in ((1, 16), (4, 64), (2, 256)):
        monkeypatch.setattr(kernels, "config", lambda _, rows=rows, block=block: Config(rows, block, 4))
        found.append(kernels.cross_entropy(z, None, 3, 4)[2])
    assert all(torch.equal(found[0], other) for other in found)


def test_a_class_of_probability_zero_is_never_drawn(device: str) -> None:
    z = torch.full((300, 40), -math.inf, device=device)
    z[:, 7] = z[:, 31] = 0.0
    loss, _, labels, dz = cross_entropy_gradient(z, None, torch.ones(300, device=device), 0, 0)
    assert set(labels.tolist()) == {7, 31}
    assert torch.allclose(loss, torch.full_like(loss, math.log(2)))
    assert dz.abs().sum(1).eq(1).all()


def test_what_cannot_be_computed_is_nan(device: str) -> None:
    z, given = logits(3, 20).to(device), torch.tensor([20, -1, 0], device=device)
    z[2, 11] = math.nan
    loss, _, labels, dz = cross_entropy_gradient(z, given, torch.ones(3, device=device), 0, 0)
    assert loss.isnan().all() and dz.isnan().any(1).all()
    assert ((labels >= 0) & (labels < 20)).all()


def test_in_place_equals_out_of_place_bit_for_bit(device: str) -> None:
    for z, labels, scale, seed, draw in registry()["cross_entropy_gradient_"].examples(torch.float32, device):
        *expected, dz = cross_entropy_gradient(z, labels, scale, seed, draw)
        for own in (z.clone(), torch.stack([z, z], dim=-1)[..., 0]):
            found = cross_entropy_gradient_(own, labels, scale, seed, draw)
            assert all(torch.equal(x, y) for x, y in zip((*expected, dz), (*found, own), strict=True))


def test_in_place_is_seen_by_autograd() -> None:
    x = logits(2, 3).requires_grad_()
    z = x * 1
    squared = z.square().sum()
    cross_entropy_gradient_(z.detach(), None, torch.ones(2), 0, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("backend_name", ["reference", "native"])
def test_the_functions_are_differentiable_twice(backend_name: str) -> None:
    z = logits(6, 5, dtype=torch.float64).requires_grad_()
    with backend(backend_name):
        for function in FUNCTIONS:
            assert torch.autograd.gradcheck(function, (z,))
            assert torch.autograd.gradgradcheck(function, (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_torch_in_float64(dtype: torch.dtype) -> None:
    z, v = logits(6, 5).to(dtype).requires_grad_(), logits(6, 5, seed=1).to(dtype)
    wide = z.detach().double().requires_grad_()
    found = to_second_order(cross_entropy(z, LABELS), z, v)
    expected = to_second_order(F.cross_entropy(wide, LABELS, reduction="none"), wide, v.double())
    pairs = zip(("loss", "dz", "grad_z"), found, expected, strict=True)
    assert_all_close([Comparison(name, x.detach(), y.detach(), reduced=5) for name, x, y in pairs])


def to_second_order(loss: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, the gradient of the sum of their squares, and its derivative along ``v``."""
    (dz,) = torch.autograd.grad(loss.square().sum(), z, create_graph=True)
    return loss, dz, torch.autograd.grad(dz, z, v)[0]


def test_function_transforms_and_the_compiler_see_the_same_function() -> None:
    z = logits(6, 5, dtype=torch.float64)
    for function in (lambda z, f=f: f(z).sum() for f in FUNCTIONS):
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        (compiled,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(function)(z), expected)
        torch.testing.assert_close(compiled, expected)
        hessian = torch.autograd.functional.hessian(function, z)
        torch.testing.assert_close(torch.func.hessian(function)(z), hessian)


@pytest.mark.parametrize(
    ("z", "labels", "scale", "said"),
    [
        (torch.ones(3), None, torch.ones(3), r"z must be \[R, C\]"),
        (torch.ones(3, 0), None, torch.ones(3), "z must have at least one class"),
        (torch.ones(3, 2), torch.zeros(3), torch.ones(3), "labels must be int64"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), torch.ones(3), r"labels must be \[R\]"),
        (torch.ones(3, 2), None, torch.ones(2), r"scale must be \[R\]"),
        (torch.ones(3, 2), None, torch.ones(3).double(), "scale must be torch.float32"),
        (torch.ones(3, 2, requires_grad=True), None, torch.ones(3), "detached from autograd"),
    ],
)
def test_what_does_not_fit_is_refused(z: Tensor, labels: Tensor | None, scale: Tensor, said: str) -> None:
    with pytest.raises(FastregError, match=f"cross_entropy_gradient: .*{said}"):
        cross_entropy_gradient(z, labels, scale, 0, 0)


def test_a_fisher_penalty_saved_before_its_first_draw_resumes_under_another_torch_seed() -> None:
    torch.manual_seed(1)
    saved = fisher()
    state = saved.penalties[0].state_dict()
    torch.manual_seed(2)
    resumed = fisher()
    resumed.penalties[0].load_state_dict(state)
    for _ in range(3):
        assert torch.equal(step_labels(saved), step_labels(resumed))
    assert not torch.equal(step_labels(saved), step_labels(fisher()))


def fisher() -> fastreg.Regularizer:
    """A penalty that takes its seed from torch, on a model of fixed weights."""
    model = torch.nn.Linear(3, 50, bias=False)
    torch.nn.init.zeros_(model.weight)
    return fastreg.Regularizer(model, fastreg.FisherTrace(weight=0.1), micro_batch_size=4)


def step_labels(reg: fastreg.Regularizer) -> Tensor:
    """The labels of one step."""
    out = reg.model(torch.ones(8, 3))
    reg(F.cross_entropy(out, torch.zeros(8, dtype=torch.int64)), out)
    return reg.penalties[0].last_labels
