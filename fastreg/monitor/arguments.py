"""What a monitor can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

from fastreg.errors import FastregError
from fastreg.monitor.metrics import METRICS


def check_arguments(
    metrics: Sequence[str], micro_batch_size: int | None, fraction: float | None, ema: float, every: int
) -> None:
    """Raise for arguments of :class:`fastreg.Monitor` that are out of range or do not go together."""
    unknown = [name for name in metrics if name not in METRICS]
    if isinstance(metrics, str) or not metrics or unknown:
        raise FastregError(f"Monitor: metrics must be names among {list(METRICS)}, got {unknown or metrics!r}")
    for name, number in (("micro_batch_size", micro_batch_size), ("every", every)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            if (name, number) != ("micro_batch_size", None):
                raise FastregError(f"Monitor: {name} must be an integer >= 1, got {number!r}")
    if not _is_number(ema) or not 0 <= ema < 1:
        raise FastregError(f"Monitor: ema must be in [0, 1), got {ema!r}")
    if fraction is not None and (not _is_number(fraction) or not 0 < fraction <= 1):
        raise FastregError(f"Monitor: fraction must be in (0, 1] or None, got {fraction!r}")
    if fraction is not None and micro_batch_size is None:
        raise FastregError(f"Monitor: fraction must have a micro_batch_size, got {fraction!r} and None (choose 1)")
    for name in metrics:
        _check_metric(name, micro_batch_size, fraction)


def _check_metric(name: str, micro_batch_size: int | None, fraction: float | None) -> None:
    if METRICS[name].samples and micro_batch_size != 1:
        raise FastregError(f"Monitor: {name} must have micro_batch_size=1, got {micro_batch_size}")
    if METRICS[name].fisher and micro_batch_size is None:
        raise FastregError(f"Monitor: {name} must have a micro_batch_size, got None (choose 1)")
    if METRICS[name].aligned and fraction not in (None, 1):
        raise FastregError(f"Monitor: {name} must have fraction=1, got {fraction!r} (or leave it out)")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
