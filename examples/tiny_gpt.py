"""A model, a loss and a batch for ``fastreg check``:

    fastreg check examples.tiny_gpt:problem
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.models import GPT, GPTConfig


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def problem() -> tuple[GPT, object, tuple[Tensor, Tensor]]:
    """``(model, loss_fn, (inputs, targets))``."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=64, context=16, width=32, layers=2, heads=2))
    return model, loss_fn, (torch.randint(64, (8, 16)), torch.randint(64, (8, 16)))
