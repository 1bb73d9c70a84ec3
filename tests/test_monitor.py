"""The monitor beside a backward pass: training is bit for bit what it was, norms are those of plain autograd."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastreg
import oracle
from cases import BY_NAME, CASES, Case, mlp
from fastreg import Monitor
from fastreg.errors import FastregError
from monitored import EXACT, NOISE, SAMPLES, assert_equal, assert_same_metrics, run, train, two_batches
from test_checkpointing import Checkpointed

# Their rules compute them in steps of their own; what comes out is equal to rounding.
DECOMPOSED = {"transformer_encoder", "transformer_encoder_norm_first", "lstm", "gru"}
MONITORED = [case for case in CASES if case.min_group == 1]
named = {"ids": lambda v: getattr(v, "name", v)}


# Training is what it was


@pytest.mark.parametrize("case", MONITORED, **named)
def test_losses_and_gradients_are_bit_for_bit_what_they_were(case: Case) -> None:
    dtype, tolerance = (torch.float64, EXACT) if case.name in DECOMPOSED else (torch.float32, 0.0)
    model, plain = case.model(dtype), case.model(dtype)
    Monitor(model, ("grad_noise_scale", "fisher_trace"))
    losses = (train(net, case, dtype=dtype) for net in (model, plain))
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    assert_equal(model, plain, tolerance)


@pytest.mark.parametrize("case", CASES, **named)
def test_whole_backward_passes_leave_every_model_alone(case: Case) -> None:
    model, plain = case.model(), case.model()
    monitor = Monitor(model, ("grad_norm",), micro_batch_size=None)
    for _ in range(2):
        assert torch.equal(train(model, case), train(plain, case))
    norm = monitor.step(scale=0.5)["fastreg/grad_norm"]
    assert_equal(model, plain)
    want = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None).sqrt()
    torch.testing.assert_close(norm, want, rtol=EXACT, atol=0)


def test_batch_norm_couples_samples() -> None:
    case = BY_NAME["batch_norm_train"]
    model = case.model()
    Monitor(model)
    with pytest.raises(FastregError, match="must not couple the samples of a batch.*micro_batch_size=None"):
        train(model, case)


# Norms


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", MONITORED, **named)
def test_norms_are_those_of_a_loop(case: Case, size: int) -> None:
    want = oracle.sq_norms_by_parameter(case.model(), case.loss_fn, *case.batch(SAMPLES), size)
    model, by_module = case.model(), defaultdict(float)
    for name, squared in want.items():
        by_module[name.rpartition(".")[0] or "(model)"] += squared
    names = ("micro_batch_grad_norm", "noise_trace", "micro_batch_norms")
    if size == 1:
        names += ("sample_norms", "empirical_fisher_trace")
    monitor = Monitor(model, (*names, "fisher_trace"), micro_batch_size=size, per_layer=True)
    train(model, case)
    found, total = monitor.step(), sum(by_module.values())
    assert found.pop("fastreg/fisher_trace") > 0
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-18)
    for vectors in names[2:4]:
        close(found.pop(f"fastreg/{vectors}").square(), total)
    assert len(found) == (3 if size == 1 else 2) * (1 + len(by_module))
    for suffix, squared in {"": total, **{f"/{module}": one for module, one in by_module.items()}}.items():
        close(found[f"fastreg/micro_batch_grad_norm{suffix}"].square(), squared.mean())
        if size == 1:
            close(found[f"fastreg/empirical_fisher_trace{suffix}"], squared.mean())
    close(sum(v for name, v in found.items() if "noise_trace/" in name), found["fastreg/noise_trace"])


@pytest.mark.parametrize(("size", "turns"), [(1, [(0, 1), (2, 3), (4, 5), (6,)]), (2, [(0,), (1,), (2,), (3,)])])
@pytest.mark.parametrize("case", MONITORED, **named)
def test_a_fraction_of_the_micro_batches_in_turn(case: Case, size: int, turns: list[tuple[int, ...]]) -> None:
    """Seven samples; the last turn of single ones starts early enough to be as long as the others."""
    turns = [(5, 6) if turn == (6,) else turn for turn in turns]
    want = oracle.sq_norms_by_parameter(case.model(), case.loss_fn, *case.batch(7), size)
    model, plain, by_module = case.model(), case.model(), defaultdict(float)
    train(plain, case, 7)
    for name, squared in want.items():
        by_module[name.rpartition(".")[0] or "(model)"] += squared
    by_module[""] = sum(want.values())
    metrics = ("micro_batch_grad_norm", "noise_trace")
    monitor = Monitor(model, metrics, micro_batch_size=size, fraction=0.25, per_layer=True)
    for turn in (*turns, *turns[:2]):
        model.zero_grad()
        train(model, case, 7)
        assert_equal(model, plain, EXACT if case.name in DECOMPOSED else 0.0)
        found = monitor.step()
        for module, squared in by_module.items():
            name = "fastreg/micro_batch_grad_norm" + (f"/{module}" if module else "")
            torch.testing.assert_close(found[name].square(), squared[list(turn)].mean(), rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("case", MONITORED, **named)
def test_a_fraction_of_the_fisher_trace(case: Case) -> None:
    """The labels drawn are the same; their mean over turns that divide the batch is that of all."""
    found = []
    for fraction in (0.5, 1.0):
        model = case.model()
        monitor = Monitor(model, ("fisher_trace",), fraction=fraction, seed=3)
        values = []
        for _ in range(2):
            monitor._source.draws = 0
            train(model, case)
            values.append(monitor.step(scale=1.0)["fastreg/fisher_trace"])
        found.append(torch.stack(values).mean())
    torch.testing.assert_close(*found, rtol=1e-11, atol=0)


def test_norms_where_the_loss_is_a_mean_over_tokens() -> None:
    case, counts = BY_NAME["gpt_tied"], torch.tensor([5, 1, 3, 5, 2, 4])
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    targets = targets.masked_fill(torch.arange(5) >= counts.unsqueeze(1), -100)
    loss = lambda outputs, labels: F.cross_entropy(outputs.flatten(0, 1), labels.flatten())  # noqa: E731
    want = oracle.sq_norms(model, loss, inputs, targets, 1)
    for chosen, aligned in ((slice(None), ("sample_norms",)), (slice(0, 1), ())):
        model.zero_grad()
        monitor = Monitor(model, (*aligned, "noise_trace", "grad_norm"))
        loss(model(inputs), targets).backward()
        found = monitor.step(counts=counts)
        monitor.remove()
        for name in aligned:
            torch.testing.assert_close(found[f"fastreg/{name}"].square(), want, rtol=1e-11, atol=0)
        inverse = (1 / counts.double())[chosen].mean() - 1 / counts.sum().double()
        trace = (want[chosen].mean() - found["fastreg/grad_norm"].square()) / inverse
        torch.testing.assert_close(found["fastreg/noise_trace"], trace, rtol=1e-10, atol=0)


# Ways to train


class InPlace(nn.Module):
    """Activations in place on the outputs of layers, one of them a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.relu(self.first(x), inplace=True)), inplace=True)
        return self.last(x).mul_(2.0)


