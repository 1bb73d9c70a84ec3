"""fastreg.checkpoint: derivatives are those of the blocks as they are, and with depth grows what it says."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import fastreg
import fastreg.optim
import oracle
from cases import CASES, Case
from fastreg.curvature import batched_hvp, fisher_vp, ggn_vp
from fastreg.errors import FastregError
from fastreg.graph_walk import _nodes
from fastreg.models import GPT, GPTConfig
from sam_oracle import sequential_gradient
from test_distributed import join, spawn

WEIGHT, SAMPLES = 0.7, 6


class Block(nn.Module):
    """A residual MLP; dropout and batch norm on request."""

    def __init__(self, width: int = 6, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


def mlp(depth: int = 3, samples: int = SAMPLES, **options: object) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), *(Block(**options) for _ in range(depth)), nn.Linear(6, 3)).double()
    return model, torch.randn(samples, 5).double(), torch.randint(3, (samples,))


def gpt(depth: int = 2, samples: int = SAMPLES) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=11, context=4, width=8, layers=depth, heads=2)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model, torch.randint(11, (samples, 4)), torch.randint(11, (samples, 4))


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__ in ("Block", "Odd"))


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy whose blocks are."""
    model = copy.deepcopy(model)
    fastreg.checkpoint_blocks(blocks_of(model))
    return model


def step(model: nn.Module, x: Tensor, y: Tensor, penalty: object, size: int = 2, **options: object) -> oracle.Gradient:
    """The gradient of the second of two regularized steps; the first is checked too."""
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=size, seed=0, **options)
    for _ in range(2):
        model.zero_grad()
        outputs = model(x)
        reg(oracle.label_loss(outputs, y), outputs).backward()
    reg.remove()
    return oracle.collected_gradient(model)


@pytest.mark.parametrize("size", [6, 4, 1])
@pytest.mark.parametrize("problem", [mlp, gpt])
def test_the_penalty_of_blocks_is_the_oracles(problem: Callable, size: int) -> None:
    model, x, y = problem()
    want = oracle.penalty_gradient(model, oracle.label_loss, x, y, size, weight=WEIGHT)
    got = step(checkpointed(model), x, y, fastreg.GradNorm(weight=WEIGHT), size)
    oracle.assert_same_gradient(got, want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_penalty_is_the_oracles_with_every_part_of_every_model(case: Case) -> None:
    """Children that return tuples, share parameters, have no parameters, are called twice, or are recurrent."""
    model, (x, y), size = case.model(), case.batch(SAMPLES), max(4, case.min_group)
    want = oracle.penalty_gradient(model, case.loss_fn, x, y, size, weight=WEIGHT, reduction="sum")
    model = case.model()
    fastreg.checkpoint_blocks(dict.fromkeys(model.children()))
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size)
    if case.name == "gpt_tied":
        with pytest.raises(FastregError, match="must depend on samples, got one of a parameter alone"):
            model(x)
        return
    outputs = model(x)
    reg(case.sample_losses(outputs, y).sum(), outputs, reduction="sum").backward()
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


