"""Plain PyTorch models for the recipes, the benchmark and the tests; batch is dim 0 everywhere."""

from fastreg.models.gpt import GPT, GPTConfig
from fastreg.models.mlp import mlp
from fastreg.models.resnet import ResNet, resnet18, small_resnet
from fastreg.models.vgg import vgg11
from fastreg.models.wide_resnet import wide_resnet

__all__ = [
    "GPT",
    "GPTConfig",
    "ResNet",
    "mlp",
    "resnet18",
    "small_resnet",
    "vgg11",
    "wide_resnet",
]
