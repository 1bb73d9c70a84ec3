"""DistributedDataParallel in two processes: the gradient is that of the mean over ranks of loss + penalty."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastreg
import fastreg.optim
import oracle
from fastreg.sinks import MemorySink
from penalty_oracle import MicroBatches, phi_2
from sam_oracle import sequential_gradient
from sharded import FORKS

WEIGHT, RHO = 0.3, 0.1
WAYS = {
    "bucket views": {"gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
    "unused parameters, perturbed": {"find_unused_parameters": True},
    "accumulated": {},
    "accumulated in bucket views": {"gradient_as_bucket_view": True},
}


def problem(rank: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    draw = torch.Generator().manual_seed(rank)
    return model, torch.randn(5, 5, generator=draw).double(), torch.randint(3, (5,), generator=draw)


def join(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)


def spawn(worker: Callable[[int, int, str], None], folder: Path) -> list[list[torch.Tensor]]:
    """Run a worker in two processes; the gradients that each saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, args=(port, str(folder)), nprocs=2, start_method=FORKS.get_start_method())
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_mean_over_ranks(
    got: list[list[torch.Tensor]], wanted: Callable[..., oracle.Gradient], tolerance: float = 1e-10
) -> None:
    """Both ranks hold, bit for bit, the mean of what ``wanted(model, x, y)`` gives for each rank's data."""
    locally = []
    for rank in range(2):
        model, x, y = problem(rank)
        want = wanted(model, x, y)
        locally.append([want[name] for name, _ in model.named_parameters()])
    for one, other, first, second in zip(*got, *locally):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(one, (first + second) / 2, rtol=tolerance, atol=1e-2 * tolerance)


def worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    model, x, y = problem(rank)
    parallel = DistributedDataParallel(model)
    reg = fastreg.Regularizer(parallel, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    for _ in range(2):
        parallel.zero_grad()
        outputs = parallel(x)
        reg(F.cross_entropy(outputs, y), outputs).backward()
    try:
        parallel.module(x)
        said = ""
    except fastreg.FastregError as refusal:
        said = str(refusal)
    (Path(folder) / f"{rank}.txt").write_text(said)
    torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def penalties(size: int) -> list[fastreg.Penalty]:
    """Those that need the gradient of the batch, or projections on a frame."""
    whole = fastreg.WithoutReplacement(weight=WEIGHT, lr=2.0, rank=size, seed=0)
    return [fastreg.GradNorm(weight=WEIGHT, centered=True), whole]


def penalties_worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    model, x, y = problem(rank)
    parallel = DistributedDataParallel(model)
    size = sum(p.numel() for p in model.parameters())
    reg = fastreg.Regularizer(parallel, penalties(size), micro_batch_size=2)
    reg(F.cross_entropy(parallel(x), y)).backward()
    torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def with_variances(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> oracle.Gradient:
    """The gradient of loss, variance and weighted variance of one rank, from dense matrices."""
    cut = MicroBatches(SimpleNamespace(loss_fn=F.cross_entropy), model, x, y, 2)
    curvatures, vectors = torch.linalg.eigh(cut.hessian().detach())
    parts = ((cut.gradients - cut.mean) @ vectors).square()
    weighted = cut.shares @ (parts @ (2 * phi_2(-2.0 * len(cut.losses) * curvatures)))
    return oracle.gradient_of(cut.loss + WEIGHT * (cut.variance() + weighted), cut.parameters, False)


def ways_worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    found = {}
    for way, options in WAYS.items():
        model, x, y = problem(rank)
        model.register_parameter("unused", nn.Parameter(torch.ones(3)) if "unused" in way else None)
        parallel = DistributedDataParallel(model, **options)
        method = "perturb" if "perturbed" in way else "exact"
        reg = fastreg.Regularizer(parallel, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, method=method)
        for _ in range(2):
            parallel.zero_grad()
            if "accumulated" in way:
                with parallel.no_sync():
                    outputs = parallel(2 * x)
                    reg(F.cross_entropy(outputs, y) / 2, outputs, scale=1 / 2).backward()
            scale = 1 / 2 if "accumulated" in way else 1.0
            if method == "perturb":
                reg(lambda: F.cross_entropy(parallel(x), y)).backward()
            else:
                outputs = parallel(x)
                reg(F.cross_entropy(outputs, y) * scale, outputs, scale=scale).backward()
        found[way] = [p.grad for name, p in model.named_parameters() if name != "unused"]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def sam_worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    model, x, y = problem(rank)
    parallel = DistributedDataParallel(model)
    optimizer = fastreg.optim.SAM(torch.optim.SGD(model.parameters(), lr=0.0), parallel, RHO, micro_batch_size=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def watched(model: nn.Module, size: int | None, steps: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> torch.Tensor:
    """Noise scale, its numerator and the gradient's norm after steps that accumulate the batches listed for them."""
    sink = MemorySink()
    monitor = fastreg.Monitor(model, micro_batch_size=size, fraction=size and 1.0, sinks=(sink,))
    for batches in steps:
        model.zero_grad()
        for x, y in batches:
            (F.cross_entropy(model(x), y) / len(batches)).backward()
        found = monitor.step(scale=1 / len(batches))
    monitor.remove()
    return torch.stack([*found.values(), torch.tensor(len(sink.rows)).double()])


def watched_batches(rank: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """One batch in the first step of a rank, two accumulated ones in the second."""
    _, x, y = problem(rank)
    return [[(x, y)], [(x.roll(1, 0), y), (2 * x, y)]]


def watching_worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    parallel = DistributedDataParallel(problem(rank)[0])
    torch.save([watched(parallel, size, watched_batches(rank)) for size in (1, None)], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_the_mean_over_ranks(tmp_path: Path) -> None:
    got = spawn(worker, tmp_path)
    assert all("must be called itself" in (tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert_mean_over_ranks(
        got, lambda model, x, y: oracle.penalty_gradient(model, F.cross_entropy, x, y, 2, weight=WEIGHT)
    )


def test_variances_are_those_of_each_rank(tmp_path: Path) -> None:
    assert_mean_over_ranks(spawn(penalties_worker, tmp_path), with_variances)


def test_options_of_distributed_data_parallel_and_accumulation(tmp_path: Path) -> None:
    def of_batch(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> oracle.Gradient:
        return oracle.penalty_gradient(model, F.cross_entropy, x, y, 2, weight=WEIGHT)

    def of_two(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> oracle.Gradient:
        first, second = of_batch(model, 2 * x, y), of_batch(model, x, y)
        return {name: (first[name] + second[name]) / 2 for name in first}

    got = spawn(ways_worker, tmp_path)
    for way in WAYS:
        wanted, tolerance = of_two if "accumulated" in way else of_batch, 1e-5 if "perturbed" in way else 1e-10
        assert_mean_over_ranks([of_rank[way] for of_rank in got], wanted, tolerance)


def test_sam_perturbs_each_rank_along_its_own_micro_batches(tmp_path: Path) -> None:
    assert_mean_over_ranks(
        spawn(sam_worker, tmp_path),
        lambda model, x, y: sequential_gradient(model, F.cross_entropy, x, y, 2, RHO),
    )


def test_every_rank_measures_what_one_process_would(tmp_path: Path) -> None:
    """Samples of all ranks make one batch; without micro-batches each rank's batches count one by one."""
    got = spawn(watching_worker, tmp_path)
    steps = [[*first, *second] for first, second in zip(watched_batches(0), watched_batches(1), strict=True)]
    joint = [[tuple(torch.cat(parts) for parts in zip(*batches))] for batches in steps]
    for of_ranks, size, batches in zip(zip(*got), (1, None), (joint, steps), strict=True):
        want = watched(problem(0)[0], size, batches)
        assert want[:-1].isfinite().all()
        for rank, one in enumerate(of_ranks):
            torch.testing.assert_close(one[:-1], want[:-1], rtol=1e-10, atol=1e-14)
            assert one[-1] == (len(steps) if rank == 0 else 0)
