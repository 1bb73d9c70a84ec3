"""Triton forms of the ops: where they run, how they are launched, what a launch was made of.

The kernels of an op are in its folder's ``triton.py``, which is imported at the first call: nothing of
Triton is needed to import fastreg.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._registry import Implementation

# Triton decides at the definition of a kernel, by this variable, whether it is compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ampere: asynchronous copies and bfloat16 products.
OLDEST_CAPABILITY = (8, 0)
# What a launch is planned for where there is no card to ask: an H200.
DEFAULT_MULTIPROCESSORS = 132

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: all that compiling it needs.

    Args:
        kernel: the jitted function.
        grid: programs per axis.
        args: its positional arguments.
        meta: its constexpr arguments.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    grid: Grid
    args: tuple[object, ...]
    meta: dict[str, object]
    warps: int
    stages: int


class _Recorder:
    """Where launches go instead of to the card, if anywhere."""

    def __init__(self) -> None:
        self.launches: list[Launch] | None = None


_recorder = _Recorder()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block and run none of them; tensors may be on ``meta``."""
    previous, _recorder.launches = _recorder.launches, []
    try:
        yield _recorder.launches
    finally:
        _recorder.launches = previous


def launch(
    kernel: Any, grid: Grid, *args: object, warps: int = 4, stages: int = 3, **meta: object
) -> None:
    """Run ``kernel`` over ``grid``, or record that it would; an empty grid runs nothing."""
    if 0 in grid:
        return
    if _recorder.launches is not None:
        _recorder.launches.append(Launch(kernel, grid, args, meta, warps, stages))
        return
    kernel[grid](*args, **meta, num_warps=warps, num_stages=stages)


def floating(args: tuple[object, ...]) -> Tensor:
    """The first floating tensor among the arguments: the one whose dtype and device decide."""
    return next(x for x in args if isinstance(x, Tensor) and x.is_floating_point())


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side, at one each per multiprocessor."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not(*args: object) -> str | None:
    """Why Triton cannot serve a call with this data, or None."""
    first = floating(args)
    if not _installed():
        return "triton is not installed"
    if first.device.type == "cpu" and not INTERPRETED:
        return "it runs on GPUs, the tensors are on cpu"
    if first.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {first.dtype}"
    if first.device.type == "cuda" and _capability(first.device) < OLDEST_CAPABILITY:
        return "it needs a GPU of compute capability {}.{} or newer".format(*OLDEST_CAPABILITY)
    return None


def _slower(*args: object) -> str | None:
    return "interpreted kernels are for tests" if floating(args).device.type == "cpu" else None


def implementation(
    folder: str,
    function: str | None = None,
    unsupported: Callable[..., str | None] | None = None,
    slower: Callable[..., str | None] | None = None,
) -> Implementation:
    """The Triton form of an op.

    Args:
        folder: of the op, under ``kernels``; its ``triton.py`` holds the kernels.
        function: the launcher's name in that file; the folder's name if not given.
        unsupported: takes the op's arguments; why the kernels cannot run them, beyond :func:`why_not`.
        slower: takes the op's arguments; the measured reason to prefer another implementation.
    """
    name = function or folder

    def run(*args: object) -> object:
        call = getattr(importlib.import_module(f"fastreg.kernels.{folder}.triton"), name)
        device = floating(args).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return call(*args)
        return call(*args)

    def refused(*args: object) -> str | None:
        reason = why_not(*args)
        return unsupported(*args) if reason is None and unsupported is not None else reason

    def passed_over(*args: object) -> str | None:
        reason = _slower(*args)
        return slower(*args) if reason is None and slower is not None else reason

    return Implementation("triton", run, refused, passed_over)
