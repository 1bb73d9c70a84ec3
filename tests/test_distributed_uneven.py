"""DistributedDataParallel with batches of other sizes, and other numbers of them, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastreg
import fastreg.optim
import oracle
from sam_oracle import sequential_gradient
from test_distributed import RHO, WEIGHT, join, problem, spawn

RATE = 0.1
# What gradients are found by -> how far parameters may be from those of plain autograd.
UNEVEN = {"exact": 1e-10, "SAM": 1e-10, "perturb": 1e-5}


def uneven_batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches of 5 on the first rank; on the second one of 5, a last one of 3, and then none."""
    _, x, y = problem(rank)
    return [(x, y), (2 * x[: 5 - 2 * rank], y[: 5 - 2 * rank]), (3 * x, y)][: 3 - rank]


def uneven_worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    found = {}
    for kind in UNEVEN:
        model, _, _ = problem(rank)
        parallel = DistributedDataParallel(model)
        base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        backward = backward_of(kind, parallel, base)
        with Join([parallel]):
            for x, y in uneven_batches(rank):
                base.zero_grad()
                backward(x, y)
                base.step()
        found[kind] = list(model.parameters())
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def backward_of(kind: str, model: nn.Module, base: torch.optim.Optimizer) -> Callable[..., object]:
    """A backward of a batch ``x, y``."""
    if kind == "SAM":
        sam = fastreg.optim.SAM(base, model, RHO, micro_batch_size=2)
        return lambda x, y: sam.backward(lambda: differentiated(F.cross_entropy(model(x), y)))
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, method=kind)
    if kind == "exact":
        return lambda x, y: reg(F.cross_entropy(model(x), y)).backward()
    return lambda x, y: reg(lambda: F.cross_entropy(model(x), y)).backward()


def differentiated(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


def test_ranks_with_batches_of_other_sizes_and_numbers_stay_the_same(tmp_path: Path) -> None:
    """Every rank's gradient counts a half, also where the other's batch is smaller; one that ran out adds nothing."""
    got = spawn(uneven_worker, tmp_path)
    for kind, tolerance in UNEVEN.items():
        model, _, _ = problem(0)
        base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        for batches in zip_longest(uneven_batches(0), uneven_batches(1)):
            base.zero_grad()
            for x, y in (batch for batch in batches if batch is not None):
                if kind == "SAM":
                    gradient = sequential_gradient(model, F.cross_entropy, x, y, 2, RHO)
                else:
                    gradient = oracle.penalty_gradient(model, F.cross_entropy, x, y, 2, weight=WEIGHT)
                for name, p in model.named_parameters():
                    p.grad = gradient[name] / 2 if p.grad is None else p.grad + gradient[name] / 2
            base.step()
        for one, other, p in zip(got[0][kind], got[1][kind], model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            torch.testing.assert_close(one.detach(), p.detach(), rtol=tolerance, atol=tolerance)
