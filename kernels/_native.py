"""The compiled CPU module ``fastreg._C``: whether it is there, and what every op of it needs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

# Imported before fastreg._C, so that both share one OpenMP runtime.
import torch
from torch import Tensor

_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


def _load() -> ModuleType | None:
    if importlib.util.find_spec("fastreg._C") is None:
        return None
    return importlib.import_module("fastreg._C")


MODULE = _load()


def calls(name: str) -> dict[torch.dtype, Callable[..., None]]:
    """The compiled functions of an op by dtype; empty without the compiled module."""
    if MODULE is None:
        return {}
    return {dtype: getattr(MODULE, f"{name}_{suffix}") for dtype, suffix in _SUFFIXES.items()}


def why_not(first: Tensor, *_rest: object) -> str | None:
    """Why compiled CPU code cannot serve a call with this data, or None."""
    if MODULE is None:
        return "fastreg._C is not built: `fastreg env` says why"
    if first.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {first.device.type}"
    if first.dtype not in _SUFFIXES:
        return f"it takes float32 and float64, not {first.dtype}"
    return None
