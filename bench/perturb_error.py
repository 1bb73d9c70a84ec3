"""Relative error of the penalty's part of the gradient by method, dtype and activation, as a Markdown table.

The truth is the exact method in float64. A part is the gradient at a weight less that at weight zero in the same dtype,
so that what the loss's own gradient rounds is not counted.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastreg
from fastreg.models import GPT, GPTConfig, mlp

SAMPLES, SIZE = 64, 8
# A quarter of learning rates 0.1 and 0.01.
WEIGHT, SMALL = 0.025, 0.0025
Method = dict[str, object]
COLUMNS: dict[str, tuple[Method, float]] = {
    "exact": ({}, WEIGHT),
    "forward": ({"method": "perturb"}, WEIGHT),
    "central": ({"method": "perturb", "difference": "central"}, WEIGHT),
    f"lookahead, weight {WEIGHT}": ({"method": "perturb", "difference": "lookahead"}, WEIGHT),
    f"lookahead, weight {SMALL}": ({"method": "perturb", "difference": "lookahead"}, SMALL),
}
DTYPES: dict[str, tuple[torch.dtype, Callable[[str], AbstractContextManager]]] = {
    "float64": (torch.float64, lambda device: nullcontext()),
    "float32": (torch.float32, lambda device: nullcontext()),
    "bfloat16 autocast": (torch.float32, lambda device: torch.autocast(device, torch.bfloat16)),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    **{
        f"MLP, {name}": (lambda name=name: mlp((64, 128, 128, 10), name), lambda: torch.randn(SAMPLES, 64), 10)
        for name in ("tanh", "gelu", "relu")
    },
    "GPT, gelu": (lambda: GPT(GPTConfig(1024, 16, 64, 2, 4)), lambda: torch.randint(1024, (SAMPLES, 16)), 1024),
}


def gradient(name: str, dtype: str, method: Method, weight: float, device: str) -> Tensor:
    """Of one step on the same model and batch every time, flat, float64."""
    torch.manual_seed(0)
    build, draw, classes = MODELS[name]
    kind, context = DTYPES[dtype]
    model, x = build().to(device, kind), draw().to(device)
    x = x.to(kind) if x.is_floating_point() else x
    y = torch.randint(classes, x.shape if not x.is_floating_point() else (SAMPLES,)).to(device)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight), micro_batch_size=SIZE, **method)

    def run() -> Tensor:
        with context(device):
            return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    reg(run).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def part(name: str, dtype: str, method: Method, weight: float, device: str) -> Tensor:
    """The penalty's, per unit of weight."""
    return (gradient(name, dtype, method, weight, device) - gradient(name, dtype, method, 0.0, device)) / weight


def table(device: str) -> None:
    """Print one row per model and dtype."""
    print("| model | dtype |", " | ".join(COLUMNS), "|")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for name in MODELS:
        truth = part(name, "float64", {}, WEIGHT, device)
        for dtype in DTYPES:
            parts = [part(name, dtype, method, weight, device) for method, weight in COLUMNS.values()]
            errors = [float((found - truth).norm() / truth.norm()) for found in parts]
            print(f"| {name} | {dtype} |", " | ".join(f"{error:.1e}" for error in errors), "|", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Regularizer: the network has kinks")
    table(args.device)


if __name__ == "__main__":
    main()
