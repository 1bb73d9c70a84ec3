"""SAM and m-SAM: the gradient of every case equals that of one micro-batch after another, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import FastregError
from fastreg.optim import SAM
from sam_oracle import sequential_gradient

SAMPLES, RHO = 6, 0.1
GRID = [(case, size) for case in CASES for size in (6, 4, 3, 1) if size >= case.min_group]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def closure_of(optimizer: SAM, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Torch's convention."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def sam_gradient(model: nn.Module, case: Case, batch: tuple[Tensor, Tensor], **options: object) -> oracle.Gradient:
    optimizer = SAM(sgd(model), model, rho=RHO, **options)
    inputs, targets = batch
    optimizer.backward(closure_of(optimizer, model, lambda: case.loss_fn(model(inputs), targets)))
    optimizer.remove()
    return oracle.collected_gradient(model)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
@pytest.mark.parametrize(("case", "size"), GRID, ids=lambda v: getattr(v, "name", v))
def test_the_batched_gradient_is_the_sequential_one(case: Case, size: int, adaptive: bool) -> None:
    model, batch = case.model(), case.batch(SAMPLES)
    want = sequential_gradient(model, case.loss_fn, *batch, size, RHO, adaptive)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    oracle.assert_same_gradient(sam_gradient(model, case, batch, micro_batch_size=size, adaptive=adaptive), want)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["mlp_relu", "gpt_tied", "residual_conv"])
def test_without_micro_batches_it_is_ordinary_sam(name: str) -> None:
    case = BY_NAME[name]
    model, batch = case.model(), case.batch(SAMPLES)
    want = sequential_gradient(model, case.loss_fn, *batch, SAMPLES, RHO)
    oracle.assert_same_gradient(sam_gradient(model, case, batch), want)


@pytest.mark.parametrize("name", ["mlp_gelu", "gpt_tied"])
def test_rows_and_dense_forms_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is a matter of cost alone."""
    case = BY_NAME[name]
    model, batch = case.model(), case.batch(SAMPLES)
    want = sequential_gradient(model, case.loss_fn, *batch, 2, RHO)
    for rows in (True, False):
        monkeypatch.setattr("fastreg.rules.perturbation._prefers_rows", lambda *_: rows)
        oracle.assert_same_gradient(sam_gradient(model, case, batch, micro_batch_size=2), want)


def test_a_step_is_the_base_step_at_that_gradient() -> None:
    case = BY_NAME["mlp_tanh_no_bias"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    plain = copy.deepcopy(model)
    plain_base = sgd(plain)
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)
    for _ in range(3):
        loss = optimizer.step(closure_of(optimizer, model, lambda: case.loss_fn(model(inputs), targets)))
        assert torch.equal(loss, case.loss_fn(plain(inputs), targets).detach())
        for p, g in zip(
            plain.parameters(), sequential_gradient(plain, case.loss_fn, inputs, targets, 2, RHO).values(), strict=True
        ):
            p.grad = g
        plain_base.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_zero_radius_is_the_plain_gradient() -> None:
    case = BY_NAME["residual_conv"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    optimizer = SAM(sgd(model), model, rho=0.0, micro_batch_size=2)
    optimizer.backward(closure_of(optimizer, model, lambda: case.loss_fn(model(inputs), targets)))
    got = oracle.collected_gradient(model)
    want = oracle.gradient_of(case.loss_fn(model(inputs), targets), oracle.trainable(model), False)
    oracle.assert_same_gradient(got, want)


def test_a_micro_batch_without_gradient_stays_where_it_is() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(4, 3).double()
    x[2:] = 0
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)
    optimizer.backward(closure_of(optimizer, model, lambda: model(x).square().mean()))
    assert torch.isfinite(model.weight.grad).all()


