"""The monitor over many steps: the noise is what was put in; averages, resuming, sinks, arguments."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import fastreg
from cases import BY_NAME, mlp
from fastreg import Monitor
from fastreg.errors import FastregError
from fastreg.sinks import MemorySink
from monitored import EXACT, NOISE, SAMPLES, assert_equal, assert_same_metrics, run, train, two_batches

# Noise


class Inner(nn.Module):
    """``<w, x>``: the gradient of one sample's loss is the sample."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.unsqueeze(1)


@pytest.mark.parametrize(
    ("size", "parts"), [(1, (4,)), (2, (4,)), (3, (4,)), (None, (2, 2)), (None, (3, 1)), (1, (3, 1)), (2, (1, 2, 1))]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_estimates_are_unbiased(size: int | None, parts: tuple[int, ...], reduction: str) -> None:
    """The mean over all batches of 4 drawn with replacement from 3 samples, cut up and accumulated in any way."""
    population = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75]], dtype=torch.float64)
    mean, model = population.mean(0), Inner(2)
    monitor = Monitor(model, ("noise_trace", "grad_norm", "grad_noise_scale"), micro_batch_size=size, ema=0.0)
    traces, signals = [], []
    for drawn in itertools.product(range(3), repeat=4):
        model.zero_grad()
        for x in population[list(drawn)].split(parts):
            outputs = model(x)
            (outputs.mean() / len(parts) if reduction == "mean" else outputs.sum()).backward()
        found = monitor.step(scale=1 / len(parts) if reduction == "mean" else 1.0, reduction=reduction)
        trace = found["fastreg/noise_trace"]
        inverse = sum(1 / b for b in parts) / len(parts) ** 2 if reduction == "mean" else 1 / 4
        signals.append(found["fastreg/grad_norm"].square() - trace * inverse)
        traces.append(trace)
        torch.testing.assert_close(found["fastreg/grad_noise_scale"], trace / signals[-1], equal_nan=True)
    torch.testing.assert_close(torch.stack(traces).mean(), (population - mean).square().sum() / 3, rtol=EXACT, atol=0)
    torch.testing.assert_close(torch.stack(signals).mean(), mean.square().sum(), rtol=EXACT, atol=0)


def test_the_noise_scale_of_a_known_covariance() -> None:
    """Within 5% of tr S / ||mu||^2, which is three standard errors of the averages of this many steps and more."""
    samples, steps, decay = 64, 500, 0.998
    draw, mu = torch.Generator().manual_seed(0), torch.full((8,), 0.6, dtype=torch.float64)
    sigma = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    model = Inner(8)
    monitor = Monitor(model, ("grad_noise_scale",), ema=decay)
    for _ in range(steps):
        model.zero_grad()
        model(mu + sigma * torch.randn(samples, 8, generator=draw, dtype=torch.float64)).mean().backward()
        found = monitor.step()
    trace, signal, square = sigma.square().sum(), mu.square().sum(), sigma.pow(4).sum()
    of_trace = 2 * square / (samples - 1) / trace**2
    of_signal = (4 * (mu * sigma).square().sum() + 2 * square / (samples - 1)) / samples / signal**2
    weights = decay ** torch.arange(steps)
    error = ((of_trace + of_signal) * weights.square().sum() / weights.sum() ** 2).sqrt()
    assert 3 * error < 0.05
    assert abs(found["fastreg/grad_noise_scale"] * signal / trace - 1) < 0.05


