"""Values of tensors that decide what is done."""

from __future__ import annotations

import torch
from torch import Tensor


def traced() -> bool:
    """Whether a graph is being traced."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def holds(condition: Tensor) -> bool:
    """The value of a 0-d bool tensor; where a graph is being traced, that which it has for the example inputs."""
    if not traced():
        return bool(condition)
    # Where something is traced, this has been imported; elsewhere it would take a second to.
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        return bool(condition)
