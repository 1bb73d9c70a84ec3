"""The first step's self-check: norms and penalty gradient of one micro-batch against plain autograd.

Plain autograd on the same graph: the gradient of the outputs' own micro-batch only, the rest masked out, with respect
to every parameter. It differs from the recorded norms when samples are coupled across the batch, when the batch is
not along dimension 0, or when a parameter acts in a way that the recording did not see.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from fastreg.chain import squared_norms
from fastreg.errors import FastregError
from fastreg.graph_walk import ends
from fastreg.kernels._checks import accumulator
from fastreg.loss import tensors_in
from fastreg.penalties.base import Step
from fastreg.recording import Recorder

_CAUSES = (
    "likely causes: samples are coupled across the batch (a batch mean, in-batch negatives), the batch is not along "
    "dimension 0 (a sequence-first model: use batch_first=True), a weight is computed from parameters "
    "(reparametrisation), position ids were taken for samples (give them shape [1, T]), or the loss is made of several "
    "forwards, of which the check sees the last alone (check=False: recorded norms are those of all)"
)


def self_check(step: Step, recorder: Recorder) -> bool:
    """Whether the step could be judged: one whose float16 gradients overflow, for a scaler to skip, cannot.

    Raises:
        FastregError: the recorded norms, or the penalty's gradient, differ from plain autograd's.
    """
    outputs = _outputs(step, recorder)
    if not outputs:
        warnings.warn("fastreg: the self-check needs the model's outputs: call reg(loss, outputs)", stacklevel=3)
        return True
    dtypes = {*(t.dtype for t in outputs), step.loss.dtype, *step.session.dtypes}
    with torch.autocast(outputs[0].device.type, enabled=False):
        scale = _scale(step)
        if torch.float16 in dtypes and not torch.isfinite(scale):
            return False
        _compare(step, outputs, recorder, _tolerance(dtypes), scale)
    return True


def _outputs(step: Step, recorder: Recorder) -> list[Tensor]:
    """Tensors at which one micro-batch may be cut out: what was passed, and the model's own outputs."""
    found, recorder.outputs = [step.outputs, *tensors_in(recorder.outputs)], None
    known = [t for t in found if t is not None and t.is_floating_point() and t.requires_grad and t.dim()]
    whole = [t for t in known if t.shape[0] % step.session.micro_batches.samples == 0]
    if known and not whole:
        step.session.micro_batches.rows_per_sample(known[0], "the model's output")
    return whole


def _scale(step: Step) -> Tensor:
    """By what the loss is multiplied to bring the largest gradient to length 1, where float16 has all its digits.

    Infinite norms give no number, zero ones 1.
    """
    squared = squared_norms(step.session, step.loss.sum(), differentiable=False).max()
    return torch.where(squared == 0, 1, squared.sqrt() / squared)


def _compare(step: Step, outputs: list[Tensor], recorder: Recorder, tolerance: float, scale: Tensor) -> None:
    session, total = step.session, step.loss.sum() * scale
    cut = session.micro_batches
    k = cut.full // 2 if cut.full > 1 else 0
    outputs = _met(total, outputs)
    masks = [_mask(t, slice(*cut.offsets(t.shape[0])[k : k + 2])) for t in outputs]
    cotangents = _masked_cotangents(total, outputs, masks, tolerance)
    tracked = [p for p in recorder.parameters if p.requires_grad]
    plain = torch.autograd.grad(outputs, tracked, cotangents, create_graph=True, allow_unused=True)
    plain_sq = {id(p): g.to(accumulator(g.dtype)).square().sum() for p, g in zip(tracked, plain) if g is not None}
    session.per_parameter = {}
    recorded = squared_norms(session, total, differentiable=True)[k]
    found = {key: squared[k] for key, squared in session.per_parameter.items()}
    session.per_parameter = None
    _compare_norms(plain_sq, found, recorder.names, k, tolerance)
    _compare_gradients(reduce(torch.add, plain_sq.values()), recorded, tracked, tolerance)