class Noisy(nn.Module):
    """Dropout and batch norm: random numbers and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.norm(self.first(x)).relu(), 0.5, self.training))


def test_both_passes_drop_the_same_units_and_statistics_move_once() -> None:
    torch.manual_seed(0)
    model = Noisy().double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    reference, masks = copy.deepcopy(model), []
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=3)

    def loss() -> Tensor:
        masks.append(torch.rand(4))
        return F.cross_entropy(model(x), y)

    torch.manual_seed(1)
    optimizer.step(closure_of(optimizer, model, loss))
    after = torch.rand(4)
    assert torch.equal(*masks)
    assert not torch.equal(after, masks[0])
    for rows in x.split(3):
        reference(rows)
    for name, buffer in model.named_buffers():
        # torch counts calls of the layer; the running statistics take a step per micro-batch.
        want = torch.tensor(1) if "tracked" in name else dict(reference.named_buffers())[name]
        torch.testing.assert_close(buffer, want)


def test_accumulation_inside_the_closure() -> None:
    """Each forward has its own micro-batches and its own backward."""
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    want = sequential_gradient(model, case.loss_fn, inputs, targets, 2, RHO)
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = []
        for x, y in zip(inputs.split(2), targets.split(2), strict=True):
            losses.append(case.loss_fn(model(x), y) / 3)
            losses[-1].backward()
        return torch.stack(losses).sum()

    optimizer.backward(closure)
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


@pytest.mark.parametrize("name", ["raw_parameters", "called_twice", "lstm"])
def test_a_pass_of_input_gradients_leaves_nothing_behind(name: str) -> None:
    """Parameters used several times are put together from what their uses leave, which must be that of one pass."""
    case = BY_NAME[name]
    model, (inputs, targets) = case.model(), case.batch(6)
    optimizer = SAM(sgd(model), model, rho=0.1, micro_batch_size=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        leaf = inputs.detach().requires_grad_()
        loss = case.loss_fn(model(leaf), targets)
        torch.autograd.grad(loss, leaf, retain_graph=True)
        loss.backward()
        return loss

    optimizer.backward(closure)
    want = sequential_gradient(case.model(), case.loss_fn, inputs, targets, 2, 0.1)
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


def test_the_scale_of_the_loss_does_not_change_the_perturbation() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    gradients = []
    for scale in (1.0, 1024.0):
        optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)
        optimizer.backward(closure_of(optimizer, model, lambda: scale * case.loss_fn(model(inputs), targets)))
        optimizer.remove()
        gradients.append({name: g / scale for name, g in oracle.collected_gradient(model).items()})
    oracle.assert_same_gradient(*gradients)


def test_bfloat16_autocast() -> None:
    case = BY_NAME["gpt_tied"]
    model, (inputs, targets) = case.model(torch.float32), case.batch(SAMPLES)
    want = sequential_gradient(case.model(), case.loss_fn, inputs, targets, 2, RHO)
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss_fn(model(inputs).float(), targets)

    optimizer.backward(closure_of(optimizer, model, loss))
    got = {name: g.double() for name, g in oracle.collected_gradient(model).items()}
    assert oracle.relative_error(got, want) < 16 * torch.finfo(torch.bfloat16).eps


# The optimizer's side


def test_the_base_is_shared_and_its_checkpoint_is_ours() -> None:
    model = BY_NAME["mlp_relu"].model()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = SAM(base, model, rho=RHO, micro_batch_size=2)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.defaults is base.defaults
    inputs, targets = BY_NAME["mlp_relu"].batch(SAMPLES)
    optimizer.step(closure_of(optimizer, model, lambda: F.cross_entropy(model(inputs), targets)))
    assert optimizer.state is base.state
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"].keys() == base.state_dict()["state"].keys()
    other = SAM(torch.optim.AdamW(model.parameters(), lr=0.5), copy.deepcopy(model), rho=RHO)
    other.load_state_dict(saved)
    assert other.param_groups is other.base.param_groups
    assert other.param_groups[0]["lr"] == 0.01
    moments = [state["exp_avg"] for state in other.state.values()]
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, base.state.values(), strict=True))


def test_schedulers_hooks_copies_and_pickles() -> None:
    model = BY_NAME["mlp_relu"].model()
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)
    inputs, targets = BY_NAME["mlp_relu"].batch(SAMPLES)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    optimizer.step(closure_of(optimizer, model, lambda: F.cross_entropy(model(inputs), targets)))
    scheduler.step()
    assert called == ["pre", "post"]
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(SAM(sgd(model), copy.deepcopy(model), RHO, 2)))):
        assert (copied.rho, copied.micro_batch_size) == (RHO, 2)
        assert copied.param_groups is copied.base.param_groups


def test_a_grad_scaler_steps_after_backward() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(torch.float32), case.batch(SAMPLES, torch.float32)
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss = lambda: scaler.scale(case.loss_fn(model(inputs), targets))  # noqa: E731
    optimizer.backward(closure_of(optimizer, model, loss))
    want = [p.grad / 256.0 for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, b, g in zip(model.parameters(), before, want, strict=True):
        torch.testing.assert_close(p, b - 0.1 * g)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rho": -1.0}, "rho must be a number >= 0, got -1.0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer >= 1 or None, got 0"),
    ],
)
def test_wrong_arguments(options: dict[str, object], said: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(FastregError, match=said):
        SAM(sgd(model), model, **options)


def test_wrong_base() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(FastregError, match=r"base_optimizer must be a torch.optim.Optimizer, got list"):
        SAM(list(model.parameters()), model)


def test_wrong_closures() -> None:
    model = nn.Linear(2, 2)
    optimizer = SAM(sgd(model), model, micro_batch_size=1)
    batches = iter([torch.randn(3, 2), torch.randn(4, 2)])
    with pytest.raises(FastregError, match="got no forward"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(FastregError, match="a backward for each forward"):
        optimizer.step(lambda: model(torch.randn(3, 2)).sum())
    with pytest.raises(FastregError, match="another one of 4 samples"):
        optimizer.step(closure_of(optimizer, model, lambda: model(next(batches)).sum()))


@pytest.mark.parametrize("returned", [lambda _: None, Tensor.item, lambda loss: (loss,)])
def test_closures_that_return_no_loss(returned: Callable[[Tensor], object]) -> None:
    model = nn.Linear(2, 2)
    optimizer = SAM(sgd(model), model, micro_batch_size=1)
    run = closure_of(optimizer, model, lambda: model(torch.ones(3, 2)).sum())
    with pytest.raises(FastregError, match=r"must return the loss, got (NoneType|float|tuple) \(end it with"):
        optimizer.step(lambda: returned(run()))


def test_indices_that_change_between_the_passes() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 1))
    optimizer = SAM(sgd(model), model, micro_batch_size=1)
    indices = iter([torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)])
    with pytest.raises(FastregError, match="must look up the same indices"):
        optimizer.step(closure_of(optimizer, model, lambda: model(next(indices)).sum()))
