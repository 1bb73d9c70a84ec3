"""The methods of Novack et al. 2022 in the experiment, against plain autograd in float64; their recipes' verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.models import mlp
from fastreg.recipes.catalogue import recipe
from fastreg.recipes.checkpoint import Checkpoint
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.experiment import run_experiment
from fastreg.recipes.methods import (
    AVERAGE_JACOBIAN,
    EXTERNAL_GRAFTING,
    ITERATIVE_GRAFTING,
    LARGE_BATCH,
    NORMALIZED,
    PENALISED,
    SMALL_BATCH,
    UNIT_JACOBIAN,
    Method,
)
from fastreg.recipes.papers import grafting, micro_batch_sweep
from fastreg.recipes.presets import MODELS
from fastreg.recipes.progress import Progress
from fastreg.recipes.report import summarise, table, verdict
from fastreg.recipes.settings import DEFAULTS, Settings, default_settings, preset
from fastreg.recipes.sweep import candidates
from fastreg.recipes.training import Run
from recipe_cases import NOVACK_METHODS, small_digits, tiny

SEED = 3
Batch = tuple[Tensor, Tensor]


def build() -> nn.Module:
    return mlp((64, 12, 10), "tanh").double()


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """128 digits in float64, and a smooth network for them."""
    monkeypatch.setitem(MODELS, "mlp", replace(MODELS["mlp"], build=build))
    splits = small_digits()
    return replace(splits, train=Split(splits.train.inputs.double(), splits.train.targets))


def gradient(value: Tensor, model: nn.Module, keep: bool = False) -> Tensor:
    found = torch.autograd.grad(value, tuple(model.parameters()), create_graph=keep, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def batches(data: Dataset, size: int) -> Iterator[Batch]:
    """The shuffled batches of the first epoch of a run."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(SEED))
    return zip(data.train.inputs[order].split(size), data.train.targets[order].split(size))


def along_outputs(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """||J_k^T direction||^2 with J_k the Jacobian of the mean outputs."""
    return gradient(model(x).mean(0) @ direction, model, keep=True).square().sum()


def descend(model: nn.Module, step: Tensor) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) - step, model.parameters())


def steps_of(run: Run) -> Iterator[Tensor]:
    """What each step of the first epoch subtracts."""
    before = nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()
    for _ in run._steps():
        after = nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()
        yield before - after
        before = after


def start() -> nn.Module:
    torch.manual_seed(SEED)
    return build()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < 1e-10 * expected.norm())


# Whole batches; a last batch of 48 after one of 80, whose micro-batches of 32 end in 16.
SIZES = {"even": {"batch_size": 128}, "ragged": {"batch_size": 80}}
sizes = pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)


def settings_of(changes: dict[str, int]) -> Settings:
    return tiny(**{"epochs": 1, "micro_batch_size": 32, "chunk_size": 128, **changes})


@sizes
@pytest.mark.parametrize("name", [AVERAGE_JACOBIAN, UNIT_JACOBIAN])
def test_jacobian_steps_are_those_of_the_formula(name: str, changes: dict[str, int], data: Dataset) -> None:
    method, settings = Method(name, lr=0.5, weight=0.2), settings_of(changes)
    run, model = Run(settings, method, SEED, data), start()
    for step, (x, y) in zip(steps_of(run), batches(data, settings.batch_size), strict=True):
        parts = x.split(settings.micro_batch_size)
        directions: Any = [torch.ones(10).double()] * len(parts)
        if name == UNIT_JACOBIAN:
            directions = run.regularizer.penalties[0].last_directions[:, 0]
            assert torch.allclose(directions.norm(dim=1), torch.ones(len(parts)).double())
        squares = torch.stack([along_outputs(model, part, u) for part, u in zip(parts, directions, strict=True)])
        expected = method.lr * gradient(F.cross_entropy(model(x), y) + method.weight * squares.mean(), model)
        assert close(step, expected)
        descend(model, expected)


