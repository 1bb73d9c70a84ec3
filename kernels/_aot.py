"""Compile the Triton kernels without a GPU: registers, shared memory, spills, tensor-core instructions.

What is compiled is what a launcher launches: the launches of the ops' ``typical`` calls are recorded on tensors
without memory, and each is specialised as Triton specialises it for aligned pointers.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._launch import INTERPRETED, Launch, recorded
from fastreg.kernels._registry import registry
from fastreg.kernels._usage import usage

# Compute capability of the cards compiled for, with the shared memory a block may take there, in bytes.
TARGETS = {80: 163 << 10, 90: 227 << 10}
# float16 compiles as bfloat16 does.
DTYPES = (torch.float32, torch.bfloat16)
# The matrix instruction of each for 16-bit floats.
TENSOR_CORES = {80: "mma", 90: "wgmma"}
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target.

    Attributes:
        op: name in the registry.
        kernel: name of the jitted function.
        dtype: of the op's data.
        meta: its constexpr arguments, as text.
        capability: 80 or 90.
        registers: per thread.
        local: bytes of local memory per thread: what was spilled from registers.
        shared: bytes of shared memory per block.
        shared_limit: what a block may take on the target.
        warps: per block.
        dots: matrix products in the kernel.
        tensor_cores: instructions that compute them: ``wgmma``, ``mma`` or, on neither, an empty string.
    """

    op: str
    kernel: str
    dtype: str
    meta: str
    capability: int
    registers: int
    local: int
    shared: int
    shared_limit: int
    warps: int
    dots: int
    tensor_cores: str

    def faults(self) -> list[str]:
        """What keeps this kernel from running well, or at all; empty if nothing does."""
        found = []
        if self.local:
            found.append(f"{self.local} bytes per thread in local memory")
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {self.shared_limit}")
        if self.dots and self.dtype != "float32" and self.tensor_cores != TENSOR_CORES[self.capability]:
            found.append(f"products by {self.tensor_cores or 'FMA'}, not {TENSOR_CORES[self.capability]}")
        return found


@dataclass(frozen=True)
class _Request:
    """A launch in words that cross to another process."""

    op: str
    dtype: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    meta: str
    warps: int
    stages: int


def report(ops: list[str] | None = None, targets: tuple[int, ...] = tuple(TARGETS)) -> list[Compiled]:
    """Compile the kernels that the ops' typical calls launch, for every target, two at a time or more.

    Args:
        ops: names in the registry; all that have Triton kernels if None.
        targets: keys of ``TARGETS``.

    Raises:
        FastregError: this process interprets kernels instead of compiling them.
    """
    if INTERPRETED:
        raise FastregError(
            "report: kernels must be compiled, got TRITON_INTERPRET=1 (start a process without that variable)"
        )
    jobs = [(request, target) for request in _requests(ops) for target in targets]
    # Compiling is most of a second each. Workers start afresh: forking would copy torch's threads half-way.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compiled, *zip(*jobs, strict=True))) if jobs else []


def _requests(ops: list[str] | None) -> list[_Request]:
    """What to compile, each specialisation once."""
    found: dict[tuple[object, ...], _Request] = {}
    for name, folder in _triton_folders().items():
        if ops is not None and name not in ops:
            continue
        module = importlib.import_module(f"{folder}.triton")
        for dtype in DTYPES:
            for args in module.typical(dtype).get(name, []):
                with recorded() as launches:
                    getattr(module, name)(*args)
                for launched in launches:
                    request = _request(name, dtype, launched)
                    key = name, request.kernel, request.signature, request.constants, request.warps
                    found.setdefault(key, request)
    return list(found.values())


def _triton_folders() -> dict[str, str]:
    """The package of every op that has Triton kernels, by op."""
    ops = registry().values()
    return {
        op.name: op.reference.__module__.rpartition(".")[0]
        for op in ops
        if any(i.name == "triton" for i in op.implementations)
    }


def _request(op: str, dtype: torch.dtype, launched: Launch) -> _Request:
    names = launched.kernel.arg_names
    values = dict(zip(names, launched.args, strict=False)) | launched.meta
    signature, constants, aligned = {}, {}, []
    for place, name in enumerate(names):
        value = values[name]
        kind = _kind(value, constexpr=name in launched.meta)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned.append(place)
    short = str(dtype).removeprefix("torch.")
    meta = ", ".join(f"{name}={value}" for name, value in launched.meta.items())
    return _Request(
        op, short, launched.kernel.fn.__module__, launched.kernel.fn.__name__, tuple(signature.items()),
        tuple(constants.items()), tuple(aligned), meta, launched.warps, launched.stages,
    )  # fmt: skip


def _kind(value: object, constexpr: bool) -> str:
    """Triton's name for the type of an argument; what it specialises away is a constexpr."""
    if constexpr or value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _compiled(request: _Request, capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request.module), request.kernel)
    source = ASTSource(
        kernel,
        dict(request.signature),
        {(kernel.arg_names.index(name),): value for name, value in request.constants},
        {(place,): _ALIGNED for place in request.aligned},
    )
    options = {"num_warps": request.warps, "num_stages": request.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        (taken,) = usage(path)
    dots = len(re.findall(r"tt\.dot |warp_group_dot ", binary.asm["ttgir"]))
    return Compiled(
        request.op, request.kernel, request.dtype, request.meta, capability, taken.registers, taken.local,
        binary.metadata.shared, TARGETS[capability], request.warps, dots, _tensor_cores(binary.asm["ptx"]),
    )  # fmt: skip


def _tensor_cores(ptx: str) -> str:
    """The matrix instruction in a kernel's code, the widest if there are several."""
    found = (name for name in ("wgmma", "mma") if re.search(rf"^\s*{name}\.", ptx, re.MULTILINE))
    return next(found, "")
