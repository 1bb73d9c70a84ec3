"""Statistics under ``fully_shard`` (FSDP2) with default resharding: those of plain autograd on all ranks' samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastreg
import fastreg.optim
import oracle
from fastreg.sinks import MemorySink
from sharded import Shared, loss_fn, on_processes, problem, shard, whole

Batches = list[tuple[Tensor, Tensor]]
METRICS = ("grad_noise_scale", "noise_trace", "grad_norm", "micro_batch_grad_norm")
NORMS = (*METRICS, "micro_batch_norms", "fisher_trace")
# name -> micro-batch size, whether a parameter is used twice, options of the monitor
CASES = {
    "samples": (1, False, {"metrics": NORMS}),
    "samples, shared": (1, True, {"metrics": NORMS}),
    "micro-batches by layer": (2, False, {"metrics": METRICS, "fraction": 1.0, "per_layer": True}),
    "backward passes": (None, False, {"metrics": METRICS}),
    "backward passes by layer": (None, False, {"metrics": METRICS, "per_layer": True}),
}
LENGTHS = ("one", "batch", "micro-batch")
RATE = 0.1


def steps_of(rank: int, x: Tensor, y: Tensor) -> list[Batches]:
    """Of two ranks: a batch of 4 in the first step, two accumulated ones in the second."""
    own = [part.chunk(2)[rank] for part in (x, y)]
    return [[tuple(own)], [(own[0].roll(1, 1), own[1]), (own[0], own[1].roll(1, 1))]]


def watched(model: nn.Module, steps: list[Batches], size: int | None, options: dict) -> tuple[list[dict], list, int]:
    """Metrics of every step, gradients of the last, and how many rows a sink got."""
    sink = MemorySink()
    monitor = fastreg.Monitor(model, micro_batch_size=size, sinks=(sink,), seed=3, ema=0.0, **options)
    found = []
    for batches in steps:
        accumulate(model, batches)
        found.append(monitor.step(scale=1 / len(batches)))
    monitor.remove()
    return found, [whole(p.grad) for p in model.parameters()], len(sink.rows)


def accumulate(model: nn.Module, batches: Batches) -> None:
    """Gradients of the mean over batches, which ranks exchange with the last."""
    model.zero_grad()
    for x, y in batches:
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(x is batches[-1][0])
        (loss_fn(model(x), y) / len(batches)).backward()


def grafted(kind: str, rank: int, x: Tensor, y: Tensor) -> list[Tensor]:
    """Parameters after a step of another length."""
    model = shard(problem()[0])
    size = {"batch": 99, "micro-batch": 2}.get(kind)
    magnitude = fastreg.optim.UnitNorm() if size is None else fastreg.optim.MicroBatchNorm(model, size, seed=rank)
    optimizer = fastreg.optim.Grafted(torch.optim.SGD(model.parameters(), lr=RATE), magnitude)
    accumulate(model, steps_of(rank, x, y)[0])
    optimizer.step()
    optimizer.remove()
    return [whole(p) for p in model.parameters()]


def work(rank: int, count: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    found: dict[str, object] = {}
    for name, (size, shared, options) in CASES.items():
        model, x, y = problem(Shared if shared else None)
        found[name] = watched(shard(model), steps_of(rank, x, y), size, options)
    model = shard(problem()[0])
    accumulate(model, steps_of(rank, x, y)[1])
    found["gradients"] = [whole(p.grad) for p in model.parameters()]
    found |= {kind: grafted(kind, rank, x, y) for kind in LENGTHS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks saved."""
    folder = tmp_path_factory.mktemp("monitor")
    on_processes(2, work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def by_layer(by_parameter: oracle.Gradient) -> dict[str, Tensor]:
    """Sums over the parameters of a module, and over all."""
    total = {"": sum(by_parameter.values())}
    for name, value in by_parameter.items():
        layer = "/" + (name.rpartition(".")[0] or "(model)")
        total[layer] = total.get(layer, 0) + value
    return total


def expected(model: nn.Module, batches: Batches, size: int | None) -> dict[str, Tensor]:
    """From gradients of micro-batches, one after another; those of both ranks are in ``batches``."""
    pieces = [oracle.sq_norms_by_parameter(model, loss_fn, x, y, size or len(x)) for x, y in batches]
    small = by_layer({name: torch.cat([piece[name] for piece in pieces]).mean() for name in pieces[0]})
    means = [oracle.penalty_gradient(model, loss_fn, x, y, 8, weight=0.0) for x, y in batches]
    big = by_layer({name: (sum(one[name] for one in means) / len(means)).square().sum() for name in means[0]})
    found = {}
    for layer in small:
        trace = (small[layer] - big[layer]) / (1 / (size or 4) - 1 / (4 * len(batches)))
        found |= {
            f"fastreg/noise_trace{layer}": trace,
            f"fastreg/grad_noise_scale{layer}": trace / (big[layer] - trace / (4 * len(batches))),
            f"fastreg/grad_norm{layer}": big[layer].sqrt(),
            f"fastreg/micro_batch_grad_norm{layer}": small[layer].sqrt(),
        }
    return found


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_all_ranks_samples(found: list[dict], name: str) -> None:
    size, shared, options = CASES[name]
    model, x, y = problem(Shared if shared else None)
    steps = [[*first, *second] for first, second in zip(steps_of(0, x, y), steps_of(1, x, y), strict=True)]
    for number, batches in enumerate(steps):
        wanted = expected(model, batches, size)
        for rank in range(2):
            metrics, _, rows = found[rank][name]
            assert rows == (len(steps) if rank == 0 else 0)
            assert len(metrics[number]) >= (len(wanted) if "per_layer" in options else len(METRICS))
            for key in metrics[number].keys() & wanted.keys():
                torch.testing.assert_close(metrics[number][key], wanted[key], rtol=1e-9, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", ["samples", "samples, shared"])
def test_norms_and_fisher_traces_are_those_of_this_ranks_samples(found: list[dict], name: str) -> None:
    model, x, y = problem(Shared if CASES[name][1] else None)
    for rank in range(2):
        alone, _, _ = watched(model, steps_of(rank, x, y), 1, CASES[name][2])
        for number, batches in enumerate(steps_of(rank, x, y)):
            got = found[rank][name][0][number]
            norms = torch.cat([oracle.sq_norms(model, loss_fn, *batch, 1) for batch in batches]).sqrt()
            torch.testing.assert_close(got["fastreg/micro_batch_norms"], norms, rtol=1e-10, atol=0)
            trace = alone[number]["fastreg/fisher_trace"]
            torch.testing.assert_close(got["fastreg/fisher_trace"], trace, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [name for name, (_, shared, _) in CASES.items() if not shared])
def test_gradients_are_bit_for_bit_those_without_a_monitor(found: list[dict], name: str) -> None:
    for rank in range(2):
        _, gradients, _ = found[rank][name]
        assert all(one.equal(other) for one, other in zip(gradients, found[rank]["gradients"], strict=True))


@pytest.mark.parametrize("kind", LENGTHS)
def test_steps_of_another_length(found: list[dict], kind: str) -> None:
    """Along the gradient of all ranks' samples; the length is one, or a norm of the first rank's."""
    model, x, y = problem()
    gradient = list(oracle.penalty_gradient(model, loss_fn, x, y, 8, weight=0.0).values())
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    size = 4 if kind == "batch" else 2
    lengths = torch.ones(1) if kind == "one" else oracle.sq_norms(model, loss_fn, x[:4], y[:4], size).sqrt()
    for got in (found[rank][kind] for rank in range(2)):
        moved = [(p.detach() - one) / RATE for p, one in zip(model.parameters(), got, strict=True)]
        length = torch.stack([m.square().sum() for m in moved]).sum().sqrt()
        assert ((length / lengths - 1).abs() < 1e-10).any()
        for one, g in zip(moved, gradient, strict=True):
            torch.testing.assert_close(one, g * length / norm, rtol=0, atol=1e-10)
