"""A report on one model: which parameter goes by which rule, in which form, and a numerical self-test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.attach import check_model
from fastreg.errors import FastregError
from fastreg.graph_walk import refuse_offenders
from fastreg.loss import Reduction, check_loss
from fastreg.penalties.base import Step
from fastreg.recording import Recorder
from fastreg.self_check import self_check
from fastreg.session import Traced


@dataclass(frozen=True)
class ParameterReport:
    """How one parameter is handled.

    Attributes:
        name, shape: the parameter's.
        rules: the operations it reached, in order of use.
        forms: how its micro-batch gradients are represented, and by which backend.
    """

    name: str
    shape: tuple[int, ...]
    rules: tuple[str, ...]
    forms: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What :func:`check` found; ``str(report)`` is a table.

    Attributes:
        parameters: one entry per parameter that requires grad.
        micro_batch_size, micro_batches, samples: b, m and B of the batch.
    """

    parameters: tuple[ParameterReport, ...]
    micro_batch_size: int
    micro_batches: int
    samples: int

    def as_dict(self) -> dict[str, object]:
        """A JSON-ready form."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [("parameter", "shape", "rule", "form")]
        for p in self.parameters:
            shape = "x".join(map(str, p.shape)) or "scalar"
            lines.append((p.name, shape, ", ".join(p.rules) or "(not used)", ", ".join(p.forms)))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
        return (
            f"{table}\nself-test passed: norms and penalty gradient of one of {self.micro_batches} micro-batches "
            f"({self.micro_batch_size} of {self.samples} samples) equal plain autograd"
        )


def check(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    batch: tuple[Any, Tensor],
    *,
    micro_batch_size: int | None = None,
) -> Report:
    """Record one forward of ``model`` and verify it; gradients are left alone.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples.
        batch: ``(inputs, targets)``.
        micro_batch_size: b; half the batch by default.

    Returns:
        A :class:`Report`.

    Raises:
        UnsupportedOperation: a parameter reaches an operation without a rule.
        FastregError: an operation has no double backward, the self-test fails, or float16 gradients overflow; the
            message says where.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> fastreg.check(model, torch.nn.functional.cross_entropy, batch).parameters[0].rules
        ('Linear',)
    """
    check_model(model)
    samples = batch[0].shape[0]
    recorder = Recorder(model, micro_batch_size or max(1, samples // 2), model.parameters(), lambda: True)
    recorder.trace, recorder.keeps_outputs = [], True
    try:
        with torch.enable_grad():
            outputs = model(batch[0])
            loss = loss_fn(outputs, batch[1])
            session = recorder.last
            check_loss(loss, session.micro_batches.samples)
            if loss.dim():
                raise FastregError(f"check: loss_fn must return a scalar mean, got shape {tuple(loss.shape)}")
            refuse_offenders(loss, session, recorder.tracked_names())
            if not self_check(Step(session, loss, None, Reduction()), recorder):
                raise FastregError("check: gradients must be finite, got inf in float16 (scale down in loss_fn)")
    finally:
        recorder.remove()
    cut = session.micro_batches
    reports = tuple(_of(name, p, recorder.trace) for name, p in model.named_parameters() if p.requires_grad)
    return Report(reports, cut.size, cut.count, cut.samples)


def _of(name: str, parameter: nn.Parameter, trace: list[Traced]) -> ParameterReport:
    uses = [use for use in trace if id(parameter) in use.parameters]
    forms = ("joined over uses",) if len(uses) > 1 else tuple(use.form for use in uses)
    return ParameterReport(name, tuple(parameter.shape), tuple(use.rule for use in uses), forms)
