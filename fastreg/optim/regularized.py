"""An optimizer that steps along the gradient of the regularized loss, for loops that only know closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fastreg.errors import FastregError
from fastreg.optim.delegating import Delegating
from fastreg.recording import Args, Kwargs, Operation
from fastreg.regularizer import Regularizer


class Regularized(Delegating):
    r"""Any optimizer, at the gradient of the loss and its penalties.

        step along  grad [ loss + sum_p weight_p R_p ]

    It is ``reg(loss, outputs).backward()`` and the base's step, for a loop that hands its optimizer a closure in
    torch's convention::

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss
        loss = optimizer.step(closure)

    The closure runs once. Every ``backward`` in it goes through ``reg``, with the outputs of the model's last forward;
    to accumulate, run one backward after each forward. ``step()`` without a closure is the base's step: after
    :meth:`backward`, which leaves the gradient in ``.grad``, so that it can be clipped, or unscaled by a GradScaler.

    Checkpoints of this optimizer are the base's; the counters of ``reg`` are in ``reg.state_dict()``.

    Args:
        base_optimizer: takes the step; its groups, state and checkpoints are this optimizer's.
        reg: attached to the model that the closure runs; not to be called by it.

    Raises:
        FastregError: an argument has the wrong type; at the step: as :class:`fastreg.Regularizer`, or the closure runs
            no backward, returns no loss, or multiplies the loss without a word (see :meth:`backward`).

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.01), micro_batch_size=2)
        >>> optimizer = fastreg.optim.Regularized(torch.optim.SGD(model.parameters(), lr=0.1), reg)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(self, base_optimizer: Optimizer, reg: Regularizer) -> None:
        super().__init__(base_optimizer)
        if not isinstance(reg, Regularizer):
            raise FastregError(
                f"Regularized: reg must be a fastreg.Regularizer, got {type(reg).__name__} "
                "(build it first: fastreg.Regularizer(model, penalty, micro_batch_size=b))"
            )
        self.reg = reg

    def backward(
        self,
        closure: Callable[[], Tensor],
        *,
        scale: float | None = None,
        counts: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Leave the gradient of loss and penalties in ``.grad``, without a step.

        Args:
            closure: as for the step.
            scale: what every loss in the closure was multiplied by (``1/n`` under accumulation over n batches,
                ``scaler.get_scale()`` of a GradScaler); R is computed for the loss before scaling. By default 1, and
                a loss that ends in a product or a quotient is refused: it may be a scaled one.
            counts, reduction: as for :class:`fastreg.Regularizer`.

        Returns:
            What the closure returned, detached.
        """
        described: dict[str, Any] = {"scale": 1.0 if scale is None else scale, "counts": counts, "reduction": reduction}
        backwards = _RegularizedBackward(self.reg, described, may_be_scaled=scale is not None)
        hook = self.reg.model.register_forward_hook(backwards.keep_outputs)
        try:
            with torch.enable_grad(), backwards:
                loss = closure()
        finally:
            hook.remove()
        if not backwards.count or not isinstance(loss, Tensor):
            raise FastregError(
                f"step: the closure must call loss.backward() and return loss, got {backwards.count} calls of "
                f"backward and {type(loss).__name__} returned"
            )
        return loss.detach()

    def __reduce__(self) -> tuple[object, ...]:
        raise FastregError(
            "Regularized: must be neither copied nor pickled, got a request for it (its Regularizer is attached to one "
            "model: save state_dict() of the optimizer and of reg, and build both anew)"
        )


class _RegularizedBackward(TorchFunctionMode):
    """Puts the regularized loss in the place of every loss that goes backward."""

    def __init__(self, reg: Regularizer, described: dict[str, Any], may_be_scaled: bool) -> None:
        super().__init__()
        self.reg, self.described, self.may_be_scaled = reg, described, may_be_scaled
        self.outputs: object = None
        self.count = 0

    def keep_outputs(self, model: nn.Module, args: Args, outputs: object) -> None:
        """Forward hook; forwards that are not recorded (a look at other data) do not count."""
        if model.training and torch.is_grad_enabled():
            self.outputs = outputs

    def __torch_function__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if func is Tensor.backward:
            args = (self._regularized(args[0]), *args[1:])
        elif func is torch.autograd.backward:
            raise FastregError("step: the closure must call loss.backward(), got torch.autograd.backward")
        return func(*args, **(kwargs or {}))

    def _regularized(self, loss: Tensor) -> Tensor:
        self.count += 1
        last = "" if loss.grad_fn is None else loss.grad_fn.name()
        if not self.may_be_scaled and last in ("MulBackward0", "DivBackward0"):
            raise FastregError(
                f"step: the loss must not end in a product or a quotient without scale, got {last} (call "
                "optimizer.backward(closure, scale=...) with what the loss was multiplied by, 1.0 if that is part of "
                "the loss, then optimizer.step())"
            )
        return self.reg(loss, self.outputs, **self.described)
