"""Optimizers that wrap another: what all of them owe to torch's loops, and Regularized against the loop it replaces."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import fastreg
from cases import BY_NAME
from fastreg.errors import FastregError
from fastreg.optim import SAM, Regularized

CASE, SAMPLES, SIZE = BY_NAME["mlp_gelu"], 6, 2
Base = Callable[[nn.Module], Optimizer]


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def grad_norm() -> fastreg.Penalty:
    return fastreg.GradNorm(weight=0.5)


def fisher_trace() -> fastreg.Penalty:
    return fastreg.FisherTrace(weight=0.5, seed=3)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples, cut into other micro-batches at every step."""
    inputs, targets = CASE.batch(SAMPLES)
    for step in range(SAMPLES):
        yield inputs.roll(step, 0), targets.roll(step, 0)


def regularizer(model: nn.Module, penalty: Callable[[], fastreg.Penalty]) -> fastreg.Regularizer:
    return fastreg.Regularizer(model, penalty(), micro_batch_size=SIZE)


def closure_of(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Torch's convention."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """To the last bit, weights and gradients."""
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


# What every wrapper owes


class Training:
    """One model in training under one of the wrappers."""

    def __init__(self, kind: str, base: Base = adamw) -> None:
        self.model, self.batches, self.reg = CASE.model(), batches(), None
        self.base = base(self.model)
        if kind == "SAM":
            self.optimizer = SAM(self.base, self.model, rho=0.1, micro_batch_size=SIZE)
        else:
            self.reg = regularizer(self.model, fisher_trace)
            self.optimizer = Regularized(self.base, self.reg)

    def closure(self) -> Callable[[], Tensor]:
        inputs, targets = next(self.batches)
        return closure_of(self.optimizer, lambda: CASE.loss_fn(self.model(inputs), targets))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.closure())

    def parts(self) -> dict[str, object]:
        """What a checkpoint is made of."""
        return {"model": self.model, "optimizer": self.optimizer} | ({"reg": self.reg} if self.reg else {})

    def load(self, saved: dict[str, object]) -> None:
        for name, state in saved.items():
            self.parts()[name].load_state_dict(state)


def through_a_file(parts: dict[str, object]) -> dict[str, object]:
    """Their states."""
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    return torch.load(file)


@pytest.fixture(params=["SAM", "Regularized"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_groups_state_and_defaults_are_the_base_s(kind: str) -> None:
    run = Training(kind)
    run.train(1)
    optimizer, base = run.optimizer, run.base
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert len(base.state) == len(list(run.model.parameters()))
    assert repr(optimizer) == f"{kind}({base!r})"


def test_a_checkpoint_of_the_wrapper_continues_in_the_bare_base(kind: str) -> None:
    run = Training(kind)
    run.train(2)
    model = copy.deepcopy(run.model)
    bare = torch.optim.AdamW(model.parameters(), lr=9.0)
    bare.load_state_dict(through_a_file(run.parts())["optimizer"])
    follow(run, model, bare)


def test_a_checkpoint_of_the_bare_base_continues_in_the_wrapper(kind: str) -> None:
    run = Training(kind)
    model = copy.deepcopy(run.model)
    bare = adamw(model)
    for inputs, targets in batches():
        closure_of(bare, lambda x=inputs, y=targets: CASE.loss_fn(model(x), y))()
        bare.step()
    run.load(through_a_file({"model": model, "optimizer": bare}))
    follow(run, model, bare)


def follow(run: Training, model: nn.Module, bare: Optimizer) -> None:
    """From the same gradients, wrapper and bare optimizer take the same steps."""
    for _ in range(3):
        run.optimizer.backward(run.closure())
        for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
            p.grad = q.grad.clone()
        bare.step()
        run.optimizer.step()
        assert_same(run.model, model)


def test_resuming_is_bit_identical(kind: str) -> None:
    whole, first, second = (Training(kind) for _ in range(3))
    whole.train(5)
    first.train(2)
    second.load(through_a_file(first.parts()))
    second.batches = first.batches
    second.train(3)
    assert_same(whole.model, second.model)


def test_distributed_checkpoints_go_through_the_wrapper(kind: str) -> None:
    run = Training(kind)
    run.train(2)
    state = get_optimizer_state_dict(run.model, run.optimizer)
    for steps in (0, 1):
        other = Training(kind)
        other.train(steps)
        set_optimizer_state_dict(other.model, other.optimizer, copy.deepcopy(state))
        torch.testing.assert_close(other.base.state_dict(), run.base.state_dict(), rtol=0, atol=0)


SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.3, total_steps=6, cycle_momentum=True),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(kind: str, name: str) -> None:
    """Through the wrapper they move the base as they would move it bare."""
    run, bare = Training(kind, sgd), sgd(CASE.model())
    scheduler, reference = (SCHEDULERS[name](optimizer) for optimizer in (run.optimizer, bare))
    seen: list[tuple[float, float]] = []
    for _ in range(5):
        run.train(1)
        scheduler.step()
        bare.step()
        reference.step()
        ours, theirs = ((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]) for base in (run.base, bare))
        assert ours == theirs
        seen.append(ours)
    assert len({lr for lr, _ in seen}) > 1
    assert (len({momentum for _, momentum in seen}) > 1) == (name == "OneCycleLR")


