"""One cell of the benchmark: all methods on one model with one number of micro-batches."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from fastreg.benchmark import flops, memory
from fastreg.benchmark.gate import TOLERANCE, Reference, run_and_compare
from fastreg.benchmark.measure import Spread, interleaved, ratios
from fastreg.benchmark.methods import METHODS, Method
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import PRESETS, Preset, Problem
from fastreg.benchmark.report import Row
from fastreg.errors import FastregError


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: timed rounds per cell.
        warm_up: untimed calls of each step before them.
        threads: CPU threads.
        device: ``"cpu"`` or ``"cuda"``.
        autocast: dtype of the forward passes that are timed, or None for float32.
        peak_memory: whether to measure memory too.
        note: told what is being done, in a few words.
    """

    rounds: int = 11
    warm_up: int = 2
    threads: int = 1
    device: str = "cpu"
    autocast: torch.dtype | None = None
    peak_memory: bool = True
    note: Callable[[str], None] = lambda text: None


def measure_cell(
    preset: Preset, micro_batches: int, methods: Sequence[str], settings: Settings
) -> list[Row]:
    """Gate, time and weigh the methods; the plain step is always among them.

    Args:
        preset: model and batch.
        micro_batches: m, at most the batch.
        methods: names from :data:`METHODS`.
        settings: how to measure.
    """
    gated = preset if preset.gate is None else PRESETS[preset.gate]
    exact = gated.problem(min(micro_batches, gated.batch), dtype=torch.float64, device=settings.device)
    timed = preset.problem(micro_batches, device=settings.device, autocast=settings.autocast)
    reference = Reference(exact)
    rows, steps = [], {}
    for name in dict.fromkeys(("plain", *methods)):
        settings.note(f"{preset.name}, m = {micro_batches}: is {name} right?")
        row = Row(preset.name, micro_batches, name, products=METHODS[name].products)
        rows.append(row)
        if not METHODS[name].installed:
            row.status = "not installed"
            continue
        step = _gate(METHODS[name], exact, timed, reference, row, same=gated is preset)
        if step is not None:
            steps[name] = step
    _count(rows, steps)
    settings.note(f"{preset.name}, m = {micro_batches}: {settings.rounds} rounds of {len(steps)}")
    _time(rows, steps, settings)
    if settings.peak_memory and memory.measurable(settings.device):
        _weigh(rows, steps, preset, settings)
    return rows


def _gate(
    method: Method, exact: Problem, timed: Problem, reference: Reference, row: Row, same: bool
) -> Step | None:
    """Fill the row's verdict and errors; the step to time, or None if it is wrong or fails.

    A model that is gated at another size has no error of its own. What a method raises is one of the results, and the
    other methods are still measured.
    """
    try:
        _, row.error_float64 = run_and_compare(method, exact, reference)
        if row.error_float64 > TOLERANCE + method.rounding:
            row.status = "wrong"
            return None
        if not same:
            return method.prepare(timed.copy())
        step, row.error = run_and_compare(method, timed, reference)
    except (FastregError, RuntimeError) as error:
        row.status = "failed"
        row.message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
    return step


def _count(rows: Sequence[Row], steps: dict[str, Step]) -> None:
    """Count the operations of a step; its first run, behind it now, may have checked more than it does later.

    A compiled step runs below the counter.
    """
    for row in rows:
        if row.method in steps and not METHODS[row.method].compiled:
            row.flops = flops.count(steps[row.method].run)
            row.flops_ratio = row.flops / rows[0].flops


def _time(rows: Sequence[Row], steps: dict[str, Step], settings: Settings) -> None:
    calls = {name: step.run for name, step in steps.items()}
    seconds = interleaved(calls, settings.rounds, settings.warm_up, settings.device)
    for row in rows:
        if row.method in seconds:
            row.seconds = Spread.of(seconds[row.method])
            row.ratio = Spread.of(ratios(seconds[row.method], seconds["plain"]))


def _weigh(
    rows: Sequence[Row], steps: dict[str, Step], preset: Preset, settings: Settings
) -> None:
    for row in rows:
        if row.method in steps:
            settings.note(f"{row.model}, m = {row.m}: memory of {row.method}")
            if settings.device == "cpu":
                row.peak_bytes = memory.on_cpu(preset.name, row.m, row.method, settings.threads)
            else:
                row.peak_bytes = memory.on_gpu(steps[row.method], settings.device)
