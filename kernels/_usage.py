"""What compiled GPU code takes of a multiprocessor, as the tools that come with Triton read it from a binary."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

_ARCH = re.compile(r"^arch = sm_(\d+)")
_FUNCTION = re.compile(r"^ *Function (\S+):")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel for one target.

    Attributes:
        kernel: its name.
        capability: of the target, 90 for sm_90a.
        registers: per thread.
        local: bytes per thread of local memory: registers that were spilled, arrays that are indexed at run time.
        shared: bytes per block of statically allocated shared memory.
    """

    kernel: str
    capability: int
    registers: int
    local: int
    shared: int


def usage(binary: Path) -> list[Usage]:
    """The kernels in a cubin, an executable or a shared object."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, capability, kernel = [], 0, ""
    for line in said.splitlines():
        if match := _ARCH.match(line):
            capability = int(match[1])
        elif match := _FUNCTION.match(line):
            kernel = _short(match[1])
        elif match := _USAGE.search(line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Usage(kernel, capability, registers, stack + local, shared))
    return found


def _short(symbol: str) -> str:
    """The kernel's own name: without namespaces and parameters."""
    name = torch._C._demangle(symbol).removeprefix("void ")
    for qualifier in ("(anonymous namespace)::", "fastreg::"):
        name = name.replace(qualifier, "")
    return name.partition("(")[0].replace("> >", ">>")
