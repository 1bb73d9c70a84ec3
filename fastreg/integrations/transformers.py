"""Penalties and the monitor inside the Trainer of Hugging Face transformers.

A callback could do neither: it sees no loss, gradients only after they were clipped, and the logs only after they were
written. The mixins go before any Trainer class: ``class MyTrainer(RegularizerMixin, SFTTrainer): pass``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.attach import buffers_kept
from fastreg.errors import FastregError
from fastreg.integrations.accelerate import own_outputs
from fastreg.integrations.attached import Attaching
from fastreg.integrations.monitored import MonitorMixin
from fastreg.regularizer import Regularizer

if importlib.util.find_spec("transformers") is None:
    raise FastregError(
        "fastreg.integrations.transformers: transformers must be installed, got no such package "
        "(pip install 'fastreg[integrations]')"
    )

from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

Run = Callable[..., tuple[Tensor, Any]]

# By how much a loss may miss the mean that it is taken for: bfloat16 rounds differently in other kernels.
TOLERANCE = 1e-2


class RegularizerMixin(Attaching):
    r"""A Trainer whose updates descend the loss plus ``weight * R``, as :class:`fastreg.Regularizer` defines it.

    An update accumulates n batches (of P processes). Batch j has ``n_j`` labels that count, mean loss ``C_j`` over
    them, and ``R_j``, the penalty of its own micro-batches: ``(1/m) sum_k ||g_k||^2`` with ``g_k`` the gradient of the
    mean over the labels of micro-batch k. The Trainer descends ``sum_j f_j C_j``, and this one

        sum_j f_j (C_j + weight R_j),      f_j = n_j / N        for a loss divided by N = num_items_in_batch
                                           f_j = 1 / (n P)      if the model takes no num_items_in_batch
                                           f_j = 1 / P          if it takes and ignores it (BERT's classifiers)

    In the first case the Trainer's ``compute_loss`` returns ``f_j C_j`` (times P, which the mean of gradients over
    processes takes out). R is not linear in the loss: ``f_j`` is divided out before R is formed, and multiplied back
    onto both. In the others it returns ``C_j``, which the Trainer divides by n in the second alone. Two forwards in the
    first step find out which case it is. N is the Trainer's own count: where class names do not tell that labels are
    shifted (GPT2LMHeadModel) it has the first label of every sequence in it, and loss and penalty are smaller alike.

    The model is recorded when the first batch comes: the Trainer has wrapped it by then (DistributedDataParallel).
    Evaluation is the Trainer's. Logs of training steps have ``fastreg/<penalty>`` and ``fastreg/penalty``, of the last
    batch of this process. Checkpoints hold counters and generators, for a bit-identical continuation; not with
    ``save_only_model=True``, and one that does not starts them afresh.

    Gradient checkpointing must be non-reentrant, the default. Models compiled by ``torch_compile=True``, Liger's losses
    and DataParallel are refused; FSDP and DeepSpeed are untested. With ``fp16=True`` the loss is scaled after the
    penalty: small penalties lose digits.

    Args:
        *args, **kwargs: the Trainer's, and by keyword those of :class:`fastreg.Regularizer` but the model: ``penalty``,
            ``micro_batch_size``, ``method``, ``every``, ``fraction``, ...

    Raises:
        FastregError: an argument is out of range; at the first step: the loss is no mean over the labels counted by
            :meth:`counts`; any reason for which a Regularizer refuses a model or a loss.

    Source: Smith, Dherin, Barrett, De 2021, arXiv:2101.12176, eq. 1, for R; the factors are derived here.

    Example:
        >>> import tempfile, torch, fastreg, transformers
        >>> config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> data = [{"input_ids": row, "labels": row} for row in torch.randint(9, (8, 6))]
        >>> args = transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=1, logging_steps=1, disable_tqdm=True)
        >>> trainer = RegularizedTrainer(
        ...     model=transformers.GPT2LMHeadModel(config), args=args, train_dataset=data,
        ...     penalty=fastreg.GradNorm(weight=0.01), micro_batch_size=2,
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ..., 'fastreg/grad_norm': ..., 'fastreg/penalty': ..., 'epoch': ...}
        {'train_runtime': ...}
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._calls_again = kwargs.get("method") == "perturb"
        self._divided: bool | None = None
        super().__init__(*args, attached=Regularizer, **kwargs)

    @property
    def regularizer(self) -> Regularizer | None:
        """The one at work, once the first batch has come."""
        return self._attached.one

    def counts(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Labels of each sample that count in the loss, ``[B]``: those that are not -100. None: one each.

        To be overridden for losses that are means over something else.
        """
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if not isinstance(labels, Tensor) or not labels.dim():
            return None
        if "shift_labels" not in inputs and self._shifts_labels():
            labels = labels[..., 1:]
        return labels.ne(-100).reshape(len(labels), -1).sum(1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's loss, with the gradient of the penalty added to its own."""
        plain = super().compute_loss
        if not (model.training and torch.is_grad_enabled()):
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

        def run(items: Tensor | int | None = num_items_in_batch) -> tuple[Tensor, Any]:
            # The Trainer takes labels out of its inputs.
            return plain(model, dict(inputs), return_outputs=True, num_items_in_batch=items)

        self._attached.to(model)
        counts = self.counts(inputs)
        share = (1, 1) if num_items_in_batch is None else self._share(model, run, counts, num_items_in_batch)
        loss, outputs = self._penalised(model, run, counts, *share)
        return (loss, outputs) if return_outputs else loss

    def _share(self, model: nn.Module, run: Run, counts: Tensor | None, items: Tensor | int) -> tuple[Any, Any]:
        """Numerator and denominator of the loss over the mean loss: their quotient would be rounded to float32."""
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        own = 0 if counts is None else ranks * counts.sum().clamp(min=1)
        # A batch without labels tells nothing.
        if self._divided is None and (counts is None or counts.any()):
            self._divided = _is_divided(model, run, items, float(own / items), ranks)
        return (ranks, 1) if self._divided is False else (own, items)

    def _penalised(
        self, model: nn.Module, run: Run, counts: Tensor | None, own: Tensor | int, total: Tensor | float
    ) -> tuple[Tensor, Any]:
        found: list[Any] = []
        regularizer = self._attached.to(model)

        def mean() -> Tensor:
            loss, outputs = run()
            found[:] = found or [outputs]
            return loss * total / own

        if self._calls_again:
            loss = regularizer(mean, counts=counts)
        else:
            with own_outputs(model) as outputs:
                loss = mean()
            loss = regularizer(loss, *outputs[-1:], counts=counts)
        return loss * own / total, found[0]

    def _shifts_labels(self) -> bool:
        """Whether the first label of a sequence is none, by the loss itself: not every class name tells."""
        decodes = not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return decodes and getattr(self.model, "loss_function", None) is ForCausalLMLoss


@torch.no_grad()
def _is_divided(model: nn.Module, run: Run, items: Tensor | int, share: float, ranks: int) -> bool:
    """Whether the loss is ``share`` times the mean, by num_items_in_batch, or ``ranks`` times, in spite of it.

    Both may be the same by chance: for twice as many items they are not.
    """
    losses = []
    for count in (2 * items, None):
        with torch.random.fork_rng(), buffers_kept(model):
            losses.append(run(count)[0].item())
    found, mean = losses
    divided, ignored = (abs(found - f * mean) <= TOLERANCE * abs(f * mean) for f in (share / 2, ranks))
    if not (divided or ignored):
        raise FastregError(
            f"RegularizerMixin: the loss must be the mean over labels that count, {mean:.6g}, times their share in the "
            f"update, {share:.4g}, or times 1, got {2 * found:.6g} or {found:.6g} (override counts)"
        )
    return divided


class RegularizedTrainer(RegularizerMixin, Trainer):
    """``transformers.Trainer`` with a penalty: see :class:`RegularizerMixin`."""


class MonitoredTrainer(MonitorMixin, Trainer):
    """``transformers.Trainer`` with a monitor: see :class:`MonitorMixin`."""
