"""The monitor inside a Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastreg.integrations.attached import Attaching
from fastreg.monitor import Monitor


class MonitorMixin(Attaching):
    """A Trainer that measures its gradients by a :class:`fastreg.Monitor`, before they are clipped.

    An update accumulates n batches; the monitor is told that every loss was divided by n. Where the Trainer divides by
    tokens, a sample's gradient is that of its mean loss times its tokens over the mean number of tokens: the update's
    gradient is the mean of these, if batches have equally many samples. Scalar metrics are in the logs of training
    steps, averages in checkpoints.

    Args:
        *args, **kwargs: the Trainer's, and by keyword those of :class:`fastreg.Monitor` but the model. A model is
            recorded once: it does not go with :class:`RegularizerMixin`.

    Raises:
        FastregError: whatever a Monitor refuses.

    Example:
        >>> import tempfile, torch, transformers
        >>> from fastreg.integrations.transformers import MonitoredTrainer
        >>> config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> data = [{"input_ids": row, "labels": row} for row in torch.randint(9, (8, 6))]
        >>> args = transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=1, logging_steps=1, disable_tqdm=True)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> trainer = MonitoredTrainer(model=model, args=args, train_dataset=data, metrics=("noise_trace",))
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ..., 'fastreg/noise_trace': ..., 'epoch': ...}
        {'train_runtime': ...}
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, attached=Monitor, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; the monitor reads the gradients after the last batch of an update."""
        monitor = self._attached.to(model)
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            monitor.step(scale=scale / self.current_gradient_accumulation_steps)
        return loss