def test_all_sources_agree() -> None:
    case = BY_NAME["mlp_gelu"]
    inputs, targets = case.batch(SAMPLES)
    scaler = torch.tensor(2.0**10, dtype=torch.float64)

    def found(size: int | None, pieces: int, factor: float | Tensor, **said: object) -> dict[str, Tensor]:
        model = case.model()
        monitor = Monitor(model, NOISE, micro_batch_size=size)
        for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
            (case.loss_fn(model(x), y) * factor).backward()
        return monitor.step(**said)

    want = found(2, 1, 1.0)
    assert want["fastreg/grad_noise_scale"].isfinite()
    assert_same_metrics(found(2, 1, 6.0, reduction="sum"), want)
    assert_same_metrics(found(2, 1, scaler, scale=scaler), want)
    assert_same_metrics(found(2, 3, scaler / 3, scale=scaler / 3), want)
    for size in (2, None):
        assert_same_metrics(found(size, 3, 1 / 3, scale=1 / 3), want)
        assert_same_metrics(found(size, 3, 2.0, reduction="sum"), want)
        assert_same_metrics(found(size, 3, 2 * scaler, reduction="sum", scale=scaler), want)


@pytest.mark.parametrize("size", [None, 4])
def test_one_micro_batch_tells_nothing_and_one_warning(size: int | None) -> None:
    case = BY_NAME["mlp_relu"]
    model, fresh = case.model(), case.model()
    monitor = Monitor(model, micro_batch_size=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            train(model, case, 4)
            found = monitor.step()
            assert found["fastreg/grad_noise_scale"].isnan() and found["fastreg/noise_trace"].isnan()
            assert found["fastreg/grad_norm"] > 0
    assert ["tells no noise from signal" in str(w.message) for w in caught] == [True]
    model.zero_grad()
    want = two_batches(fresh, case, Monitor(fresh, micro_batch_size=size))
    assert_same_metrics(two_batches(model, case, monitor), want)


def test_norms_alone_need_no_second_micro_batch() -> None:
    case = BY_NAME["mlp_relu"]
    model = case.model()
    monitor = Monitor(model, ("grad_norm",), micro_batch_size=None)
    train(model, case, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.step()["fastreg/grad_norm"] > 0


def test_what_is_not_finite_does_not_count() -> None:
    case = BY_NAME["mlp_relu"]
    model, plain = case.model(), case.model()
    monitor, want = Monitor(model, NOISE), Monitor(plain, NOISE)
    for step, bad in enumerate((False, True, True, False)):
        model.zero_grad(), plain.zero_grad()
        if bad:
            (model(case.batch(SAMPLES)[0]).sum() * (math.inf, math.nan)[step - 1]).backward()
            assert not monitor.step()["fastreg/grad_norm"].isfinite()
            continue
        train(model, case, SAMPLES + step), train(plain, case, SAMPLES + step)
        assert_same_metrics(monitor.step(), want.step(), 0.0)


# Over time


def test_a_resumed_monitor_continues_bit_for_bit() -> None:
    case, names = BY_NAME["mlp_gelu"], ("grad_noise_scale", "noise_trace", "sample_norms", "fisher_trace")
    model, again = case.model(), case.model()
    monitor = Monitor(model, names, every=3, per_layer=True, seed=5)
    run(monitor, model, case, range(5))
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    want = run(monitor, model, case, range(5, 12))
    file.seek(0)
    resumed = Monitor(again, names, every=3, per_layer=True, seed=6)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    got = run(resumed, again, case, range(5, 12))
    assert [found is want[0] for found in want] == [True, False, False, False, False, False, False]
    for one, other in zip(got[1:], want[1:], strict=True):
        assert_same_metrics(one, other, 0.0)


def test_nothing_is_recorded_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    case, squares = BY_NAME["mlp_gelu"], []
    kernel = fastreg.rules.linear.outer_sqnorm
    monkeypatch.setattr("fastreg.rules.linear.outer_sqnorm", lambda *a: squares.append(a) or kernel(*a))
    model = case.model()
    monitor, sink = Monitor(model, every=3, sinks=(sink := MemorySink(),)), sink
    found = run(monitor, model, case, range(7))
    assert len(squares) == 3 * 3
    assert [row["step"] for row in sink.rows] == [0, 3, 6]
    assert found[0] is found[1] is found[2] is not found[3]


@pytest.mark.filterwarnings("ignore:Monitor. one micro-batch")
@pytest.mark.parametrize("size", [1, None])
def test_evaluation_and_removal(size: int | None) -> None:
    case = BY_NAME["mlp_gelu"]
    model, plain = case.model(), case.model()
    keys = list(model.state_dict())
    monitor = Monitor(model, micro_batch_size=size)
    assert list(model.state_dict()) == keys
    model.eval()
    train(model, case)
    with torch.no_grad():
        model.train()(case.batch(SAMPLES)[0])
    with pytest.raises(FastregError, match="a backward pass must have run since the last call.*got 0"):
        monitor.step()
    monitor.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    assert Monitor(model, micro_batch_size=size) is not monitor
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad(), plain.zero_grad()
        assert torch.equal(train(other, case), train(plain, case))
        assert_equal(other, plain)
        run(Monitor(other, micro_batch_size=size), other, case, range(2))


def test_sinks_get_scalars_of_measured_steps() -> None:
    case, sinks = BY_NAME["mlp_relu"], (MemorySink(), MemorySink())
    model = case.model()
    monitor = Monitor(model, ("grad_norm", "sample_norms", "noise_trace"), every=2, sinks=sinks)
    found = run(monitor, model, case, range(4))
    names = ("grad_norm", "noise_trace")
    want = [{"step": i, **{f"fastreg/{name}": float(found[i][f"fastreg/{name}"]) for name in names}} for i in (0, 2)]
    assert sinks[0].rows == sinks[1].rows == want
    assert all(type(value) is float for name, value in sinks[0].rows[0].items() if name != "step")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": ("loss",)}, r"metrics must be names among \['grad_noise_scale'.*got \['loss'\]"),
        ({"metrics": "grad_norm"}, "metrics must be names among"),
        ({"metrics": ()}, r"metrics must be names among .*got \(\)"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer >= 1, got 0"),
        ({"micro_batch_size": True}, "micro_batch_size must be an integer >= 1, got True"),
        ({"every": 1.5}, "every must be an integer >= 1, got 1.5"),
        ({"every": None}, "every must be an integer >= 1, got None"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\] or None, got 0.0"),
        ({"fraction": 1.5}, r"fraction must be in \(0, 1\] or None, got 1.5"),
        ({"fraction": 0.5, "micro_batch_size": None}, "fraction must have a micro_batch_size, got 0.5 and None"),
        ({"metrics": ("micro_batch_norms",), "fraction": 0.5}, "micro_batch_norms must have fraction=1, got 0.5"),
        ({"ema": math.nan}, r"ema must be in \[0, 1\), got nan"),
        ({"metrics": ("sample_norms",), "micro_batch_size": 2}, "sample_norms must have micro_batch_size=1, got 2"),
        ({"metrics": ("empirical_fisher_trace",), "micro_batch_size": None}, "must have micro_batch_size=1, got None"),
        ({"metrics": ("fisher_trace",), "micro_batch_size": None}, r"must have a micro_batch_size, got None"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(FastregError, match=f"^Monitor: .*{said}"):
        Monitor(mlp(), **arguments)


@pytest.mark.parametrize("size", [1, None])
def test_wrong_steps(size: int | None) -> None:
    case = BY_NAME["mlp_relu"]
    model = case.model()
    monitor = Monitor(model, micro_batch_size=size)
    with pytest.raises(FastregError, match=r"a backward pass must have run since the last call .*got 0"):
        monitor.step()
    train(model, case)
    model.zero_grad()
    with pytest.raises(FastregError, match=r"gradients must be in .grad, got none \(call it before zero_grad\)"):
        monitor.step()
    train(model, case), train(model, case)
    with pytest.raises(FastregError, match="counts"):
        monitor.step(counts=torch.ones(SAMPLES))
    for said in ({"reduction": "max"}, {"scale": 0.0}):
        train(model, case)
        with pytest.raises(FastregError, match=next(iter(said))):
            monitor.step(**said)


def test_one_recorder_at_a_time() -> None:
    model = mlp()
    monitor = Monitor(model)
    with pytest.raises(FastregError, match="must carry one fastreg recorder at a time"):
        Monitor(model)
    Monitor(model, micro_batch_size=None).remove()
    monitor.remove()
    Monitor(model)
