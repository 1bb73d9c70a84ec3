"""Lengths of steps from a file of norms that another run has logged."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.optim.magnitudes import Magnitude


class LoggedNorm(Magnitude):
    r"""``n_t``: the norm that another run had logged at the same step: external grafting.

        n_t = the norm logged at step  t - t mod stride,      t = 0, 1, ... steps of this optimizer

    The file is that of a :class:`fastreg.sinks.CSVSink` or :class:`fastreg.sinks.JSONLSink`, as a monitor of the
    small-batch run writes it; its ``grad_norm`` is ``||g||`` of the batch that was trained on, exactly::

        monitor = fastreg.Monitor(model, ("grad_norm",), micro_batch_size=None, every=20, sinks=[CSVSink("norms.csv")])

    Args:
        path: the file, read once.
        stride: steps that each norm serves for, at least 1: what the run was logged ``every``, or a multiple of it.
        metric: the column or key.

    Attributes:
        steps: t, of the step to come.

    Raises:
        FastregError: an argument is out of range; the file is missing, cut off or of another format; it lacks a step
            that is a multiple of the stride, or holds what is no norm; at a step: the trace has ended.

    Source: Novack et al. 2022, arXiv:2211.15853.

    Example:
        >>> import tempfile, torch, fastreg.optim
        >>> from fastreg.sinks import CSVSink
        >>> path = tempfile.mkdtemp() + "/norms.csv"
        >>> with CSVSink(path) as sink:
        ...     sink.write(0, {"fastreg/grad_norm": 0.5})
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> magnitude = fastreg.optim.LoggedNorm(path, stride=20)
        >>> optimizer = fastreg.optim.Grafted(torch.optim.SGD([weight], lr=1.0), magnitude)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.detach()
        tensor([2.7000, 3.6000])
    """

    def __init__(self, path: str | Path, *, stride: int = 1, metric: str = "fastreg/grad_norm") -> None:
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise FastregError(f"LoggedNorm: stride must be an integer >= 1, got {stride!r}")
        self.path, self.stride, self.steps = Path(path), stride, 0
        logged = _logged(self.path, metric)
        wanted = range(0, max(logged) + 1, stride)
        missing = [step for step in wanted if step not in logged]
        if missing:
            raise FastregError(
                f"LoggedNorm: path must log {metric} at every multiple of stride={stride}, got none at step "
                f"{missing[0]} in {path} (stride is what the run was logged every, or a multiple of it)"
            )
        self._norms = [logged[step] for step in wanted]

    def __call__(self, described: Reduction) -> float:
        row = self.steps // self.stride
        if row >= len(self._norms):
            raise FastregError(
                f"LoggedNorm: the trace must reach step {self.steps}, got {len(self._norms)} norms for {self.stride} "
                f"steps each in {self.path} (stop here, or log a longer run)"
            )
        self.steps += 1
        return self._norms[row]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def _logged(path: Path, metric: str) -> dict[int, float]:
    """Norms by step; of a step that a resumed run has logged again, the later one."""
    if not path.is_file():
        raise FastregError(f"LoggedNorm: path must be a file that a sink has written, got none at {path}")
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise FastregError(f"LoggedNorm: path must end with a whole line, got a cut-off one in {path} (remove it)")
    try:
        rows = list(_rows(text.splitlines()))
        found = {int(row["step"]): _norm(row[metric]) for row in rows if metric in row}
    except (KeyError, TypeError, ValueError) as error:
        raise FastregError(
            f"LoggedNorm: path must be a CSV or JSON lines file of steps and finite norms >= 0, got {error!r} in {path}"
        ) from error
    if not found:
        names = sorted({name for row in rows for name in row})
        raise FastregError(f"LoggedNorm: metric must be one that is logged in {path}, got {metric!r} (there: {names})")
    return found


def _rows(lines: list[str]) -> Iterable[dict[str, Any]]:
    return map(json.loads, lines) if lines[0].startswith("{") else csv.DictReader(lines)


def _norm(value: Any) -> float:
    norm = math.nan if value is None else float(value)
    if not 0 <= norm < math.inf:
        raise ValueError(f"a norm of {norm}")
    return norm
