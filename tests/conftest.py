"""Session set-up: the Triton interpreter where there is no GPU, and a header naming what is tested."""

from __future__ import annotations

import os

import torch

# Triton reads this when a kernel module is imported, so it comes before any import of fastreg.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> list[str]:
    """Versions, threads, and the implementations each op has."""
    from fastreg.kernels import registry

    threads, cuda = torch.get_num_threads(), torch.cuda.is_available()
    lines = [f"torch {torch.__version__}, {threads} threads, cuda {cuda}"]
    lines += [f"{name}: {', '.join(i.name for i in op.implementations)}" for name, op in registry().items()]
    return lines