@pytest.mark.parametrize("closure", [True, False], ids=["closure", "two calls"])
def test_hooks_run_once_per_step(kind: str, closure: bool) -> None:
    run = Training(kind)
    called: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    run.optimizer.register_step_post_hook(lambda *_: called.append("post"))
    for _ in range(2):
        if closure:
            run.train(1)
        else:
            run.optimizer.backward(run.closure())
            run.optimizer.step()
    assert called == ["pre", "post"] * 2


def test_zero_grad(kind: str) -> None:
    run = Training(kind)
    run.optimizer.backward(run.closure())
    run.optimizer.zero_grad(set_to_none=False)
    assert all(bool((p.grad == 0).all()) for p in run.model.parameters())
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in run.model.parameters())


def test_add_param_group(kind: str) -> None:
    run, extra = Training(kind, sgd), nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert run.base.param_groups[1]["lr"] == 0.5
    extra.grad = torch.ones(2)
    run.optimizer.step()
    assert torch.equal(extra, torch.full((2,), 0.5))


# Regularized


@pytest.mark.parametrize("base", [sgd, adamw])
@pytest.mark.parametrize("penalty", [grad_norm, fisher_trace])
def test_it_is_the_loop_with_reg_in_it(penalty: Callable[[], fastreg.Penalty], base: Base) -> None:
    ours, theirs = CASE.model(), CASE.model()
    optimizer, plain = Regularized(base(ours), regularizer(ours, penalty)), base(theirs)
    reg = regularizer(theirs, penalty)
    for (x, y), _ in zip(batches(), range(5), strict=False):
        got = optimizer.step(closure_of(optimizer, lambda x=x, y=y: CASE.loss_fn(ours(x), y)))
        outputs = theirs(x)
        plain.zero_grad()
        loss = CASE.loss_fn(outputs, y)
        reg(loss, outputs).backward()
        plain.step()
        assert torch.equal(got, loss)
        assert not got.requires_grad
        assert_same(ours, theirs)
    unpenalised = torch.autograd.grad(CASE.loss_fn(theirs(x), y), list(theirs.parameters()))
    assert any(not torch.equal(g, p.grad) for g, p in zip(unpenalised, theirs.parameters(), strict=True))


