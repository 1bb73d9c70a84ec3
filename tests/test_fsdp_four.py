"""``fully_shard`` (FSDP2) on four gloo processes, in a row and in a square, and what two of them have saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import fastreg
import oracle
from sharded import loss_fn, on_processes, problem, shard, whole
from sharded_steps import B, assert_those_of_one_process, sam_backward, trained

ON_FOUR = (
    ("exact", "row"),
    ("exact", "square"),
    ("SAM", "square"),
    ("forward difference, accumulated", "square"),
)


def adam(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shard(model) if dist.is_initialized() else model
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    sam_backward(model, base, x, y)
    base.step()


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [whole(t).clone() for t in (*model.parameters(), *moments)]


def save(rank: int, count: int, folder: Path) -> None:
    """A step, a checkpoint, and another step."""
    dist.init_process_group("gloo")
    model, x, y = problem()
    own = [part.chunk(count)[rank] for part in (x, y)]
    model, optimizer = adam(model)
    step(model, optimizer, *own)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(states, checkpoint_id=folder / "checkpoint")
    saved = tensors(model, optimizer)
    step(model, optimizer, *own)
    torch.save((saved, tensors(model, optimizer)), folder / f"saved {rank}.pt")
    dist.destroy_process_group()


def resume(rank: int, count: int, folder: Path) -> None:
    """Load what two ranks saved, and take the other step."""
    model, x, y = problem()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model, optimizer = adam(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(states, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    loaded = tensors(model, optimizer)
    step(model, optimizer, *(part.chunk(count)[rank] for part in (x, y)))
    torch.save((loaded, tensors(model, optimizer)), folder / f"resumed {rank} of {count}.pt")


def work(rank: int, count: int, folder: Path) -> None:
    """What two saved, some cases, and a monitor."""
    dist.init_process_group("gloo")
    resume(rank, count, folder)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicated", "cut"))
    meshes = {"row": {}, "square": {"mesh": square}}
    found = {(name, mesh): trained(name, rank, count, **meshes[mesh]) for name, mesh in ON_FOUR}
    model, x, y = problem()
    model = shard(model, mesh=square)
    monitor = fastreg.Monitor(model, ("grad_norm", "micro_batch_grad_norm", "sample_norms"))
    loss_fn(model(x.chunk(count)[rank]), y.chunk(count)[rank]).backward()
    torch.save((found, monitor.step()), folder / f"four {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    on_processes(2, save, folder)
    on_processes(4, work, folder)
    on_processes(1, resume, folder)
    return folder


@pytest.mark.parametrize(("name", "mesh"), ON_FOUR)
def test_steps_are_those_of_one_process(folder: Path, name: str, mesh: str) -> None:
    found = (torch.load(folder / f"four {rank}.pt")[0] for rank in range(4))
    assert_those_of_one_process([cases[name, mesh] for cases in found], name)


def test_norms_of_ranks_in_a_square(folder: Path) -> None:
    model, x, y = problem()
    batch = oracle.penalty_gradient(model, loss_fn, x, y, B, weight=0.0)
    norms = oracle.sq_norms(model, loss_fn, x, y, 1).sqrt()
    for rank in range(4):
        _, got = torch.load(folder / f"four {rank}.pt")
        wanted = {
            "grad_norm": torch.stack([g.square().sum() for g in batch.values()]).sum().sqrt(),
            "micro_batch_grad_norm": norms.square().mean().sqrt(),
            "sample_norms": norms.chunk(4)[rank],
        }
        for name, value in wanted.items():
            torch.testing.assert_close(got[f"fastreg/{name}"], value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_of_two_ranks_continues_on(folder: Path, count: int) -> None:
    saved, continued = torch.load(folder / "saved 0.pt")
    for rank in range(count):
        loaded, further = torch.load(folder / f"resumed {rank} of {count}.pt")
        for one, other in zip(loaded, saved, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        for one, other in zip(further, continued, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
