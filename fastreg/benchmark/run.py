"""One cell of the benchmark: all methods on one model with one number of micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fastreg.benchmark import flops, memory
from fastreg.benchmark.gate import TOLERANCE, Reference, run_and_compare
from fastreg.benchmark.measure import Spread, interleaved, ratios
from fastreg.benchmark.method import Method
from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Preset, Problem
from fastreg.benchmark.report import Row


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        preset: model and batch.
        m: micro-batches, at most the batch.
        methods: names from :data:`METHODS`; the plain step is always measured.
        part: the part of the plan that this belongs to.
        curve: the curve that this is a point of.
        at: the varied value there.
        memory: whether peak memory is measured on a CPU too, in a process of its own for every method.
        excluded: why a method is not tried, by its name.
    """

    preset: Preset
    m: int
    methods: tuple[str, ...]
    part: str = ""
    curve: str | None = None
    at: float | None = None
    memory: bool = True
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[Row]:
        """A row for every method, with nothing measured."""
        return [self._row(METHODS[name]) for name in dict.fromkeys(("plain", *self.methods))]

    def _row(self, method: Method) -> Row:
        return Row(
            self.preset.name,
            self.m,
            method.name,
            products=method.products,
            quantity=method.computes,
            part=self.part,
            curve=self.curve,
            at=self.at,
            ours=method.ours,
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: timed rounds per cell, or fewer:
        budget: seconds that they may take together.
        warm_up: untimed calls of each step before them.
        threads: CPU threads.
        device: ``"cpu"`` or ``"cuda"``.
        autocast: dtype of the forward passes that are timed, or None for float32.
        peak_memory: whether to measure memory too.
        note: told what is being done, in a few words.
    """

    rounds: int = 11
    budget: float = math.inf
    warm_up: int = 2
    threads: int = 1
    device: str = "cpu"
    autocast: torch.dtype | None = None
    peak_memory: bool = True
    note: Callable[[str], None] = lambda text: None


def measure_cell(cell: Cell, settings: Settings) -> list[Row]:
    """Gate, time and weigh the methods; the plain step is always among them."""
    timed = cell.preset.problem(cell.m, device=settings.device, autocast=settings.autocast)
    gate, gate_m, judged = cell.preset, cell.m, timed
    own = gate.gate
    if own is not None:
        # Two samples or more in a micro-batch, as batch norm wants them.
        gate, gate_m = own, min(cell.m, own.batch // 2)
        judged = gate.problem(gate_m, device=settings.device, autocast=settings.autocast)
    reference = _reference(gate, gate_m, settings.device)
    rows, steps = cell.rows(), {}
    for row in rows:
        method = METHODS[row.method]
        settings.note(f"{row.model}, m = {row.m}: is {row.method} right?")
        if not method.installed:
            row.status = "not installed"
        elif reason := cell.excluded.get(row.method) or method.skipped(timed):
            row.status, row.message = "skipped", reason
        elif step := _gated(method, reference, judged, timed, row):
            steps[row.method] = step
    _count(rows, steps)
    settings.note(f"{cell.preset.name}, m = {cell.m}: up to {settings.rounds} rounds of {len(steps)}")
    _time(rows, steps, settings)
    if settings.peak_memory and (cell.memory or settings.device != "cpu") and memory.measurable(settings.device):
        _weigh(rows, steps, cell, settings)
    return rows


# Cells of the same problem follow each other.
@functools.lru_cache(maxsize=1)
def _reference(preset: Preset, m: int, device: str) -> Reference:
    return Reference(preset.problem(m, dtype=torch.float64, device=device))


def _gated(method: Method, reference: Reference, judged: Problem, timed: Problem, row: Row) -> Step | None:
    """Fill the row's verdict and errors; the step to time, or None if it is wrong or fails.

    A model that is too large for the gate has both errors of the one that is judged in its place. What a method raises
    is one of the results, whatever it is, and the other methods are still measured.
    """
    try:
        _, row.error_float64 = run_and_compare(method, reference.problem, reference)
        if row.error_float64 > TOLERANCE + method.rounding:
            row.status = "wrong"
            return None
        step, row.error = run_and_compare(method, judged, reference)
        return step if judged is timed else _prepared(method, timed)
    except Exception as error:
        row.status = "failed"
        row.message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None


def _prepared(method: Method, problem: Problem) -> Step:
    step = method.prepare(problem.copy())
    step.run()
    return step


def _count(rows: Sequence[Row], steps: dict[str, Step]) -> None:
    """Count the operations of a step; its first run, behind it now, may have checked more than it does later.

    A compiled step runs below the counter.
    """
    for row in rows:
        if row.method in steps and not METHODS[row.method].compiled:
            row.flops = flops.count(steps[row.method].run)
            base = rows[0].flops
            row.flops_ratio = None if base is None else row.flops / base


def _time(rows: Sequence[Row], steps: dict[str, Step], settings: Settings) -> None:
    calls = {name: step.run for name, step in steps.items()}
    seconds = interleaved(calls, settings.rounds, settings.warm_up, settings.device, settings.budget)
    for row in rows:
        if row.method in seconds:
            row.seconds = Spread.of(seconds[row.method])
            row.ratio = Spread.of(ratios(seconds[row.method], seconds["plain"]))


def _weigh(rows: Sequence[Row], steps: dict[str, Step], cell: Cell, settings: Settings) -> None:
    for row in rows:
        if row.method in steps:
            settings.note(f"{row.model}, m = {row.m}: memory of {row.method}")
            if settings.device == "cpu":
                row.peak_bytes = memory.on_cpu(cell.preset.name, row.m, row.method, settings.threads)
            else:
                row.peak_bytes = memory.on_gpu(steps[row.method], settings.device)
