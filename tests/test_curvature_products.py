"""batched_hvp, ggn_vp, fisher_vp: every case against dense matrices of plain autograd, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from cases import BY_NAME, CASES, Case
from curvature_oracle import Piece, cut, flat, pieces
from fastreg.cross_entropy import drawn_cross_entropy
from fastreg.curvature import batched_hvp, fisher_vp, ggn_vp
from fastreg.models import GPT, GPTConfig

SAMPLES, SEED = 6, 5
PRODUCTS: dict[str, Callable] = {
    "hessian": batched_hvp,
    "ggn": ggn_vp,
    "exact": partial(fisher_vp, kind="exact"),
    "sampled": partial(fisher_vp, kind="sampled", seed=SEED),
    "empirical": partial(fisher_vp, kind="empirical"),
}
# The first leaves a tail, which makes the mean over micro-batches another one than that over samples.
GRID = [(case, size) for case in CASES for size in (4, 3 if case.min_group > 1 else 1)]
every_product = pytest.mark.parametrize("kind", PRODUCTS)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dimension(model: nn.Module) -> int:
    return sum(p.numel() for p in oracle.trainable(model).values())


def reduced(rows: Tensor, size: int) -> dict[str | None, Tensor]:
    """What to ask for with micro-batches of this size, and what it is of ``[m, D]``."""
    return {None: rows, "mean": rows.mean(0)} if SAMPLES % size else {"sum": rows.sum(0)}


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@lru_cache(maxsize=2)
def labelled(case: Case, size: int) -> list[Piece]:
    """Micro-batches, with the labels that are drawn for the predictions of the whole batch."""
    found = pieces(case, SAMPLES, size)
    _, labels = drawn_cross_entropy(torch.cat([p.outputs.detach() for p in found]).flatten(0, -2), SEED, 0)
    for piece, own in zip(found, labels.view(SAMPLES, -1).split(size), strict=True):
        piece.labels = own.flatten()
    return found


@lru_cache(maxsize=8)
def matrix(case: Case, kind: str) -> Tensor:
    """Of the whole batch, ``[D, D]``."""
    (piece,) = labelled(case, SAMPLES)
    return getattr(piece, kind)()


def by(piece: Piece, kind: str, vector: Tensor) -> Tensor:
    """One product of one micro-batch."""
    return piece.hessian_product(vector) if kind == "hessian" else getattr(piece, kind)() @ vector


def want_of(case: Case, kind: str, size: int, rows: Tensor) -> Tensor:
    """The product of every micro-batch with its own vector, ``[m, D]``."""
    return torch.stack([by(piece, kind, v) for piece, v in zip(labelled(case, size), rows, strict=True)])


# Against dense matrices


@every_product
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_vectors_on_one_batch(case: Case, kind: str) -> None:
    model = case.model()
    parameters, rows = oracle.trainable(model), normal(3, dimension(model))
    got = PRODUCTS[kind](model, case.loss_fn, case.batch(SAMPLES), cut(rows, parameters))
    # torch has no batching rule for the second derivative of a group norm, and row by row takes seconds.
    by_products = (case.name, kind) == ("residual_conv", "hessian")
    one_by_one = lambda: torch.cat([want_of(case, kind, SAMPLES, v[None]) for v in rows])  # noqa: E731
    want = one_by_one() if by_products else rows @ matrix(case, kind)
    oracle.assert_same_gradient(got, cut(want, parameters))


@every_product
@pytest.mark.parametrize(("case", "size"), GRID, ids=lambda v: getattr(v, "name", v))
def test_another_vector_for_every_micro_batch(case: Case, size: int, kind: str) -> None:
    model = case.model()
    parameters, count = oracle.trainable(model), -(-SAMPLES // size)
    rows = normal(count, dimension(model))
    want = want_of(case, kind, size, rows)
    for reduce, wanted in reduced(want, size).items():
        got = PRODUCTS[kind](model, case.loss_fn, case.batch(SAMPLES), cut(rows, parameters), size, reduce=reduce)
        oracle.assert_same_gradient(got, cut(wanted, parameters))


@pytest.mark.parametrize(("case", "size"), GRID, ids=lambda v: getattr(v, "name", v))
def test_along_the_gradients_of_micro_batches(case: Case, size: int) -> None:
    model = case.model()
    parameters = oracle.trainable(model)
    want = torch.stack([piece.hessian_product(piece.gradient()) for piece in labelled(case, size)])
    for reduce, wanted in reduced(want, size).items():
        got = batched_hvp(model, case.loss_fn, case.batch(SAMPLES), "grad", size, reduce=reduce)
        oracle.assert_same_gradient(got, cut(wanted, parameters))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_along_the_gradient_of_the_batch(case: Case) -> None:
    model = case.model()
    (piece,) = labelled(case, SAMPLES)
    want = cut(piece.hessian_product(piece.gradient()), oracle.trainable(model))
    oracle.assert_same_gradient(batched_hvp(model, case.loss_fn, case.batch(SAMPLES), "grad"), want)


@pytest.mark.parametrize("name", ["mlp_gelu", "conv1d_same", "embedding_padding"])
def test_the_oracle_agrees_with_itself(name: str) -> None:
    """Rows of the dense Hessian, one by one and all together, and products."""
    case = BY_NAME[name]
    (piece,) = pieces(case, SAMPLES, SAMPLES)
    dense, vector = matrix(case, "hessian"), normal(len(matrix(case, "hessian")))
    torch.testing.assert_close(piece.hessian_by_rows(), dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(piece.hessian_product(vector), dense @ vector, rtol=1e-10, atol=1e-12)


def test_sampled_labels_give_the_exact_matrix_on_average() -> None:
    """Within 5 standard errors in each of 18 numbers, their variance from an enumeration of the labels."""
    case, seeds = BY_NAME["one_linear"], 200
    model, vector = case.model(), normal(18)
    draws = [fisher_vp(model, None, case.batch(SAMPLES), vector, seed=seed) for seed in range(seeds)]
    log_p = F.log_softmax(model(case.batch(SAMPLES)[0]), -1)
    variance = torch.zeros(18, dtype=torch.float64)
    for row in log_p:
        scores = torch.stack([flat(torch.autograd.grad(c, [*model.parameters()], retain_graph=True),
                                   [*model.parameters()]) for c in row])  # fmt: skip
        terms, p = scores * (scores @ vector)[:, None], row.detach().exp()[:, None]
        variance += ((p * terms.square()).sum(0) - (p * terms).sum(0).square()) / SAMPLES**2
    deviation = torch.stack(draws).mean(0) - matrix(case, "exact") @ vector
    assert (deviation.abs() < 5 * (variance / seeds).sqrt()).all()
    # Not the exact matrix each time.
    assert (torch.stack(draws).var(0) > variance / 2).all()


# What such matrices are


@every_product
@pytest.mark.parametrize("name", ["gpt_tied", "batch_norm_train"])
def test_symmetric_linear_and_the_same_every_time(name: str, kind: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    size = dimension(model)
    for micro_batch_size in (None, 3):
        u, v = normal(size, 2), normal(size, 2, seed=3)
        make = partial(PRODUCTS[kind], model, case.loss_fn, case.batch(SAMPLES))
        times = partial(make, micro_batch_size=micro_batch_size)
        found = times(u), times(v)
        assert torch.equal(found[0], times(u))
        scale = found[0].norm() * v.norm()
        assert ((v * found[0]).sum(0) - (u * found[1]).sum(0)).abs().max() < 1e-14 * scale
        assert error(times(2 * u - v), 2 * found[0] - found[1]) < 1e-13


@pytest.mark.parametrize("kind", ["ggn", "exact", "sampled", "empirical"])
def test_positive_semidefinite(kind: str) -> None:
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    found = PRODUCTS[kind](model, case.loss_fn, case.batch(SAMPLES), torch.eye(dimension(model)).double())
    values = torch.linalg.eigvalsh(found)
    assert values[0] > -1e-14 * values[-1]
    assert torch.linalg.eigvalsh(matrix(case, "hessian"))[0] < 0


# Forms


@every_product
@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("form", ["flat", "dict", "reversed dict", "list", "tuple"])
def test_forms(form: str, count: int | None, kind: str) -> None:
    """``gates`` has a scalar among its parameters."""
    case = BY_NAME["gates"]
    model = case.model()
    parameters, rows = oracle.trainable(model), normal(count or 1, dimension(model))

    def shaped(rows: Tensor) -> object:
        parts = cut(rows, parameters)
        forms = {
            "flat": rows.mT if rows.dim() == 2 else rows,
            "dict": parts,
            "reversed dict": dict(reversed(parts.items())),
            "list": list(parts.values()),
            "tuple": tuple(parts.values()),
        }
        return forms[form]

    def check(got: object, want: object) -> None:
        assert type(got) is type(want)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    make = partial(PRODUCTS[kind], model, case.loss_fn, case.batch(SAMPLES))
    single = count is None
    check(make(shaped(rows[0] if single else rows)), shaped((rows[0] if single else rows) @ matrix(case, kind)))
    if count == 3:
        want = want_of(case, kind, 2, rows)
        check(make(shaped(rows), 2), shaped(want))
        check(make(shaped(rows), 2, reduce="sum"), shaped(want.sum(0)))


@every_product
def test_half_of_the_parameters(kind: str) -> None:
    """A diagonal block, whatever the order they are asked for in."""
    case = BY_NAME["called_twice"]
    model = case.model()
    named = oracle.trainable(model)
    asked = dict(list(named.items())[::2])
    inside = torch.cat([torch.full((p.numel(),), name in asked) for name, p in named.items()])
    rows = normal(3, int(inside.sum()))
    make = partial(PRODUCTS[kind], model, case.loss_fn, case.batch(SAMPLES), cut(rows, asked))
    got = make(parameters=reversed(asked.values()))
    oracle.assert_same_gradient(got, cut(rows @ matrix(case, kind)[inside][:, inside], asked))
    wide = torch.zeros(3, len(inside)).double()
    wide[:, inside] = rows
    got = make(micro_batch_size=2, reduce="mean", parameters=iter(asked.values()))
    oracle.assert_same_gradient(got, cut(want_of(case, kind, 2, wide).mean(0)[inside], asked))


def test_unused_and_frozen_parameters() -> None:
    case = BY_NAME["unused"]
    model = case.model()
    found = batched_hvp(model, case.loss_fn, case.batch(SAMPLES), normal(dimension(model), 3), 2)
    found = cut(found.T, oracle.trainable(model))
    assert {name for name, part in found.items() if not part.any()} == {"orphan", "idle.weight", "idle.bias"}
    frozen = BY_NAME["frozen"].model()
    assert batched_hvp(frozen, case.loss_fn, BY_NAME["frozen"].batch(SAMPLES), "grad").keys() == {"2.weight", "4.bias"}


# Precision


@pytest.mark.parametrize("kind", ["hessian", "ggn", "exact", "empirical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mlp_gelu", "vit", "batch_norm_train"])
def test_lower_precision(name: str, dtype: torch.dtype, kind: str) -> None:
    """No less exact than plain autograd in the same precision, bfloat16 by autocast; products are float32."""
    case = replace(BY_NAME[name], sample_losses=lambda out, y: BY_NAME[name].sample_losses(out.float(), y))
    model, batch = case.model(torch.float32), case.batch(SAMPLES, torch.float32)
    for options in ({}, {"micro_batch_size": 3}):
        size = options.get("micro_batch_size", SAMPLES)
        rows = normal(SAMPLES // size, dimension(model))
        want = want_of(BY_NAME[name], kind, size, rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            got = PRODUCTS[kind](model, case.loss_fn, batch, rows.T.float(), **options).T
            plain = [Piece(model, case, *(part[r] for part in batch)) for r in oracle.cut(SAMPLES, size)]
        plain = torch.stack([by(piece, kind, v.float()) for piece, v in zip(plain, rows, strict=True)])
        assert got.dtype == torch.float32
        assert error(got, want) < 2 * error(plain, want) + 4 * torch.finfo(dtype).eps


@every_product
def test_a_gpt_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(vocab=50, context=12, width=32, layers=2, heads=4)), torch.randint(50, (4, 12))
    loss = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())  # noqa: E731
    rows, double = normal(dimension(model), 2), copy.deepcopy(model).double()
    for options in ({}, {"micro_batch_size": 2}):
        got, want = (
            PRODUCTS[kind](one, loss, (tokens, tokens.roll(-1, 1)), rows.to(dtype), **options)
            for one, dtype in ((model, torch.float32), (double, torch.float64))
        )
        assert got.dtype == torch.float32
        assert error(got, want) < 16 * torch.finfo(torch.float32).eps


def test_bfloat16_parameters_take_float32_vectors() -> None:
    case = BY_NAME["mlp_gelu"]
    model, rows = case.model(torch.bfloat16), normal(dimension(case.model()), 3)
    got = batched_hvp(model, case.loss_fn, case.batch(SAMPLES, torch.bfloat16), rows.float(), 2)
    assert got.dtype == torch.float32
    want = batched_hvp(case.model(), case.loss_fn, case.batch(SAMPLES), rows, 2)
    assert error(got, want) < 16 * torch.finfo(torch.bfloat16).eps
