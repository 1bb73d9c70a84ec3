"""Compiled training steps leave what eager ones leave: losses, gradients, buffers, metrics, counters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastreg
import fastreg.optim
from cases import BY_NAME, CASES, Case
from fastreg.errors import FastregError
from fastreg.penalties.base import Penalty

SIZE, STEPS, RATE = 2, 4, 0.05
Loss = Callable[[nn.Module, fastreg.Regularizer, Tensor, Tensor], Tensor]


def as_traced(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable:
    """What would be compiled."""
    return graph


@dataclass
class Run:
    """What a training run left."""

    steps: list[list[Tensor]]
    reg: fastreg.Regularizer
    model: nn.Module
    graphs: int


def train(
    case: Case,
    penalty: Callable[[torch.optim.Optimizer], Penalty],
    compiler: Callable | None,
    *,
    eager: bool,
    sizes: tuple[int, ...] = (6,) * STEPS,
    zeroed: bool = True,
    **options: object,
) -> Run:
    """``STEPS`` of SGD whose learning rate decays."""
    torch.manual_seed(0)
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    reg = fastreg.Regularizer(model, penalty(optimizer), micro_batch_size=SIZE, **options)

    def step(x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        loss = reg(case.loss_fn(outputs, y), outputs)
        loss.backward()
        return loss

    taken = step if eager else fastreg.compile(step, model, compiler=compiler)
    torch.manual_seed(1)
    left = []
    for size in sizes:
        if zeroed:
            optimizer.zero_grad()
        loss = taken(*case.batch(size))
        grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
        kept = [t for one in reg.penalties if (t := getattr(one, "last_labels", None)) is not None]
        left.append([loss.detach(), *grads, *reg.metrics.values(), *kept])
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return Run(left, reg, model, 0 if eager else len(taken._graphs))


def assert_same(eager: Run, compiled: Run, tolerance: float = 0.0) -> None:
    for want, got in zip(eager.steps, compiled.steps, strict=True):
        for w, g in zip(want, got, strict=True):
            assert not g.requires_grad
            assert float((w - g).double().norm()) <= tolerance * float(w.double().norm()) + 1e-300
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=max(tolerance, 1e-12), atol=1e-12)
    assert compiled.reg._calls == eager.reg._calls
    assert list(compiled.reg.metrics) == list(eager.reg.metrics)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule(case: Case) -> None:
    def penalty(_: object) -> Penalty:
        return fastreg.GradNorm(0.1)

    compiled = train(case, penalty, as_traced, eager=False, sizes=(6, 6, 6))
    assert_same(train(case, penalty, None, eager=True, sizes=(6, 6, 6)), compiled, 1e-12)
    assert compiled.graphs == 1


PENALTIES: dict[str, Callable[[torch.optim.Optimizer], Penalty]] = {
    "warm_up": lambda _: fastreg.GradNorm(fastreg.weights.warm_up(0.1, 3)),
    "match_sgd": lambda lr: fastreg.GradNorm(fastreg.weights.match_sgd(0.1, lr=lr)),
    "unsquared": lambda _: fastreg.GradNorm(0.1, unsquared=True),
    "variance": lambda _: fastreg.GradNorm(0.1, centered=True, unbiased=True),
    "noise_trace": lambda _: fastreg.NoiseTrace(0.1),
    "fisher": lambda _: fastreg.FisherTrace(0.1, seed=0),
    "fisher_true": lambda _: fastreg.FisherTrace(0.1, seed=0, gradient="true"),
    "fisher_frozen": lambda _: fastreg.FisherTrace(0.1, seed=0, gradient="frozen"),
    "average_jacobian": lambda _: fastreg.AverageJacobian(0.1),
    "unit_jacobian": lambda _: fastreg.UnitJacobian(0.1, directions=2, seed=0),
    "without_replacement": lambda lr: fastreg.WithoutReplacement(0.1, lr=lr, rank=3, refresh=2, seed=0),
}


@pytest.mark.parametrize("model", ["mlp_gelu", "gpt_tied"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty(penalty: str, model: str) -> None:
    """Weights that change, labels and directions that are drawn anew: nothing of it is a constant of the graph."""
    sizes = (6,) * 6
    runs = [train(BY_NAME[model], PENALTIES[penalty], as_traced, eager=e, sizes=sizes) for e in (True, False)]
    assert_same(*runs, 1e-12)
    assert runs[1].graphs == 1


def test_labels_differ_from_step_to_step() -> None:
    run = train(BY_NAME["gpt_tied"], PENALTIES["fisher"], as_traced, eager=False)
    drawn = [step[-1] for step in run.steps]
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn))


@pytest.mark.parametrize("options", [{"every": 2}, {"check": False}, {"zeroed": False}], ids=str)
def test_options(options: dict) -> None:
    sizes = (6, 6, 6, 4, 4, 6, 5, 4)
    case, penalty = BY_NAME["mlp_gelu"], PENALTIES["warm_up"]
    runs = [train(case, penalty, as_traced, eager=e, sizes=sizes, **options) for e in (1, 0)]
    assert_same(*runs, 1e-12)


def test_a_resumed_run_goes_on() -> None:
    """Counters of a compiled run are those that a checkpoint holds."""
    runs = [train(BY_NAME["gpt_tied"], PENALTIES["fisher"], as_traced, eager=eager) for eager in (True, False)]
    saved = [run.reg.state_dict()["penalties"] for run in runs]
    assert saved[0] == saved[1] == [{"seed": 0, "draws": STEPS}]


def test_a_loaded_seed_draws_the_labels_of_the_next_step() -> None:
    """Also where the step was compiled with another one."""
    case, drawn = BY_NAME["gpt_tied"], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = case.model()
        reg = fastreg.Regularizer(model, fastreg.FisherTrace(0.1, seed=0), micro_batch_size=SIZE)

        def step(x: Tensor, y: Tensor, model: nn.Module = model, reg: fastreg.Regularizer = reg) -> None:
            outputs = model(x)
            reg(case.loss_fn(outputs, y), outputs).backward()

        taken = fastreg.compile(step, model, compiler=as_traced) if compiled else step
        labels = []
        for seed in (0, 0, 7, 0):
            reg.penalties[0].load_state_dict({"seed": seed, "draws": 5})
            taken(*case.batch(6))
            labels.append(reg.penalties[0].last_labels.clone())
        drawn.append(labels)
    eager, compiled = drawn
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert torch.equal(eager[0], eager[3]) and not torch.equal(eager[0], eager[2])


def test_per_micro_batch_norms() -> None:
    runs = [train(BY_NAME["mlp_gelu"], PENALTIES["warm_up"], as_traced, eager=eager) for eager in (True, False)]
    torch.testing.assert_close(runs[1].reg.sq_norms, runs[0].reg.sq_norms, rtol=1e-12, atol=0)


def test_inductor_twenty_steps_of_two_batch_sizes_with_two_graphs() -> None:
    sizes = (6, 6, 4) * 7
    eager, compiled = (train(BY_NAME["mlp_gelu"], PENALTIES["warm_up"], None, eager=e, sizes=sizes) for e in (1, 0))
    assert_same(eager, compiled, 1e-10)
    assert compiled.graphs == 2


def test_options_reach_inductor() -> None:
    """And those of CUDA graphs, which a CPU has none of, leave results right."""
    model, reg = regularized()
    with pytest.raises(FastregError, match="options must be None with a compiler"):
        fastreg.compile(step_of(model, reg), model, options={}, compiler=as_traced)
    compiled = fastreg.compile(step_of(model, reg), model, options={"no such option": 1})
    compiled(*batch())
    compiled(*batch())
    with pytest.raises(AttributeError, match="no such option"):
        compiled(*batch())
    fixed, found = batch(), []
    graphed = fastreg.compile(step_of(model, reg), model, options={"triton.cudagraphs": True})
    for taken in (step_of(model, reg), graphed):
        for _ in range(3):
            model.zero_grad()
            taken(*fixed)
        found.append([p.grad for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_inductor_transformer() -> None:
    eager, compiled = (train(BY_NAME["gpt_tied"], PENALTIES["fisher"], None, eager=e, sizes=(6, 6, 6)) for e in (1, 0))
    assert_same(eager, compiled, 1e-10)


OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=RATE),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=torch.tensor(RATE), momentum=0.9, fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(RATE), fused=True),
}


def optimized(name: str, compile_step: Callable | None) -> tuple[nn.Module, int]:
    """Parameters after five steps, with the optimizer's in the function."""
    case = BY_NAME["mlp_gelu"]
    torch.manual_seed(0)
    model = case.model()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(0.1), micro_batch_size=SIZE)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = reg(case.loss_fn(model(x), y))
        loss.backward()
        optimizer.step()
        return loss

    taken = step
    if compile_step is not None:
        taken = fastreg.compile(step, model, optimizer=optimizer, compiler=compile_step)
    torch.manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        taken(*case.batch(6))
        schedule.step()
    return model, len(taken._graphs) if compile_step else 0


