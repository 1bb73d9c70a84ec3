"""The benchmark measures what it says: it refuses wrong methods, and its own references are right."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastreg
from fastreg import kernels
from fastreg.benchmark import cli, curvature, flops, machine, measure, memory, penalties, report
from fastreg.benchmark.gate import TOLERANCE, Reference, gradient, relative_error, run_and_compare
from fastreg.benchmark.method import Method, Product
from fastreg.benchmark.methods import METHODS, default_methods
from fastreg.benchmark.peers import Step, double_backward, plain, sequential
from fastreg.benchmark.penalties import LR
from fastreg.benchmark.presets import PRESETS, Preset, Problem
from fastreg.benchmark.run import Cell, Settings, measure_cell
from fastreg.benchmark.sam import RHO
from fastreg.cli import main
from fastreg.models import GPT, GPTConfig, mlp, small_resnet
from penalty_oracle import phi_2

QUICK = Settings(rounds=2, warm_up=1, peak_memory=False)
EAGER = [
    pytest.param(name, marks=pytest.mark.skipif(not method.installed, reason=f"{method.package} is not installed"))
    for name, method in METHODS.items()
    # What a difference quotient is allowed is another test's concern.
    if not method.compiled and name != "sequential_fd"
]


def _vectors(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 6, generator=generator), torch.randint(4, (batch,), generator=generator)


def _images(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.randint(4, (batch,), generator=generator)


def _tokens(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(11, (batch, 6), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


TINY = {
    "mlp": Preset("mlp", "tiny", lambda: mlp((6, 5, 4), "tanh"), _vectors, batch=4),
    "resnet": Preset("resnet", "tiny", lambda: small_resnet(4, width=4), _images, batch=4),
    "gpt": Preset("gpt", "tiny", lambda: GPT(GPTConfig(11, 5, 8, 2, 2)), _tokens, batch=4),
}


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, preset in TINY.items():
        monkeypatch.setitem(PRESETS, name, preset)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("model", TINY)
def test_every_method_passes_its_gate(model: str, name: str) -> None:
    problem = TINY[model].problem(2, dtype=torch.float64)
    if reason := METHODS[name].skipped(problem):
        pytest.skip(reason)
    if (model, name) == ("resnet", "curvlinops"):
        with pytest.raises(NotImplementedError, match="forward AD with aten::native_group_norm_backward"):
            run_and_compare(METHODS[name], problem, Reference(problem))
        return
    _, error = run_and_compare(METHODS[name], problem, Reference(problem))
    assert error <= TOLERANCE + METHODS[name].rounding


@pytest.mark.parametrize("m", [1, 2])
def test_sam_reference_ascends_by_rho_and_differentiates_there(m: int) -> None:
    problem = TINY["mlp"].problem(m, dtype=torch.float64)
    expected = torch.zeros_like(gradient(_after_plain(problem)))
    for x, y in problem.chunks():
        moved = _after_plain(dataclasses.replace(problem.copy(), inputs=x, targets=y))
        flat = gradient(moved)
        step = flat * (RHO / flat.norm())
        assert float(step.norm()) == pytest.approx(0.05)
        weights = list(moved.model.parameters())
        vector = torch.nn.utils.parameters_to_vector(weights).detach() + step
        torch.nn.utils.vector_to_parameters(vector, weights)
        expected += gradient(_after_plain(moved)) / m
    reference = Reference(problem)
    assert relative_error(reference.m_sam_gradient, expected) < 1e-12
    assert (relative_error(reference.sam_gradient, expected) < 1e-12) == (m == 1)


def _after_plain(problem: Problem) -> Problem:
    plain(problem).run()
    return problem


def test_sequential_m_sam_leaves_the_weights_as_they_were() -> None:
    problem = TINY["gpt"].problem(2)
    before = [p.detach().clone() for p in problem.model.parameters()]
    METHODS["sequential_m_sam"].prepare(problem).run()
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))


def test_reference_gradients_match_difference_quotients() -> None:
    torch.manual_seed(0)
    problem = TINY["mlp"].problem(2, dtype=torch.float64)
    reference = Reference(problem)
    labels = torch.randint(4, (4,))
    parameters = list(problem.model.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def slope(targets: torch.Tensor, step: float = 1e-5) -> float:
        def penalty() -> float:
            total = 0.0
            for x, y in zip(problem.inputs.chunk(2), targets.chunk(2)):
                grads = torch.autograd.grad(F.cross_entropy(problem.model(x), y), parameters)
                total += float(sum(g.square().sum() for g in grads)) / 2
            return total

        values = []
        with torch.no_grad():
            for shift in (step, -2 * step, step):
                for p, v in zip(parameters, direction):
                    p += shift * v
                with torch.enable_grad():
                    values.append(penalty())
        return (values[0] - values[1]) / (2 * step)

    flat = torch.cat([v.flatten() for v in direction])
    for targets, found in (
        (problem.targets, reference.penalty_gradient("grad_norm")),
        (labels, reference.penalty_gradient("fisher", labels)),
    ):
        assert float(found @ flat) == pytest.approx(slope(targets), rel=1e-6)


class Dense:
    """Rows ``g_k`` and Jacobians of a tiny problem as functions of a flat weight vector, by ``torch.func``."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.named = problem, dict(problem.model.named_parameters())
        self.w = torch.nn.utils.parameters_to_vector(self.named.values()).detach()

    def outputs(self, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        sizes = [p.numel() for p in self.named.values()]
        parts = {n: part.view_as(p) for part, (n, p) in zip(w.split(sizes), self.named.items(), strict=True)}
        return torch.func.functional_call(self.problem.model, parts, (x,))

    def rows(self, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        chunks = zip(self.problem.inputs.chunk(self.problem.micro_batches), targets.chunk(self.problem.micro_batches))
        of_chunk = torch.func.grad(lambda w, x, y: F.cross_entropy(self.outputs(w, x), y))
        return torch.stack([of_chunk(w, x, y) for x, y in chunks])

    def jacobians(self, w: torch.Tensor) -> torch.Tensor:
        """Of the mean outputs of each micro-batch, ``[m, C, P]``."""
        chunks = self.problem.inputs.chunk(self.problem.micro_batches)
        return torch.stack([torch.func.jacrev(lambda w: self.outputs(w, x).mean(0))(w) for x in chunks])

    def sample_jacobians(self, w: torch.Tensor) -> torch.Tensor:
        """``[B, C, P]``."""
        return torch.func.jacrev(lambda w: self.outputs(w, self.problem.inputs))(w)

    def deviations(self, w: torch.Tensor) -> torch.Tensor:
        rows = self.rows(w, self.problem.targets)
        return rows - rows.mean(0)


def _value(dense: Dense, kind: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
    """R as a function of the weights, and what it takes as drawn."""
    m, b = dense.problem.micro_batches, dense.problem.micro_batch_size
    labels, u = torch.randint(4, (m * b,)), torch.randn(m, 4, dtype=torch.float64)
    if kind in ("variance", "noise_trace"):
        factor = 1 / m if kind == "variance" else b / (m - 1)
        return lambda w: factor * dense.deviations(w).square().sum(), None
    if kind == "average_jacobian":
        return lambda w: dense.jacobians(w).sum(1).square().sum() / m, None
    if kind == "unit_jacobian":
        return lambda w: torch.einsum("kc,kcp->kp", u, dense.jacobians(w)).square().sum() / m, u
    if kind == "fisher_frozen":
        residual = dense.outputs(dense.w, dense.problem.inputs).softmax(1).detach() - F.one_hot(labels, 4)
        samples = lambda w: torch.einsum("ic,icp->ip", residual, dense.sample_jacobians(w))  # noqa: E731
        return lambda w: samples(w).unflatten(0, (m, b)).mean(1).square().sum() / m, labels
    whole = torch.func.hessian(lambda w: F.cross_entropy(dense.outputs(w, dense.problem.inputs), dense.problem.targets))
    values, vectors = torch.linalg.eigh(whole(dense.w))
    weights = 2 * phi_2(-LR * m * values)
    return lambda w: (dense.deviations(w) @ vectors).square() @ weights @ torch.full((m,), 1 / m).double(), vectors.T


@pytest.mark.parametrize(
    "kind",
    ["variance", "noise_trace", "average_jacobian", "unit_jacobian", "fisher_frozen", "without_replacement"],
)
def test_reference_penalty_gradients_are_those_of_dense_values(kind: str) -> None:
    torch.manual_seed(0)
    dense = Dense(TINY["mlp"].problem(2, dtype=torch.float64))
    value, drawn = _value(dense, kind)
    found = Reference(dense.problem).penalty_gradient(kind, drawn)
    assert relative_error(found, torch.func.grad(value)(dense.w)) < 1e-10


def test_reference_of_the_true_fisher_gradient_expects_that_of_the_trace() -> None:
    draw = lambda batch, generator: (torch.randn(batch, 3, generator=generator), torch.ones(batch).long())  # noqa: E731
    preset = Preset("two", "two classes", lambda: mlp((3, 3, 2), "tanh"), draw, batch=4)
    dense = Dense(preset.problem(2, dtype=torch.float64))
    reference, p = Reference(dense.problem), dense.outputs(dense.w, dense.problem.inputs).softmax(1).detach()
    expected = {"fisher": 0.0, "fisher_true": 0.0}
    for labels in itertools.product(range(2), repeat=4):
        chosen = torch.tensor(labels)
        for kind in expected:
            expected[kind] += p[range(4), chosen].prod() * reference.penalty_gradient(kind, chosen)

    def trace_over_b(w: torch.Tensor) -> torch.Tensor:
        log_p = dense.outputs(w, dense.problem.inputs).log_softmax(1)
        rows = torch.func.jacrev(lambda w: dense.outputs(w, dense.problem.inputs).log_softmax(1))(w)
        return (log_p.exp() * rows.square().sum(2)).sum() / 4 / 2

    trace = torch.func.grad(trace_over_b)(dense.w)
    assert relative_error(expected["fisher_true"], trace) < 1e-10
    assert relative_error(expected["fisher"], trace) > 0.01


@pytest.mark.parametrize("refresh", [1, 1000])
def test_ritz_vectors_are_kept_for_as_many_runs_as_said(refresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "REFRESH", refresh)
    problem = TINY["mlp"].problem(2)
    step = METHODS["without_replacement"].prepare(problem)
    step.run()
    before = step.drawn().clone()
    with torch.no_grad():
        next(problem.model.parameters()).mul_(1.5)
    step.run()
    assert torch.equal(step.drawn(), before) == (refresh == 1000)


def test_every_penalty_of_the_library_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[type] = set()

    class Noted(fastreg.Regularizer):
        def __init__(self, model: torch.nn.Module, penalty: fastreg.Penalty, **options: object) -> None:
            seen.add(type(penalty))
            super().__init__(model, penalty, **options)

    monkeypatch.setattr(fastreg, "Regularizer", Noted)
    for name in default_methods("regularizers"):
        METHODS[name].prepare(TINY["mlp"].problem(2))
    public = [getattr(fastreg.penalties, name) for name in fastreg.penalties.__all__]
    assert seen == {kind for kind in public if issubclass(kind, fastreg.Penalty)} - {fastreg.Penalty}


def test_operations_of_a_variance_are_those_of_the_norms_and_of_three_layer_products() -> None:
    def count(name: str) -> int:
        step = METHODS[name].prepare(TINY["mlp"].problem(2))
        # The first run also checks the graph.
        step.run()
        return flops.count(step.run)

    assert count("variance") == count("noise_trace") == count("exact") + count("plain")
    # A double backward of the batch costs what those of its micro-batches do, all together.
    assert count("sequential_variance") == 2 * count("sequential")
    assert count("sequential_centred") == count("sequential") + count("plain")


def test_variance_of_a_single_micro_batch_is_refused() -> None:
    _, *refused = measure_cell(Cell(TINY["mlp"], 1, ("variance", "without_replacement", "sequential_variance")), QUICK)
    for row in refused:
        assert row.status == "failed"
        assert row.message.startswith("FastregError: bench: m must be at least 2 for a variance, got 1")


def test_reference_products_are_those_of_dense_matrices() -> None:
    problem = TINY["mlp"].problem(2, dtype=torch.float64)
    dense = Dense(problem)
    w, outputs, sizes = dense.w, dense.outputs, [p.numel() for p in dense.named.values()]

    def hessian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.hessian(lambda w: F.cross_entropy(outputs(w, x), y), w)

    def columns(count: int) -> torch.Tensor:
        return torch.cat([v.flatten(1) for v in curvature.vectors(problem, count).values()], 1).T

    chunks, v, many = problem.chunks(), columns(1)[:, 0], columns(2)
    whole = hessian(problem.inputs, problem.targets)
    several = (whole @ columns(curvature.SEVERAL)).split(sizes)
    jacobian = torch.autograd.functional.jacobian(lambda w: outputs(w, problem.inputs), w)
    p = outputs(w, problem.inputs).softmax(1)
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    gradients = [_after_plain(dataclasses.replace(problem.copy(), inputs=x, targets=y)) for x, y in chunks]
    expected = {
        "hvp": whole @ v,
        "hvp_several": torch.cat([part.T.flatten() for part in several]),
        "hvp_micro": sum(hessian(*chunk) @ many[:, k] for k, chunk in enumerate(chunks)) / 2,
        "hvp_micro_grad": sum(hessian(*c) @ gradient(g) for c, g in zip(chunks, gradients, strict=True)) / 2,
        "ggn": torch.einsum("nap,nab,nbq,q->p", jacobian, middle, jacobian, v) / len(p),
    }
    assert expected.keys() == set(get_args(Product))
    reference = Reference(problem)
    assert all(relative_error(reference.product(kind), expected[kind]) < 1e-12 for kind in expected)


def _scaled(factor: float) -> Callable[[Problem], Step]:
    """A sequential penalty whose weight is off by ``factor``."""

    def prepare(problem: Problem) -> Step:
        return sequential(dataclasses.replace(problem, weight=factor * problem.weight))

    return prepare


def _not_a_number(problem: Problem) -> Step:
    def run() -> None:
        double_backward(problem, None)
        next(problem.model.parameters()).grad[0] = math.nan

    return Step(problem.model, run)


def _wrong_norms(problem: Problem) -> Step:
    count = len(problem.inputs)
    return Step(problem.model, plain(problem).run, sq_norms=lambda: torch.ones(count))


def _turned(prepare: Callable[[Problem], Step]) -> Callable[[Problem], Step]:
    """On the batch in reverse."""

    def turned(problem: Problem) -> Step:
        return prepare(dataclasses.replace(problem, inputs=problem.inputs.flip(0), targets=problem.targets.flip(0)))

    return turned


def _redrawn(name: str) -> Callable[[Problem], Step]:
    """A method that says to have drawn something else."""

    def prepare(problem: Problem) -> Step:
        step = METHODS[name].prepare(problem)
        return dataclasses.replace(step, drawn=lambda: step.drawn().flip(-1))

    return prepare


@pytest.mark.parametrize(
    "wrong",
    [
        Method("wrong", "grad_norm", "no penalty at all", plain),
        Method("wrong", "grad_norm", "weight off by a millionth", _scaled(1 + 1e-6)),
        Method("wrong", "grad_norm", "one entry is not a number", _not_a_number),
        Method("wrong", "loss", "a penalty nobody asked for", sequential),
        Method("wrong", "m_sam", "one perturbation for all", METHODS["sam"].prepare),
        Method("wrong", "sam", "a perturbation for each", METHODS["m_sam"].prepare),
        Method("wrong", "sam", "no perturbation", plain),
        Method("wrong", "sample_norms", "right gradient, wrong norms", _wrong_norms),
        Method("wrong", "variance", "mean square for variance", METHODS["exact"].prepare),
        Method("wrong", "noise_trace", "of micro-batches for of samples", METHODS["variance"].prepare),
        Method("wrong", "fisher_true", "labels are constants", METHODS["fisher"].prepare),
        Method("wrong", "fisher_frozen", "residuals move", METHODS["fisher"].prepare),
        Method("wrong", "unit_jacobian", "other directions", _redrawn("unit_jacobian")),
        Method("wrong", "without_replacement", "other Ritz vectors", _redrawn("without_replacement")),
        Method("wrong", "hvp", "Gauss-Newton for Hessian", METHODS["ggn"].prepare),
        Method("wrong", "ggn", "Hessian for Gauss-Newton", METHODS["hvp"].prepare),
        Method("wrong", "hvp_micro", "vectors go to other micro-batches", _turned(METHODS["hvp_micro"].prepare)),
        Method("wrong", "hvp_micro", "gradients for vectors", METHODS["hvp_micro_grad"].prepare),
    ],
    ids=lambda method: method.about.replace(" ", "-"),
)
def test_wrong_method_is_shown_and_not_timed(
    wrong: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []

    def counted(problem: Problem) -> Step:
        step = wrong.prepare(problem)
        calls.append(problem.inputs.dtype)
        return step

    monkeypatch.setitem(METHODS, "wrong", dataclasses.replace(wrong, prepare=counted))
    plain_row, row = measure_cell(Cell(TINY["mlp"], 2, ("wrong",)), QUICK)
    assert (row.status, row.seconds, row.ratio) == ("wrong", None, None)
    assert not row.error_float64 <= TOLERANCE
    assert calls == [torch.float64]
    assert "WRONG" in report.line(row)
    assert plain_row.status == "ok" and plain_row.seconds.p50 > 0


def test_method_that_raises_is_reported_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(problem: Problem) -> Step:
        raise RuntimeError("no second derivative\nand a long explanation")

    monkeypatch.setitem(METHODS, "broken", Method("broken", "grad_norm", "", prepare))
    rows = {row.method: row for row in measure_cell(Cell(TINY["mlp"], 2, ("broken", "sequential")), QUICK)}
    assert rows["broken"].status == "failed"
    assert rows["broken"].message == "RuntimeError: no second derivative"
    assert rows["broken"].message in report.line(rows["broken"])
    assert rows["sequential"].ratio.p50 > 1


@pytest.mark.parametrize(
    ("suite", "others", "absent"),
    [
        ("sam", ["m_sam", "sequential_m_sam", "sam"], "package_sam"),
        (
            "hvp",
            [
                *("hvp", "hvp_kept", "hvp8", "hvp_micro", "hvp_micro_grad", "ggn", "fisher_exact"),
                *("double_backward", "double_backward_kept", "sequential_micro", "func_hvp", "func_hvp8", "func_micro"),
            ],
            "curvlinops",
        ),
    ],
)
def test_method_whose_package_is_missing_is_listed_and_is_no_failure(
    suite: str, others: list[str], absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = dataclasses.replace(METHODS[absent], package="no_such_package")
    monkeypatch.setitem(METHODS, absent, missing)
    monkeypatch.setitem(PRESETS, "mlp", TINY["mlp"])
    arguments = ["bench", "--model", "mlp", "--m", "2", "--suite", suite, "--rounds", "1", "--no-memory"]
    assert main([*arguments, "--threads", str(torch.get_num_threads())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("mlp ")] == ["plain", *others, absent]
    assert lines[-1].endswith("not installed")


def test_operations_of_sam_are_those_of_two_plain_steps() -> None:
    # One hidden layer: 2 S I O each for y and dw, and for dx where there is one.
    batch, layers = 4, ((6, 5), (5, 4))
    products = sum(2 * batch * i * o for i, o in layers)
    expected = 3 * products - 2 * batch * 6 * 5
    rows = {row.method: row for row in measure_cell(Cell(TINY["mlp"], 2, tuple(default_methods("sam"))), QUICK)}
    assert rows["plain"].flops == expected
    assert rows["sequential_m_sam"].flops_ratio == 2
    assert rows["m_sam"].flops > expected


def test_operations_of_kept_products_are_those_of_further_ones() -> None:
    rows = {row.method: row for row in measure_cell(Cell(TINY["mlp"], 2, tuple(default_methods("hvp"))), QUICK)}
    first, later = rows["hvp"].flops, rows["hvp_kept"].flops
    assert 0 < later < first
    assert rows["hvp8"].flops == first + 7 * later
    # The graph of a double backward also holds the gradients of the weights.
    assert rows["hvp"].flops < rows["double_backward"].flops
    assert rows["double_backward_kept"].flops < rows["double_backward"].flops
    assert rows["hvp8"].products == 8
    assert report.line(rows["hvp8"]).endswith(f"{rows['hvp8'].ratio.p50 / 8:.2f} per product")


@pytest.mark.parametrize("name", ["hvp_kept", "double_backward_kept"])
def test_kept_products_run_the_model_again_only_when_cleared(name: str) -> None:
    problem, forwards = TINY["mlp"].problem(2), []
    problem.model.register_forward_hook(lambda *_: forwards.append(1))
    step = METHODS[name].prepare(problem)
    step.run()
    step.run()
    assert len(forwards) == 1
    step.clear()
    step.run()
    assert len(forwards) == 2


@pytest.mark.parametrize("s", [3, 40])
def test_operations_of_outer_ops_are_those_of_their_products(s: int) -> None:
    q, v, offsets = torch.ones(2 * s, 16), torch.ones(2 * s, 24), [0, s, 2 * s]
    pairs, gradients = 2 * s * 2 * s * (16 + 24), 2 * 2 * s * 16 * 24
    assert flops.count(lambda: kernels.outer_sum(q, v, offsets)) == gradients
    assert flops.count(lambda: kernels.outer_sqnorm(q, v, offsets)) == min(pairs, gradients)
    assert flops.count(lambda: kernels.outer_apply(q, q, v, offsets)) == min(pairs, 2 * gradients)


def test_operations_of_attention_are_those_of_its_products() -> None:
    q, product = torch.ones(2, 3, 5, 8), 2 * 2 * 3 * 5 * 5 * 8
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    assert flops.count(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * product
    assert flops.count(lambda: kernels.attention_forward(q, q, q, *kernels.Pattern())) == 2 * product
    assert flops.count(lambda: kernels.attention_backward(q, q, q, lse, out, *kernels.Pattern())) == 5 * product
    double = (q, q, q, lse, out, q, q, q, *kernels.Pattern())
    assert flops.count(lambda: kernels.attention_double_backward(*double)) == 12 * product


def test_operations_of_segmented_convolutions_are_those_of_one() -> None:
    x, weight = torch.ones(2, 3, 4, 7, 6), torch.ones(5, 4, 3, 2)
    y = F.conv2d(x.flatten(0, 1), weight, padding=1).unflatten(0, (2, 3))
    expected = flops.count(lambda: F.conv2d(x.flatten(0, 1), weight, padding=1))
    assert flops.OURS["conv_apply"](x, weight.expand(2, -1, -1, -1, -1), None, [1, 1], out_val=y) == expected
    assert flops.OURS["conv_outer"](x, y, [3, 2], [1, 1], [1, 1], [1, 1]) == expected


def test_operations_of_a_grouped_convolution_are_those_of_its_groups() -> None:
    def step(channels: int, groups: int, convolution: type[torch.nn.Module]) -> Callable[[], None]:
        x = torch.ones(2, channels, 7, 5, requires_grad=True)
        layer = convolution(channels, 2 * channels, (3, 2), stride=2, groups=groups)
        return lambda: layer(x).sum().backward()

    for convolution in (torch.nn.Conv2d, torch.nn.ConvTranspose2d):
        of_one = flops.count(step(4, 1, convolution))
        with FlopCounterMode(display=False) as counter:
            step(4, 1, convolution)()
        assert of_one == counter.get_total_flops() > 0
        assert flops.count(step(12, 3, convolution)) == 3 * of_one


def test_float64_problem_is_the_float32_one() -> None:
    single, double = (TINY["gpt"].problem(2, dtype=d) for d in (torch.float32, torch.float64))
    assert torch.equal(single.inputs, double.inputs)
    for p, q in zip(single.model.parameters(), double.model.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p.double(), q)


def test_rounds_are_interleaved_and_start_with_another_step_each() -> None:
    order: list[str] = []

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            # Longer than the shortest measurement, so that every round is one call.
            measure.time.sleep(1.1 * measure.ROUND_SECONDS)

        return run

    steps = {name: step(name) for name in "abc"}
    seconds = measure.interleaved(steps, rounds=3, warm_up=1, device="cpu")
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert all(len(values) == 3 for values in seconds.values())
    assert min(min(values) for values in seconds.values()) >= measure.ROUND_SECONDS


def test_ratio_is_per_round_and_spread_is_percentiles() -> None:
    # The second round ran on a machine half as fast; the ratio does not notice.
    assert measure.ratios([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]
    spread = measure.Spread.of([float(i) for i in range(11)])
    assert (spread.p20, spread.p50, spread.p80) == (2.0, 5.0, 8.0)
    assert measure.Spread.of([3.0]) == measure.Spread(3.0, 3.0, 3.0)


def test_peak_memory_of_a_plain_step_holds_its_gradients() -> None:
    assert memory.measurable("cpu")
    parameters = sum(p.numel() for p in PRESETS["mlp"].build().parameters())
    peak = memory.on_cpu("mlp", 8, "plain", threads=1)
    # When the last gradient is formed all others exist, and that of the first hidden layer.
    floor = 4 * (parameters + 256 * 512)
    assert 0.9 * floor <= peak <= 1.5 * floor


@pytest.mark.usefixtures("tiny_presets")
def test_peak_memory_is_that_of_a_step_that_finds_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def prepare(problem: Problem) -> Step:
        return Step(problem.model, lambda: done.append("run"), forget=lambda: done.append("forget"))

    monkeypatch.setitem(METHODS, "fake", Method("fake", "hvp", "", prepare))
    memory._measure("mlp", 2, "fake")
    assert done == ["run", "forget", "run"]


@pytest.mark.usefixtures("tiny_presets")
def test_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    target, plot = tmp_path / "deep" / "bench.json", tmp_path / "bench.png"
    arguments = ["bench", "--model", "mlp", "--m", "2", "32", "--methods", "exact", "sequential"]
    arguments += ["--rounds", "2", "--threads", str(threads), "--no-memory"]
    assert main([*arguments, "--json", str(target), "--plot", str(plot)]) == 0
    document = json.loads(target.read_text())
    rows = [(row["model"], row["m"], row["method"], row["status"]) for row in document["rows"]]
    # m = 32 is clipped to one micro-batch per sample.
    assert rows == [
        ("mlp", m, name, "ok") for m in (2, 4) for name in ("plain", "exact", "sequential")
    ]
    assert document["settings"]["rounds"] == 2
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["machine"]["device"] == machine.cpu_name()
    printed = capsys.readouterr().out
    for row in document["rows"]:
        assert row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert f"{1e3 * row['seconds']['p50']:.1f}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_presets")
def test_wrong_method_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "exact", Method("exact", "grad_norm", "", plain, ours=True))
    arguments = ["bench", "--model", "mlp", "--m", "2", "--methods", "exact", "--rounds", "1"]
    assert main([*arguments, "--threads", str(torch.get_num_threads()), "--no-memory"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--model", "vgg"], ["--m", "0"], ["--m", "x"], ["--methods", "magic"], ["--rounds", "-1"]],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *arguments])
    assert exit_.value.code == 2


def test_m_must_divide_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "mlp", "--m", "7"]) == 1
    assert "error: bench: m must divide the batch of mlp, 256 samples, got 7" in capsys.readouterr().err


def test_missing_drawing_library_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", "ratios.svg"]) == 1
    out, err = capsys.readouterr()
    assert not out and "pip install 'fastreg[demo]'" in err


def test_json_on_standard_output_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "mlp", "--m", "2", "--methods", "plain", "--rounds", "1", "--no-memory", "--json"]
    assert main(["bench", *options]) == 0
    out, err = capsys.readouterr()
    assert [row["method"] for row in json.loads(out)["rows"]] == ["plain"] and "784-512-512-10" in err


def test_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 1
