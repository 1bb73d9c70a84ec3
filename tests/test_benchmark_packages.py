"""The peers: each a whole training step, right where it says so, elsewhere skipped with a reason or shown as wrong."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg.benchmark import measure, peers
from fastreg.benchmark.gate import Reference, run_and_compare
from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.packages.layers import LayeredGPT, layered
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Preset, Problem
from fastreg.benchmark.report import Row
from fastreg.benchmark.run import Cell, Settings, measure_cell
from fastreg.models import GPT, GPTConfig, mlp, small_resnet

SAMPLES = ("sequential_norms", "functorch_norms", "opacus_hooks", "opacus_ghost", "backpack", "torchjd")
BEFORE_MICRO = ("sequential", "functorch", "opacus", "backpack", "torchjd", "torchjd_unbatched")
MICRO = tuple(f"{name}_micro_norms" for name in BEFORE_MICRO)
NORMS = (*SAMPLES, *MICRO)
PENALTIES = ("sequential_fd", "backpack_penalty")
QUICK = Settings(rounds=1, warm_up=1, peak_memory=False)


def _vectors(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 6, generator=generator), torch.randint(4, (batch,), generator=generator)


def _images(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(4, (batch,), generator=generator)


def _tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Four words for five places: some occur twice in a sample.
    tokens = torch.randint(4, (batch, 6), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


MODELS = {
    "mlp": Preset("mlp", "", lambda: mlp((6, 5, 4), "tanh"), _vectors, batch=6),
    "conv": Preset("conv", "", lambda: small_resnet(4, width=4, norm="none"), _images, batch=6),
    "group": Preset("group", "", lambda: small_resnet(4, width=4, norm="group"), _images, batch=6),
    "batch": Preset("batch", "", lambda: small_resnet(4, width=4, norm="batch"), _images, batch=6),
    "gpt": Preset("gpt", "", lambda: GPT(GPTConfig(7, 5, 8, 2, 2)), _tokens, batch=6),
}
COUPLED = "skipped: batch norm couples the samples"
NO_RULE = "skipped: BackPACK's .* has no rule for {}$"
# What is not "ok": a verdict and the beginning of its reason.
EXPECTED = {
    **{("batch", name): COUPLED for name in (*SAMPLES, *MICRO[2:], "backpack_penalty")},
    **{("group", name): NO_RULE.format("GroupNorm") for name in NORMS + PENALTIES if name.startswith("backpack")},
    **{("gpt", name): NO_RULE.format("GPT, LayerNorm") for name in NORMS + PENALTIES if name.startswith("backpack")},
    # Rectifiers behind a norm: steps cross kinks.
    **{(model, "sequential_fd"): "wrong" for model in ("group", "batch")},
}


@pytest.fixture(autouse=True)
def single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is one call of a step."""
    monkeypatch.setattr(measure, "ROUND_SECONDS", 1e-9)


def _needs(name: str) -> object:
    package = METHODS[name].package
    missing = package is not None and importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


def _problem(model: str, dtype: torch.dtype = torch.float64) -> Problem:
    return MODELS[model].problem(2, dtype=dtype)


@functools.cache
def _rows(model: str) -> dict[str, Row]:
    return {row.method: row for row in measure_cell(Cell(MODELS[model], 2, NORMS + PENALTIES), QUICK)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [_needs(name) for name in NORMS + PENALTIES])
@pytest.mark.parametrize("model", MODELS)
def test_verdict_is_the_expected_one(model: str, name: str) -> None:
    row = _rows(model)[name]
    expected = EXPECTED.get((model, name), "ok")
    told = row.status if row.message is None else f"{row.status}: {row.message}"
    assert re.match(expected, told), told
    if expected == "ok":
        assert row.error < 1e-5 + METHODS[name].rounding
        assert row.ratio.p50 > 0 and row.flops_ratio >= 1
    if expected == "wrong":
        assert row.error_float64 > METHODS[name].rounding and row.ratio is None


def _gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _right_norms(problem: Problem, parts: int) -> Tensor:
    pairs = zip(problem.inputs.chunk(parts), problem.targets.chunk(parts), strict=True)
    return torch.stack([sum(g.square().sum() for g in _gradients(problem.model, *pair)) for pair in pairs])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [_needs(name) for name in NORMS])
