"""``fully_shard`` (FSDP2) on gloo processes: steps are those of one process with the whole batch."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fastreg
import fastreg.optim
import oracle
from fastreg.models import GPT, GPTConfig
from sam_oracle import sequential_gradient

B, WEIGHT, RHO, RATE, STEPS = 2, 0.3, 0.1, 0.5, 2
Worker = Callable[[int, int, Path], None]


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class Joined(nn.Module):
    """A parameter that is shared, and one that is sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rows = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.twice(torch.tanh(self.twice(x) * self.rows[1])) + self.rows[0]


def problem(joined: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and a batch of 8 sequences."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, width=8, layers=2, heads=2)).double()
    if joined:
        model.blocks.append(Joined().double())
    return model, torch.randint(13, (8, 6)), torch.randint(13, (8, 6))


def shard(model: nn.Module, blocks: bool = True, **options: bool) -> nn.Module:
    for block in model.blocks if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def sam_step(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor, adaptive: bool = False) -> None:
    optimizer = fastreg.optim.SAM(base, model, RHO, micro_batch_size=B, adaptive=adaptive)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.remove()


def exact_step(
    model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor, left_whole: bool = False
) -> None:
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=B)
    base.zero_grad()
    model.set_reshard_after_backward(False)
    out = model(x)
    loss = reg(loss_fn(out, y), out)
    model.set_reshard_after_backward(not left_whole)
    loss.backward()
    base.step()
    reg.remove()


def accumulating_step(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """As :func:`exact_step`, one micro-batch after another, reduced over ranks with the last."""
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=B)
    base.zero_grad()
    for rows in (part := oracle.cut(len(x), B)):
        model.set_requires_gradient_sync(rows is part[-1])
        model.set_reshard_after_backward(False)
        out = model(x[rows])
        loss = reg(loss_fn(out, y[rows]) / len(part), out, scale=1 / len(part))
        model.set_reshard_after_backward(True)
        loss.backward()
    base.step()
    reg.remove()


