"""Symmetric linear operators on the parameters of a model: what eigenvalues, traces and densities are taken of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastreg.curvature.vectors import Same, common_dtype, flatten
from fastreg.errors import FastregError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse.linalg import LinearOperator


class CurvatureOperator(ABC):
    """A symmetric operator A on the D parameters of a model, known by its products with vectors.

    A subclass defines :meth:`apply`; ``A @ vectors`` then takes and returns vectors in any of their forms.

    Args:
        parameters: name -> parameter, or a tensor that stands for one, in the order of the flat vector.

    Attributes:
        parameters: as given, as a dict.
        size: D, the number of elements of all parameters.
        shape: ``(D, D)``.
        dtype: of vectors and products: float64 if any parameter is, else float32.
        device: of the parameters, of vectors and of products.

    Raises:
        FastregError: no parameters, or parameters that are not real floating point, or on several devices.

    Example:
        >>> import torch
        >>> class Scaling(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return 2 * rows
        >>> operator = Scaling(dict(torch.nn.Linear(3, 2).named_parameters()))
        >>> (operator @ torch.ones(8)).tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        >>> (operator @ {"weight": torch.ones(5, 2, 3), "bias": torch.ones(5, 2)})["weight"].shape
        torch.Size([5, 2, 3])
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        _check_parameters(parameters)
        self.parameters: Mapping[str, Tensor] = dict(parameters)
        self.size = sum(p.numel() for p in self.parameters.values())
        self.shape = (self.size, self.size)
        self.dtype = common_dtype(self.parameters)
        self.device = next(iter(self.parameters.values())).device

    @abstractmethod
    def apply(self, rows: Tensor) -> Tensor:
        """``[n, D] -> [n, D]``, of :attr:`dtype`: row j of the result is A times row j."""

    def __matmul__(self, vectors: Same) -> Same:
        """A times one or several vectors, in the form they come in.

        Args:
            vectors: ``[D]``, or ``[D, n]`` for n columns; a dict name -> ``[*shape]`` or ``[n, *shape]``; a list or
                tuple of these in the order of the parameters. Of :attr:`dtype`, on :attr:`device`.

        Raises:
            FastregError: a wrong form, name, length, shape, dtype or device.
        """
        rows, restore = flatten(vectors, self.parameters)
        return cast(Same, restore(self.apply(rows)))

    def dense(self, *, block: int = 64) -> Tensor:
        """The matrix ``[D, D]``, for small models: D products, ``block`` at a time.

        Raises:
            FastregError: ``block`` is not an integer >= 1.
        """
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise FastregError(f"dense: block must be an integer >= 1, got {block!r}")
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self.apply(rows) for rows in identity.split(block)]).T

    def to_scipy(self) -> LinearOperator:
        """The same operator for scipy's solvers: numpy vectors ``[D]`` or ``[D, n]`` in, of :attr:`dtype` out.

        Raises:
            ImportError: scipy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        def product(columns: NDArray[Any]) -> NDArray[Any]:
            rows = torch.as_tensor(columns, dtype=self.dtype, device=self.device).reshape(self.size, -1).T
            return self.apply(rows).T.detach().cpu().numpy().reshape(columns.shape)

        # Symmetric, so that the adjoint is the same function.
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype
        )


def _check_parameters(parameters: Mapping[str, Tensor]) -> None:
    if not parameters or not sum(p.numel() for p in parameters.values()):
        raise FastregError("CurvatureOperator: parameters must hold at least one element, got none")
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise FastregError(f"CurvatureOperator: parameters[{name!r}] must be floating point, got {p.dtype}")
    devices = {str(p.device) for p in parameters.values()}
    if len(devices) > 1:
        raise FastregError(f"CurvatureOperator: parameters must be on one device, got {sorted(devices)}")
