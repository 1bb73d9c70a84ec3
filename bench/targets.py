"""What fastreg set out to reach, and what of it the results show. The verdicts come from the rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from documents import Document, Json, cells, with_kernels
from fastreg.benchmark.report import Row
from verdicts import OURS, REFERENCE

Device = Literal["CPU", "H200"]
# Of a case or a cell: its name and what was measured.
Measured = tuple[str, float]

FAMILIES = {"MLP": ("mlp",), "conv": ("resnet",), "GPT": ("gpt",), "transformer": ("gpt", "vit"), "any": ("",)}
STATISTICS = ("plain_norms", "micro_norms", "noise_scale")
MEMORY_BOUND = ("norm_affine", "norm_affine_backward", "norm_affine_double_backward", "cross_entropy",
                "cross_entropy_gradient", "cross_entropy_backward", "normalize", "normalize_backward",
                "normalize_double_backward", "gelu_double_backward", "segment_dot", "segment_sum",
                "affine_sqnorm", "index_sqnorm")  # fmt: skip
# More cells than this are counted, fewer are listed.
LISTED = 6


@dataclass(frozen=True)
class StepTarget:
    """A bound on a method, in plain steps or against another method of the same cell.

    Attributes:
        what: the promise in words.
        device: where it holds.
        family: which models, a key of :data:`FAMILIES`.
        methods: any of these.
        limit: the bound.
        of: the time or the peak memory over that of ``to``, at most ``limit``; or the ``speed``: the time of ``to``
            over that of the method, at least ``limit``.
        to: what it is referred to.
        m: only this number of micro-batches.
        dtype: only this dtype.
    """

    what: str
    device: Device
    family: str
    methods: tuple[str, ...]
    limit: float
    of: Literal["time", "memory", "speed"] = "time"
    to: str = "plain"
    m: int | None = None
    dtype: str | None = None

    @property
    def least(self) -> bool:
        """Whether ``limit`` bounds from below."""
        return self.of == "speed"

    def measured(self, documents: Sequence[Document]) -> Iterator[Measured]:
        """Every cell that has both methods."""
        for cell in cells([one for one in documents if _on(one, self.device)]):
            right = cell.model.startswith(FAMILIES[self.family]) and self.m in (None, cell.m)
            if right and self.dtype in (None, cell.document.dtype):
                by_name = {row.method: row for row in cell.rows if row.ratio is not None}
                for name in self.methods:
                    value = self._value(by_name.get(name), by_name.get(self.to))
                    if value is not None:
                        yield f"{name} on {cell.label}", value

    def _value(self, row: Row | None, to: Row | None) -> float | None:
        if row is None or to is None:
            return None
        if self.of == "memory":
            return row.peak_bytes / to.peak_bytes if row.peak_bytes and to.peak_bytes else None
        quotient = row.ratio.p50 / to.ratio.p50
        return 1 / quotient if self.of == "speed" else quotient


@dataclass(frozen=True)
class KernelTarget:
    """A least share of a measured ceiling, or of a rival's speed, for the fastest of our implementations.

    Attributes:
        what: the promise in words.
        device: where it holds.
        ops: any of these.
        limit: the least share.
        of: ``"bytes_per_s"`` or ``"flops_per_s"`` of the device, or the name of a rival.
        dtype: only this dtype.
    """

    what: str
    device: Device
    ops: tuple[str, ...]
    limit: float
    of: str
    dtype: str | None = None
    least: bool = True

    def measured(self, documents: Sequence[Document]) -> Iterator[Measured]:
        """Every case of the ops."""
        document = with_kernels([one for one in documents if _on(one, self.device)])
        timed = [one for one in document.kernels if one.get("seconds")] if document else []
        wanted = [one for one in timed if one["op"] in self.ops and self.dtype in (None, one["dtype"])]
        for case, rows in groupby(wanted, key=lambda one: (one["op"], one["case"], one["dtype"])):
            share = self._share(list(rows), document.ceilings)
            if share is not None:
                yield " ".join(str(part) for part in case), share

    def _share(self, rows: list[Json], ceilings: dict[str, float]) -> float | None:
        seconds = {row["implementation"]: row["seconds"]["p50"] for row in rows}
        ours = [seconds[name] for name in OURS if name in seconds]
        if not ours or (self.of not in ceilings and self.of not in seconds):
            return None
        if self.of in seconds:
            return seconds[self.of] / min(ours)
        moved = rows[0]["bytes" if self.of == "bytes_per_s" else "flops"]
        return moved / min(ours) / ceilings[self.of]


Target = StepTarget | KernelTarget


def _on(document: Document, device: Device) -> bool:
    return document.on_cpu if device == "CPU" else "H200" in document.device


def _steps(device: Device, what: str, methods: tuple[str, ...], limits: dict[str, float], **of: object) -> list[Target]:
    """The same promise for several families of models."""
    return [StepTarget(what, device, family, methods, limit, **of) for family, limit in limits.items()]


TARGETS: list[Target] = [
    *_steps("CPU", "statistics on a training step", STATISTICS, {"MLP": 1.1, "transformer": 1.1, "conv": 1.25}),
    *_steps("CPU", "GradNorm", ("exact",), {"MLP": 2.0, "transformer": 2.5, "conv": 2.6}),
    *_steps("CPU", "GradNorm, compiled", ("exact_compiled",), {"GPT": 2.2}, to="plain_compiled"),
    *_steps("CPU", "FisherTrace", ("fisher",), {"MLP": 2.1, "transformer": 2.6, "conv": 2.7}),
    *_steps("CPU", "m-SAM", ("m_sam",), {"MLP": 1.9, "GPT": 2.0, "conv": 1.9}),
    *_steps("CPU", "Monitor, every step", ("monitor",), {"any": 1.1}),
    *_steps("CPU", "peak memory, GradNorm", ("exact",), {"any": 2.2}, of="memory"),
    *_steps("CPU", "peak memory, blocks recomputed", ("exact_recomputed",), {"any": 1.3}, of="memory"),
    *_steps("CPU", "GradNorm against a double backward per micro-batch", ("exact",), {"MLP": 5, "transformer": 1.7},
            of="speed", to="sequential", m=32),
    *_steps("CPU", "GradNorm against compiled torch.func", ("exact", "exact_compiled"), {"any": 1.1}, of="speed",
            to="functorch_compiled"),
    KernelTarget("outer_apply against two torch.bmm", "CPU", ("outer_apply",), 1.0, "torch.bmm twice"),
    KernelTarget("memory-bound ops against torch's composition", "CPU", MEMORY_BOUND, 1.0, REFERENCE),
    *_steps("H200", "statistics on a training step, bfloat16", STATISTICS, {"transformer": 1.05, "conv": 1.05},
            dtype="bfloat16"),
    *_steps("H200", "GradNorm", ("exact",), {"any": 2.6}),
    *_steps("H200", "GradNorm, compiled", ("exact_compiled",), {"any": 2.2}, to="plain_compiled"),
    *_steps("H200", "FisherTrace", ("fisher",), {"any": 2.3}),
    *_steps("H200", "m-SAM", ("m_sam",), {"any": 1.8}),
    *_steps("H200", "Monitor, every step", ("monitor",), {"any": 1.03}),
    *_steps("H200", "peak memory, GradNorm", ("exact",), {"any": 2.2}, of="memory"),
    *_steps("H200", "peak memory, blocks recomputed", ("exact_recomputed",), {"any": 1.3}, of="memory"),
    *_steps("H200", "GradNorm against a double backward per micro-batch", ("exact",), {"any": 10}, of="speed",
            to="sequential", m=32),
    *_steps("H200", "GradNorm against compiled torch.func", ("exact", "exact_compiled"), {"any": 1.5}, of="speed",
            to="functorch_compiled"),
    KernelTarget("outer_sum with norms against cuBLAS without", "H200", ("outer_sum",), 0.9, "torch.mm, no norms"),
    KernelTarget("outer_apply against the bfloat16 peak", "H200", ("outer_apply",), 0.6, "flops_per_s", "bfloat16"),
    KernelTarget("memory-bound ops against copy bandwidth", "H200", MEMORY_BOUND, 0.85, "bytes_per_s"),
]  # fmt: skip


def verdict(target: Target, found: Sequence[Measured]) -> str:
    """Reached or missed, by the worst cell."""
    if not found:
        return "not measured"
    worst = _worst(target, found)[1]
    missed = target.limit - worst if target.least else worst - target.limit
    return f"missed by {missed:.2f}" if missed > 0 else "reached"


def _worst(target: Target, found: Sequence[Measured]) -> Measured:
    return (min if target.least else max)(found, key=lambda one: one[1])


def _in_words(target: Target, found: Sequence[Measured]) -> str:
    if len(found) <= LISTED:
        return "; ".join(f"{name}: {value:.2f}" for name, value in found)
    reached = sum(verdict(target, [one]) == "reached" for one in found)
    name, value = _worst(target, found)
    return f"{reached} of {len(found)} cases; worst {name}: {value:.2f}"


def table(documents: Sequence[Document]) -> str:
    """All targets as Markdown: promise, bound, what was measured, verdict."""
    lines = ["| device | what | models | target | measured | |", "| --- | --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        found = list(target.measured(documents))
        models = target.family if isinstance(target, StepTarget) else "ops"
        bound = f"{'>=' if target.least else '<='} {target.limit:g}"
        cells_of = (target.device, target.what, models, bound, _in_words(target, found), verdict(target, found))
        lines.append(f"| {' | '.join(cells_of)} |")
    return "\n".join(lines)


def summary(documents: Sequence[Document]) -> str:
    """How many targets were reached, missed and not measured."""
    found = [verdict(target, list(target.measured(documents))).split(" by ")[0] for target in TARGETS]
    return ", ".join(f"{found.count(kind)} {kind}" for kind in ("reached", "missed", "not measured"))
