"""Traces of curvature operators from matrix-vector products: Hutchinson, Hutch++ and XTrace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.recurrence import random_rows
from fastreg.errors import FastregError

# Fewest products from which a method can also tell its standard error.
LEAST_SAMPLES = {"hutchinson": 2, "hutch++": 4, "xtrace": 4}


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    Args:
        value: 0-d, unbiased.
        error: 0-d, the estimated standard error of ``value``, in its units.
        products: matrix-vector products used.
        layers: for each parameter an unbiased estimate of the trace of its diagonal block, 0-d; they sum to ``value``.
    """

    value: Tensor
    error: Tensor
    products: int
    layers: dict[str, Tensor] | None = None


def trace(
    operator: CurvatureOperator,
    *,
    method: str = "hutchinson",
    samples: int = 30,
    per_layer: bool = False,
    block: int = 8,
    generator: torch.Generator | None = None,
) -> Trace:
    """The trace of a symmetric operator, estimated without bias from at most ``samples`` products.

        hutchinson   mean_i z_i . A z_i,  z_i of random signs;  variance 2 (||A||_F^2 - ||diag A||^2) / samples
        hutch++      tr(Q' A Q) + mean_i r_i . A r_i,  Q = orth(A S),  r_i = (I - Q Q') z_i
        xtrace       mean_i tr(Q_i' A Q_i) + r_i . A r_i,  Q_i = orth(A W without w_i),  r_i = c_i (I - Q_i Q_i') w_i

    Hutch++ spends a third of its products on the sketch S, a third on ``A Q``, a third on the rest; XTrace uses every
    w_i both ways, with c_i so that ``|r_i|^2 = D - m + 1`` for m = samples // 2. Both are exact, up to rounding, when
    the rank of A is below a third, half of ``samples``, and win where eigenvalues decay; where they do not, or where
    the trace of single layers is wanted, Hutchinson is the choice. With samples >= D both take the D unit vectors.

    References: Hutchinson 1989; Meyer, Musco, Musco, Woodruff 2021, arXiv:2010.09649; Epperly, Tropp, Webber 2024,
    arXiv:2301.07825, sections 2.1 to 2.3.

    Args:
        operator: A, ``[D, D]``.
        method: one of the three.
        samples: at least 2 for Hutchinson, 4 for the others, which hold about that many vectors of length D.
        per_layer: also estimate the trace of each parameter's diagonal block; Hutchinson only.
        block: vectors per call of ``operator.apply``. It changes cost and memory, not the vectors drawn.
        generator: of the random vectors; torch's global one by default.

    Returns:
        A :class:`Trace` in the operator's dtype. Its error is that of a mean of independent terms for Hutchinson,
        of the terms beyond the sketch for Hutch++, and of the leave-one-out terms for XTrace, which are taken as
        independent though they are not: the error told is then some 25 % too small.

    Raises:
        FastregError: unknown method, too few samples, block < 1, or ``per_layer`` with another method.

    Example:
        >>> import torch
        >>> from fastreg.curvature.operator import CurvatureOperator
        >>> from fastreg.curvature.traces import trace
        >>> class Diagonal(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return rows * torch.arange(1.0, 5.0)
        >>> trace(Diagonal({"weight": torch.zeros(2, 2)})).value
        tensor(10.)
    """
    if method not in LEAST_SAMPLES:
        raise FastregError(f"trace: method must be one of {tuple(LEAST_SAMPLES)}, got {method!r}")
    check_count("trace", "samples", samples, LEAST_SAMPLES[method])
    check_count("trace", "block", block, 1)
    if method == "hutchinson":
        return _hutchinson(operator, samples, per_layer, block, generator)
    if per_layer:
        raise FastregError(f"trace: method must be 'hutchinson' for per_layer=True, got {method!r}")
    if samples >= operator.size:
        return _exact(operator, block)
    return (_hutch_plus_plus if method == "hutch++" else _xtrace)(operator, samples, block, generator)


def check_count(function: str, name: str, value: object, least: int) -> None:
    """Raise FastregError unless ``value`` is an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FastregError(f"{function}: {name} must be an integer >= {least}, got {value!r}")


def signs(operator: CurvatureOperator, count: int, generator: torch.Generator | None) -> Tensor:
    """Random signs, ``[count, D]``, in the operator's dtype and on its device; drawn where the generator lives."""
    device = operator.device if generator is None else generator.device
    rows = torch.empty(count, operator.size, dtype=operator.dtype, device=device)
    # Row by row, so that the same vectors are drawn in blocks of any size.
    for row in rows:
        row.bernoulli_(0.5, generator=generator)
    return rows.mul_(2).sub_(1).to(operator.device)


