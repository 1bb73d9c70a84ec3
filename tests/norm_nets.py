"""Small nets around one norm layer each, shared by the tests of norm layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rule_oracle import PerSample

SAMPLES = 5


class Functional(nn.Module):
    """A function of the activations, a scale and a bias, both [3]."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.rand(3) + 0.5), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b)


def after_linear(norm: nn.Module) -> PerSample:
    """Tokens [B, 4, 3]."""
    return PerSample(nn.Linear(3, 3), norm, nn.Tanh(), nn.Linear(3, 2))


def after_conv(norm: nn.Module) -> PerSample:
    """Images [B, 2, 3, 4]; three channels reach the norm."""
    return PerSample(nn.Conv2d(2, 3, 2), norm, nn.Tanh(), nn.Conv2d(3, 2, 2))


def of(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> PerSample:
    return after_linear(Functional(function))


TOKENS, IMAGE = (4, 3), (2, 3, 4)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: after_linear(nn.LayerNorm(3)), TOKENS),
    "layer_no_bias": (lambda: after_linear(nn.LayerNorm(3, bias=False)), TOKENS),
    "layer_two_dimensions": (lambda: after_linear(nn.LayerNorm((4, 3))), TOKENS),
    "layer_plain": (lambda: after_linear(nn.LayerNorm(3, elementwise_affine=False)), TOKENS),
    "layer_constant_scale": (lambda: of(lambda x, w, b: F.layer_norm(x * w, (3,), w.detach(), b)), TOKENS),
    "layer_large_eps": (lambda: after_linear(nn.LayerNorm(3, eps=0.5)), TOKENS),
    "layer_shifted_scale": (lambda: of(lambda x, w, b: F.layer_norm(x, (3,), 1 + w, b)), TOKENS),
    "layer_shared": (lambda: of(lambda x, w, b: F.layer_norm(F.layer_norm(x, (3,), w, b).sin(), (3,), w, b)), TOKENS),
    "layer_torch": (lambda: of(lambda x, w, b: torch.layer_norm(x, (3,), w, b)), TOKENS),
    "layer_transposed": (
        lambda: of(lambda x, w, b: F.layer_norm(x.transpose(1, 2), (4,)).transpose(1, 2) * w + b), TOKENS
    ),
    "rms": (lambda: after_linear(nn.RMSNorm(3)), TOKENS),
    "rms_shared": (lambda: of(lambda x, w, b: F.rms_norm(F.rms_norm(x, (3,), w).sin(), (3,), w) + b), TOKENS),
    "rms_eps": (lambda: after_linear(nn.RMSNorm((4, 3), eps=0.1)), TOKENS),
    "rms_torch": (lambda: of(lambda x, w, b: torch.rms_norm(x, (3,), w) + b), TOKENS),
    "group": (lambda: PerSample(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 2)), IMAGE),
    "group_plain": (lambda: after_conv(nn.GroupNorm(1, 3, affine=False)), IMAGE),
    "group_tokens": (lambda: of(lambda x, w, b: torch.group_norm(x.mT, 3, w, b).mT), TOKENS),
    "group_shared": (
        lambda: of(lambda x, w, b: F.group_norm(F.group_norm(x.mT, 3, w, b).sin(), 1, w, b).mT), TOKENS
    ),
    "group_first": (lambda: PerSample(nn.GroupNorm(1, 2), nn.Conv2d(2, 3, 2)), IMAGE),
    "instance": (lambda: after_conv(nn.InstanceNorm2d(3, affine=True)), IMAGE),
    "instance_plain": (lambda: after_conv(nn.InstanceNorm2d(3)), IMAGE),
    "instance_running": (lambda: after_conv(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), IMAGE),
    "instance_evaluated": (
        lambda: after_conv(nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval()), IMAGE
    ),
    "batch": (lambda: after_conv(nn.BatchNorm2d(3)), IMAGE),
    "batch_tokens": (lambda: after_linear(nn.BatchNorm1d(4)), TOKENS),
    "batch_plain": (lambda: after_conv(nn.BatchNorm2d(3, affine=False)), IMAGE),
    "batch_stateless": (lambda: after_conv(nn.BatchNorm2d(3, track_running_stats=False)), IMAGE),
    "batch_evaluated": (lambda: after_conv(nn.BatchNorm2d(3).eval()), IMAGE),
    "batch_evaluated_plain": (lambda: after_conv(nn.BatchNorm2d(3, affine=False).eval()), IMAGE),
    "batch_torch": (
        lambda: of(lambda x, w, b: torch.batch_norm(x.mT, w, b, None, None, True, 0.1, 1e-5, False).mT), TOKENS
    ),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The net with affine and running values off their defaults, and a batch."""
    make, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = make().double()
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.dim() == 1:
                nn.init.uniform_(tensor, 0.5, 1.5)
        return net, torch.randn(SAMPLES, *shape, dtype=torch.float64)