def adaptive_step(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    sam_step(model, base, x, y, adaptive=True)


def keeping_step(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Whole parameters stay from one step to the next, where they are out of date."""
    exact_step(model, base, x, y, left_whole=True)


WHOLE = {"reshard_after_forward": False}
# name -> step, what is special about the model, options of fully_shard
CASES = {
    "SAM": (sam_step, False, {}),
    "adaptive SAM": (adaptive_step, False, {}),
    "SAM, parameters whole": (sam_step, False, WHOLE),
    "SAM, joined in the root": (sam_step, True, {"blocks": False}),
    "adaptive SAM, joined in the root": (adaptive_step, True, {"blocks": False}),
    "exact": (exact_step, False, WHOLE),
    "exact, joined": (exact_step, True, WHOLE),
    "exact, left whole": (keeping_step, False, WHOLE),
    "exact, accumulated": (accumulating_step, False, WHOLE),
}


def gradient(step: Callable[..., None], model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    """Of the whole batch, in plain autograd."""
    if step in (exact_step, keeping_step, accumulating_step):
        return oracle.penalty_gradient(model, loss_fn, x, y, B, weight=WEIGHT)
    return sequential_gradient(model, loss_fn, x, y, B, RHO, adaptive=step is adaptive_step)


def on_processes(count: int, worker: Worker, folder: Path, *, fail: bool = False) -> list[int]:
    """Run a worker on ranks of a gloo group; their exit codes, all 0 unless ``fail``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # Imported once, by the process that the others are forked from.
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "fastreg.models"]
    )
    processes = [context.Process(target=join, args=(rank, count, port, worker, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
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


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def trained(name: str, rank: int, count: int) -> dict[str, list[Tensor]]:
    """Gradients and parameters after every step."""
    step, joined, options = CASES[name]
    model, x, y = problem(joined)
    model = shard(model, **options)
    parameters = list(model.parameters())
    found = {"gradients": [], "parameters": []}
    for number in range(STEPS):
        base = torch.optim.SGD(parameters, lr=RATE)
        step(model, base, *(part.roll(number, 0).chunk(count)[rank] for part in (x, y)))
        found["gradients"] += [whole(p.grad) for p in parameters]
        found["parameters"] += [whole(p) for p in parameters]
    return found


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except fastreg.FastregError as refusal:
        return str(refusal)
    return "nothing was refused"


def refusals() -> dict[str, str]:
    model, x, y = problem()
    model, penalty = shard(model), fastreg.GradNorm(WEIGHT)

    def penalised(**options: str) -> None:
        reg = fastreg.Regularizer(model, penalty, micro_batch_size=B, **options)
        try:
            reg((lambda: loss_fn(model(x), y)) if options else loss_fn(model(x), y))
        finally:
            reg.remove()

    joined = shard(problem(joined=True)[0])
    base = torch.optim.SGD(joined.parameters(), lr=RATE)
    return {
        "exact": refused(penalised),
        "perturb": refused(lambda: penalised(method="perturb")),
        "Monitor": refused(lambda: fastreg.Monitor(model)),
        "joined": refused(lambda: sam_step(joined, base, x, y)),
    }


def work(rank: int, count: int, folder: Path) -> None:
    """All cases, and a checkpoint."""
    dist.init_process_group("gloo")
    found = {name: trained(name, rank, count) for name in CASES}
    found["refusals"] = refusals()
    torch.save(found, folder / f"{rank}.pt")
    model, optimizer = adam(problem()[0])
    _, x, y = problem()
    sam_step(model, optimizer, x.chunk(count)[rank], y.chunk(count)[rank])
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(states, checkpoint_id=folder / "checkpoint")
    torch.save([whole(t) for t in tensors(model, optimizer)], folder / f"saved {rank}.pt")
    sam_step(model, optimizer, x.chunk(count)[rank], y.chunk(count)[rank])
    torch.save([whole(t) for t in tensors(model, optimizer)], folder / f"continued {rank}.pt")
    dist.destroy_process_group()


def adam(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shard(model) if dist.is_initialized() else model
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [*model.parameters(), *moments]


def resume(rank: int, count: int, folder: Path) -> None:
    """Load what two ranks saved, and take one more step."""
    if count > 1:
        dist.init_process_group("gloo")
    model, x, y = problem()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model, optimizer = adam(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(states, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    found = [[whole(t).clone() for t in tensors(model, optimizer)]]
    sam_step(model, optimizer, x.chunk(count)[rank], y.chunk(count)[rank])
    torch.save([*found, [whole(t) for t in tensors(model, optimizer)]], folder / f"resumed {rank} of {count}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    on_processes(2, work, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process_with_the_whole_batch(folder: Path, name: str) -> None:
    step, joined, _ = CASES[name]
    model, x, y = problem(joined)
    wanted = {"gradients": [], "parameters": []}
    for number in range(STEPS):
        found = gradient(step, model, x.roll(number, 0), y.roll(number, 0))
        with torch.no_grad():
            for key, p in model.named_parameters():
                p -= RATE * found[key]
        wanted["gradients"] += [found[key] for key, _ in model.named_parameters()]
        wanted["parameters"] += [p.detach().clone() for p in model.parameters()]
    for rank in range(2):
        got = torch.load(folder / f"{rank}.pt")[name]
        for key, tensors_ in wanted.items():
            for one, other in zip(got[key], tensors_, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("exact", r"must stay for the double backward.*reshard_after_forward=False.*after_backward\(False\)"),
        ("perturb", "method='perturb' must be given a model that fully_shard has not cut.*SAM"),
        ("Monitor", "Monitor.*must be those of a model that fully_shard has not cut.*DistributedDataParallel"),
        ("joined", r"must be used once.*'blocks\.2\..*fully_shard the model, and not that module"),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_remedy(folder: Path, what: str, said: str) -> None:
    for rank in range(2):
        assert re.search(said, torch.load(folder / f"{rank}.pt")["refusals"][what])


@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_of_two_ranks_continues_on(folder: Path, count: int) -> None:
    on_processes(count, resume, folder)
    saved, continued = (torch.load(folder / f"{name} 0.pt") for name in ("saved", "continued"))
    for rank in range(count):
        loaded, further = torch.load(folder / f"resumed {rank} of {count}.pt")
        for one, other in zip(loaded, saved, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        for one, other in zip(further, continued, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