class CheckpointedFunction(nn.Module):
    """A function of two layers, re-run outside every module but them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = lambda h: torch.tanh(self.middle(torch.tanh(h)))  # noqa: E731
        return self.last(checkpoint(inner, self.first(x), use_reentrant=False))


@pytest.mark.filterwarnings("ignore:Monitor. one micro-batch")
@pytest.mark.parametrize("size", [1, 4, None])
@pytest.mark.parametrize("build", [InPlace, lambda: Checkpointed(False), CheckpointedFunction])
def test_in_place_and_checkpointed(build: type[nn.Module], size: int | None) -> None:
    torch.manual_seed(0)
    model, case = build().double(), BY_NAME["mlp_gelu"]
    plain = copy.deepcopy(model)
    want = oracle.sq_norms(plain, case.loss_fn, *case.batch(SAMPLES), size or SAMPLES)
    monitor = Monitor(model, ("micro_batch_norms", "grad_norm"), micro_batch_size=size)
    for _ in range(2):
        model.zero_grad(), plain.zero_grad()
        assert torch.equal(train(model, case), train(plain, case))
        assert_equal(model, plain)
        norms = monitor.step()["fastreg/micro_batch_norms"]
        torch.testing.assert_close(norms.square(), want, rtol=1e-11, atol=0)


class CheckpointedParameter(nn.Module):
    """A function of a parameter, re-run outside every module and so not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda z: torch.sin(z * self.w), x, use_reentrant=False))


def test_checkpointing_a_bare_function_of_a_parameter() -> None:
    model, case = CheckpointedParameter().double(), BY_NAME["mlp_gelu"]
    Monitor(model)
    with pytest.raises(CheckpointError):
        train(model, case)


@pytest.mark.parametrize("size", [1, None])
def test_reentrant_checkpointing_is_refused(size: int | None) -> None:
    model, case = Checkpointed(True).double(), BY_NAME["mlp_gelu"]
    monitor = Monitor(model, micro_batch_size=size)
    with pytest.raises(FastregError, match="use_reentrant=False"):
        train(model, case)
        monitor.step()


