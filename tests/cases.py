"""The models every exactness test runs on: factories of tiny seeded models with their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from case_models import (
    CalledTwice,
    EncoderClassifier,
    Gates,
    LowRank,
    RawParameters,
    Recurrent,
    ResidualConv,
    TiedPadding,
    TinyGPT,
    TinyViT,
    TokenMean,
    WithUnused,
)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of every sample, averaged over its tokens: [B, ..., C], [B, ...] -> [B]."""
    losses = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of every sample: [B, C], [B, C] -> [B]."""
    return (outputs - targets).square().flatten(1).mean(1)


def linear(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss linear in the outputs, so that R does not depend on the last bias: [B, C] -> [B]."""
    return (outputs * targets).flatten(1).sum(1)


@dataclass(frozen=True)
class Case:
    """A model and its data. `min_group` is the smallest micro-batch the model accepts."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int | None = None
    classes: int = 3
    per_token: bool = False
    sample_losses: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    min_group: int = 1
    may_refuse: bool = False

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model, the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().to(dtype)

    def batch(self, samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Inputs and targets, the same every time."""
        draw = torch.Generator().manual_seed(1)
        if self.vocabulary is None:
            inputs = torch.randn(samples, *self.shape, generator=draw, dtype=torch.float64).to(dtype)
        else:
            inputs = torch.randint(self.vocabulary, (samples, *self.shape), generator=draw)
        if self.sample_losses is not cross_entropy:
            return inputs, torch.randn(samples, self.classes, generator=draw, dtype=torch.float64).to(dtype)
        shape = (samples, *self.shape) if self.per_token else (samples,)
        return inputs, torch.randint(self.classes, shape, generator=draw)

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over samples."""
        return self.sample_losses(outputs, targets).mean()


def mlp(activation: type[nn.Module] = nn.ReLU, bias: bool = True, outputs: int = 3) -> nn.Sequential:
    """5 -> 6 -> 4 -> outputs."""
    return nn.Sequential(
        nn.Linear(5, 6, bias=bias),
        activation(),
        nn.Linear(6, 4, bias=bias),
        activation(),
        nn.Linear(4, outputs, bias=bias),
    )


def conv_head(*layers: nn.Module, channels: int) -> nn.Sequential:
    """The layers, tanh, mean over space, linear head."""
    return nn.Sequential(*layers, nn.Tanh(), _SpaceMean(), nn.Linear(channels, 3))


class _SpaceMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


def batch_norm_net(training: bool) -> nn.Module:
    """Convolution, batch norm, twice."""
    net = conv_head(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), channels=4,
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.train(training)
    return net


def norm_net(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Linear, norm over the last dimension, tanh, linear; inputs [B, T, 4]."""
    return nn.Sequential(nn.Linear(4, 5), norm(5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))


def frozen_mlp() -> nn.Sequential:
    """A frozen layer in front, a frozen bias in the middle, a frozen head."""
    net = mlp(nn.Tanh)
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    net[4].weight.requires_grad_(False)
    return net


def frozen_in_the_middle() -> nn.Sequential:
    """Only the outer layers learn: the gradient must pass through the frozen ones."""
    net = mlp(nn.GELU)
    net[2].requires_grad_(False)
    return net


IMAGE, VOLUME, TOKENS = (2, 4, 4), (2, 3, 4, 3), (3, 4)

CASES = [
    Case("mlp_relu", mlp, (5,)),
    Case("mlp_gelu", lambda: mlp(nn.GELU), (5,)),
    Case("mlp_tanh_no_bias", lambda: mlp(nn.Tanh, bias=False), (5,)),
    Case("mlp_silu_square", lambda: mlp(nn.SiLU), (5,), sample_losses=square),
    Case("last_layer_bias", lambda: mlp(nn.Tanh), (5,), sample_losses=linear),
    Case("one_linear", lambda: nn.Linear(5, 3), (5,)),
    Case("linear_3d", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (3, 4),
         sample_losses=lambda out, y: square(out.mean(1), y)),
    Case("linear_4d", lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), (2, 3, 4),
         sample_losses=lambda out, y: square(out.mean((1, 2)), y)),
    Case("residual_conv", ResidualConv, IMAGE),
    Case("batch_norm_train", lambda: batch_norm_net(True), IMAGE, min_group=2),
    Case("batch_norm_eval", lambda: batch_norm_net(False), IMAGE),
    Case("conv1d_dilated_strided", lambda: conv_head(
        nn.Conv1d(4, 5, 3, stride=2, dilation=2, padding=3), channels=5), (4, 9)),
    Case("conv1d_same", lambda: conv_head(nn.Conv1d(2, 3, 4, padding="same"), channels=3), (2, 6)),
    Case("conv2d_depthwise", lambda: conv_head(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, padding=1), channels=4), IMAGE),
    Case("conv2d_grouped", lambda: conv_head(
        nn.Conv2d(4, 6, (3, 2), groups=2, stride=(2, 1), padding=(1, 0)), channels=6), (4, 5, 4)),
    Case("conv2d_circular", lambda: conv_head(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), channels=3), IMAGE),
    Case("conv3d", lambda: conv_head(
        nn.Conv3d(2, 4, 2, groups=2), nn.GELU(), nn.Conv3d(4, 3, (1, 2, 1)), channels=3), VOLUME),
    Case("conv_transpose2d", lambda: conv_head(
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), nn.GELU(),
        nn.ConvTranspose2d(4, 4, 2, groups=2, bias=False), channels=4), IMAGE),
    Case("gpt_tied", TinyGPT, (5,), vocabulary=7, classes=7, per_token=True),
    Case("vit", TinyViT, IMAGE),
    Case("transformer_encoder", lambda: EncoderClassifier(norm_first=False), TOKENS),
    Case("transformer_encoder_norm_first", lambda: EncoderClassifier(norm_first=True), TOKENS),
    Case("layer_norm", lambda: norm_net(nn.LayerNorm), TOKENS),
    Case("layer_norm_no_bias", lambda: norm_net(lambda n: nn.LayerNorm(n, bias=False)), TOKENS),
    Case("layer_norm_two_dims", lambda: nn.Sequential(
        nn.Linear(4, 5), nn.LayerNorm((3, 5)), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), TOKENS),
    Case("rms_norm", lambda: norm_net(nn.RMSNorm), TOKENS),
    Case("instance_norm", lambda: conv_head(
        nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Tanh(), nn.Conv2d(3, 4, 2),
        channels=4), IMAGE),
    Case("prelu", lambda: nn.Sequential(
        nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 3)), (5,)),
    Case("embedding_padding", TokenMean, (4,), vocabulary=6),
    Case("tied_padding", TiedPadding, (4,), vocabulary=5, classes=5, per_token=True),
    Case("raw_parameters", RawParameters, (5,)),
    Case("gates", Gates, (3, 4)),
    Case("called_twice", CalledTwice, (5,)),
    Case("frozen", frozen_mlp, (5,)),
    Case("frozen_in_the_middle", frozen_in_the_middle, (5,)),
    Case("low_rank", lambda: nn.Sequential(LowRank(5, 6), nn.Tanh(), LowRank(6, 3)), (5,)),
    Case("unused", WithUnused, (4,)),
    Case("lstm", lambda: Recurrent(nn.LSTM), TOKENS, may_refuse=True),
    Case("gru", lambda: Recurrent(nn.GRU), TOKENS, may_refuse=True),
]

BY_NAME = {case.name: case for case in CASES}
