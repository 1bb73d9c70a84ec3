"""Products with curvature matrices as functions of a model, a loss and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn

from fastreg.curvature.linearization import Batch, Linearization, LossFunction
from fastreg.curvature.products import Product, fisher_product, ggn_product, hessian_product
from fastreg.curvature.vectors import Forms, Same, Vectors, named_parameters
from fastreg.errors import FastregError

GRADIENT = "grad"


@overload
def batched_hvp(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, vectors: Literal["grad"],
    micro_batch_size: int | None = None, *, reduce: str | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> dict[str, Tensor]: ...  # fmt: skip


@overload
def batched_hvp(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, vectors: Same,
    micro_batch_size: int | None = None, *, reduce: str | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Same: ...  # fmt: skip


def batched_hvp(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    vectors: Vectors | str,
    micro_batch_size: int | None = None,
    *,
    reduce: str | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Vectors:
    r"""Hessian-vector products: many vectors for one batch, or another vector for every micro-batch.

        H v_j                      H the Hessian of the mean loss C of the batch; one forward and backward for all j
        H_k v_k,   k = 1 .. m      H_k that of the mean loss C_k of micro-batch k, in one batched pass

    Counted in layer products, with 3 for a gradient: 2 for forward and backward, and 6 for every vector, or for all
    micro-batches together.

    Args:
        model: run in its current mode; buffers stay as they are.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples, scalar.
        batch: ``(inputs, targets)``, each ``[B, ...]``.
        vectors: on the parameters: flat ``[D]`` or ``[D, n]``; a dict name -> ``[*shape]`` or ``[n, *shape]``; a list
            of these in the order of the parameters. With ``micro_batch_size``, n = m = ceil(B / b) and vector k goes
            with ``H_k``. ``"grad"``: the gradient g, or ``v_k = g_k``, which is not formed where sums are asked for.
        micro_batch_size: b, samples per micro-batch.
        reduce: ``"mean"`` or ``"sum"`` over micro-batches; None keeps every product.
        parameters: those that the Hessian is about; all that require grad by default.

    Returns:
        As the vectors (without n where they are reduced); a dict for ``"grad"``.

    Raises:
        FastregError: wrong vectors; a model or loss without second derivatives; see :class:`fastreg.Regularizer`.

    Source: Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147.

    Example:
        >>> import torch
        >>> from fastreg.curvature import batched_hvp
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> batched_hvp(model, loss_fn, batch, torch.randn(8, 5)).shape
        torch.Size([8, 5])
        >>> batched_hvp(model, loss_fn, batch, "grad", 2, reduce="mean")["weight"].shape
        torch.Size([2, 3])
    """
    inputs, targets = batch
    if not isinstance(vectors, str):
        make = partial(hessian_product, loss_fn=loss_fn, targets=targets)
        return _products(model, make, inputs, vectors, micro_batch_size, reduce, parameters)
    if vectors != GRADIENT:
        raise FastregError(f"batched_hvp: vectors must be tensors or {GRADIENT!r}, got {vectors!r}")
    _check_reduction(micro_batch_size, reduce)
    chosen = named_parameters(model, parameters)
    if reduce is None and micro_batch_size is not None:
        linear = Linearization(model, chosen, inputs, micro_batch_size, spread=True, apart=True)
        return dict(zip(chosen, linear.along_gradients(linear.loss(loss_fn, targets))[1], strict=True))
    linear = Linearization(model, chosen, inputs, micro_batch_size)
    found = linear.hessian_gradients(linear.loss(loss_fn, targets), mean=reduce != "sum")
    return dict(zip(chosen, found, strict=True))


def ggn_vp(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    vectors: Same,
    micro_batch_size: int | None = None,
    *,
    reduce: str | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Same:
    r"""Products with the generalised Gauss-Newton matrix, ``J^T H_out J``; arguments as for :func:`batched_hvp`.

    J is the Jacobian of the outputs by the parameters, ``H_out`` the Hessian of the mean loss by the outputs. Positive
    semidefinite for a loss convex in the outputs. ``loss_fn`` is given the logits where outputs are an object that has
    them. 2 layer products for all vectors and 4 for each.

    Source: Schraudolph 2002, doi:10.1162/08997660260028683; Martens 2020, arXiv:1412.1193, section 8.

    Example:
        >>> import torch
        >>> from fastreg.curvature import ggn_vp
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
        >>> ggn_vp(model, torch.nn.functional.mse_loss, batch, [torch.randn(2, 3), torch.randn(2)])[1].shape
        torch.Size([2])
    """
    make = partial(ggn_product, loss_fn=loss_fn, targets=batch[1])
    return _products(model, make, batch[0], vectors, micro_batch_size, reduce, parameters)


def fisher_vp(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batch: Batch,
    vectors: Same,
    micro_batch_size: int | None = None,
    *,
    kind: str = "sampled",
    seed: int | None = None,
    reduce: str | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Same:
    r"""Products with a Fisher information matrix; other arguments as for :func:`batched_hvp`.

        exact      (1/N) sum_r J_r^T (diag p_r - p_r p_r^T) J_r      over the N predictions of the batch
        sampled    (1/N) sum_r s_r s_r^T,  s_r = grad -log p(y_r),  y_r drawn from p_r; the former in expectation
        empirical  (1/B) sum_i g_i g_i^T,  g_i the gradient of sample i's own loss

    Args:
        loss_fn: used by ``empirical`` only; may be None otherwise.
        batch: ``(inputs, targets)``; the model's outputs are logits ``[B, ..., C]``.
        kind: one of the three.
        seed: of the labels of ``sampled``; None takes it from ``torch.initial_seed()``.

    Raises:
        FastregError: unknown kind, or as for :func:`batched_hvp`.

    Source: Kunstner, Hennig, Balles 2019, arXiv:1905.12558 (the difference between them).

    Example:
        >>> import torch
        >>> from fastreg.curvature import fisher_vp
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> fisher_vp(model, None, batch, torch.randn(8), kind="exact").shape
        torch.Size([8])
    """
    make = partial(fisher_product, kind=kind, loss_fn=loss_fn, targets=batch[1], seed=seed)
    return _products(model, make, batch[0], vectors, micro_batch_size, reduce, parameters)


def _products(
    model: nn.Module,
    make: Callable[[Linearization], Product],
    inputs: object,
    vectors: Same,
    size: int | None,
    reduce: str | None,
    parameters: Iterable[nn.Parameter] | None,
) -> Same:
    _check_reduction(size, reduce)
    chosen = named_parameters(model, parameters)
    forms = Forms(vectors, chosen)
    spread = size is not None
    linear = Linearization(model, chosen, inputs, size, spread=spread, apart=spread and reduce is None)
    product = make(linear)
    if not spread:
        return cast(Same, forms.restore(_one_by_one(product, forms.parts)))
    count = linear.micro_batches.count
    if forms.count != count:
        raise FastregError(f"curvature: vectors must be one per micro-batch, {count}, got {forms.count}")
    if reduce is None:
        return cast(Same, forms.restore(linear.unweighted(product(forms.parts))))
    return cast(Same, forms.restore_one(product(linear.weighted(forms.parts, mean=reduce == "mean"))))


def _one_by_one(product: Product, parts: list[Tensor]) -> list[Tensor]:
    """Products with n vectors. Two passes of full size each; batched by torch's vmap they took longer on a CPU."""
    if len(parts[0]) == 1:
        return [one.unsqueeze(0) for one in product([part[0] for part in parts])]
    found = [torch.empty_like(part) for part in parts]
    for j in range(len(parts[0])):
        for onto, one in zip(found, product([part[j] for part in parts]), strict=True):
            onto[j] = one
    return found


def _check_reduction(size: int | None, reduce: str | None) -> None:
    if reduce not in (None, "mean", "sum"):
        raise FastregError(f"curvature: reduce must be 'mean', 'sum' or None, got {reduce!r}")
    if reduce is not None and size is None:
        raise FastregError(f"curvature: reduce must go with a micro_batch_size, got {reduce!r} and None")
