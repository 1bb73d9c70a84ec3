"""Compile the Triton kernels without a GPU: registers, shared memory, spills, tensor-core instructions.

What is compiled is what a launcher launches: the launches of the ops' ``typical`` calls are recorded on tensors
without memory, and each is specialised as Triton specialises it for aligned pointers.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._launch import DTYPES, INTERPRETED, Launch, recorded
from fastreg.kernels._registry import registry

# Compute capability of the cards compiled for, with the shared memory a block may take there, in bytes.
TARGETS = {80: 163 << 10, 90: 227 << 10}
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
        spills: bytes per thread spilled to local memory.
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
    spills: int
    shared: int
    shared_limit: int
    warps: int
    dots: int
    tensor_cores: str


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
    with ProcessPoolExecutor(os.cpu_count()) as pool:
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
                    found.setdefault((request.kernel, request.signature, request.constants, request.warps), request)
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
    # Triton is needed only here, in a worker.
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
    registers, spills = _usage(binary.asm["ptx"], capability)
    ptx = binary.asm["ptx"]
    instructions = [name for name in ("wgmma", "mma") if re.search(rf"^\s*{name}\.", ptx, re.MULTILINE)]
    return Compiled(
        request.op, request.kernel, request.dtype, request.meta, capability, registers, spills,
        binary.metadata.shared, TARGETS[capability], request.warps,
        len(re.findall(r"tt\.dot |warp_group_dot ", binary.asm["ttgir"])), next(iter(instructions), ""),
    )  # fmt: skip


def _usage(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as Triton's own assembler reports them."""
    from triton import knobs

    arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(path), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def lines(found: list[Compiled]) -> Iterator[str]:
    """The report as a table."""
    yield f"{'op':<28}{'kernel':<34}{'dtype':<10}{'sm':>3}{'warps':>6}{'regs':>6}{'spills':>8}{'shared':>9}  dots"
    for row in found:
        dots = f"{row.dots} by {row.tensor_cores or 'FMA'}" if row.dots else "-"
        yield (
            f"{row.op:<28}{row.kernel:<34}{row.dtype:<10}{row.capability:>3}{row.warps:>6}{row.registers:>6}"
            f"{row.spills:>8}{row.shared:>9}  {dots}"
        )