PENALTIES = {
    "variance": lambda: fastreg.GradNorm(weight=WEIGHT, centered=True),
    "noise": lambda: fastreg.NoiseTrace(weight=WEIGHT),
    "without replacement": lambda: fastreg.WithoutReplacement(weight=WEIGHT, lr=2.0, rank=5, seed=0),
    "Fisher": lambda: fastreg.FisherTrace(weight=WEIGHT, seed=0, gradient="true"),
    "Jacobian": lambda: fastreg.UnitJacobian(weight=WEIGHT, directions=2, seed=0),
    "two": lambda: [fastreg.GradNorm(weight=WEIGHT), fastreg.FisherTrace(weight=WEIGHT, seed=0)],
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty_is_that_of_the_blocks_as_they_are(penalty: str) -> None:
    model, x, y = mlp()
    want = step(copy.deepcopy(model), x, y, PENALTIES[penalty]())
    oracle.assert_same_gradient(step(checkpointed(model), x, y, PENALTIES[penalty]()), want)


@pytest.mark.parametrize("penalty", ["variance", "Fisher"])
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_some_of_the_micro_batches(penalty: str, fraction: float) -> None:
    model, x, y = mlp()
    want = step(copy.deepcopy(model), x, y, PENALTIES[penalty](), 1, fraction=fraction)
    oracle.assert_same_gradient(step(checkpointed(model), x, y, PENALTIES[penalty](), 1, fraction=fraction), want)


class Odd(nn.Module):
    """A block with nested arguments and results, and with a parameter, and a row of one, among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, others: tuple, *, flag: bool, table: dict[str, Tensor]) -> dict[str, object]:
        first, (second, index) = others
        x = torch.tanh(self.inner(x) * second + first[index]) if flag else x
        return {"x": F.linear(x, table["weight"]), "unused": (index, None, 3), "twice": [x, x + second]}


class WithOdd(nn.Module):
    """Shares a weight between blocks, with the outside, and passes it in; ``nested``: a block within a block."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.first, self.odd, self.other = nn.Linear(5, 6), Odd(), Odd()
        self.rows, self.head = nn.Parameter(torch.randn(2, 6)), nn.Linear(6, 3)
        self.other.inner.bias = self.odd.inner.bias
        if nested:
            self.odd.inner = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x, index = self.first(x), torch.arange(len(x))
        for block in (self.odd, self.other):
            others = (torch.tanh(x), (self.rows[1], index))
            found = block(x, others, flag=True, table={"weight": self.other.inner.weight})
            x = found["x"] + found["twice"][1] * found["unused"][2]
        return self.head(x) + F.linear(x, self.other.inner.weight)[:, :3]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [6, 1])
def test_nested_arguments_and_parameters_that_blocks_share(nested: bool, size: int) -> None:
    torch.manual_seed(0)
    model, (_, x, y) = WithOdd(nested).double(), mlp()
    want = oracle.penalty_gradient(model, oracle.label_loss, x, y, size, weight=WEIGHT)
    got = step(checkpointed(model), x, y, fastreg.GradNorm(weight=WEIGHT), size)
    oracle.assert_same_gradient(got, want)


FORMS = [lambda block: block, lambda block: block.forward, lambda block: partial(block.__call__)]


@pytest.mark.parametrize("form", FORMS)
def test_modules_and_their_methods(form: Callable) -> None:
    model, x, y = mlp(depth=1)
    want = oracle.penalty_gradient(model, oracle.label_loss, x, y, 2, weight=WEIGHT)
    first, block, head = model
    model.forward = lambda x: head(fastreg.checkpoint(form(block), first(x)))
    oracle.assert_same_gradient(step(model, x, y, fastreg.GradNorm(weight=WEIGHT)), want)


def test_a_backward_in_another_thread() -> None:
    """As those of a GPU are."""
    model, x, y = gpt()
    want = oracle.penalty_gradient(model, oracle.label_loss, x, y, 2, weight=WEIGHT)
    model = checkpointed(model)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, check=False)
    found = []
    loss = oracle.label_loss(model(x), y)
    for run in (lambda: found.append(reg(loss)), lambda: found[0].backward()):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


