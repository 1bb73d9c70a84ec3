"""Processes of a gloo group, and a small GPT that ``fully_shard`` cuts over them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fastreg
from fastreg.models import GPT, GPTConfig

WHOLE = {"reshard_after_forward": False}
Worker = Callable[[int, int, Path], None]

FORKS = multiprocessing.get_context("forkserver")
# Imported once, by the process that the others are forked from.
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "fastreg.models"]
)


def on_processes(count: int, worker: Worker, folder: Path, *, fail: bool = False) -> list[int]:
    """Run a worker on ranks of a gloo group; their exit codes, all 0 unless ``fail``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=join, args=(rank, count, port, worker, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    codes = [process.exitcode for process in processes]
    assert fail or codes == [0] * count
    return codes


def join(rank: int, count: int, port: int, worker: Worker, folder: Path) -> None:
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    os.environ.update(zip(names, ("127.0.0.1", str(port), str(rank), str(count))))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worker(rank, count, folder)


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    wide = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten())


class Shared(nn.Module):
    """A parameter that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.twice(torch.tanh(self.twice(x)))


class Sliced(nn.Module):
    """A parameter that is used twice, and one that is sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rows = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.twice(torch.tanh(self.twice(x) * self.rows[1])) + self.rows[0]


def problem(more: type[nn.Module] | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, with one more block if given, and a batch of 8 sequences."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, width=8, layers=2, heads=2)).double()
    if more is not None:
        model.blocks.append(more().double())
    return model, torch.randint(13, (8, 6)), torch.randint(13, (8, 6))


def shard(model: nn.Module, blocks: bool = True, checkpointed: bool = False, **options: object) -> nn.Module:
    for number, block in enumerate(model.blocks if checkpointed else ()):
        model.blocks[number] = checkpoint_wrapper(block)
    for block in model.blocks if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except fastreg.FastregError as refusal:
        return str(refusal)
    return "nothing was refused"
