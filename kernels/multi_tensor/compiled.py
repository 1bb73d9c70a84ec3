"""C++ and CUDA forms of the passes: one call for all tensors of the lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from fastreg.kernels import _cuda, _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels.multi_tensor.lists import addresses, chunks

_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}
Lists = Sequence[list[Tensor]]


def native(rule: str, lists: Lists, coefficients: Tensor | None, constants: tuple[float, ...]) -> Tensor:
    """Run a rule on the CPU; the sums ``[n]`` of what it returns."""
    first, where = lists[0][0], addresses(lists)
    cut, sums = chunks(tuple(x.numel() for x in lists[0]), first.device), first.new_empty(len(lists[0]))
    getattr(_native.MODULE, f"multi_{rule}_{_SUFFIXES[first.dtype]}")(
        [where.data_ptr(), cut.table.data_ptr(), cut.bounds.data_ptr()], len(lists[0]), cut.count,
        _address(coefficients), sums.data_ptr(), torch.get_num_threads(), *constants,
    )  # fmt: skip
    return sums


def cuda(rule: str, lists: Lists, coefficients: Tensor | None, constants: tuple[float, ...]) -> Tensor:
    """Run a rule on the current stream of the tensors' GPU; the sums ``[n]`` of what it returns."""
    first, where = lists[0][0], addresses(lists)
    cut, sums = chunks(tuple(x.numel() for x in lists[0]), first.device), first.new_empty(len(lists[0]))
    partial = first.new_empty(cut.count)
    with torch.cuda.device(first.device):
        getattr(_cuda.MODULE, f"multi_{rule}")(
            [where.data_ptr(), cut.table.data_ptr(), cut.bounds.data_ptr()], len(lists[0]), cut.count,
            _address(coefficients), partial.data_ptr(), sums.data_ptr(),
            torch.cuda.current_stream().cuda_stream, *constants,
        )  # fmt: skip
    return sums


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_why_not(_rule: str, lists: Lists, *_rest: object) -> str | None:
    """As for every native op, asked of all tensors."""
    return _native.why_not(lists[0][0]) or _unfit(lists)


def cuda_why_not(_rule: str, lists: Lists, *_rest: object) -> str | None:
    """Why ``fastreg._cuda`` cannot run these lists, or None."""
    first = lists[0][0]
    if _cuda.MODULE is None:
        return "fastreg._cuda is not built: `fastreg env` says why"
    if first.device.type != "cuda":
        return f"it runs on GPUs, the tensors are on {first.device.type}"
    if first.dtype != torch.float32:
        return f"it takes float32, not {first.dtype}"
    return _unfit(lists)


def _unfit(lists: Lists) -> str | None:
    # No operators of torch's: nobody who listens to those would hear of them.
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return "a graph of torch's operators is being made"
    if all(tensor.is_contiguous() for tensors in lists for tensor in tensors):
        return None
    return "it takes contiguous tensors"


IMPLEMENTATIONS = (
    Implementation("cuda", cuda, cuda_why_not),
    Implementation("native", native, native_why_not),
)
