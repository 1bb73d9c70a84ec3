"""Runs cells of the benchmark one after another, says beforehand how long it will take, and writes as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fastreg.benchmark import report
from fastreg.benchmark.measure import LEAST, synchronize
from fastreg.benchmark.method import PER_SAMPLE, Method
from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.peers import plain
from fastreg.benchmark.presets import Preset
from fastreg.benchmark.report import Row
from fastreg.benchmark.run import Cell, Settings, measure_cell

# Runs of a step beside the rounds: the count of operations and one for the length of a round; and the gate's, in
# float64, which counts twice, and in the timed precision.
BESIDE_ROUNDS, GATE = 2, 3
# Seconds that torch.compile takes for one method, for both dtypes, and a fresh process to import the library.
COMPILATION, IMPORT = 30.0, 3.0
# A point of a curve is left out for a method whose step would take longer, seconds.
LONGEST = 4.0


def measure(cells: Sequence[Cell], settings: Settings, done: Callable[[list[Row]], None]) -> list[Row]:
    """Measure all cells and print them; ``done`` is told the rows so far after each."""
    rows: list[Row] = []
    shown: tuple[str, str] | None = None
    for cell in cells:
        if (cell.part, cell.preset.about) != shown:
            shown = cell.part, cell.preset.about
            print(f"\n{cell.part}, {cell.preset.name}: {cell.preset.about}\n{report.HEADER}", flush=True)
        found = measure_cell(replace(cell, excluded=_too_slow(cell, rows, settings)), settings)
        settings.note("")
        print("\n".join(report.line(row) for row in found), flush=True)
        rows += found
        done(rows)
    return rows


def exit_status(rows: Sequence[Row]) -> int:
    """1 if a method of fastreg's is wrong or failed, else 0; a peer that is wrong is a finding."""
    return int(any(row.ours and row.status in ("wrong", "failed") for row in rows))


def _too_slow(cell: Cell, rows: Sequence[Row], settings: Settings) -> dict[str, str]:
    """Methods whose step would be too long at a point of a curve, judged by the point before.

    A step is taken to grow as the plain one or, where m is varied, no faster than m.
    """
    before = {row.method: row for row in rows if cell.curve is not None and row.curve == cell.curve}
    if not before:
        return {}
    base = before["plain"].seconds
    assert base is not None
    growth = step_seconds(cell.preset, cell.m, settings) / base.p50
    found = {}
    for name, row in before.items():
        if row.status == "skipped":
            found[name] = row.message or ""
        elif row.seconds is not None:
            expected = row.seconds.p50 * max(growth, cell.m / row.m)
            if expected > LONGEST:
                found[name] = f"a step would take up to {expected:.0f} s at {cell.at:g}, and may take {LONGEST:g}"
    return found


def expected_seconds(cells: Sequence[Cell], settings: Settings) -> float:
    """What :func:`measure` will take, from a plain step of every problem and how the methods compare with it."""
    plain_seconds: dict[Preset, float] = {}
    total = 0.0
    for cell in cells:
        if cell.preset not in plain_seconds:
            plain_seconds[cell.preset] = step_seconds(cell.preset, 1, settings)
        total += sum(_parts_of(cell, plain_seconds[cell.preset], settings))
    return total


def _parts_of(cell: Cell, plain_step: float, settings: Settings) -> Iterator[float]:
    """Seconds beside and in the rounds, of compilations, and of measuring memory."""
    problem, listed = cell.preset.problem(cell.m), (METHODS[name] for name in cell.methods)
    methods = [method for method in listed if method.installed and not method.skipped(problem)]
    steps = sum(plain_step * _ratio(method, cell) for method in methods)
    # What is gated in the place of a preset takes about a third.
    yield (BESIDE_ROUNDS + (GATE if cell.preset.gate is None else 1 + GATE / 3)) * steps
    yield min(settings.rounds * steps, max(settings.budget, LEAST * steps))
    yield COMPILATION * sum(method.compiled for method in methods)
    if settings.peak_memory and cell.memory and settings.device == "cpu":
        yield len(methods) * IMPORT + 2 * steps


def _ratio(method: Method, cell: Cell) -> float:
    """Roughly how many plain steps one of the method takes."""
    norms = method.computes in (*PER_SAMPLE, "micro_norms")
    if method.computes == "loss" or (norms and method.ours):
        return 1.2
    if norms:
        # Few rows a sample: per-sample gradients are as large as the model and cost far more than their norms.
        return 40.0 if cell.preset.name.startswith("mlp") else 2.0
    return (2.7 if method.ours else 3.5) * method.products**0.8


def step_seconds(preset: Preset, m: int, settings: Settings) -> float:
    """Seconds of a plain step."""
    step = plain(preset.problem(m, device=settings.device, autocast=settings.autocast))
    step.run()
    synchronize(settings.device)
    start = time.perf_counter()
    step.run()
    synchronize(settings.device)
    return time.perf_counter() - start
