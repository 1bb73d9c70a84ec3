r"""Penalties and the monitor in modules of Lightning.

A penalty needs one line: ``return self.reg(loss)`` in ``training_step``, for a Regularizer of the network that the step
calls. With automatic optimization Lightning descends, per update of n accumulated batches,

    (1/n) sum_j (C_j + weight R_j),      C_j, R_j of batch j alone,

because it divides by n, and a GradScaler multiplies, what ``training_step`` returned: loss and penalty alike, hence
``scale=1``, the default. At the end of an epoch it divides by n even where fewer batches are left. With
DistributedDataParallel it descends the mean of this over processes. Clipping comes after.

With ``precision="16-mixed"`` the loss is scaled after the penalty: small penalties lose digits.

The callbacks here log, keep state in checkpoints, and run the monitor where gradients are neither unscaled nor clipped.

Of :mod:`fastreg.optim`, ``Regularized`` refuses the loss, which Lightning divides inside the closure. ``SAM`` works
with automatic optimization where every batch is an update of its own; without a word it does not under
``accumulate_grad_batches``, which hands it the last batch of an update alone, nor under ``precision="16-mixed"``, which
hands it no closure. Step by hand in these cases (``automatic_optimization = False``).
"""

from __future__ import annotations

import importlib.util
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastreg.errors import FastregError
from fastreg.monitor import Monitor
from fastreg.regularizer import Regularizer

if importlib.util.find_spec("lightning") is None:
    raise FastregError(
        "fastreg.integrations.lightning: lightning must be installed, got no such package "
        "(pip install 'fastreg[integrations]')"
    )

from lightning.pytorch import Callback, LightningModule, Trainer

Kind = TypeVar("Kind", Regularizer, Monitor)


class Kept(Callback, Generic[Kind]):
    """Logs what is attached to a network, and keeps its state in the Trainer's checkpoints, one for each process."""

    kind: type[Kind]

    def __init__(self, one: Kind) -> None:
        if not isinstance(one, self.kind):
            raise FastregError(
                f"{type(self).__name__}: argument must be a fastreg.{self.kind.__name__}, got {type(one).__name__} "
                "(build it first, for a module inside the LightningModule)"
            )
        if isinstance(one.model, LightningModule):
            raise FastregError(
                f"{type(self).__name__}: {self.kind.__name__} must be attached to a module inside the LightningModule, "
                f"got {type(one.model).__name__} itself (Lightning calls it for training_step, loss and all: attach to "
                "the network that training_step calls)"
            )
        self.one: Kind = one

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes."""
        if not dist.is_initialized():
            return {"processes": [self.one.state_dict()]}
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.one.state_dict())
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the state of this process."""
        processes = state_dict["processes"]
        rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if len(processes) != count:
            raise FastregError(
                f"{type(self).__name__}: checkpoint must be of {count} processes, as there are now, got one of "
                f"{len(processes)} (train on as many, or drop this callback to start its state afresh)"
            )
        self.one.load_state_dict(processes[rank])

    def _log(self, module: LightningModule, metrics: dict[str, Tensor]) -> None:
        module.log_dict({name: value for name, value in metrics.items() if not value.dim()})


class RegularizerCallback(Kept[Regularizer]):
    """Logs and checkpoints of the Regularizer that ``training_step`` calls.

    Every batch logs ``fastreg/<penalty>`` and ``fastreg/penalty``, of this process, by the module's ``log_dict``, which
    waits for the device only where a logger writes. Checkpoints hold counters and generators of every process: a run
    goes on bit-identically where Lightning itself does so, from checkpoints of ModelCheckpoint at the end of an epoch.

    Args:
        reg: attached to a module inside the LightningModule, not to that itself.

    Raises:
        FastregError: the argument is another; the strategy is DistributedDataParallel with ``static_graph=True``, under
            which gradients of a double backward are silently not reduced; a checkpoint is of another number of
            processes.

    Example:
        >>> import torch, fastreg, lightning
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(3, 2)
        ...         self.reg = fastreg.Regularizer(self.net, fastreg.GradNorm(weight=0.01), micro_batch_size=2)
        ...     def training_step(self, batch, number):
        ...         return self.reg(torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        ...     def configure_callbacks(self):
        ...         return [RegularizerCallback(self.reg)]
        >>> off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> trainer = lightning.Trainer(accelerator="cpu", max_steps=2, **dict.fromkeys(off, False))
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
        >>> trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=4))
        >>> sorted(trainer.logged_metrics)
        ['fastreg/grad_norm', 'fastreg/penalty']
    """

    kind = Regularizer

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what would be wrong without a word: the Regularizer does not see the wrapper."""
        if isinstance(trainer.model, DistributedDataParallel) and trainer.model.static_graph:
            raise FastregError(
                "RegularizerCallback: strategy must not be DistributedDataParallel with static_graph=True, got it "
                "(with a double backward its gradients are silently not reduced: drop static_graph)"
            )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        """Log."""
        self._log(module, self.one.metrics)


class MonitorCallback(Kept[Monitor]):
    """A :class:`fastreg.Monitor` in the loop: it reads the gradients of every update, before they are clipped.

    An update of n accumulated batches is n backward passes of losses that Lightning divided by n, and multiplied by the
    scale of a GradScaler; under DistributedDataParallel micro-batches of all processes count. Scalar metrics are logged
    by the module's ``log_dict``, at every update. Checkpoints hold the averages.

    Args:
        monitor: attached to a module inside the LightningModule, not to that itself. A model is recorded once: it does
            not go with a Regularizer of the same module.

    Raises:
        FastregError: the argument is another; the module optimises by hand; a checkpoint is of another number of
            processes; whatever a Monitor refuses.

    Example:
        >>> import torch, fastreg, lightning
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(3, 2)
        ...     def training_step(self, batch, number):
        ...         return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> module = Classifier()
        >>> watch = MonitorCallback(fastreg.Monitor(module.net, metrics=("noise_trace",)))
        >>> trainer = lightning.Trainer(accelerator="cpu", max_steps=2, callbacks=[watch], **dict.fromkeys(off, False))
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
        >>> trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        >>> sorted(trainer.logged_metrics)
        ['fastreg/noise_trace']
    """

    kind = Monitor

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Let the monitor know of the ranks, whose wrapper was not there when it was built."""
        if not module.automatic_optimization:
            raise FastregError(
                "MonitorCallback: module must have automatic_optimization=True, got False (call monitor.step() in "
                "training_step, after the last manual_backward of an update)"
            )
        self.one.model = trainer.model

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """Read the update's gradients after its last batch: a GradScaler unscales them before any later hook."""
        if trainer.fit_loop._should_accumulate():
            return
        scale = 1.0 if trainer.scaler is None else trainer.scaler.get_scale()
        self._log(module, self.one.step(scale=scale / trainer.accumulate_grad_batches))
