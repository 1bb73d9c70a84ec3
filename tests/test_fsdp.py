"""``fully_shard`` (FSDP2) on two gloo processes: steps are those of one process with the whole batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastreg
from sharded import Shared, Sliced, loss_fn, on_processes, problem, refused, shard
from sharded_steps import (
    CASES,
    RATE,
    WEIGHT,
    B,
    adaptive_backward,
    assert_those_of_one_process,
    perturbed,
    sam_backward,
    trained,
)


def refusals() -> dict[str, str]:
    model, x, y = problem()
    model = shard(model)
    sliced, shared = (shard(problem(more)[0]) for more in (Sliced, Shared))

    def monitored() -> None:
        monitor = fastreg.Monitor(sliced)
        try:
            sliced(x)
        finally:
            monitor.remove()

    def resharded() -> None:
        reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=B)
        try:
            reg(loss_fn(model(x), y))
        finally:
            reg.remove()

    def of(backward: Callable[..., None], model: nn.Module) -> str:
        return refused(lambda: backward(model, torch.optim.SGD(model.parameters(), lr=RATE), x, y))

    return {
        "exact": refused(resharded),
        "perturb, sliced": of(perturbed("forward"), sliced),
        "SAM, sliced": of(sam_backward, sliced),
        "adaptive SAM, shared": of(adaptive_backward, shared),
        "Monitor, sliced": refused(monitored),
    }


def work(rank: int, count: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {name: trained(name, rank, count) for name in CASES}
    torch.save((found, refusals()), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, dict[str, str]]]:
    """Gradients and parameters of all cases, and what is refused, on each of two ranks."""
    folder = tmp_path_factory.mktemp("fsdp")
    on_processes(2, work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process_with_the_whole_batch(found: list[tuple[dict, dict]], name: str) -> None:
    assert_those_of_one_process([cases[name] for cases, _ in found], name)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("exact", r"must stay for the double backward.*reshard_after_forward=False.*after_backward\(False\)"),
        ("perturb, sliced", r"must be used whole.*'blocks\.2\.rows'.*fully_shard the model, and not that module"),
        ("SAM, sliced", r"must be used whole.*'blocks\.2\.rows'.*fully_shard the model, and not that module"),
        ("Monitor, sliced", r"must be used whole.*'blocks\.2\.rows'.*fully_shard the model, and not that module"),
        ("adaptive SAM, shared", r"by adaptive SAM once a forward.*'blocks\.2\.twice\.(weight|bias)'"),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_remedy(
    found: list[tuple[dict, dict]], what: str, said: str
) -> None:
    assert all(re.search(said, refusals_[what]) for _, refusals_ in found)