def _tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Half the digits of the least precise dtype involved."""
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point) ** 0.5


def _met(total: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """The outputs that the loss depends on, without those from which others of them are computed."""
    found = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    known = ends([t for t, d in zip(outputs, found, strict=True) if d is not None])
    if not known:
        raise FastregError("reg: loss must depend on the model's last outputs, got one that does not")
    return known


def _mask(output: Tensor, rows: slice) -> Tensor:
    mask = torch.zeros(output.shape[0], *(1,) * (output.dim() - 1), dtype=output.dtype, device=output.device)
    mask[rows] = 1
    return mask


def _masked_cotangents(
    total: Tensor, outputs: list[Tensor], masks: list[Tensor], tolerance: float
) -> list[Tensor]:
    """The loss's gradient at the outputs of one micro-batch, zero elsewhere; a loss that couples samples is refused."""
    found = torch.autograd.grad(total, outputs, create_graph=True)
    own = [d * mask for d, mask in zip(found, masks, strict=True)]
    if any(d.requires_grad for d in own):
        weighted = [(d * torch.linspace(1, 2, d.numel(), device=d.device).view_as(d)).sum() for d in own]
        coupled = torch.autograd.grad(reduce(torch.add, weighted), outputs, retain_graph=True, allow_unused=True)
        pairs = [(c.abs(), mask) for c, mask in zip(coupled, masks, strict=True) if c is not None]
        if any((c * (1 - mask)).max() > tolerance * max(other.max() for other, _ in pairs) for c, mask in pairs):
            raise FastregError(
                "reg: the loss must be a sum of per-sample terms, got one that couples samples of different "
                "micro-batches (contrastive losses and batch statistics in the loss have no micro-batch gradients)"
            )
    return own


def _compare_norms(
    plain: dict[int, Tensor], found: dict[int, Tensor], names: dict[int, str], k: int, tolerance: float
) -> None:
    keys = list({**plain, **found})
    zero = next(iter(plain.values())).new_zeros(()).detach()
    expected = torch.stack([plain.get(key, zero).detach() for key in keys]).double()
    got = torch.stack([found.get(key, zero).detach() for key in keys]).double()
    wrong = (got - expected).abs() > tolerance * expected.sum()
    if wrong.any() or not torch.isfinite(got).all():
        lines = [
            f"{names.get(keys[i], '?')}: plain {expected[i]:.4e}, recorded {got[i]:.4e}"
            for i in wrong.nonzero().flatten().tolist()[:5]
        ]
        raise FastregError(
            f"reg: recorded squared gradient norms of micro-batch {k} must equal plain autograd's, got a difference "
            f"in {int(wrong.sum())} of {len(keys)} parameters ({'; '.join(lines)}); {_CAUSES}"
        )


def _compare_gradients(plain: Tensor, recorded: Tensor, tracked: Sequence[Tensor], tolerance: float) -> None:
    """The two squared norms agree; so must their gradients, each taken through its own double backward."""

    def gradient(squared: Tensor) -> Tensor:
        if not squared.requires_grad:
            return torch.zeros((), dtype=torch.float64, device=squared.device)
        grads = torch.autograd.grad(squared, tracked, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(tracked, grads)]
        return torch.cat([g.flatten().double() for g in flat])

    expected, got = gradient(plain), gradient(recorded)
    size = torch.stack([p.detach().double().square().sum() for p in tracked]).sum().sqrt()
    scale = torch.maximum(expected.norm(), plain.detach().double() / size.clamp(min=1))
    error = (got - expected).norm()
    if not error <= tolerance * scale:
        raise FastregError(
            f"reg: the penalty's gradient must equal plain double backward, got a relative difference of "
            f"{(error / scale).item():.2e} (an operation between the parameters and the loss has a wrong double "
            "backward; find it with fastreg.check)"
        )