@pytest.mark.parametrize("problem", [mlp, gpt])
def test_without_a_regularizer_it_is_plain_autograd_of_both_orders(problem: Callable) -> None:
    model, x, y = problem()
    found = []
    for one in (model, checkpointed(model)):
        with sdpa_kernel(SDPBackend.MATH):
            loss = oracle.label_loss(one(x), y)
            gradient = oracle.gradient_of(loss, oracle.trainable(one), True)
            (loss + sum(g.square().sum() for g in gradient.values())).backward()
        found.append(oracle.collected_gradient(one))
    oracle.assert_same_gradient(found[1], found[0], 1e-12)


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"batch_norm": True}, {"dropout": 0.3, "batch_norm": True}])
def test_random_numbers_and_buffers_are_those_of_one_run(options: dict, regularized: bool) -> None:
    model, x, y = mlp(**options)
    found = []
    for one in (model, checkpointed(model)):
        torch.manual_seed(1)
        if regularized:
            gradient = step(one, x, y, fastreg.GradNorm(weight=WEIGHT))
        else:
            oracle.label_loss(one(x), y).backward()
            gradient = oracle.collected_gradient(one)
        found.append((gradient, list(one.buffers()), torch.get_rng_state()))
    (want, buffers, random), (got, others, after) = found
    oracle.assert_same_gradient(got, want)
    for one, other in zip(buffers, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert torch.equal(random, after)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("regularized", [False, True])
def test_autocast_is_that_of_the_first_run(regularized: bool, inside: bool) -> None:
    """The rounding of a penalty differs: parts of its gradient are added in another order. Its error is as large."""
    model, x, y = gpt(samples=16)
    penalty = fastreg.GradNorm(weight=WEIGHT * regularized)
    want = oracle.penalty_gradient(model, oracle.label_loss, x, y, 4, weight=penalty.weight)
    errors, both = [], []
    for one in (model.float(), checkpointed(model.float())):
        reg = fastreg.Regularizer(one, penalty, micro_batch_size=4) if regularized else lambda loss, _: loss
        with torch.autocast("cpu", torch.bfloat16):
            outputs = one(x)
            loss = reg(oracle.label_loss(outputs, y), outputs)
            loss.backward() if inside else None
        None if inside else loss.backward()
        found = {name: g.double() for name, g in oracle.collected_gradient(one).items()}
        errors.append(oracle.relative_error(found, want))
        both.append(found)
    assert regularized or oracle.relative_error(*both) == 0
    assert 0.8 * errors[0] < errors[1] < 1.25 * errors[0] < 0.05


def kept_bytes(depth: int, regularized: bool) -> int:
    """What is saved for the last backward when it starts, parameters aside, in bytes."""
    model, x, y = gpt(depth)
    model = checkpointed(model)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, check=False)
    reg.enabled = regularized
    alive: weakref.WeakSet = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        outputs = model(x)
        loss = reg(oracle.label_loss(outputs, y), outputs)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in alive}
    loss.backward()
    assert not alive, "a backward is to leave nothing behind"
    return sum(size for place, size in storages.items() if place not in own)


class Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(("regularized", "tensors"), [(False, 1), (True, 2)])
def test_a_block_keeps_its_input_and_under_a_penalty_its_output_gradient(regularized: bool, tensors: int) -> None:
    size = SAMPLES * 4 * 8 * 8
    found = [kept_bytes(depth, regularized) for depth in (1, 2, 5)]
    assert [found[1] - found[0], found[2] - found[1]] == [tensors * size, 3 * tensors * size]


