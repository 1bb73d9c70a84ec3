"""bfloat16 and float16, by autocast or throughout, and loss scaling: errors in units of the dtype's eps.

Oracles are plain float64 autograd at the weights that the model has after rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import fastreg
import oracle
from cases import BY_NAME, Case
from fastreg.errors import FastregError
from fastreg.optim import SAM
from penalty_oracle import MicroBatches
from sam_oracle import sequential_gradient

HALF = torch.float16
EPS = torch.finfo(HALF).eps
SAMPLES, SIZE, WEIGHT, LARGE = 6, 2, 0.7, 2.0**16


def group_norm_net() -> nn.Sequential:
    """Two convolutions with group norm, 4 x 4 images."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.GELU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


CONV = Case("conv_group_norm", group_norm_net, (2, 4, 4))
MODELS = [BY_NAME["mlp_gelu"], CONV, BY_NAME["gpt_tied"]]
# Parameters, and what autocast computes in.
MODES = {
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, HALF),
    "bfloat16": (torch.bfloat16, None),
    "float16": (HALF, None),
}


class Setting:
    """A case in a precision, and its float64 counterpart with the same weights."""

    def __init__(self, case: Case, mode: str = "autocast float16", factor: float = 1.0) -> None:
        self.case, self.factor = case, factor
        dtype, self.low = MODES[mode]
        self.eps = torch.finfo(self.low or dtype).eps
        self.model, (self.inputs, self.targets) = case.model(dtype), case.batch(SAMPLES, dtype)
        self.exact = copy.deepcopy(self.model).double()
        self.exact_batch = [t.double() if t.is_floating_point() else t for t in (self.inputs, self.targets)]

    def precision(self) -> AbstractContextManager:
        return torch.autocast("cpu", self.low, enabled=self.low is not None)

    def forward(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The loss in float32, and the outputs."""
        with self.precision():
            outputs = self.model(self.inputs)
        targets = self.targets.float() if self.targets.is_floating_point() else self.targets
        return self.loss_fn(outputs.float(), targets) * scale, outputs

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.case.loss_fn(outputs, targets) * self.factor

    def regularizer(self, penalty: fastreg.Penalty, **options: object) -> fastreg.Regularizer:
        return fastreg.Regularizer(self.model, penalty, micro_batch_size=SIZE, **options)

    def collected(self, scale: float = 1.0) -> oracle.Gradient:
        return {name: g.double() / scale for name, g in oracle.collected_gradient(self.model).items()}

    def want(self, **options: object) -> oracle.Gradient:
        return oracle.penalty_gradient(self.exact, self.loss_fn, *self.exact_batch, SIZE, **options)

    def roundings(self, got: oracle.Gradient, want: oracle.Gradient) -> float:
        """Relative error in units of eps."""
        return oracle.relative_error(got, want) / self.eps


def finite(gradient: oracle.Gradient) -> bool:
    return all(bool(g.isfinite().all()) for g in gradient.values())


every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
every_mode = pytest.mark.parametrize("mode", MODES)


# Errors of gradients and values


@every_model
@every_mode
def test_gradient_norm(case: Case, mode: str) -> None:
    """Measured: at most 1.5 eps; norms 0.4."""
    one = Setting(case, mode)
    reg = one.regularizer(fastreg.GradNorm(weight=WEIGHT))
    reg(*one.forward()).backward()
    norms = oracle.sq_norms(one.exact, one.loss_fn, *one.exact_batch, SIZE)
    assert one.roundings(one.collected(), one.want(weight=WEIGHT)) < 4
    assert reg.sq_norms.dtype == reg.metrics["fastreg/grad_norm"].dtype == torch.float32
    assert (reg.sq_norms - norms).norm() < 2 * one.eps * norms.norm()


@every_model
@every_mode
def test_fisher_trace(case: Case, mode: str) -> None:
    """Measured: at most 1.3 eps."""
    one, penalty = Setting(case, mode), fastreg.FisherTrace(weight=WEIGHT, seed=0)
    one.regularizer(penalty)(*one.forward()).backward()
    want = one.want(weight=WEIGHT, penalty="fisher_trace", labels=penalty.last_labels)
    assert one.roundings(one.collected(), want) < 4


@every_model
@every_mode
@pytest.mark.parametrize("kind", ["variance", "noise_trace"])
def test_variances(case: Case, mode: str, kind: str) -> None:
    """A difference of squares, of which some digits cancel. Measured: at most 2.3 eps."""
    one = Setting(case, mode)
    penalty = {"variance": fastreg.GradNorm(WEIGHT, centered=True), "noise_trace": fastreg.NoiseTrace(WEIGHT)}[kind]
    one.regularizer(penalty)(*one.forward()).backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        cut = MicroBatches(case, one.exact, *one.exact_batch, SIZE)
        factor = 1 if kind == "variance" else SAMPLES / (SAMPLES // SIZE - 1)
        want = oracle.gradient_of(cut.loss + WEIGHT * factor * cut.variance(), cut.parameters, False)
    assert one.roundings(one.collected(), want) < 5


@every_model
@every_mode
def test_perturbed_penalty(case: Case, mode: str) -> None:
    """Central differences of gradients that are rounded themselves. Measured: at most 4.1 eps, in float16 7.4."""
    one = Setting(case, mode)
    reg = one.regularizer(fastreg.GradNorm(weight=0.05), method="perturb", difference="central")
    reg(lambda: one.forward()[0]).backward()
    assert one.roundings(one.collected(), one.want(weight=0.05)) < 16


@every_model
@every_mode
def test_sam(case: Case, mode: str) -> None:
    """Measured: at most 1.0 eps."""
    one = Setting(case, mode)
    want = sequential_gradient(one.exact, one.loss_fn, *one.exact_batch, SIZE, 0.05)
    assert one.roundings(sam_gradient(one, 1.0), want) < 3


@every_model
@every_mode
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_monitor(case: Case, mode: str, scale: float) -> None:
    """Measured: at most 0.2 eps."""
    one = Setting(case, mode)
    monitor = fastreg.Monitor(one.model, ("sample_norms", "grad_noise_scale"))
    one.forward(scale)[0].backward()
    norms = monitor.step(scale=scale)["fastreg/sample_norms"]
    want = oracle.sq_norms(one.exact, one.loss_fn, *one.exact_batch, 1).sqrt()
    assert norms.dtype == torch.float32
    assert (norms - want).norm() < 2 * one.eps * want.norm()


def sam_gradient(one: Setting, scale: float) -> oracle.Gradient:
    optimizer = SAM(torch.optim.SGD(one.model.parameters(), lr=0.1), one.model, rho=0.05, micro_batch_size=SIZE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = one.forward(scale)[0]
        loss.backward()
        return loss

    optimizer.backward(closure)
    optimizer.remove()
    return one.collected(scale)


# Squared norms of gradients whose squares float16 cannot hold

FAMILIES = [
    "mlp_gelu", "residual_conv", "conv2d_grouped", "conv_transpose2d", "conv1d_dilated_strided", "conv3d",
    "instance_norm", "layer_norm", "rms_norm", "prelu", "embedding_padding", "tied_padding", "raw_parameters", "gates",
    "called_twice", "low_rank", "gpt_tied", "vit", "transformer_encoder",
]  # fmt: skip
JOINED = ("tied_padding", "called_twice", "gpt_tied")


@pytest.mark.parametrize(("factor", "scale", "mode"), [(1e-6, 2.0**14, "autocast float16"), (1e3, 1.0, "float16")])
@pytest.mark.parametrize(
    ("name", "by_rows"), [*((name, None) for name in FAMILIES), *((n, b) for n in JOINED for b in (True, False))]
)
def test_squares_beyond_float16(
    name: str, by_rows: bool | None, factor: float, scale: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients of 1e-6 (the loss is scaled) and of 1e3. Measured: at most 1.7 eps."""
    if by_rows is not None:
        monkeypatch.setattr("fastreg.rules.joining.prefers_rows", lambda *_: by_rows)
    one, kind = Setting(BY_NAME[name], mode, factor), torch.finfo(HALF)
    want = oracle.sq_norms(one.exact, one.loss_fn, *one.exact_batch, 1)
    assert bool((want < kind.smallest_normal).all() if factor < 1 else (want > kind.max).all())
    reg = fastreg.Regularizer(one.model, fastreg.GradNorm(weight=1e-3), micro_batch_size=1, check=False)
    loss, outputs = one.forward(scale)
    reg(loss, outputs, scale=scale)
    assert (reg.sq_norms / want - 1).abs().max() < 8 * EPS


@pytest.mark.parametrize("name", JOINED)
def test_rows_of_a_shared_parameter_whose_products_underflow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``d_s . d_t`` of 1e-8; where float16 formed it, 5% were lost. Measured: at most 2.9 eps."""
    monkeypatch.setattr("fastreg.rules.joining.prefers_rows", lambda *_: True)
    one = Setting(BY_NAME[name], "float16", 1e-3)
    want = oracle.sq_norms(one.exact, one.loss_fn, *one.exact_batch, 1)
    reg = fastreg.Regularizer(one.model, fastreg.GradNorm(weight=1e-3), micro_batch_size=1, check=False)
    reg(*one.forward())
    assert (reg.sq_norms / want - 1).abs().max() < 8 * EPS


# Loss scales


def penalty_part(one: Setting, weight: float, before: float, after: float) -> oracle.Gradient:
    """The penalty's part of the gradient alone, of a loss that is scaled before and after ``reg`` sees it."""
    reg = one.regularizer(fastreg.GradNorm(weight=weight), check=False)
    loss, outputs = one.forward(before)
    ((reg(loss, outputs, scale=before) - loss) * after).backward()
    reg.remove()
    return one.collected(before * after)


def exact_part(one: Setting, weight: float) -> oracle.Gradient:
    with_penalty, without = one.want(weight=weight), one.want(weight=0.0)
    return {name: with_penalty[name] - without[name] for name in without}


@every_model
@pytest.mark.parametrize("weight", [0.5, 1e-3])
@pytest.mark.parametrize("before", [2.0**8, 2.0**12, LARGE])
def test_the_penalty_keeps_its_digits_when_the_loss_is_scaled_first(
    case: Case, weight: float, before: float
) -> None:
    """Its seeds go down to ``2 weight m / scale = 9e-8``, of which float16 has one digit. Measured: at most 3.0 eps."""
    one = Setting(case, factor=0.01)
    assert one.roundings(penalty_part(one, weight, before, LARGE / before), exact_part(one, weight)) < 6


@every_model
def test_scaling_first_keeps_more_digits_than_scaling_last(case: Case) -> None:
    """Gradients of 1e-4: rows of d that ``reg`` meets unscaled are subnormal. Measured: 2, 90 and 90 times."""
    one = Setting(case, factor=1e-4)
    want = exact_part(one, 0.5)
    first, last = penalty_part(one, 0.5, LARGE, 1.0), penalty_part(one, 0.5, 1.0, LARGE)
    assert one.roundings(first, want) < 6
    assert one.roundings(last, want) > 1.5 * one.roundings(first, want)


PENALTIES: dict[str, Callable[[], fastreg.Penalty]] = {
    "grad_norm": lambda: fastreg.GradNorm(weight=0.5),
    "unsquared": lambda: fastreg.GradNorm(weight=0.5, unsquared=True),
    "centered": lambda: fastreg.GradNorm(weight=0.5, centered=True),
    "fisher": lambda: fastreg.FisherTrace(weight=0.5, seed=0),
}


@every_model
@pytest.mark.parametrize("penalty", PENALTIES)
def test_overflow_is_infinite_or_nan_never_a_finite_wrong_number(case: Case, penalty: str) -> None:
    """Loss scales up to 2^20, before and after ``reg``: every gradient that is finite is right."""
    one, outcomes = Setting(case), set()
    reference = Setting(case)
    reference.model, reference.low = reference.exact, None
    reference.inputs = reference.exact_batch[0]
    reg = reference.regularizer(PENALTIES[penalty]())
    loss, outputs = reference.forward()
    reg(loss, outputs).backward()
    want = reference.collected()
    for scale in (1.0, 2.0**8, 2.0**20):
        for before, after in ((scale, 1.0), (1.0, scale)):
            reg = one.regularizer(PENALTIES[penalty](), check=False)
            loss, outputs = one.forward(before)
            (reg(loss, outputs, scale=before) * after).backward()
            reg.remove()
            got = one.collected(scale)
            outcomes.add(finite(got))
            assert not finite(got) or one.roundings(got, want) < 8
    assert outcomes == {True, False}


# GradScaler


class Training:
    """Steps of a loop with a GradScaler, in the order that the documentation recommends."""

    def __init__(self, one: Setting, init_scale: float) -> None:
        self.one = one
        self.reg = one.regularizer(fastreg.GradNorm(weight=0.05))
        self.optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=init_scale != 1.0)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss, outputs = self.one.forward()
        self.reg(self.scaler.scale(loss), outputs, scale=self.scaler.get_scale()).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.one.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self) -> list[Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values() if value is not None]
        return [t.detach().clone() for t in (*self.one.model.parameters(), *moments)]


