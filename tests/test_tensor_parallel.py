"""Parameters that ranks hold parts of in another way than ``fully_shard``'s are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastreg
import fastreg.optim
from sharded import on_processes, refused

ATTACHED: dict[str, Callable[[nn.Module], object]] = {
    "Monitor": fastreg.Monitor,
    "Monitor of backward passes": lambda model: fastreg.Monitor(model, micro_batch_size=None),
    "exact": lambda model: fastreg.Regularizer(model, fastreg.GradNorm(0.1), micro_batch_size=2),
    "perturb": lambda model: fastreg.Regularizer(model, fastreg.GradNorm(0.1), micro_batch_size=2, method="perturb"),
    "SAM": lambda model: fastreg.optim.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model),
}
PARALLEL = r"cut by fully_shard alone, got '0\.weight' placed as .*Shard.*in place of tensor parallelism"
MODELS = {
    "tensor parallel": PARALLEL,
    "tensor parallel and sharded": PARALLEL,
    "sharded on two meshes": r"all parameters, on one mesh, got '0\.weight' and 2 meshes",
    "sharded in part": r"all parameters, on one mesh, got '2\.weight' and 1 meshes .*call it for the model too",
}


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def models() -> dict[str, nn.Module]:
    row = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    both = fully_shard(parallelize_module(layers(), square["tp"], plan), mesh=square["dp"])
    twice, part = layers(), layers()
    fully_shard(twice[0], mesh=row)
    fully_shard(twice[2], mesh=square["dp"])
    fully_shard(part[0])
    built = (parallelize_module(layers(), row, plan), both, twice, part)
    return dict(zip(MODELS, built, strict=True))


def work(rank: int, count: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    every = product(models().items(), ATTACHED.items())
    said = {(name, what): refused(lambda: attach(model)) for (name, model), (what, attach) in every}
    torch.save(said, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], str]]:
    """What each of two ranks was told."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    on_processes(2, work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("what", ATTACHED)
@pytest.mark.parametrize("name", MODELS)
def test_what_fully_shard_alone_has_not_cut_is_refused(
    said: list[dict[tuple[str, str], str]], name: str, what: str
) -> None:
    assert all(re.search(MODELS[name], of_rank[name, what]) for of_rank in said)