@pytest.mark.parametrize("model", ["mlp", "conv", "group", "gpt"])
def test_every_run_leaves_the_gradient_of_the_loss_and_the_norms(model: str, name: str) -> None:
    problem = _problem(model)
    if METHODS[name].skipped(problem):
        return
    expected = _gradients(problem.model, problem.inputs, problem.targets)
    norms = _right_norms(problem, 6 if name in SAMPLES else 2)
    own = problem.copy()
    step = METHODS[name].prepare(own)
    for _ in range(2):
        step.run()
        torch.testing.assert_close([p.grad for p in own.model.parameters()], expected, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(step.sq_norms(), norms, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [_needs(name) for name in NORMS + PENALTIES])
def test_clear_leaves_nothing_behind(name: str) -> None:
    problem = _problem("mlp")
    step = METHODS[name].prepare(problem)
    step.run()
    assert all(p.grad.grad_fn is None for p in problem.model.parameters())
    step.clear()
    fields = ("grad_sample", "batch_l2", "grad_batch", "variance")
    assert not [field for p in problem.model.parameters() for field in fields if getattr(p, field, None) is not None]
    assert all(p.grad is None for p in problem.model.parameters())


def _planted(name: str, factor: float, where: str) -> Callable[[Problem], Step]:
    """A method whose norms, or whose gradient, are off by ``factor``."""

    def prepare(problem: Problem) -> Step:
        step = METHODS[name].prepare(problem)
        if where == "norms":
            return dataclasses.replace(step, sq_norms=lambda: factor * step.sq_norms())

        def run() -> None:
            step.run()
            next(problem.model.parameters()).grad.mul_(factor)

        return dataclasses.replace(step, run=run)

    return prepare


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["norms", "gradient"])
@pytest.mark.parametrize("name", [_needs(name) for name in NORMS])
def test_planted_error_is_caught(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(METHODS[name], name="broken", prepare=_planted(name, 1 + 1e-6, where))
    monkeypatch.setitem(METHODS, "broken", broken)
    _, row = measure_cell(Cell(MODELS["mlp"], 2, ("broken",)), QUICK)
    assert row.status == "wrong" and row.ratio is None
    assert 1e-8 < row.error_float64 < 1e-5


def test_layered_model_is_the_same_function_of_the_same_parameters() -> None:
    model = _problem("gpt").model
    tokens = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    split = layered(model)
    assert isinstance(split, LayeredGPT) and {*split.parameters()} == {*model.parameters()}
    torch.testing.assert_close(split(tokens), expected, rtol=1e-12, atol=1e-14)
    assert layered(model.blocks) is model.blocks


@pytest.mark.filterwarnings("ignore")
def test_torchjd_loses_the_cross_terms_of_a_weight_that_two_modules_share() -> None:
    pytest.importorskip("torchjd")
    problem = _problem("gpt")
    norms = _right_norms(problem, 6)
    step = METHODS["torchjd"].prepare(dataclasses.replace(problem, model=layered(problem.model)))
    step.run()
    assert float((step.sq_norms() - norms).norm() / norms.norm()) > 1e-3


def test_ghost_clipping_refuses_a_weight_that_two_of_its_layers_share() -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(NotImplementedError, match="Parameter tying is not supported with Ghost Clipping"):
        opacus.GradSampleModuleFastGradientClipping(shared)(torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore")
def test_compiled_norms_pass_their_gate() -> None:
    problem = _problem("mlp")
    _, error = run_and_compare(METHODS["functorch_norms_compiled"], problem, Reference(problem))
    assert error < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_backpack_gives_the_moments_of_the_noise_scale(model: str) -> None:
    pytest.importorskip("backpack")
    problem = _problem(model)
    pairs = zip(problem.inputs.split(1), problem.targets.split(1), strict=True)
    own = torch.stack([torch.cat([g.flatten() for g in _gradients(problem.model, *pair)]) for pair in pairs])
    step = METHODS["backpack_noise_scale"].prepare(problem)
    step.run()
    expected = torch.stack([own.var(0).sum(), own.mean(0).square().sum()])
    torch.testing.assert_close(step.statistics(), expected, rtol=1e-10, atol=0)


def _error_of_difference(model: str, length: float, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(peers, "DIFFERENCE", length)
    problem = _problem(model)
    return run_and_compare(METHODS["sequential_fd"], problem, Reference(problem))[1]


def test_difference_is_of_first_order_on_a_smooth_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1e-3 / 4**i for i in range(4)]
    errors = [_error_of_difference("gpt", length, monkeypatch) for length in lengths]
    slope = math.log(errors[0] / errors[-1]) / math.log(lengths[0] / lengths[-1])
    assert slope == pytest.approx(1, abs=0.15)


def test_difference_does_not_converge_across_kinks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(_error_of_difference("group", 1e-3 / 4**i, monkeypatch) > peers.TRUNCATION for i in range(3))


def test_difference_leaves_the_weights_as_they_were() -> None:
    problem = _problem("gpt", torch.float32)
    before = [p.detach().clone() for p in problem.model.parameters()]
    METHODS["sequential_fd"].prepare(problem).run()
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))


def test_every_package_is_pinned() -> None:
    lines = (Path(__file__).parent.parent / "bench" / "peers.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    names = {line.split("==")[0].removesuffix("-for-pytorch") for line in pins}
    assert {method.package for method in METHODS.values()} - {None} <= names