@every_model
@pytest.mark.parametrize(("mode", "steps"), [("autocast bfloat16", 4), ("autocast float16", 1)])
def test_a_scaled_loop_is_the_unscaled_one(case: Case, mode: str, steps: int) -> None:
    """bfloat16 scales without rounding: to the last bit. float16 loses what is subnormal without a scale."""
    scaled, plain = Training(Setting(case, mode), 2.0**7), Training(Setting(case, mode), 1.0)
    for _ in range(steps):
        scaled.step()
        plain.step()
        tolerance = 0.0 if mode == "autocast bfloat16" else 4 * EPS
        for a, b in zip(scaled.state(), plain.state(), strict=True):
            assert (a - b).norm() <= tolerance * b.norm()
        torch.testing.assert_close(scaled.reg.metrics, plain.reg.metrics, rtol=tolerance, atol=0)
        torch.testing.assert_close(scaled.reg.sq_norms, plain.reg.sq_norms, rtol=tolerance, atol=0)


@every_model
def test_an_overflowing_step_is_skipped_and_training_goes_on(case: Case) -> None:
    """The self-check of the first step waits for one that is finite."""
    run = Training(Setting(case), 2.0**20)
    before = run.state()
    for skipped in range(1, 20):
        run.step()
        if run.scaler.get_scale() == 2.0 ** (21 - skipped):
            break
        assert run.scaler.get_scale() == 2.0 ** (20 - skipped)
        assert all(torch.equal(a, b) for a, b in zip(run.state(), before, strict=True))
    assert 1 < skipped < 19
    assert all(bool(t.isfinite().all()) for t in run.state())
    assert not torch.equal(run.state()[0], before[0])


