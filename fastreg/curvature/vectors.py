"""Vectors on the parameters of a model: flat, by name or by position, and the rows ``[n, D]`` that operators take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastreg.errors import FastregError

Vectors = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
# The form that vectors come in is the form of the products.
Same = TypeVar("Same", bound=Vectors)
FORMS = "a tensor, a dict name -> tensor, a list or a tuple of tensors"


def common_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """float64 if any parameter is, else float32: what vectors are held in, of half precision parameters too."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32


def flatten(vectors: Vectors, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Vectors]]:
    """The rows of one or several vectors, and the way back to the form they came in.

    Args:
        vectors: ``[D]`` or ``[D, n]`` (columns); or a dict name -> ``[*shape]`` or ``[n, *shape]``, with every name;
            or a list or tuple of these, in the order of the parameters. Of :func:`common_dtype`, on their device.
        parameters: name -> ``[*shape]``, with D elements in all.

    Returns:
        rows ``[n, D]``, and ``restore(rows [n, D])`` of the form of ``vectors``.

    Raises:
        FastregError: a wrong form, name, length, shape, dtype or device.

    Example:
        >>> import torch
        >>> parameters = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        >>> rows, restore = flatten({"bias": torch.ones(5, 2), "weight": torch.ones(5, 2, 3)}, parameters)
        >>> rows.shape, restore(rows)["weight"].shape
        (torch.Size([5, 8]), torch.Size([5, 2, 3]))
    """
    if isinstance(vectors, Tensor):
        return _flatten_columns(vectors, parameters)
    named = _named(vectors, parameters)
    lead = _lead(named, parameters)
    count = lead[0] if lead else 1
    rows = torch.cat([named[name].reshape(count, p.numel()) for name, p in parameters.items()], dim=1)

    def restore(rows: Tensor) -> Vectors:
        parts = unflatten(rows if lead else rows[0], parameters)
        return _like(vectors, parts)

    return rows, restore


class Forms:
    """One or several vectors, parameter by parameter, and the way back to the form they came in.

    Args:
        vectors, parameters: as for :func:`flatten`, which raises the same errors.

    Attributes:
        count: n.
        parts: ``[n, *shape]`` for each parameter, of its dtype; nothing is copied unless the dtype differs.
    """

    def __init__(self, vectors: Vectors, parameters: Mapping[str, Tensor]) -> None:
        self._vectors, self._parameters = vectors, parameters
        if isinstance(vectors, Tensor):
            rows, _ = _flatten_columns(vectors, parameters)
            named, self._several = unflatten(rows, parameters), vectors.dim() == 2
        else:
            named = _named(vectors, parameters)
            self._several = bool(_lead(named, parameters))
            named = named if self._several else {name: part.unsqueeze(0) for name, part in named.items()}
        self.parts = [part.to(p.dtype) for part, p in zip(named.values(), parameters.values(), strict=True)]
        self.count = self.parts[0].shape[0]

    def restore(self, parts: Sequence[Tensor]) -> Vectors:
        """From ``[n, *shape]`` for each parameter to the form of the vectors."""
        if not self._several:
            return self.restore_one([part[0] for part in parts])
        if isinstance(self._vectors, Tensor):
            return torch.cat([part.reshape(self.count, -1).to(self._vectors.dtype) for part in parts], 1).T
        return self._named(parts)

    def restore_one(self, parts: Sequence[Tensor]) -> Vectors:
        """From ``[*shape]`` for each parameter to the form of a single vector."""
        if isinstance(self._vectors, Tensor):
            return torch.cat([part.reshape(-1).to(self._vectors.dtype) for part in parts])
        return self._named(parts)

    def _named(self, parts: Sequence[Tensor]) -> Vectors:
        named = dict(zip(self._parameters, (part.to(common_dtype(self._parameters)) for part in parts), strict=True))
        return _like(self._vectors, named)


def named_parameters(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> dict[str, nn.Parameter]:
    """Name -> parameter of a model: those asked for, or all that require grad.

    Raises:
        FastregError: one is not the model's, or does not require grad; there is none.
    """
    known = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters is not None:
        asked = {id(p) for p in parameters}
        known = {name: p for name, p in known.items() if id(p) in asked}
        if len(known) != len(asked):
            raise FastregError(
                f"curvature: parameters must be parameters of the model that require grad, got {len(asked)} of which "
                f"{len(known)} are"
            )
    if not known:
        raise FastregError("curvature: the model must have a parameter that requires grad, got none")
    return known


def unflatten(rows: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``[..., D]`` cut into name -> ``[..., *shape]``, in the order of the parameters.

    Example:
        >>> import torch
        >>> unflatten(torch.ones(4, 8), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})["weight"].shape
        torch.Size([4, 2, 3])
    """
    parts = rows.split([p.numel() for p in parameters.values()], dim=-1)
    return {name: part.reshape((*rows.shape[:-1], *p.shape)) for part, (name, p) in zip(parts, parameters.items())}


def check_tensor(name: str, value: Tensor, shape: tuple[int, ...], like: Mapping[str, Tensor], hint: str) -> None:
    """Refuse a tensor that has not this shape, the dtype of vectors on ``like``, and its device."""
    device, dtype = next(iter(like.values())).device, common_dtype(like)
    if not isinstance(value, Tensor):
        raise FastregError(f"{name} must be a tensor, got {type(value).__name__}")
    if (tuple(value.shape), value.dtype, value.device) != (shape, dtype, device):
        got = f"{list(value.shape)} {value.dtype} on {value.device}"
        raise FastregError(f"{name} must be {list(shape)} {dtype} on {device}, got {got} ({hint})")


def _like(vectors: Vectors, named: dict[str, Tensor]) -> Vectors:
    """``named`` in the form of the vectors, a mapping, a list or a tuple."""
    if isinstance(vectors, Mapping):
        return named
    kind: Any = type(vectors)
    return cast(Vectors, kind(named.values()))


def _flatten_columns(vectors: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Vectors]]:
    size = sum(p.numel() for p in parameters.values())
    single = vectors.dim() != 2
    shape = (size,) if single else (size, vectors.shape[1])
    check_tensor("flatten: vectors", vectors, shape, parameters, "[D], or [D, n] for n columns")
    return (vectors[None], lambda rows: rows[0]) if single else (vectors.T, lambda rows: rows.T)


def _named(vectors: Vectors, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(vectors, Mapping):
        missing, unknown = sorted(parameters.keys() - vectors.keys()), sorted(vectors.keys() - parameters.keys())
        if missing or unknown:
            raise FastregError(
                f"flatten: vectors must name every parameter and nothing else, got missing {missing}, unknown {unknown}"
            )
        return {name: vectors[name] for name in parameters}
    if not isinstance(vectors, (list, tuple)):
        raise FastregError(f"flatten: vectors must be {FORMS}, got {type(vectors).__name__}")
    if len(vectors) != len(parameters):
        raise FastregError(f"flatten: vectors must be one tensor per parameter, {len(parameters)}, got {len(vectors)}")
    return dict(zip(parameters, vectors))


def _lead(named: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    """``()`` where every entry is one vector's, ``(n,)`` where it is n vectors'; the first entry decides."""
    lead: tuple[int, ...] | None = None
    for name, p in parameters.items():
        value, key = named[name], f"flatten: vectors[{name!r}]"
        if lead is None:
            batched = isinstance(value, Tensor) and value.dim() == p.dim() + 1
            lead = (value.shape[0],) if batched else ()
        check_tensor(key, value, (*lead, *p.shape), parameters, "one vector, or n of them along the first dimension")
    return lead or ()