def lengths(name: str, model: nn.Module, settings: Settings, x: Tensor, y: Tensor, logged: float) -> list[Tensor]:
    """Norms that the step's gradient may be given."""
    if name == EXTERNAL_GRAFTING:
        return [torch.tensor(logged, dtype=torch.float64)]
    if name == NORMALIZED:
        return [torch.tensor(1.0, dtype=torch.float64)]
    last = x.split(settings.chunk_size)[-1], y.split(settings.chunk_size)[-1]
    cut = zip(*(part.split(settings.micro_batch_size) for part in last))
    return [gradient(F.cross_entropy(model(inputs), targets), model).norm() for inputs, targets in cut]


def small_batch_norms(data: Dataset, size: int, lr: float) -> list[float]:
    model, norms = start(), []
    for x, y in batches(data, size):
        step = gradient(F.cross_entropy(model(x), y), model)
        norms.append(float(step.norm()))
        descend(model, lr * step)
    return norms


@pytest.mark.parametrize("changes", [*SIZES.values(), {"batch_size": 128, "chunk_size": 64}], ids=[*SIZES, "chunks"])
@pytest.mark.parametrize("name", [ITERATIVE_GRAFTING, EXTERNAL_GRAFTING, NORMALIZED])
def test_grafted_steps_are_those_of_the_formula(name: str, changes: dict[str, int], data: Dataset) -> None:
    method, settings = Method(name, lr=0.4), settings_of(changes)
    logged = small_batch_norms(data, settings.micro_batch_size, method.lr)
    model, taken = start(), steps_of(Run(settings, method, SEED, data))
    for step, (x, y), norm in zip(taken, batches(data, settings.batch_size), logged):
        whole = gradient(F.cross_entropy(model(x), y), model)
        found = lengths(name, model, settings, x, y, norm)
        expected = [method.lr * length * whole / whole.norm() for length in found]
        assert sum(close(step, candidate) for candidate in expected) == 1
        descend(model, step)


def test_every_micro_batch_is_drawn_for_its_norm(data: Dataset) -> None:
    settings, chosen = settings_of({"batch_size": 128}), set()
    for x, y in batches(data, 128):
        found = torch.stack(lengths(ITERATIVE_GRAFTING, start(), settings, x, y, 0.0))
    for seed in range(40):
        run = Run(settings, Method(ITERATIVE_GRAFTING, lr=1.0), SEED, data)
        run.optimizer.magnitude.load_state_dict({"generator": torch.Generator().manual_seed(seed).get_state()})
        (step,) = steps_of(run)
        chosen.add(int((found - step.norm()).abs().argmin()))
    assert chosen == set(range(4))


def test_the_run_of_the_norms_leaves_no_trace_in_the_random_numbers(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)).double()  # noqa: E731
    dropping = replace(MODELS["mlp"], build=layers)
    monkeypatch.setitem(MODELS, "mlp", dropping)

    def state(name: str) -> Tensor:
        Run(tiny(), Method(name, lr=0.1), SEED, data)
        return torch.get_rng_state()

    assert torch.equal(state(EXTERNAL_GRAFTING), state(LARGE_BATCH))


def test_diverged_small_batches_are_a_diverged_graft(tmp_path: Path) -> None:
    methods = (Method(LARGE_BATCH, lr=0.5), Method(EXTERNAL_GRAFTING, lr=1e20))
    settings, data = tiny(methods=methods, seeds=(0,)), small_digits()
    # Before it takes a step of its own: it lacks their lengths.
    assert Run(settings, methods[1], 0, data).finished
    with Progress(6) as progress:
        results = run_experiment(Checkpoint(settings), data, tmp_path / "c.pt", progress)
    assert [result["diverged"] for result in results] == [False, True]
    assert "external grafting (1 diverged)" in table(summarise(settings, results))


def test_new_methods_are_part_of_the_verdict(tmp_path: Path) -> None:
    methods = (Method(SMALL_BATCH, lr=0.1), Method(LARGE_BATCH, lr=0.5), *NOVACK_METHODS)
    settings = tiny(methods=methods, epochs=1)
    with Progress(20) as progress:
        results = run_experiment(Checkpoint(settings), small_digits(), tmp_path / "c.pt", progress)
    sentences = verdict(settings, results)
    assert len(sentences) == 1 + len(NOVACK_METHODS)
    for method, sentence in zip(NOVACK_METHODS, sentences[1:]):
        assert sentence.startswith(f"{method.title} - large batch")