class Coupled(nn.Module):
    """Outputs of one sample depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden - hidden.mean(0))


def test_the_self_check_waits_for_finite_gradients_and_still_finds_what_is_wrong() -> None:
    run = Training(Setting(Case("coupled", Coupled, (5,))), 2.0**24)
    with pytest.raises(FastregError, match="samples are coupled"):
        for _ in range(24):
            run.step()
    assert 1.0 < run.scaler.get_scale() < 2.0**24


@every_model
@pytest.mark.parametrize(
    ("mode", "factor", "scale"),
    [
        ("float16", 1e-5, 1.0), ("float16", 1e3, 1.0),
        ("autocast float16", 1.0, 2.0**14), ("autocast float16", 1e3, LARGE),
    ],
)
def test_the_self_check_refuses_no_size_of_gradients(case: Case, mode: str, factor: float, scale: float) -> None:
    one = Setting(case, mode, factor)
    reg = one.regularizer(fastreg.GradNorm(weight=0.1))
    reg(*one.forward(scale), scale=scale)


def test_check_says_that_float16_overflows() -> None:
    one = Setting(MODELS[0], "float16", 1e7)
    with pytest.raises(FastregError, match="check: gradients must be finite, got inf in float16"):
        fastreg.check(one.model, lambda out, y: one.loss_fn(out.float(), y), (one.inputs, one.targets))


@every_model
def test_sam_under_a_scale(case: Case) -> None:
    """Measured: at most 1.0 eps at gradients of 1e-4, 30 without a scale; infinite or NaN where float16 overflows."""
    small, large = Setting(case, factor=1e-4), Setting(case, factor=1e3)
    want = sequential_gradient(small.exact, small.loss_fn, *small.exact_batch, SIZE, 0.05)
    assert small.roundings(sam_gradient(small, 2.0**12), want) < 3
    assert not finite(sam_gradient(large, LARGE))


def test_a_monitor_forgets_steps_that_overflow() -> None:
    one = Setting(CONV)
    monitor = fastreg.Monitor(one.model, ("grad_noise_scale",), fraction=1.0)
    for scale in (2.0**24, 2.0**8):
        one.forward(scale)[0].backward()
        noise = monitor.step(scale=scale)["fastreg/grad_noise_scale"]
        one.model.zero_grad()
    again = Setting(CONV)
    fresh = fastreg.Monitor(again.model, ("grad_noise_scale",), fraction=1.0)
    again.forward(2.0**8)[0].backward()
    assert torch.equal(noise, fresh.step(scale=2.0**8)["fastreg/grad_noise_scale"])


@pytest.mark.parametrize("difference", ["forward", "central", "lookahead"])
def test_a_scaled_perturbed_penalty(difference: str) -> None:
    """In float32, to rounding: the steps do not depend on the scale."""
    found = []
    for scale in (1.0, LARGE):
        model, (x, y) = MODELS[0].model(torch.float32), MODELS[0].batch(SAMPLES, torch.float32)
        penalty = fastreg.GradNorm(weight=0.05)
        reg = fastreg.Regularizer(model, penalty, micro_batch_size=SIZE, method="perturb", difference=difference)
        reg(lambda: MODELS[0].loss_fn(model(x), y) * scale, scale=scale).backward()
        found.append({name: g / scale for name, g in oracle.collected_gradient(model).items()})
    assert oracle.relative_error(*found) < 1e-6