# Its rule casts where torch does not.
CAST = DECOMPOSED | {"prelu"}


@pytest.mark.parametrize("case", MONITORED, **named)
def test_bfloat16_autocast(case: Case) -> None:
    """Bit for bit what it was, and norms within a few roundings of those of float64."""
    model, plain = case.model(torch.float32), case.model(torch.float32)
    want = oracle.sq_norms(case.model(), case.loss_fn, *case.batch(SAMPLES), 1).sqrt()
    monitor = Monitor(model, ("sample_norms",))
    inputs, targets = case.batch(SAMPLES, torch.float32)
    for net in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = net(inputs)
        case.loss_fn(outputs.float(), targets).backward()
    eps = torch.finfo(torch.bfloat16).eps
    assert_equal(model, plain, eps if case.name in CAST else 0.0)
    norms = monitor.step()["fastreg/sample_norms"].double()
    assert (norms - want).norm() < 2 * eps * want.norm()


def test_attention_is_torchs_own() -> None:
    """The fused kernel is in the graph: nothing of ours is routed where nothing is differentiated twice."""
    case = BY_NAME["gpt_tied"]
    model = case.model()
    Monitor(model, ("grad_noise_scale", "fisher_trace"))
    todo, seen = [model(case.batch(SAMPLES)[0]).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert any(name.startswith("ScaledDotProductFlashAttention") for name in names), names


# Passes and parameters


@pytest.mark.parametrize("name", ["mlp_gelu", "called_twice"])
def test_a_pass_for_input_gradients_is_not_counted(name: str) -> None:
    case = BY_NAME[name]
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    want = oracle.sq_norms(model, case.loss_fn, inputs, targets, 1)
    monitor = Monitor(model, ("sample_norms",), per_layer=True)
    loss = case.loss_fn(model(inputs.requires_grad_()), targets)
    torch.autograd.grad(loss, inputs, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(monitor.step()["fastreg/sample_norms"].square(), want, rtol=1e-11, atol=0)


@pytest.mark.filterwarnings("ignore:Monitor. one micro-batch")
@pytest.mark.parametrize("size", [1, None])
def test_two_backward_passes_of_one_forward(size: int | None) -> None:
    case = BY_NAME["mlp_relu"]
    model = case.model()
    monitor = Monitor(model, micro_batch_size=size)
    loss = case.loss_fn(model(case.batch(SAMPLES)[0]), case.batch(SAMPLES)[1])
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(FastregError, match="every forward must have one backward pass, got 2 for 1"):
        monitor.step()
    assert run(monitor, model, case, range(1))[0]["fastreg/grad_norm"] > 0


@pytest.mark.parametrize("size", [1, None])
def test_parameters_that_freeze_and_thaw(size: int | None) -> None:
    """What is frozen no longer counts, whatever is left in its ``.grad``; what thaws is refused."""
    case = BY_NAME["frozen"]
    model, frozen = case.model(), case.model()
    frozen[2].weight.requires_grad_(False)
    monitor, want = Monitor(model, NOISE, micro_batch_size=size), Monitor(frozen, NOISE, micro_batch_size=size)
    model[2].weight.requires_grad_(False).grad = torch.ones_like(model[2].weight)
    assert_same_metrics(two_batches(model, case, monitor), two_batches(frozen, case, want))
    model[0].weight.requires_grad_()
    train(model, case, 4)
    with pytest.raises(FastregError, match="must have done so when the monitor was built, got 1 that did not"):
        monitor.step()


# The Fisher trace


@pytest.mark.parametrize("size", [1, 4])
def test_the_fisher_trace_is_unbiased(size: int) -> None:
    """Four standard errors of 200 draws, whose spread is their own; torch's generator stays where it is."""
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    want = fastreg.fisher_trace(model, None, case.batch(SAMPLES), kind="exact")
    monitor, state = Monitor(model, ("fisher_trace",), micro_batch_size=size, seed=1), torch.get_rng_state()
    draws = []
    for _ in range(200):
        model.zero_grad()
        train(model, case)
        draws.append(monitor.step()["fastreg/fisher_trace"])
    draws = torch.stack(draws)
    assert draws.std() > 0
    assert abs(draws.mean() - want) < 4 * draws.std() / len(draws) ** 0.5
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fisher_trace_needs_logits() -> None:
    model = nn.Sequential(mlp(), nn.Flatten(0))
    Monitor(model, ("fisher_trace",))
    with pytest.raises(FastregError, match=r"outputs are logits \[B, ..., C\], got .*\(18,\)"):
        model(torch.randn(6, 5))