def test_sizes_of_the_paper() -> None:
    for name in ("cifar10", "cifar100"):
        assert (DEFAULTS[name].batch_size, DEFAULTS[name].micro_batch_size) == (5120, 128)
        assert DEFAULTS[name].data == name
    assert dict(recipe("micro-batch-sweep").presets)["paper"].micro_batch_sizes == (50, 100, 1000, 2500)


@pytest.mark.parametrize("method", NOVACK_METHODS, ids=lambda method: method.name)
def test_sweep_has_a_grid_for_every_method(method: Method) -> None:
    grid = candidates(method.name)
    assert len(set(grid)) == len(grid) >= 3
    assert all((trial.weight > 0) == (method.name in PENALISED) for trial in grid)
    assert preset("mlp", method.name) in grid


def test_a_method_without_published_values_takes_those_given() -> None:
    assert preset("vgg11", UNIT_JACOBIAN, 0.1, 0.2) == Method(UNIT_JACOBIAN, 0.1, 0.2)
    assert preset("vgg11", NORMALIZED, 0.1) == Method(NORMALIZED, 0.1)
    for values in ((), (0.1,), (None, 0.1)):
        with pytest.raises(FastregError, match="lr and weight must be given for unit_jacobian on vgg11"):
            preset("vgg11", UNIT_JACOBIAN, *values)


def test_default_comparison_stays_that_of_four_methods() -> None:
    for name in DEFAULTS:
        assert len(default_settings(name).methods) == 4


def rows(*means: float) -> dict[str, Any]:
    """Two seeds a hundredth apart, so that differences of seeds have no spread; b doubles from the second row on."""
    return {"rows": [
        {"title": "t", "lr": 0.1, "weight": 0.0, "micro_batch_size": 2**place, "accuracy": [mean, mean + 0.01]}
        for place, mean in enumerate(means)
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("show", "means", "words"),
    [
        (grafting.table, (0.95, 0.91, 0.94, 0.95, 0.9), "recovers 75% (iterative) and 100% (external): seen"),
        (grafting.table, (0.95, 0.91, 0.92, 0.95, 0.9), "recovers 25% (iterative) and 100% (external): not seen"),
        (grafting.table, (0.95, 0.91, 0.90, 0.89, 0.9), "recovers -25% (iterative) and -50% (external): opposite"),
        (grafting.table, (0.91, 0.91, 0.92, 0.95, 0.9), "the claim is not seen here"),
        (micro_batch_sweep.table, (0.95, 0.91, 0.93, 0.92), "+2.00 +- 0.00 at b = 4, +1.00 +- 0.00 more than at b = 8"),
        (micro_batch_sweep.table, (0.95, 0.91, 0.93, 0.91), "ceases to as b grows is seen"),
        (micro_batch_sweep.table, (0.95, 0.91, 0.92, 0.93), "ceases to as b grows is opposite"),
        (micro_batch_sweep.table, (0.95, 0.91, 0.90, 0.89), "ceases to as b grows is not seen"),
    ],
)
def test_verdicts_of_the_recipes(show: Callable[[Any], str], means: tuple[float, ...], words: str) -> None:
    assert words in show(rows(*means))


def test_recipes_refuse() -> None:
    for module, changes in (
        (grafting, {"seeds": 0}),
        (micro_batch_sweep, {"seeds": 0}),
        (micro_batch_sweep, {"micro_batch_sizes": ()}),
        (micro_batch_sweep, {"micro_batch_sizes": (1024,)}),
        (micro_batch_sweep, {"train_size": -1}),
        (micro_batch_sweep, {"penalty": "adam"}),
        (micro_batch_sweep, {"weight": 0.0}),
    ):
        with pytest.raises(FastregError, match="must be"):
            module.cases(module.Config(**changes))
