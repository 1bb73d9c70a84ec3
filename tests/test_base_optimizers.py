"""Every optimizer of torch.optim, and some of others, inside the wrappers: three steps against a loop by hand."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

import fastreg
import oracle
from cases import BY_NAME, Case
from fastreg.errors import FastregError
from fastreg.optim import SAM, Grafted, Regularized, UnitNorm
from sam_oracle import sequential_gradient

SAMPLES, SIZE, WEIGHT, RHO, STEPS = 6, 2, 0.5, 0.1, 3
Gradient = Callable[[nn.Module, Tensor, Tensor], oracle.Gradient]

# What makes each of them move, and what it remembers, within three steps.
TORCH: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1, "t0": 1},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "AdamW": {"lr": 0.05},
    "Adamax": {"lr": 0.05},
    "Muon": {"lr": 0.05},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.05, "momentum": 0.9},
    "Rprop": {"lr": 0.05},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}
REFUSED = {"LBFGS", "SparseAdam"}
ELSEWHERE: dict[str, dict[str, dict[str, Any]]] = {
    "schedulefree": {
        "AdamWScheduleFree": {"lr": 0.05},
        "RAdamScheduleFree": {"lr": 0.05, "silent_sgd_phase": False},
        "SGDScheduleFree": {"lr": 0.5},
    },
    "pytorch_optimizer": {
        "AdaBelief": {"lr": 0.05},
        "Lion": {"lr": 0.05},
        # Preconditioners of matrices without full rank would turn roundings of 1e-15 into 0.2.
        "SOAP": {"lr": 0.05, "precondition_frequency": 1, "max_precondition_dim": 3, "eps": 1e-4},
    },
}


def bases() -> Iterator[Any]:
    """Module, name and options of each, in every form that it has on a CPU."""
    for name, options in TORCH.items():
        for form in ("foreach", "fused"):
            if form in inspect.signature(getattr(torch.optim, name)).parameters:
                yield pytest.param("torch.optim", name, options | {form: True}, id=f"{name}-{form}")
        yield pytest.param("torch.optim", name, options, id=name)
    for module, names in ELSEWHERE.items():
        absent = importlib.util.find_spec(module) is None
        marks = [pytest.mark.skipif(absent, reason=f"{module} is not installed")]
        for name, options in names.items():
            yield pytest.param(module, name, options, id=name, marks=marks)


def case_for(name: str) -> Case:
    # Muon takes matrices alone.
    return BY_NAME["mlp_tanh_no_bias" if name == "Muon" else "mlp_gelu"]


class Run:
    """One base, inside a wrapper or bare, with a learning rate that is halved at every step."""

    def __init__(self, wrapper: str | None, module: str, name: str, options: dict, **to: Any) -> None:
        self.case = case_for(name)
        self.model = self.case.model().to(**to)
        self.base = getattr(importlib.import_module(module), name)(self.model.parameters(), **options)
        self.optimizer = self.base if wrapper is None else wrapped(wrapper, self.base, self.model)
        if module == "schedulefree":
            self.optimizer.train()
        self.scheduler = StepLR(self.optimizer, 1, gamma=0.5)
        x, self.targets = (t.to(to.get("device")) for t in self.case.batch(SAMPLES))
        self.inputs = x.to(to.get("dtype"))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.inputs.roll(step, 0), self.targets.roll(step, 0)

    def by_closure(self, steps: range) -> None:
        for step in steps:
            x, y = self.batch(step)

            def closure() -> Tensor:
                self.optimizer.zero_grad()
                loss = self.case.loss_fn(self.model(x), y)
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.scheduler.step()

    def by_hand(self, steps: range, gradient: Gradient) -> None:
        for step in steps:
            wanted = gradient(self.model, *self.batch(step))
            for name, p in self.model.named_parameters():
                p.grad = wanted[name]
            self.optimizer.step()
            self.scheduler.step()

    def states(self) -> list[dict]:
        return copy.deepcopy([part.state_dict() for part in (self.model, self.optimizer, self.scheduler)])

    def load(self, states: list[dict]) -> None:
        for part, state in zip((self.model, self.optimizer, self.scheduler), states, strict=True):
            part.load_state_dict(state)

    @property
    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def wrapped(wrapper: str, base: Optimizer, model: nn.Module) -> Optimizer:
    if wrapper == "SAM":
        return SAM(base, model, rho=RHO, micro_batch_size=SIZE)
    return Regularized(base, fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE))


def gradient_of(wrapper: str, case: Case) -> Gradient:
    """By plain autograd, one micro-batch after another."""
    if wrapper == "SAM":
        return lambda model, x, y: sequential_gradient(model, case.loss_fn, x, y, SIZE, RHO)
    return lambda model, x, y: oracle.penalty_gradient(model, case.loss_fn, x, y, SIZE, weight=WEIGHT)


def assert_same_steps(wrapper: str, module: str, name: str, options: dict, **to: Any) -> None:
    ours, theirs, plain = (Run(way, module, name, options, **to) for way in (wrapper, None, None))
    start = ours.weights
    ours.by_closure(range(STEPS))
    theirs.by_hand(range(STEPS), gradient_of(wrapper, ours.case))
    plain.by_hand(range(STEPS), lambda model, x, y: unpenalised(ours.case, model, x, y))
    moved = (theirs.weights - start).norm()
    assert (ours.weights - theirs.weights).norm() <= 1e-10 * moved
    # The gradient is not that of the loss alone, and the schedule was followed.
    assert (plain.weights - theirs.weights).norm() > 1e-4 * moved > 0
    assert ours.base.param_groups[0]["lr"] == options["lr"] / 2**STEPS


def unpenalised(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    return oracle.gradient_of(case.loss_fn(model(x), y), oracle.trainable(model), False)


@pytest.fixture(params=["Regularized", "SAM"])
def wrapper(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_table_has_every_optimizer_of_torch() -> None:
    classes = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
    found = {name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, Optimizer)}
    assert found - {"Optimizer"} == TORCH.keys() | REFUSED


@pytest.mark.parametrize(("module", "name", "options"), [*bases()])
def test_steps_are_those_of_a_loop_by_hand(wrapper: str, module: str, name: str, options: dict) -> None:
    assert_same_steps(wrapper, module, name, options)


CAPTURABLE = [name for name in TORCH if "capturable" in inspect.signature(getattr(torch.optim, name)).parameters]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_optimizers(wrapper: str, name: str) -> None:
    assert_same_steps(wrapper, "torch.optim", name, TORCH[name] | {"capturable": True}, device="cuda")


@pytest.mark.parametrize(("module", "name", "options"), [*bases()])
def test_a_resumed_run_is_the_uninterrupted_one(wrapper: str, module: str, name: str, options: dict) -> None:
    # In float32: NAdam keeps a float32 number that torch casts to the dtype of its parameter when it is loaded.
    whole, first, second, forgetful = (Run(wrapper, module, name, options, dtype=torch.float32) for _ in range(4))
    whole.by_closure(range(4))
    first.by_closure(range(2))
    second.load(first.states())
    second.by_closure(range(2, 4))
    assert torch.equal(second.weights, whole.weights)
    forgetful.model.load_state_dict(first.model.state_dict())
    forgetful.scheduler.load_state_dict(first.scheduler.state_dict())
    forgetful.by_closure(range(2, 4))
    assert not torch.equal(forgetful.weights, whole.weights)


@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_the_average_of_a_schedule_free_optimizer_is_reached_through_the_wrapper(wrapper: str) -> None:
    options = ELSEWHERE["schedulefree"]["SGDScheduleFree"]
    ours, theirs = (Run(way, "schedulefree", "SGDScheduleFree", options) for way in (wrapper, None))
    ours.by_closure(range(STEPS))
    theirs.by_hand(range(STEPS), gradient_of(wrapper, ours.case))
    trained = ours.weights
    for run in (ours, theirs):
        run.optimizer.eval()
    assert (ours.weights - theirs.weights).norm() <= 1e-10 * theirs.weights.norm()
    assert not torch.equal(ours.weights, trained)
    ours.optimizer.train()
    torch.testing.assert_close(ours.weights, trained, rtol=1e-12, atol=1e-12)


def test_vectors_go_to_an_optimizer_of_their_own() -> None:
    """Muon takes matrices alone: the gradient is in ``.grad`` of all parameters, for more than one to step."""
    case = BY_NAME["mlp_gelu"]
    ours, theirs = case.model(), case.model()

    def optimizers(model: nn.Module) -> tuple[Optimizer, Optimizer]:
        vectors = [p for p in model.parameters() if p.dim() < 2]
        matrices = [p for p in model.parameters() if p.dim() > 1]
        return torch.optim.Muon(matrices, **TORCH["Muon"]), torch.optim.AdamW(vectors, **TORCH["AdamW"])

    muon, adamw = optimizers(ours)
    optimizer, bare = wrapped("Regularized", muon, ours), optimizers(theirs)
    x, y = case.batch(SAMPLES)

    def closure() -> Tensor:
        ours.zero_grad()
        loss = case.loss_fn(ours(x), y)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        adamw.step()
        wanted = gradient_of("Regularized", case)(theirs, x, y)
        for name, p in theirs.named_parameters():
            p.grad = wanted[name]
        for one in bare:
            one.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_an_optimizer_that_needs_its_closure_takes_reg_inside_it(wrapper: str) -> None:
    case = BY_NAME["mlp_gelu"]
    ours, theirs = case.model(), case.model()
    x, y = case.batch(SAMPLES)
    options = {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    mine, bare = (torch.optim.LBFGS(model.parameters(), **options) for model in (ours, theirs))
    with pytest.raises(FastregError, match=r"must step without a closure, got LBFGS \(.*reg\(loss\).backward\(\)"):
        wrapped(wrapper, mine, ours)
    ours = case.model()
    mine = torch.optim.LBFGS(ours.parameters(), **options)
    reg = fastreg.Regularizer(ours, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE)

    def closure() -> Tensor:
        mine.zero_grad()
        loss = reg(case.loss_fn(ours(x), y))
        loss.backward()
        return loss

    def by_hand() -> Tensor:
        wanted = gradient_of("Regularized", case)(theirs, x, y)
        for name, p in theirs.named_parameters():
            p.grad = wanted[name]
        return case.loss_fn(theirs(x), y).detach()

    mine.step(closure)
    bare.step(by_hand)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_sparse_gradients_are_refused(wrapper: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)).double()
    optimizer = wrapped(wrapper, torch.optim.SparseAdam(model[:1].parameters()), model)
    with pytest.raises(FastregError, match="sparse=True gives a sparse gradient; use sparse=False"):
        optimizer.step(lambda: model(torch.ones(4, 2, dtype=torch.long)).square().mean())


def test_dense_gradients_are_refused_by_torch(wrapper: str) -> None:
    case = BY_NAME["mlp_gelu"]
    model, (x, y) = case.model(), case.batch(SAMPLES)
    optimizer = wrapped(wrapper, torch.optim.SparseAdam(model.parameters()), model)

    def closure() -> Tensor:
        loss = case.loss_fn(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="does not support dense gradients, please consider Adam instead"):
        optimizer.step(closure)


@pytest.mark.parametrize("inner", ["Regularized", "SAM"])
def test_wrappers_of_wrappers_are_refused(wrapper: str, inner: str) -> None:
    """The step without a closure would be that of the innermost optimizer, at the outer gradient alone."""
    model = BY_NAME["mlp_gelu"].model()
    once = wrapped(inner, torch.optim.SGD(model.parameters(), lr=0.1), model)
    other = BY_NAME["mlp_gelu"].model()
    with pytest.raises(FastregError, match=rf"must not make gradients of its own, got {inner} \(.*inside it, SGD\)"):
        wrapped(wrapper, once, other)


def test_a_base_that_has_a_scheduler_already(wrapper: str) -> None:
    """Which has put a function in the place of its step."""
    model = BY_NAME["mlp_gelu"].model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(base, 1)
    assert wrapped(wrapper, scheduler.optimizer, model).base is base


def test_a_grafted_base_makes_its_step_alone(wrapper: str) -> None:
    model = BY_NAME["mlp_gelu"].model()
    wrapped(wrapper, Grafted(torch.optim.SGD(model.parameters(), lr=0.1), UnitNorm()), model)


@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_a_plain_class_is_no_optimizer(wrapper: str) -> None:
    import schedulefree

    model = BY_NAME["mlp_gelu"].model()
    base = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(FastregError, match=r"must be a torch.optim.Optimizer, got ScheduleFreeWrapper"):
        wrapped(wrapper, base, model)
