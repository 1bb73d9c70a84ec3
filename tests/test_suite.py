"""The suite: its plan, the gate of every quantity, batch norm, curves, and the command from end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from fastreg.benchmark import measure, report, suite
from fastreg.benchmark.gate import TOLERANCE, Reference, gradient, relative_error, run_and_compare
from fastreg.benchmark.method import Method, Quantity
from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.peers import Step, plain
from fastreg.benchmark.plan import CURVES, GROUPS, plan
from fastreg.benchmark.presets import PRESETS, Preset, Problem, gpt_of, mlp_of
from fastreg.benchmark.run import Cell, Settings, measure_cell
from fastreg.benchmark.vit import ViT
from fastreg.models import mlp, small_resnet

QUICK = Settings(rounds=1, warm_up=0, peak_memory=False)


def _vectors(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 6, generator=generator), torch.randint(4, (batch,), generator=generator)


def _images(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.randint(4, (batch,), generator=generator)


MLP = Preset("mlp", "tiny", lambda: mlp((6, 5, 4), "tanh"), _vectors, batch=4)
BATCH_NORM = Preset("coupled", "tiny", lambda: small_resnet(4, width=4, norm="batch"), _images, batch=4)
VIT = Preset("vit", "tiny", lambda: ViT(12, 2, 3, image=8, classes=4), _images, batch=4)


def _flattened(quantities: object) -> list[str]:
    return list(dict.fromkeys(name for part in get_args(quantities) for name in _flattened(part) or [part]))


# The first method of ours for each.
OURS = {m.computes: m.name for m in reversed(METHODS.values()) if m.ours and not m.compiled} | {"loss": "plain"}


@pytest.fixture
def bench_suite() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "suite.py"
    spec = importlib.util.spec_from_file_location("bench_suite", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_names_what_exists_and_every_point_can_be_cut(device: str, quick: bool) -> None:
    cells = plan(device, quick)
    for cell in cells:
        assert set(cell.methods) <= set(METHODS)
        assert cell.preset.batch % cell.m == 0
        assert cell.curve is not None or PRESETS[cell.preset.name] is cell.preset
        # A fresh process finds a preset by its name.
        assert cell.curve is None or not cell.memory
    places = [(cell.part, cell.preset.name, cell.m, cell.curve, cell.at) for cell in cells]
    assert len(set(places)) == len(places)


def test_full_plan_measures_every_part_quantity_and_compiled_twin() -> None:
    full, quick = plan("cpu", False), plan("cpu", True)
    assert {cell.part for cell in full} == {group.part for group in GROUPS["cpu"]} | {"scaling"}
    assert {METHODS[name].computes for cell in full for name in cell.methods} == set(_flattened(Quantity))
    for model in ("mlp", "gpt"):
        measured = {name for cell in full if cell.preset is PRESETS[model] for name in cell.methods}
        assert {"plain_compiled", "exact_compiled", "fisher_compiled", "functorch_compiled"} <= measured
    assert {(cell.part, cell.preset.name, cell.m) for cell in quick} <= {(c.part, c.preset.name, c.m) for c in full}
    assert not any(METHODS[name].compiled for cell in quick for name in cell.methods)
    assert {cell.part for cell in plan("cpu", False, ["sam", "scaling"])} == {"sam", "scaling"}


def test_problems_follow_each_other_so_that_references_are_shared() -> None:
    problems = [(cell.preset.name, cell.m) for cell in plan("cpu", False) if cell.curve is None]
    assert problems == sorted(problems, key=problems.index)


@pytest.mark.parametrize("curve", CURVES["cpu"] + CURVES["cuda"], ids=lambda curve: curve.name)
def test_a_curve_varies_what_its_name_says(curve: object) -> None:
    size = curve.name.split(maxsplit=1)[1]
    points = {value: _sizes(*curve.point(value)) for value in curve.values}
    assert all(sizes[size] == value for value, sizes in points.items())
    # The batch grows with m or with the micro-batches, one of which stays.
    same = {"batch": {"micro-batch size"}, "micro-batch size": {"m"}, "m": {"batch"}}.get(size, {"m", "batch"})
    assert all(len({sizes[name] for sizes in points.values()}) == 1 for name in same | {"width", "depth"} - {size})


def _sizes(preset: Preset, m: int) -> dict[str, int]:
    """What the model and its batch are like, read off them."""
    with torch.device("meta"):
        model = preset.build()
    found = {"m": m, "batch": preset.batch, "micro-batch size": preset.batch // m}
    if preset.name == "gpt":
        context, width = model.positions.shape
        return found | {"context": context, "width": width, "depth": len(model.blocks)}
    layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    return found | {"width": layers[0].out_features, "depth": len(layers)}


def _off(problem: Problem, step: Step, factor: float) -> Step:
    """``step`` with everything that it adds to the gradient of the loss, or shows, scaled by ``factor``."""
    alone = plain(problem.copy())
    alone.run()

    def run() -> None:
        step.run()
        for p, q in zip(problem.model.parameters(), alone.model.parameters(), strict=True):
            if p.grad is not None:
                p.grad = q.grad + factor * (p.grad - q.grad)

    shown = ("sq_norms", "statistics", "product")
    found = {name: get for name in shown if (get := getattr(step, name))}
    planted = {name: (lambda get=get: factor * get()) for name, get in found.items()}
    return dataclasses.replace(step, run=run, **planted)


@pytest.mark.parametrize("quantity", _flattened(Quantity))
def test_every_quantity_has_a_gate_that_sees_an_error_of_a_millionth(quantity: str) -> None:
    method, problem = METHODS[OURS[quantity]], MLP.problem(2, dtype=torch.float64)
    reference = Reference(problem)
    _, right = run_and_compare(method, problem, reference)
    assert right <= TOLERANCE + method.rounding

    def planted(problem: Problem) -> Step:
        if quantity == "loss":
            return _scaled_gradient(problem)
        return _off(problem, method.prepare(problem), 1 + 1e-6)

    _, wrong = run_and_compare(dataclasses.replace(method, prepare=planted), problem, reference)
    assert wrong == pytest.approx(1e-6, rel=1e-2)


def _scaled_gradient(problem: Problem) -> Step:
    step = plain(problem)

    def run() -> None:
        step.run()
        for p in problem.model.parameters():
            p.grad *= 1 + 1e-6

    return dataclasses.replace(step, run=run)


NORMS = [
    pytest.param(m.name, marks=pytest.mark.skipif(not m.installed, reason=f"{m.package} is not installed"))
    for m in METHODS.values()
    if m.computes in ("sample_norms", "micro_norms", "noise_scale") and not m.compiled
]


@pytest.mark.parametrize("name", NORMS)
def test_norms_beside_a_wrong_gradient_are_wrong(name: str) -> None:
    method, problem = METHODS[name], MLP.problem(2, dtype=torch.float64)

    def planted(problem: Problem) -> Step:
        step = method.prepare(problem)

        def run() -> None:
            step.run()
            next(problem.model.parameters()).grad[0] += 1e-6

        return dataclasses.replace(step, run=run)

    _, wrong = run_and_compare(dataclasses.replace(method, prepare=planted), problem, Reference(problem))
    assert wrong > 1e-7


def test_noise_reference_is_the_covariance_of_dense_rows() -> None:
    problem = MLP.problem(2, dtype=torch.float64)
    named = dict(problem.model.named_parameters())
    rows = torch.func.vmap(torch.func.grad(_loss_of(problem)), in_dims=(None, 0, 0))(
        {n: p.detach() for n, p in named.items()}, problem.inputs.unsqueeze(1), problem.targets.unsqueeze(1)
    )
    flat = torch.cat([part.flatten(1) for part in rows.values()], 1)
    expected = torch.stack([torch.cov(flat.T).trace(), flat.mean(0).square().sum()])
    reference = Reference(problem)
    assert torch.allclose(reference.noise_statistics, expected, rtol=1e-12)
    assert torch.allclose(reference.samples.sq_norms, flat.square().sum(1), rtol=1e-12)
    micro = flat.unflatten(0, (2, 2)).mean(1)
    assert torch.allclose(reference.micro_batches.sq_norms, micro.square().sum(1), rtol=1e-12)


def test_fisher_reference_expects_the_trace_over_labels() -> None:
    problem = MLP.problem(2, dtype=torch.float64)
    named = {n: p.detach() for n, p in problem.model.named_parameters()}
    p = problem.model(problem.inputs).softmax(1).detach()
    log_p = lambda w: torch.func.functional_call(problem.model, w, (problem.inputs,)).log_softmax(1)  # noqa: E731
    rows = torch.cat([part.flatten(2) for part in torch.func.jacrev(log_p)(named).values()], 2)
    trace = (p * rows.square().sum(2)).sum() / 4
    reference = Reference(problem)
    # Over samples the value is a mean, so each label of a sample can be taken with the first of the others.
    found = 0.0
    for i in range(4):
        for c in range(4):
            labels = torch.zeros(4, dtype=torch.int64)
            one = dataclasses.replace(problem, inputs=problem.inputs[i : i + 1], targets=problem.targets[i : i + 1])
            labels[0] = c
            found += float(p[i, c] * Reference(one).fisher_trace(labels[:1])) / 4
    assert found == pytest.approx(float(trace), rel=1e-12)
    assert reference.fisher_trace(problem.targets).shape == (1,)


def _loss_of(problem: Problem) -> Callable[..., torch.Tensor]:
    return lambda w, x, y: F.cross_entropy(torch.func.functional_call(problem.model, w, (x,)), y)


def test_batch_norm_reference_takes_the_statistics_of_each_micro_batch() -> None:
    problem = BATCH_NORM.problem(2, dtype=torch.float64)
    reference = Reference(problem)
    assert problem.coupled and not MLP.problem(2).coupled
    expected = torch.zeros_like(reference.loss_gradient)
    for x, y in problem.chunks():
        alone = dataclasses.replace(problem.copy(), inputs=x, targets=y, micro_batches=1)
        plain(alone).run()
        expected += gradient(alone) / 2
    assert relative_error(reference.micro_batches.mean, expected) < 1e-12
    # The batch's own statistics make another function of it.
    assert relative_error(reference.loss_gradient, expected) > 1e-3


RIGHT_WITH_BATCH_NORM = [
    *("exact", "fisher", "variance", "micro_norms", "m_sam", "sam", "hvp"),
    *("sequential", "functorch", "functorch_micro_norms"),
]


@pytest.mark.parametrize("name", RIGHT_WITH_BATCH_NORM)
def test_methods_are_right_with_batch_norm(name: str) -> None:
    problem = BATCH_NORM.problem(2, dtype=torch.float64)
    _, error = run_and_compare(METHODS[name], problem, Reference(problem))
    assert error <= TOLERANCE


def test_what_batch_norm_leaves_undefined_is_skipped_with_the_reason() -> None:
    undefined = ("plain_norms", "noise_scale", "fisher_trace", "monitor", "sequential_norms")
    rows = measure_cell(Cell(BATCH_NORM, 2, (*undefined, "micro_norms")), QUICK)
    assert [row.status for row in rows] == ["ok", *["skipped"] * len(undefined), "ok"]
    for row in rows[1:-1]:
        assert "batch norm couples the samples" in row.message and row.message in report.line(row)
        assert row.seconds is None


@pytest.mark.parametrize("name", ["exact", "fisher", "plain_norms", "m_sam", "sequential", "functorch", "hvp"])
def test_vision_transformer_passes_the_gate(name: str) -> None:
    problem = VIT.problem(2, dtype=torch.float64)
    assert problem.model(problem.inputs).shape == (4, 4)
    _, error = run_and_compare(METHODS[name], problem, Reference(problem))
    assert error <= TOLERANCE


def test_vision_transformer_of_the_preset_has_the_sizes_it_says() -> None:
    model = PRESETS["vit-tiny"].build()
    assert model.positions.shape == (65, 192) and len(model.blocks) == 12
    assert model.blocks[0].self_attn.num_heads == 3


def test_a_large_model_is_judged_by_the_one_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype]] = []

    def noted(problem: Problem) -> Step:
        seen.append((len(problem.inputs), problem.inputs.dtype))
        return plain(problem)

    monkeypatch.setitem(METHODS, "noted", Method("noted", "loss", "", noted))
    large = dataclasses.replace(MLP, batch=16, gate=MLP)
    _, row = measure_cell(Cell(large, 8, ("noted",)), QUICK)
    assert seen == [(4, torch.float64), (4, torch.float32), (16, torch.float32)]
    assert row.error_float64 == 0 and 0 < row.error < 1e-5


def _curve_rows(seconds: float, m: int) -> list[report.Row]:
    rows = Cell(MLP, m, ("exact", "sequential"), "scaling", "mlp m", m).rows()
    for row, factor in zip(rows, (1, 2, 5), strict=True):
        row.seconds = measure.Spread(*[factor * seconds] * 3)
    return rows


def test_a_curve_leaves_out_methods_that_would_exceed_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "step_seconds", lambda preset, m, settings: 0.5)
    cell = Cell(MLP, 4, ("exact", "sequential"), "scaling", "mlp m", 4)
    # m doubles: at most 2 s against 0.8 s for exact, 5 s for the sequential one.
    found = suite._too_slow(cell, _curve_rows(0.5, 2), QUICK)
    assert list(found) == ["sequential"]
    assert found["sequential"] == "a step would take up to 5 s at 4, and may take 4"
    assert suite._too_slow(dataclasses.replace(cell, curve="mlp batch"), _curve_rows(0.5, 2), QUICK) == {}
    # What was left out stays so, with the reason it had.
    rows = _curve_rows(0.001, 2)
    rows[2].status, rows[2].seconds, rows[2].message = "skipped", None, "too slow at 2"
    monkeypatch.setattr(suite, "step_seconds", lambda preset, m, settings: 0.001)
    assert suite._too_slow(cell, rows, QUICK) == {"sequential": "too slow at 2"}
    measured = measure_cell(dataclasses.replace(cell, excluded={"sequential": "too slow at 2"}), QUICK)
    assert [(row.status, row.message) for row in measured] == [("ok", None), ("ok", None), ("skipped", "too slow at 2")]


def test_rounds_fit_into_the_budget_and_are_never_too_few() -> None:
    calls = []

    def step() -> None:
        calls.append(1)
        measure.time.sleep(1.1 * measure.ROUND_SECONDS)

    for budget, rounds in ((math.inf, 20), (8.9 * measure.ROUND_SECONDS, None), (0.0, measure.LEAST)):
        found = len(measure.interleaved({"a": step}, 20, 0, "cpu", budget)["a"])
        assert found == rounds or (rounds is None and measure.LEAST < found <= 8)


def test_expected_time_follows_the_plain_step_and_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(MLP, 2, ("plain", "exact"), "penalty")]
    settings = Settings(rounds=10, peak_memory=False)

    def expected(plain_step: float, settings: Settings) -> float:
        monkeypatch.setattr(suite, "step_seconds", lambda *_: plain_step)
        return suite.expected_seconds(cells, settings)

    assert expected(2.0, settings) == pytest.approx(2 * expected(1.0, settings))
    rounds = 10 * (expected(1.0, settings) / (10 + suite.BESIDE_ROUNDS + suite.GATE))
    bounded = expected(1.0, dataclasses.replace(settings, budget=rounds / 2))
    assert bounded == pytest.approx(expected(1.0, settings) - rounds / 2)


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch, bench_suite: ModuleType) -> None:
    cells = [
        Cell(MLP, 2, ("exact", "fisher", "sequential"), "penalty"),
        Cell(BATCH_NORM, 2, ("plain_norms", "micro_norms"), "norms", memory=False),
        Cell(MLP, 4, ("exact",), "scaling", "mlp m", 4, memory=False),
    ]
    wanted = lambda device, quick, parts: [c for c in cells if c.part in parts or not parts]  # noqa: E731
    monkeypatch.setattr(bench_suite, "plan", wanted)


@pytest.mark.usefixtures("tiny_plan")
def test_suite_runs_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bench_suite: ModuleType
) -> None:
    target, threads = tmp_path / "suite.json", str(torch.get_num_threads())
    assert bench_suite.main(["--quick", "--threads", threads, "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    assert document["schema"] == report.SCHEMA and document["settings"]["plan"] == "quick"
    found = [(r["part"], r["method"], r["quantity"], r["ours"], r["status"], r["at"]) for r in document["rows"]]
    assert found[:4] == [
        ("penalty", "plain", "loss", False, "ok", None),
        ("penalty", "exact", "grad_norm", True, "ok", None),
        ("penalty", "fisher", "fisher", True, "ok", None),
        ("penalty", "sequential", "grad_norm", False, "ok", None),
    ]
    assert found[5][1:5] == ("plain_norms", "sample_norms", True, "skipped")
    assert found[-1] == ("scaling", "exact", "grad_norm", True, "ok", 4)
    assert all(row["message"] for row in document["rows"] if row["status"] == "skipped")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 cells, about 0 minutes")
    assert "norms         2 ok, 1 skipped" in lines


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize(("name", "status"), [("exact", 1), ("sequential", 0)])
def test_exit_status_is_that_of_our_own_methods(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch, bench_suite: ModuleType
) -> None:
    monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], prepare=plain))
    arguments = ["--quick", "--parts", "penalty", "--threads", str(torch.get_num_threads())]
    assert bench_suite.main(arguments) == status


def test_missing_gpu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench_suite: ModuleType
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_suite.main(["--device", "cuda"]) == 1
    assert "error: bench: --device must be one that torch can use, got cuda" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--parts", "magic"], ["--quick", "--full"], ["--threads", "0"]], ids=" ".join)
def test_wrong_arguments_exit_with_2(arguments: list[str], bench_suite: ModuleType) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench_suite.main(arguments)
    assert exit_.value.code == 2


def test_command_measures_the_curves_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreg.benchmark import cli
    from fastreg.cli import main

    seen: list[Cell] = []
    monkeypatch.setattr(cli, "execute", lambda cells, *_: seen.extend(cells) or [])
    assert main(["bench", "--suite", "scaling", "--model", "gpt", "--methods", "exact"]) == 0
    expected = [(c.name, value) for c in CURVES["cpu"] if c.name.startswith("gpt") for value in c.values]
    assert [(cell.curve, cell.at) for cell in seen] == expected
    assert all(cell.methods == ("exact",) for cell in seen)


def test_sizes_of_the_varied_presets() -> None:
    assert mlp_of().about == PRESETS["mlp"].about and gpt_of().about == PRESETS["gpt"].about
