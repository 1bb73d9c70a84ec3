"""An optimizer whose step has the direction of the gradient and a length from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.optim.delegating import Delegating
from fastreg.optim.magnitudes import Magnitude
from fastreg.ranks import local, sq_norms


class Grafted(Delegating):
    r"""Any optimizer, at a gradient of the direction that ``backward`` left and of another length.

        step along  n_t g / ||g||,      g what is in .grad, ||g|| over all parameters of the base

    ``n_t`` is the magnitude, in units of gradient norms: with SGD the step has length ``lr n_t``.

    ==============================  ==================================================================================
    :class:`UnitNorm`               normalised gradient descent, ``n_t = 1``
    :class:`MicroBatchNorm`         iterative grafting: ``||g_k||`` of one micro-batch of this step, exactly
    :class:`LoggedNorm`             external grafting: a norm that a small-batch run has logged
    ==============================  ==================================================================================

    The length is set last: what the base adds of its own (momentum, weight decay) is outside of it, and to clip or
    rescale gradients before the step changes nothing. A gradient of zero stays zero. Nothing waits for the device.

    Accumulation: the direction is that of the sum in ``.grad``. GradScaler: ``scaler.step(optimizer,
    scale=scaler.get_scale())``, and a step that overflowed is skipped. With another wrapper this one goes inside:
    ``SAM(Grafted(base, magnitude), model)``.

    Checkpoints of this optimizer are the base's; those of the magnitude are ``optimizer.magnitude.state_dict()``.

    Args:
        base_optimizer: takes the step; its groups, state and checkpoints are this optimizer's.
        magnitude: gives ``n_t``; it belongs to this optimizer alone.

    Raises:
        FastregError: an argument has the wrong type; at the step: there is no gradient, or as the magnitude.

    Source: Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853 (all three; constant rate, no momentum).

    Example:
        >>> import torch, fastreg.optim
        >>> model = torch.nn.Linear(3, 2)
        >>> magnitude = fastreg.optim.MicroBatchNorm(model, micro_batch_size=2)
        >>> optimizer = fastreg.optim.Grafted(torch.optim.SGD(model.parameters(), lr=0.1), magnitude)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        >>> optimizer.step()
    """

    # A GradScaler then unscales the gradients itself: a fused base would divide the grafted ones, length and all.
    _step_supports_amp_scaling = False

    def __init__(self, base_optimizer: Optimizer, magnitude: Magnitude) -> None:
        if isinstance(base_optimizer, Delegating):
            name = type(base_optimizer).__name__
            raise FastregError(
                f"Grafted: base_optimizer must not make gradients of its own, got {name} (wrap it the other way round: "
                f"{name}(Grafted(base, magnitude), ...))"
            )
        super().__init__(base_optimizer)
        if not isinstance(magnitude, Magnitude):
            raise FastregError(
                f"Grafted: magnitude must be a fastreg.optim.Magnitude, got {type(magnitude).__name__} (UnitNorm(), "
                "MicroBatchNorm(model, b) or LoggedNorm(path))"
            )
        self.magnitude = magnitude
        magnitude.attach(self._parameters())

    # As in Delegating.
    @overload  # type: ignore[override]
    def step(
        self, closure: None = None, *, scale: float = 1.0, reduction: str = "mean", counts: Tensor | None = None
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], Tensor],
        *,
        scale: float = 1.0,
        reduction: str = "mean",
        counts: Tensor | None = None,
    ) -> Tensor: ...

    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        scale: float = 1.0,
        reduction: str = "mean",
        counts: Tensor | None = None,
    ) -> Tensor | None:
        """The base's step at the grafted gradient; the closure's loss.

        Args:
            closure: in torch's convention; runs once, before.
            scale: what the last loss was multiplied by: ``1/n`` under accumulation over n batches, the scale of a
                GradScaler, or their product. The direction does not depend on it, nor on what follows; the norm of a
                micro-batch does.
            reduction, counts: as for :class:`fastreg.Regularizer`, for the last loss.
        """
        loss = None if closure is None else self.backward(closure)
        self._graft(self.magnitude(Reduction(reduction, scale, counts)))
        self.base.step()
        return loss

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run the closure; the step grafts what it leaves in ``.grad``."""
        with torch.enable_grad():
            return closure()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's; the magnitude is then that of all groups."""
        super().add_param_group(param_group)
        self.magnitude.remove()
        self.magnitude.attach(self._parameters())

    def remove(self) -> None:
        """Detach the magnitude from the model."""
        self.magnitude.remove()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _graft(self, norm: float | Tensor) -> None:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if not gradients:
            raise FastregError("Grafted.step: gradients must be in .grad, got none (call backward before it)")
        length = sq_norms(gradients).sum().sqrt()
        torch._foreach_mul_([local(g) for g in gradients], torch.where(length > 0, norm / length, 0))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.base, self.magnitude)
