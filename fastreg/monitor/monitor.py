"""The monitor: gradient statistics that ride on the training backward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.monitor.arguments import check_arguments
from fastreg.monitor.backward_source import BackwardSource
from fastreg.monitor.means import Layers, Means, squared_gradients
from fastreg.monitor.metrics import DEFAULT, METRICS, Measured
from fastreg.monitor.micro_batch_source import MicroBatchSource
from fastreg.monitor.noise import Average, moments
from fastreg.monitor.sources import Backward, Source
from fastreg.ranks import is_first
from fastreg.sinks import Sink

# Of a batch's micro-batches, where only means over them are asked for: norms then cost a few percent of a step.
EIGHTH = 0.125


class Monitor:
    r"""Measures gradients while a model trains: noise scale, norms, covariance and Fisher traces.

    Norms are taken from the backward pass of the training step; there is no second one, and losses and gradients are
    bit for bit what they were (to rounding for ``nn.MultiheadAttention`` and recurrent layers, and under autocast for
    PReLU and, on the CPU, convolutions called several times). Nothing waits for the device until a value is read::

        monitor = fastreg.Monitor(model)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            monitor.step()            # after the step's backward passes, before clipping and the optimizer
            optimizer.step(); optimizer.zero_grad()

    With ``G`` and ``S`` mean and covariance of per-sample gradients, squared norms of micro-batch gradients, of b
    samples, and of the batch's gradient give unbiased estimates

        tr S ~ (mean_k ||g_k||^2 - ||g||^2) / (1/b - 1/B),      ||G||^2 ~ ||g||^2 - tr S / B

    each averaged over steps before the noise scale ``tr S / ||G||^2`` is formed (McCandlish, Kaplan, Amodei 2018,
    arXiv:1812.06162, appendix A.1).

    Args:
        model: recorded while it is in training mode with gradients enabled; neither wrapped nor changed.
        metrics: names among ``fastreg.monitor.METRICS``.
        micro_batch_size: b, samples per micro-batch, 1 for per-sample norms. None: every backward pass is one
            micro-batch (accumulation steps, and ranks of DistributedDataParallel or ``fully_shard``); this works with
            any model and costs one read of the gradients.
        fraction: share of the micro-batches of every batch that are measured, in turn, in (0, 1]. Estimates of means
            stay unbiased. None: all where a metric has an entry for each of them, an eighth otherwise.
        ema: decay of the averages over measured steps, in [0, 1).
        every: measure at every ``every``-th step; in between nothing is recorded.
        per_layer: measure every module with parameters of its own as well: ``fastreg/<metric>/<module>``.
        sinks: each takes the scalar metrics of every measured step (one wait for the device a step); on rank 0 only.
        seed: of the labels that ``fisher_trace`` draws; None takes it from ``torch.initial_seed()``.

    Attributes:
        metrics: of the last measured step: ``fastreg/<name>``, 0-d tensors, vectors for norms.

    Raises:
        FastregError: an argument is out of range; a metric does not go with the micro-batch size; the model
            synchronises batch norm statistics; at a forward: a layer couples the samples of a batch.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> monitor = fastreg.Monitor(model, metrics=("grad_noise_scale", "sample_norms"))
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,)))
        >>> loss.backward()
        >>> monitor.step()["fastreg/sample_norms"].shape
        torch.Size([8])
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Sequence[str] = DEFAULT,
        *,
        micro_batch_size: int | None = 1,
        fraction: float | None = None,
        ema: float = 0.99,
        every: int = 1,
        per_layer: bool = False,
        sinks: Sequence[Sink] = (),
        seed: int | None = None,
    ) -> None:
        check_arguments(metrics, micro_batch_size, fraction, ema, every)
        self.model, self.every, self.sinks = model, every, tuple(sinks)
        self.metrics: dict[str, Tensor] = {}
        self._names = tuple(metrics)
        if micro_batch_size is None:
            self._source: Source = BackwardSource(model)
        else:
            if fraction is None:
                fraction = 1.0 if any(METRICS[name].aligned for name in metrics) else EIGHTH
            source = self._source = MicroBatchSource(model, micro_batch_size, fraction, per_layer, seed)
            if any(METRICS[name].fisher for name in metrics):
                source.trace_fisher()
        self._layers = Layers(model, self._source.parameters) if per_layer else None
        self._average = Average(ema)
        self._steps = 0
        self._warns = any(METRICS[name].noise for name in metrics)

    def step(
        self, *, scale: float | Tensor = 1.0, reduction: str = "mean", counts: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Read what the backward passes since the last call left; ``metrics``, as they were if it is not their turn.

        Args:
            scale: what every loss was multiplied by: ``1/n`` under accumulation over n batches, the scale of a
                GradScaler (call before ``unscale_``), or their product. A tensor is not waited for.
            reduction: ``"mean"``, or ``"sum"`` if the losses are sums over samples.
            counts: tokens per sample ``[B]`` of a loss that is a mean over tokens; noise is then that of tokens.

        Raises:
            FastregError: no backward pass of a recorded forward, or no gradient, since the last call; a backward pass
                without a forward of its own; a parameter that was frozen when the monitor was built no longer is.
        """
        number, self._steps = self._steps, self._steps + 1
        self._source.on = self._steps % self.every == 0
        if number % self.every:
            return self.metrics
        self._source.check_parameters()
        multiplied = scale if isinstance(scale, Tensor) else 1.0
        described = Reduction(reduction, 1.0 if isinstance(scale, Tensor) else scale, counts)
        passes = self._source.take(described, self._by_layer)
        if not passes or (counts is not None and len(passes) > 1):
            raise FastregError(
                f"Monitor.step: a backward pass must have run since the last call (one, where counts are given), got "
                f"{len(passes)} (is the model in training mode?)"
            )
        measured = self._measured(passes, described, multiplied)
        self.metrics = self._evaluated(measured)
        self._write(number)
        return self.metrics

    def remove(self) -> None:
        """Detach from the model."""
        self._source.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next values to be the same."""
        return {"steps": self._steps, "average": self._average.state_dict(), "source": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._steps = state["steps"]
        self._source.on = self._steps % self.every == 0
        self._average.load_state_dict(state["average"])
        self._source.load_state_dict(state["source"])

    def _by_layer(self, squared: Tensor) -> Tensor:
        return squared.sum(-1, keepdim=True) if self._layers is None else self._layers.sums(squared)

    def _measured(self, passes: list[Backward], described: Reduction, multiplied: float | Tensor) -> Measured:
        squared = torch.cat([one.squared for one in passes]) / multiplied**2
        means = Means.of(passes, squared, self.model)
        big = self._by_layer(squared_gradients(self._source.parameters, squared))
        big = big * (means.mean_gradient(described) / multiplied) ** 2
        sizes = means.sizes(described)
        if sizes.one and self._warns:
            self._warns = False
            warnings.warn(
                "Monitor: one micro-batch a step tells no noise from signal: noise metrics are NaN (choose a smaller "
                "micro_batch_size, accumulate, or train on several ranks)",
                stacklevel=3,
            )
        self._average.add(moments(means.small, big, sizes))
        trace, signal = self._average.value()
        fisher = getattr(self._source, "fisher", None)
        drawn = torch.stack(fisher).mean() if fisher else None
        if fisher:
            fisher.clear()
        return Measured(means.small, big, trace, signal, squared.sum(1).sqrt(), drawn)

    def _evaluated(self, by_layer: Measured) -> dict[str, Tensor]:
        sums = {field: getattr(by_layer, field).sum() for field in ("small", "big", "trace", "signal")}
        total = replace(by_layer, **sums)
        found = {f"fastreg/{name}": METRICS[name].value(total) for name in self._names}
        if self._layers is not None:
            for name in (name for name in self._names if METRICS[name].layered):
                values = METRICS[name].value(by_layer).unbind()
                found |= {f"fastreg/{name}/{layer}": v for layer, v in zip(self._layers.names, values, strict=True)}
        return found

    def _write(self, number: int) -> None:
        if not self.sinks or not is_first(self.model):
            return
        scalars = {name: value for name, value in self.metrics.items() if not value.dim()}
        values = torch.stack([value.double() for value in scalars.values()]).tolist()
        for sink in self.sinks:
            sink.write(number, dict(zip(scalars, values, strict=True)))
