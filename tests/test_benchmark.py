"""The benchmark measures what it says: it refuses wrong methods, and its own references are right."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastreg.benchmark import cli, machine, measure, memory, report
from fastreg.benchmark.gate import TOLERANCE, Reference, run_and_compare
from fastreg.benchmark.methods import METHODS, Method
from fastreg.benchmark.peers import Step, double_backward, plain, sequential
from fastreg.benchmark.presets import PRESETS, Preset, Problem
from fastreg.benchmark.run import Settings, measure_cell
from fastreg.cli import main
from fastreg.errors import FastregError
from fastreg.models import GPT, GPTConfig, mlp, small_resnet

QUICK = Settings(rounds=2, warm_up=1, peak_memory=False)
EAGER = [name for name in METHODS if not name.endswith("_compiled")]


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
    _, error = run_and_compare(METHODS[name], problem, Reference(problem))
    assert error <= TOLERANCE


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
        (problem.targets, reference.grad_norm_gradient),
        (labels, reference.fisher_gradient(labels)),
    ):
        assert float(found @ flat) == pytest.approx(slope(targets), rel=1e-6)


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


@pytest.mark.parametrize(
    "wrong",
    [
        Method("wrong", "grad_norm", "no penalty at all", plain),
        Method("wrong", "grad_norm", "weight off by a millionth", _scaled(1 + 1e-6)),
        Method("wrong", "grad_norm", "one entry is not a number", _not_a_number),
        Method("wrong", "loss", "a penalty nobody asked for", sequential),
        Method("wrong", "sample_norms", "right gradient, wrong norms", _wrong_norms),
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
    plain_row, row = measure_cell(TINY["mlp"], 2, ["wrong"], QUICK)
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
    rows = {row.method: row for row in measure_cell(TINY["mlp"], 2, ["broken", "sequential"], QUICK)}
    assert rows["broken"].status == "failed"
    assert rows["broken"].message == "RuntimeError: no second derivative"
    assert rows["broken"].message in report.line(rows["broken"])
    assert rows["sequential"].ratio.p50 > 1


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
    monkeypatch.setitem(METHODS, "exact", Method("exact", "grad_norm", "", plain))
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


def test_missing_drawing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FastregError, match=r"pip install 'fastreg\[demo\]'"):
        report.check_plot_available()


def test_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 1