@pytest.mark.parametrize(("regularized", "forwards"), [(False, (3, 4)), (True, (6, 11))])
def test_what_it_costs(regularized: bool, forwards: tuple[int, int]) -> None:
    """Layer products in units of a forward, norms aside. 11, and not 12: nothing in a block follows its last layer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Embedding(5, 64), Block(64), Block(64)), torch.randint(5, (32,))
    for one, count in zip((model, checkpointed(model)), forwards, strict=True):
        reg = fastreg.Regularizer(one, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, check=False)
        reg.enabled = regularized
        with FlopCounterMode(display=False) as counter:
            reg(oracle.label_loss(one(x), x)).backward()
        assert counter.get_total_flops() == count * 2 * 32 * 2 * 2 * 64 * 128


def test_a_step_leaves_nothing_behind_without_the_garbage_collector() -> None:
    model, x, y = gpt()
    model = checkpointed(model)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, check=False)
    gc.disable()
    try:
        outputs = model(x)
        loss = reg(oracle.label_loss(outputs, y), outputs)
        calls = [weakref.ref(node.call) for node in _nodes([loss.grad_fn]) if hasattr(node, "call")]
        loss.backward()
        del outputs, loss
        assert len(calls) == 2 and [call() for call in calls] == [None, None]
    finally:
        gc.enable()


def test_hooks_of_parameters_see_one_gradient() -> None:
    model, x, y = mlp()
    found = []
    for one in (model, checkpointed(model)):
        seen = []
        for p in one.parameters():
            p.register_hook(lambda g: seen.append(None) or 3 * g)
        gradient = step(one, x, y, fastreg.GradNorm(weight=WEIGHT), check=False)
        found.append((gradient, len(seen)))
    oracle.assert_same_gradient(found[1][0], found[0][0])
    assert found[0][1] == found[1][1] == 2 * len(list(model.parameters()))


@pytest.mark.parametrize(("adaptive", "parts"), [(False, 1), (True, 1), (False, 2)])
def test_sam_is_sequential_sam(adaptive: bool, parts: int) -> None:
    """In parts: several forwards and backwards a step. All that has parameters is a block."""
    model, x, y = mlp(samples=8)
    want = sequential_gradient(model, oracle.label_loss, x, y, 2, 0.1, adaptive)
    fastreg.checkpoint_blocks(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = fastreg.optim.SAM(base, model, micro_batch_size=2, rho=0.1, adaptive=adaptive)

    def closure() -> Tensor:
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = oracle.label_loss(model(inputs), targets) / parts
            loss.backward()
        return loss

    optimizer.step(closure)
    got = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert oracle.relative_error(got, want) < 1e-10


def perturbed(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2, method="perturb")
    reg(lambda: oracle.label_loss(model(x), y)).backward()
    return list(oracle.collected_gradient(model).values())


def monitored(model: nn.Module, x: Tensor, y: Tensor, size: int | None = 2) -> list[Tensor]:
    monitor = fastreg.Monitor(model, micro_batch_size=size, fraction=None if size is None else 1.0)
    for rows in (slice(0, 4), slice(4, 6)):
        oracle.label_loss(model(x[rows]), y[rows]).backward()
    found = monitor.step()
    return [found["fastreg/grad_norm"], found["fastreg/noise_trace"], *oracle.collected_gradient(model).values()]


def monitored_after_another_pass(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """A pass that does not end where norms are collected leaves nothing, of shared parameters either."""
    first, *_, last = blocks_of(model)
    last.up.weight = first.up.weight
    monitor = fastreg.Monitor(model, micro_batch_size=2, fraction=1.0)
    loss = oracle.label_loss(model(x), y)
    torch.autograd.grad(loss, first.down.weight, retain_graph=True)
    loss.backward()
    found = monitor.step()
    return [found["fastreg/grad_norm"], found["fastreg/noise_trace"]]


def along(function: Callable, model: nn.Module, x: Tensor, y: Tensor, size: int | None) -> list[Tensor]:
    torch.manual_seed(1)
    vectors = [torch.randn(2 if size is None else 3, *p.shape).double() for p in model.parameters()]
    return list(function(model, oracle.label_loss, (x, y), vectors, size))


USES = {
    "perturbed": perturbed,
    "monitored": monitored,
    "monitored by backwards": partial(monitored, size=None),
    "monitored after another pass": monitored_after_another_pass,
    "norms": lambda model, x, y: [fastreg.micro_batch_grad_norms(model, oracle.label_loss, (x, y), 2)],
    "Hessian": lambda model, x, y: along(batched_hvp, model, x, y, None),
    "Hessians of micro-batches": lambda model, x, y: along(batched_hvp, model, x, y, 2),
    "Gauss-Newton": lambda model, x, y: along(ggn_vp, model, x, y, None),
    "Fisher": lambda model, x, y: along(partial(fisher_vp, seed=0), model, x, y, None),
}


# The last two take one prediction a sample.
@pytest.mark.parametrize(("problem", "use"), [*((mlp, use) for use in USES), *((gpt, use) for use in [*USES][:-2])])
def test_what_else_records_finds_the_same(use: str, problem: Callable) -> None:
    model, x, y = problem()
    want, got = (USES[use](one, x, y) for one in (copy.deepcopy(model), checkpointed(model)))
    # A finite difference in float64 keeps half of the digits.
    tolerance = 1e-6 if use == "perturbed" else 1e-10
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=tolerance, atol=tolerance)


def test_a_compiled_step_runs_the_blocks_as_they_are() -> None:
    model, x, y = mlp(depth=1)
    want = step(copy.deepcopy(model), x, y, fastreg.GradNorm(weight=WEIGHT))
    sizes = []
    for one in (model, checkpointed(model)):
        sizes.append([])
        reg = fastreg.Regularizer(one, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
        compiled = fastreg.compile(
            lambda x, y: reg(oracle.label_loss(one(x), y)).backward(),
            one,
            compiler=lambda graph, _: sizes[-1].append(len(graph.graph.nodes)) or graph,
        )
        for _ in range(3):
            one.zero_grad()
            compiled(x, y)
        oracle.assert_same_gradient(oracle.collected_gradient(one), want)
    assert sizes[0] == sizes[1] != []


def worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    found = []
    for wrap in (DistributedDataParallel, sharded):
        model, x, y = gpt()
        model, rows = checkpointed(model), slice(3 * rank, 3 * rank + 3)
        wrapped = wrap(model)
        reshard = getattr(wrapped, "set_reshard_after_backward", lambda _: None)
        reg = fastreg.Regularizer(wrapped, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
        for _ in range(2):
            wrapped.zero_grad()
            reshard(False)
            outputs = wrapped(x[rows])
            loss = reg(oracle.label_loss(outputs, y[rows]), outputs)
            reshard(True)
            loss.backward()
        gradients = (p.grad for p in model.parameters())
        found += [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    torch.save(found, Path(folder) / f"{rank}.pt")
    with pytest.raises(FastregError, match="must be whole, got shards in FSDPBlock"):
        fastreg.checkpoint(fully_shard(Block()), torch.randn(2, 6))
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


def test_ddp_and_fsdp_reduce_the_gradients_of_blocks(tmp_path: Path) -> None:
    model, x, y = gpt()
    locally = []
    for rows in (slice(0, 3), slice(3, 6)):
        want = oracle.penalty_gradient(model, oracle.label_loss, x[rows], y[rows], 2, weight=WEIGHT)
        locally.append([want[name] for name, _ in model.named_parameters()] * 2)
    for one, other, *local in zip(*spawn(worker, tmp_path), *locally, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(one, sum(local) / 2, rtol=1e-10, atol=1e-13)


def test_copies_and_pickles_are_checkpointed_and_their_own() -> None:
    model, x, _ = mlp()
    first = checkpointed(model)
    for one in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        nn.init.zeros_(one[1].down.weight)
        assert type(one[1](torch.randn(2, 6).double()).grad_fn).__name__ == "RerunBackward"
        assert not torch.equal(one(x), first(x))
        assert one.state_dict().keys() == model.state_dict().keys()
    del first[1].forward
    assert type(first[1](torch.randn(2, 6).double()).grad_fn).__name__ == "AddBackward0"


def test_with_gradients_disabled_it_calls() -> None:
    model, x, _ = mlp()
    with torch.no_grad():
        assert torch.equal(checkpointed(model)(x), model(x))


class Captures(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.inner, self.captured = nn.Linear(6, 6), [tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.captured[0]


class Returns(nn.Module):
    def forward(self, x: object) -> object:
        return Saved(x) if isinstance(x, Tensor) else x.tensor


class Differentiates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0]


REFUSED = {
    "a function": (lambda x: fastreg.checkpoint(lambda y: 2 * y, x), "must be a module, or a method of one"),
    "captured": (lambda x: fastreg.checkpoint(Captures(torch.ones(6, requires_grad=True)), x), r"of shape \(6,\)"),
    "captured data": (lambda x: fastreg.checkpoint(Captures(nn.Linear(6, 1)(x)), x), r"of shape \(1"),
    "a result": (lambda x: fastreg.checkpoint(Returns(), x), "results must be tensors and constants.* got a Saved"),
    "an argument": (lambda x: fastreg.checkpoint(Returns(), Saved(x)), "arguments must be .* got a Saved"),
    "in a partial": (lambda x: fastreg.checkpoint(partial(Returns(), Saved(x))), "arguments must be .* got a Saved"),
    "a gradient": (lambda x: fastreg.checkpoint(Differentiates(), x.requires_grad_()), "must not differentiate"),
    "no module": (lambda x: fastreg.checkpoint_blocks([torch.tanh]), "blocks must be modules"),
    "twice": (lambda x: [fastreg.checkpoint_blocks([Block()] * 2)], "each given once"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    run, said = REFUSED[what]
    with pytest.raises(FastregError, match=said):
        run(torch.randn(2, 6))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d: Tensor) -> Tensor:
        return 2 * d * ctx.saved_tensors[0]


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.inner(x))


def test_the_first_step_looks_into_blocks() -> None:
    _, x, y = mlp()
    model = nn.Sequential(nn.Linear(5, 6), Hidden(), nn.Linear(6, 3)).double()
    fastreg.checkpoint_blocks([model[1]])
    with pytest.raises(FastregError, match="got Once, whose backward is @once_differentiable"):
        step(model, x, y, fastreg.GradNorm(weight=WEIGHT))