@pytest.mark.parametrize(("name", "graphs"), [("sgd", 4), ("sgd_fused", 1), ("adamw_fused", 1)])
def test_the_optimizer_in_the_graph(name: str, graphs: int) -> None:
    """A learning rate that is a number makes a graph for each of its values; one that is a tensor does not."""
    (want, _), (got, made) = optimized(name, None), optimized(name, as_traced)
    assert made == graphs
    for w, g in zip(want.parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_an_optimizer_that_reads_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "adamw", lambda p: torch.optim.AdamW(p, lr=RATE))
    with pytest.raises(FastregError, match="must not read numbers out of tensors.*fused=True"):
        optimized("adamw", as_traced)


class Blocks(nn.Module):
    """A network with a block that may drop, and may be computed again in the backward."""

    def __init__(self, dropout: float, again: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout))
        self.head, self.again = nn.Linear(8, 2), again

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x))


def step_of(model: nn.Module, reg: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = reg(F.cross_entropy(model(x), y))
        loss.backward()
        return loss

    return step


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))


def regularized(dropout: float = 0.0, again: bool = False, **options: object) -> tuple[nn.Module, fastreg.Regularizer]:
    torch.manual_seed(0)
    model = Blocks(dropout, again).double()
    return model, fastreg.Regularizer(model, fastreg.GradNorm(0.1), micro_batch_size=2, **options)