class Pair:
    """A model under Regularized, and its twin under a plain loop."""

    def __init__(self, penalty: Callable[[], fastreg.Penalty] = fisher_trace) -> None:
        self.model, self.twin = CASE.model(), CASE.model()
        self.optimizer = Regularized(sgd(self.model), regularizer(self.model, penalty))
        self.reg = regularizer(self.twin, penalty)

    def reference(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        outputs = self.twin(x)
        self.reg(CASE.loss_fn(outputs, y) * scale, outputs, scale=scale).backward()


def test_accumulation_inside_the_closure() -> None:
    """One backward for each forward, losses divided by their number."""
    pair, data = Pair(), list(batches())[:2]

    def closure() -> Tensor:
        pair.optimizer.zero_grad()
        losses = []
        for x, y in data:
            losses.append(CASE.loss_fn(pair.model(x), y) / 2)
            losses[-1].backward()
        return torch.stack(losses).sum()

    pair.optimizer.backward(closure, scale=0.5)
    for x, y in data:
        pair.reference(x, y, 0.5)
    assert_same(pair.model, pair.twin)


def test_a_grad_scaler_says_its_scale() -> None:
    pair, (x, y) = Pair(), CASE.batch(SAMPLES)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    closure = closure_of(pair.optimizer, lambda: scaler.scale(CASE.loss_fn(pair.model(x), y)))
    pair.optimizer.backward(closure, scale=scaler.get_scale())
    scaler.step(pair.optimizer)
    pair.reference(x, y)
    sgd(pair.twin).step()
    # A power of two scales without rounding.
    assert_same(pair.model, pair.twin)


def test_counts_and_reduction_reach_reg() -> None:
    pair, (x, y) = Pair(grad_norm), CASE.batch(SAMPLES)
    counts = torch.arange(1.0, SAMPLES + 1)
    loss = lambda outputs: (CASE.sample_losses(outputs, y) * counts).sum()  # noqa: E731
    pair.optimizer.backward(closure_of(pair.optimizer, lambda: loss(pair.model(x))), counts=counts, reduction="sum")
    pair.reg(loss(pair.twin(x)), counts=counts, reduction="sum").backward()
    assert_same(pair.model, pair.twin)


@pytest.mark.parametrize("evaluating", [True, False])
def test_a_look_at_other_data_between_forward_and_backward(evaluating: bool) -> None:
    pair, (x, y) = Pair(), CASE.batch(SAMPLES)

    def loss() -> Tensor:
        value = CASE.loss_fn(pair.model(x), y)
        pair.model.train(not evaluating)
        with torch.set_grad_enabled(evaluating):
            pair.model(-x)
        pair.model.train()
        return value

    pair.optimizer.backward(closure_of(pair.optimizer, loss))
    pair.reference(x, y)
    assert_same(pair.model, pair.twin)


def test_a_disabled_reg_leaves_the_plain_gradient() -> None:
    pair, (x, y) = Pair(), CASE.batch(SAMPLES)
    pair.optimizer.reg.enabled = False
    pair.optimizer.backward(closure_of(pair.optimizer, lambda: CASE.loss_fn(pair.model(x), y)))
    CASE.loss_fn(pair.twin(x), y).backward()
    assert_same(pair.model, pair.twin)


def test_nothing_is_left_behind_by_a_closure_that_fails() -> None:
    pair, (x, y) = Pair(), CASE.batch(SAMPLES)
    hooks = len(pair.model._forward_hooks)

    def closure() -> Tensor:
        raise ValueError("out of data")

    with pytest.raises(ValueError, match="out of data"):
        pair.optimizer.step(closure)
    assert len(pair.model._forward_hooks) == hooks
    CASE.loss_fn(pair.model(x), y).backward()
    CASE.loss_fn(pair.twin(x), y).backward()
    assert_same(pair.model, pair.twin)


# Refusals


def backward_of(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(value: Tensor) -> Tensor:
        value = loss(value)
        value.backward()
        return value

    return run


@pytest.mark.parametrize(
    ("finish", "said"),
    [
        (lambda loss: loss, r"must call loss.backward\(\) and return loss, got 0 calls of backward and Tensor"),
        (lambda loss: loss.backward(), "got 1 calls of backward and NoneType returned"),
        # Before torch 2.11 only its absence is seen: no backward.
        (torch.autograd.backward, r"the closure must call loss.backward\(\)"),
        (backward_of(lambda loss: loss / 4), r"without scale, got DivBackward0 \(call optimizer.backward"),
        (backward_of(lambda loss: torch.tensor(1024.0) * loss), "without scale, got MulBackward0"),
        (backward_of(torch.Tensor.detach), "loss must require grad"),
    ],
    ids=["no backward", "no loss", "autograd.backward", "divided", "scaled", "detached"],
)
def test_closures_that_would_be_silently_wrong(finish: Callable[[Tensor], object], said: str) -> None:
    pair, (x, y) = Pair(), CASE.batch(SAMPLES)
    before = [p.detach().clone() for p in pair.model.parameters()]
    with pytest.raises(FastregError, match=said):
        pair.optimizer.step(lambda: finish(CASE.loss_fn(pair.model(x), y)))
    assert all(torch.equal(b, p) for b, p in zip(before, pair.model.parameters(), strict=True))


def test_a_second_backward_of_one_forward() -> None:
    pair, (x, y) = Pair(), CASE.batch(SAMPLES)

    def closure() -> Tensor:
        loss = CASE.loss_fn(pair.model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        return loss

    with pytest.raises(FastregError, match="a second call for one forward"):
        pair.optimizer.step(closure)


def test_wrong_arguments() -> None:
    pair = Pair()
    with pytest.raises(FastregError, match=r"base_optimizer must be a torch.optim.Optimizer, got list"):
        Regularized(list(pair.model.parameters()), pair.reg)
    with pytest.raises(FastregError, match=r"reg must be a fastreg.Regularizer, got GradNorm"):
        Regularized(sgd(pair.model), grad_norm())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(FastregError, match="neither copied nor pickled"):
        duplicate(Pair().optimizer)
