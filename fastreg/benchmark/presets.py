"""The models and batches that the benchmark measures."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastreg.benchmark.vit import ViT
from fastreg.errors import FastregError
from fastreg.models import GPT, GPTConfig, mlp, resnet18, small_resnet


def mean_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over samples and, where there are any, tokens.

    Args:
        outputs: logits ``[B, V]`` or ``[B, T, V]``.
        targets: classes ``[B]`` or ``[B, T]`` int64.
    """
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclasses.dataclass(frozen=True)
class Problem:
    """One batch, the model it trains, and the penalty to add: loss + weight * R.

    Attributes:
        model: maps ``inputs`` to logits.
        inputs: ``[B, ...]``.
        targets: ``[B]`` or ``[B, T]`` int64.
        micro_batches: m; divides B.
        weight: factor of the penalty R.
        autocast: dtype of the forward pass, or None for that of the parameters.
    """

    model: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor
    micro_batches: int
    weight: float = 0.01
    autocast: torch.dtype | None = None

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch, b = B / m."""
        return len(self.inputs) // self.micro_batches

    @property
    def coupled(self) -> bool:
        """Whether samples interact: batch norm takes its statistics from the batch it sees."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self.model.modules())

    def chunks(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The m micro-batches, ``(inputs, targets)`` each."""
        m = self.micro_batches
        return list(zip(self.inputs.chunk(m), self.targets.chunk(m)))

    def precision(self) -> AbstractContextManager[None]:
        """The context in which a forward pass and its loss run."""
        kind = self.inputs.device.type
        return torch.autocast(kind, self.autocast, enabled=self.autocast is not None)

    def copy(self) -> Problem:
        """The same problem with a model of its own, so that methods do not share hooks."""
        return dataclasses.replace(self, model=copy.deepcopy(self.model))


# (batch, generator) -> (inputs, targets)
Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and a batch to train it on.

    Attributes:
        name: what ``--model`` calls it.
        about: sizes, in words.
        build: makes the model.
        draw: makes ``(inputs, targets)`` from a generator.
        batch: samples of the batch.
        by_default: measured by ``--model all``; the others are larger.
        gate: what is gated in its place, where float64 results of this one would take too long.
    """

    name: str
    about: str
    build: Callable[[], nn.Module]
    draw: Draw
    batch: int
    by_default: bool = True
    gate: Preset | None = None

    def problem(
        self,
        micro_batches: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> Problem:
        """The preset's problem with ``micro_batches`` micro-batches.

        Weights and inputs are drawn in float32 on the CPU whatever ``dtype`` and ``device`` are,
        so a float64 problem is the exact counterpart of the float32 one.

        Raises:
            FastregError: ``micro_batches`` does not divide the batch.
        """
        if micro_batches < 1 or self.batch % micro_batches:
            raise FastregError(
                f"bench: m must divide the batch of {self.name}, {self.batch} samples, "
                f"got {micro_batches}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        inputs, targets = self.draw(self.batch, torch.Generator().manual_seed(seed))
        if inputs.is_floating_point():
            inputs = inputs.to(dtype)
        model = model.to(device=device, dtype=dtype)
        return Problem(
            model, inputs.to(device), targets.to(device), micro_batches, autocast=autocast
        )


def _vectors(features: int) -> Draw:
    def draw(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(batch, features, generator=generator)
        return inputs, torch.randint(10, (batch,), generator=generator)

    return draw


def _images(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(batch, 3, 32, 32, generator=generator)
    return inputs, torch.randint(10, (batch,), generator=generator)


def _tokens(config: GPTConfig) -> Draw:
    def draw(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (batch, config.context + 1)
        tokens = torch.randint(config.vocab, shape, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return draw


def gpt_of(batch: int = 8, **sizes: int) -> Preset:
    """The preset ``"gpt"`` at other sizes, those of :class:`fastreg.models.GPTConfig`."""
    config = dataclasses.replace(SMALL_GPT, **sizes)
    about = f"{config.layers} layers, width {config.width}, {config.heads} heads, {config.context} tokens"
    about += f", vocabulary {config.vocab}, tied head, batch {batch}"
    return Preset("gpt", about, lambda: GPT(config), _tokens(config), batch)


def mlp_of(width: int = 512, depth: int = 3, batch: int = 256) -> Preset:
    """The preset ``"mlp"`` at other sizes: ``depth`` layers, all but the last of them ``width`` wide."""
    widths = (784, *(width,) * (depth - 1), 10)
    about = f"{'-'.join(map(str, widths))} ReLU, batch {batch}"
    return Preset("mlp", about, lambda: mlp(widths), _vectors(784), batch)


def _language_model(name: str, width: int, layers: int, heads: int, context: int, batch: int) -> Preset:
    """One at a size that is trained with; its kind is gated at a smaller one."""
    config = GPTConfig(vocab=50304, context=context, width=width, layers=layers, heads=heads)
    about = f"{layers} layers, width {width}, {heads} heads, {context} tokens"
    about += f", vocabulary 50304, tied head, batch {batch}"
    return Preset(name, about, lambda: GPT(config), _tokens(config), batch, by_default=False, gate=GPT_GATE)


def _resnet() -> Preset:
    about = "residual conv net, three stages of width 32, 64, 128, group norm, 3x32x32, batch 64"
    whole = Preset("resnet", about, lambda: small_resnet(num_classes=10, width=32, norm="group"), _images, batch=64)
    return dataclasses.replace(whole, gate=dataclasses.replace(whole, batch=16))


def _resnet18(name: str, norm: str, batch: int) -> Preset:
    about = f"ResNet-18 with {norm} norm, 3x32x32, batch {batch}"
    whole = Preset(name, about, lambda: resnet18(num_classes=10, norm=norm), _images, batch, by_default=False)
    return dataclasses.replace(whole, gate=dataclasses.replace(whole, batch=4))


def _vit() -> Preset:
    about = "12 blocks, width 192, 3 heads, patches of 4x4 and a class token, 3x32x32, batch 16"
    whole = Preset("vit-tiny", about, ViT, _images, batch=16, by_default=False)
    return dataclasses.replace(whole, gate=dataclasses.replace(whole, build=lambda: ViT(depth=2)))


SMALL_GPT = GPTConfig(vocab=1024, context=128, width=256, layers=4, heads=4)
GPT2 = GPTConfig(vocab=32768, context=512, width=768, layers=12, heads=12)
# Half the layers and tokens: the float64 results of "gpt" and of its like at sizes that are trained with.
GPT_GATE = gpt_of(16, context=64, layers=2)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        mlp_of(),
        _resnet(),
        dataclasses.replace(gpt_of(), gate=GPT_GATE),
        dataclasses.replace(mlp_of(2048, batch=512), name="mlp2048", by_default=False),
        _resnet18("resnet18", "group", batch=256),
        _resnet18("resnet18-gn", "group", batch=16),
        _resnet18("resnet18-bn", "batch", batch=16),
        _vit(),
        Preset(
            "gpt2",
            "12 layers, width 768, 12 heads, 512 tokens, vocabulary 32768, tied head, batch 16",
            lambda: GPT(GPT2),
            _tokens(GPT2),
            batch=16,
            by_default=False,
        ),
        _language_model("gpt-124m", 768, 12, 12, context=1024, batch=16),
        _language_model("gpt-124m-4k", 768, 12, 12, context=4096, batch=4),
        _language_model("gpt-350m", 1024, 24, 16, context=1024, batch=8),
        _language_model("gpt-350m-4k", 1024, 24, 16, context=4096, batch=2),
        _language_model("gpt-1.3b", 2048, 24, 16, context=1024, batch=4),
        _language_model("gpt-1.3b-4k", 2048, 24, 16, context=4096, batch=2),
    )
}
