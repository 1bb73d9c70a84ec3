"""One run: one method, one seed."""

import copy
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastreg
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.methods import PENALISED, Method
from fastreg.recipes.settings import MODELS, Settings

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and mean cross entropy on one split."""

    accuracy: float
    loss: float

    def better_than(self, other: "Score") -> bool:
        """Higher accuracy, then lower loss: accuracies of small splits often tie."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


def evaluate(model: nn.Module, data: Dataset, split: Split) -> Score:
    """Score ``model`` on ``split`` in evaluation mode; the model is left in training mode."""
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for x, y in zip(
            split.inputs.split(EVALUATION_BATCH), split.targets.split(EVALUATION_BATCH)
        ):
            outputs = model(data.transform(x, None))
            correct += int((outputs.argmax(1) == y).sum())
            loss += float(F.cross_entropy(outputs, y, reduction="sum"))
    model.train()
    return Score(correct / len(split), loss / len(split))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a sample's output in training depends on the other samples of its forward pass."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class Run:
    """One method with one seed on one data set; resumable after any epoch.

    Args:
        settings: the experiment it belongs to.
        method: what takes the steps.
        seed: of weights, order, augmentation and sampled labels.
        data: on ``settings.device``.
        held_out: whether the test split is scored; a search for settings leaves it unread.

    Example:
        >>> from fastreg.recipes.settings import default_settings, load_dataset
        >>> settings = default_settings("digits")
        >>> run = Run(settings, settings.methods[0], 0, load_dataset("digits", None))
        >>> run.train_epoch()
        >>> len(run.history)
        1
    """

    def __init__(
        self, settings: Settings, method: Method, seed: int, data: Dataset, held_out: bool = True
    ) -> None:
        torch.manual_seed(seed)
        self.settings, self.method, self.seed = settings, method, seed
        self.data, self.held_out = data, held_out
        self.model = MODELS[settings.model].build().to(settings.device)
        # Measurements run on a copy: they leave buffers of the model and its recorder alone.
        self._measured = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=method.lr)
        self.regularizer = method.regularizer(self.model, settings.micro_batch_size)
        self.order = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.diverged = False

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
        size = self.method.samples_per_step(
            self.settings.batch_size, self.settings.micro_batch_size
        )
        indices = torch.randperm(len(self.data.train), generator=self.order).split(size)
        total = 0.0
        for index in indices:
            index = index.to(self.settings.device)
            x = self.data.transform(self.data.train.inputs[index], self.order)
            total += self._step(x, self.data.train.targets[index])
            if not total < float("inf"):
                break
        return total / len(indices)

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
        self.optimizer.step()
        return total

    @property
    def _chunk(self) -> int:
        # A penalised step normalises every micro-batch by its own statistics, so the plain
        # large-batch step that it is compared with does the same.
        if has_batch_norm(self.model) and self.method.name not in PENALISED:
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

    def result(self) -> dict[str, object]:
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

    def state_dict(self) -> dict[str, object]:
        """Everything a bit-identical continuation needs; the order generator is the position."""
        return {
            "method": self.method.name,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all(),
            "history": self.history,
            "best": self.best,
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from ``state_dict()`` of a run with the same settings, method and seed."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["cuda_random"])
        self.history = list(state["history"])
        self.best = dict(state["best"])
        self.diverged = bool(state["diverged"])