def test_checkpointed_blocks() -> None:
    found = []
    for again in (False, True):
        model, reg = regularized(again=again)
        compiled = fastreg.compile(step_of(model, reg), model, compiler=as_traced)
        for _ in range(3):
            model.zero_grad()
            compiled(*batch())
        found.append([p.grad for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_checkpointed_dropout_is_refused() -> None:
    model, reg = regularized(0.5, again=True)
    compiled = fastreg.compile(step_of(model, reg), model, compiler=as_traced)
    compiled(*batch())
    with pytest.raises(FastregError, match="a backward must not draw random numbers"):
        compiled(*batch())


def test_dropout_drops_others_in_every_step() -> None:
    model, reg = regularized(0.5)
    compiled = fastreg.compile(step_of(model, reg), model, compiler=as_traced)
    fixed = batch()
    losses = [float(compiled(*fixed)) for _ in range(6)]
    assert len(set(losses)) == 6


def test_autocast() -> None:
    """A traced step casts a weight for each of its uses, an eager one once for all: sums of two are rounded apart."""
    found = []
    for compiler in (None, as_traced):
        model, reg = regularized()
        step = step_of(model.float(), reg)
        taken = step if compiler is None else fastreg.compile(step, model, compiler=compiler)
        x, y = batch()
        for _ in range(3):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                taken(x.float(), y)
        found.append([p.grad for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        assert float((want - got).norm()) <= 2**-8 * float(want.norm())


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"method": "perturb"}], ids=str)
def test_what_cannot_be_traced_is_refused(options: dict) -> None:
    model, reg = regularized(**options)
    compiled = fastreg.compile(step_of(model, reg), model, compiler=as_traced)
    with pytest.raises(FastregError, match="method='exact' and fraction=1"):
        compiled(*batch())


def test_other_recorders_are_refused() -> None:
    model, reg = regularized()
    reg.remove()
    optimizer = fastreg.optim.SAM(torch.optim.SGD(model.parameters(), lr=RATE), model)
    compiled = fastreg.compile(step_of(model, lambda loss: loss), model, compiler=as_traced)
    with pytest.raises(FastregError, match="must be a Regularizer, got a Monitor, SAM"):
        compiled(*batch())
    optimizer.remove()


def test_torch_compile_of_a_regularized_step_points_here() -> None:
    model, reg = regularized()
    step = step_of(model, reg)
    step(*batch())
    with pytest.raises(FastregError, match="torch.compile, for which there is fastreg.compile"):
        torch.compile(step, backend="eager")(*batch())


def test_a_second_model_is_not_touched() -> None:
    """What is compiled belongs to one model: a copy of it trains on its own."""
    model, reg = regularized()
    compiled = fastreg.compile(step_of(model, reg), model, compiler=as_traced)
    other = copy.deepcopy(model)
    for _ in range(3):
        compiled(*batch())
    assert all(p.grad is None for p in other.parameters())
