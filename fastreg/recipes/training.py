"""One run: one method, one seed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastreg
from fastreg.optim import Grafted, LoggedNorm
from fastreg.recipes.data import Dataset
from fastreg.recipes.methods import SMALL_BATCH, Method
from fastreg.recipes.presets import MODELS
from fastreg.recipes.scoring import Score, evaluate
from fastreg.recipes.settings import Settings
from fastreg.sinks import CSVSink


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a sample's output in training depends on the other samples of its forward pass."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class Run:
    """One method with one seed on one data set; resumable after any epoch.

    For external grafting the small-batch run comes first, here, and again on resumption: it takes as many steps as this
    one, which are few epochs of it, and it is no part of the times.

    Args:
        settings: the experiment it belongs to.
        method: what takes the steps.
        seed: of weights, order, augmentation and sampled labels.
        data: on ``settings.device``.
        held_out: whether the test split is scored; a search for settings leaves it unread.

    Example:
        >>> from fastreg.recipes.datasets import load_dataset
        >>> from fastreg.recipes.settings import default_settings
        >>> settings = default_settings("digits")
        >>> run = Run(settings, settings.methods[0], 0, load_dataset("digits", None))
        >>> run.train_epoch()
        >>> len(run.history)
        1
    """

    def __init__(self, settings: Settings, method: Method, seed: int, data: Dataset, held_out: bool = True) -> None:
        torch.manual_seed(seed)
        self.settings, self.method, self.seed = settings, method, seed
        self.data, self.held_out = data, held_out
        self.model = MODELS[settings.model].build().to(settings.device)
        # Measurements run on a copy: they leave buffers of the model and its recorder alone.
        self._measured = copy.deepcopy(self.model)
        self.order = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.diverged = False
        self.regularizer = method.regularizer(self.model, settings.micro_batch_size)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=method.lr)
        magnitude = method.magnitude(self.model, settings.micro_batch_size, self._small_batch_norms)
        if magnitude is not None:
            self.optimizer = Grafted(self.optimizer, magnitude)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the loss left the finite numbers."""
        return self.diverged or len(self.history) == self.settings.epochs

    def train_epoch(self) -> None:
        """One pass over the training split in a fresh order, then the measurements."""
        start = time.perf_counter()
        loss = self._pass()
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize(self.settings.device)
        seconds = time.perf_counter() - start
        self.diverged = not loss < float("inf")
        if not self.diverged:
            self._record(loss, seconds)

    def _pass(self) -> float:
        total = 0.0
        for count, loss in enumerate(self._steps(), 1):
            total += loss
            if not total < float("inf"):
                break
        return total / count

    def _steps(self) -> Iterator[float]:
        """The losses of one pass, each after its step."""
        size = self.method.samples_per_step(self.settings.batch_size, self.settings.micro_batch_size)
        for index in torch.randperm(len(self.data.train), generator=self.order).split(size):
            index = index.to(self.settings.device)
            x = self.data.transform(self.data.train.inputs[index], self.order)
            yield self._step(x, self.data.train.targets[index])

    def _small_batch_norms(self) -> LoggedNorm:
        """The norms of as many steps of small-batch SGD as this run takes, from the same seed."""
        steps = self.settings.epochs * math.ceil(len(self.data.train) / self.settings.batch_size)
        with torch.random.fork_rng(), TemporaryDirectory() as folder:
            small = Run(self.settings, replace(self.method, name=SMALL_BATCH), self.seed, self.data, held_out=False)
            small.log_norms(steps, Path(folder) / "norms.csv")
            # Without a length for every step there is no run.
            self.diverged = small.diverged
            return LoggedNorm(Path(folder) / "norms.csv")

    def log_norms(self, steps: int, path: Path) -> None:
        """Take ``steps`` steps, without measurements, and log ||g|| of each as a monitor would; stop at divergence."""
        losses = chain.from_iterable(self._steps() for _ in repeat(None))
        with CSVSink(path) as sink:
            for step, loss in enumerate(islice(losses, steps)):
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                norm = float(nn.utils.get_total_norm(gradients)) if loss < float("inf") else math.nan
                self.diverged = not norm < float("inf")
                if self.diverged:
                    return
                sink.write(step, {"fastreg/grad_norm": norm})

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One step on one batch, by gradient accumulation where it exceeds the chunk size.

        A chunk enters with its share of the samples; that is the unsplit step exactly when the
        chunks hold equally many micro-batches.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for inputs, targets in zip(x.split(self._chunk), y.split(self._chunk)):
            share = len(targets) / len(y)
            outputs = self.model(inputs)
            loss = F.cross_entropy(outputs, targets) * share
            total += loss.item()
            if not total < float("inf"):
                return total
            if self.regularizer is not None:
                loss = self.regularizer(loss, outputs, scale=share)
            loss.backward()
        # A grafted length is read off the last backward, whose loss was scaled.
        if isinstance(self.optimizer, Grafted):
            self.optimizer.step(scale=share)
        else:
            self.optimizer.step()
        return total

    @property
    def _chunk(self) -> int:
        # A penalised step normalises every micro-batch by its own statistics, so the plain large-batch step that it is
        # compared with does the same.
        if has_batch_norm(self.model) and not self.method.kind.cuts:
            return self.settings.micro_batch_size
        return self.settings.chunk_size

    def _record(self, train_loss: float, seconds: float) -> None:
        epoch = len(self.history) + 1
        score = evaluate(self.model, self.data, self.data.validation)
        entry = {
            "epoch": epoch,
            "train_loss": train_loss,
            "validation_accuracy": score.accuracy,
            "validation_loss": score.loss,
            "seconds": seconds,
        }
        if epoch % self.settings.measure_every == 0 or epoch == self.settings.epochs:
            entry["micro_batch_grad_norm"] = self.micro_batch_grad_norm()
        self.history.append(entry)
        best = Score(self.best.get("accuracy", -1.0), self.best.get("loss", 0.0))
        if score.better_than(best):
            self.best = {"epoch": epoch, "accuracy": score.accuracy, "loss": score.loss}
            if self.held_out:
                self.best["test_accuracy"] = self._test_accuracy()

    def _test_accuracy(self) -> float:
        return evaluate(self.model, self.data, self.data.test).accuracy

    def micro_batch_grad_norm(self) -> float:
        """mean_k ||g_k|| over the micro-batches of the first batch of training samples, or chunk.

        The same samples, unaugmented, for every method and epoch; outside the timed part.
        """
        size = min(self.settings.batch_size, self.settings.chunk_size)
        inputs = self.data.transform(self.data.train.inputs[:size], None)
        batch = (inputs, self.data.train.targets[:size])
        self._measured.load_state_dict(self.model.state_dict())
        squares = fastreg.micro_batch_grad_norms(
            self._measured, F.cross_entropy, batch, self.settings.micro_batch_size
        )
        return float(squares.sqrt().mean())

    def result(self) -> dict[str, Any]:
        """Plain numbers: the history, the best epoch by validation, and the final scores."""
        final = {"train_accuracy": evaluate(self.model, self.data, self.data.train).accuracy}
        if self.held_out:
            final["test_accuracy"] = self._test_accuracy()
        return {
            "method": self.method.name,
            "seed": self.seed,
            "diverged": self.diverged,
            "best": self.best,
            "final": final,
            "history": self.history,
        }

    def remove(self) -> None:
        """Detach what rides on the model."""
        for rider in (self.regularizer, self.optimizer if isinstance(self.optimizer, Grafted) else None):
            if rider is not None:
                rider.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-identical continuation needs; the order generator is the position."""
        return {
            "method": self.method.name,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "magnitude": self.optimizer.magnitude.state_dict() if isinstance(self.optimizer, Grafted) else None,
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all(),
            "history": self.history,
            "best": self.best,
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of a run with the same settings, method and seed."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        if isinstance(self.optimizer, Grafted):
            self.optimizer.magnitude.load_state_dict(state["magnitude"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["cuda_random"])
        self.history = list(state["history"])
        self.best = dict(state["best"])
        self.diverged = bool(state["diverged"])
