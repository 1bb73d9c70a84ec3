"""How well a model does on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastreg.recipes.data import Dataset, Split

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and mean cross entropy on one split."""

    accuracy: float
    loss: float

    def better_than(self, other: Score) -> bool:
        """Higher accuracy, then lower loss: accuracies of small splits often tie."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


def evaluate(model: nn.Module, data: Dataset, split: Split) -> Score:
    """Score ``model`` on ``split`` in evaluation mode; the model is left in training mode."""
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for x, y in zip(split.inputs.split(EVALUATION_BATCH), split.targets.split(EVALUATION_BATCH)):
            outputs = model(data.transform(x, None))
            correct += int((outputs.argmax(1) == y).sum())
            loss += float(F.cross_entropy(outputs, y, reduction="sum"))
    model.train()
    return Score(correct / len(split), loss / len(split))
