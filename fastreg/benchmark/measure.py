"""Interleaved timing of steps, and the statistics that the report quotes."""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

# A round measures a step for at least this long, so that one timer tick or one context switch
# does not decide about a step of a few milliseconds.
ROUND_SECONDS = 0.05
# Rounds below which a median is no median.
LEAST = 3


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values, percentiles interpolated linearly."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def interleaved(
    steps: Mapping[str, Callable[[], None]], rounds: int, warm_up: int, device: str, budget: float = math.inf
) -> dict[str, list[float]]:
    """Seconds per call of every step, ``rounds`` values each, or as many as fit into ``budget``.

    A round calls every step, and each round starts with another one, so that a change in the
    machine's speed meets all steps alike and none always follows the same neighbour.

    Args:
        steps: what to time, by name.
        rounds: values per step.
        warm_up: untimed calls of each step before its first timed one.
        device: where the steps run.
        budget: seconds for all rounds; :data:`LEAST` of them are made in any case.
    """
    once = {name: _once(step, warm_up, device) for name, step in steps.items()}
    repeats = {name: math.ceil(ROUND_SECONDS / seconds) for name, seconds in once.items()}
    round_seconds = sum(repeats[name] * seconds for name, seconds in once.items())
    rounds = min(rounds, max(LEAST, int(min(budget / round_seconds, rounds))))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    with _no_garbage_collection():
        for round_index in range(rounds):
            shift = round_index % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(_time(steps[name], repeats[name], device))
    return seconds


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Each round's time over the same round's baseline."""
    return [value / base for value, base in zip(seconds, baseline, strict=True)]


def _once(step: Callable[[], None], warm_up: int, device: str) -> float:
    for _ in range(warm_up):
        step()
    return _time(step, 1, device)


def _time(step: Callable[[], None], calls: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the cycle collector out of the timings, as :mod:`timeit` does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