def sign_blocks(
    operator: CurvatureOperator, count: int, block: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """The rows of :func:`signs`, at most ``block`` at a time."""
    for start in range(0, count, block):
        yield signs(operator, min(block, count - start), generator)


def _products(operator: CurvatureOperator, rows: Tensor, block: int) -> Tensor:
    return torch.cat([operator.apply(part) for part in rows.split(block)])


def _standard_error(terms: Tensor) -> Tensor:
    return terms.std() / len(terms) ** 0.5


def _exact(operator: CurvatureOperator, block: int) -> Trace:
    value = operator.dense(block=block).trace()
    return Trace(value, torch.zeros_like(value), operator.size)


def _hutchinson(
    operator: CurvatureOperator, samples: int, per_layer: bool, block: int, generator: torch.Generator | None
) -> Trace:
    sizes = [parameter.numel() for parameter in operator.parameters.values()]
    terms = []
    for probes in sign_blocks(operator, samples, block, generator):
        parts = (probes * operator.apply(probes)).split(sizes, 1)
        terms.append(torch.stack([part.sum(1) for part in parts], 1))
    by_layer = torch.cat(terms)  # [samples, parameters]
    layers = dict(zip(operator.parameters, by_layer.mean(0).unbind())) if per_layer else None
    totals = by_layer.sum(1)
    return Trace(totals.mean(), _standard_error(totals), samples, layers)


def _hutch_plus_plus(
    operator: CurvatureOperator, samples: int, block: int, generator: torch.Generator | None
) -> Trace:
    third = samples // 3
    sketch, probes = signs(operator, samples - third, generator).split([third, samples - 2 * third])
    captured, rest = _split_by_sketch(operator, sketch, probes, block)
    return Trace(captured + rest.mean(), _standard_error(rest), samples)


def _split_by_sketch(
    operator: CurvatureOperator, sketch: Tensor, probes: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """``tr(Q' A Q)``, 0-d, and ``r_j . A r_j``, ``[n]``, of a sketch ``[k, D]`` and probes ``[n, D]``."""
    basis = torch.linalg.qr(_products(operator, sketch, block).T).Q.T  # [k, D]
    vectors = torch.cat([basis, probes - probes @ basis.T @ basis])
    terms = (vectors * _products(operator, vectors, block)).sum(1)
    return terms[: len(sketch)].sum(), terms[len(sketch) :]


def _xtrace(operator: CurvatureOperator, samples: int, block: int, generator: torch.Generator | None) -> Trace:
    terms = _leave_one_out(operator, random_rows(samples // 2, operator, generator), block)
    return Trace(terms.mean(), _standard_error(terms), 2 * len(terms))


def _leave_one_out(operator: CurvatureOperator, probes: Tensor, block: int) -> Tensor:
    """The m terms of XTrace, ``[m]``, from probes W ``[m, D]`` with spherical directions, m <= D.

    With ``Q R = A W`` and s_i the unit vector along column i of ``R^-T``, ``Q_i Q_i' = Q (I - s_i s_i') Q'``.
    """
    count, size = probes.shape
    images = _products(operator, probes, block)  # [m, D]
    basis, factor = torch.linalg.qr(images.T)
    basis = basis.T  # [m, D]
    basis_images = _products(operator, basis, block)  # [m, D]
    left_out = _left_out_directions(factor)  # [m, m], row i is s_i
    compressed = basis @ basis_images.T
    captured = compressed.trace() - ((left_out @ compressed) * left_out).sum(1)
    coordinates = probes @ basis.T
    kept = coordinates - left_out * (coordinates * left_out).sum(1, keepdim=True)
    rest = probes - kept @ basis  # [m, D]
    quotients = (rest * (images - kept @ basis_images)).sum(1) / rest.square().sum(1)
    return captured + (size - count + 1) * quotients


def _left_out_directions(factor: Tensor) -> Tensor:
    """Columns of ``factor^-T``, ``[m, m]``, as unit rows."""
    left, values, right = torch.linalg.svd(factor.double())
    # A of rank < m makes the factor singular: any null direction may then be left out, so one rounding stands for zero.
    floor = torch.finfo(factor.dtype).eps * values[0] + torch.finfo(factor.dtype).tiny
    rows = (right.T / values.clamp_min(floor)) @ left.T
    return (rows / rows.norm(dim=1, keepdim=True)).to(factor.dtype)
