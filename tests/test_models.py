"""The models: sizes as published, samples that do not see each other, gradients of gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.errors import FastregError
from fastreg.models import GPT, GPTConfig, mlp, resnet18, small_resnet, vgg11, wide_resnet

TINY_GPT = GPTConfig(vocab=13, context=7, width=12, layers=2, heads=3)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


# Every model in which samples do not interact, with an input of three samples.
INDEPENDENT = {
    "mlp": (lambda: mlp((5, 7, 4), "gelu"), lambda: torch.randn(3, 5, dtype=torch.float64)),
    "resnet18": (lambda: resnet18(norm="group"), lambda: _images(3)),
    "small_resnet": (lambda: small_resnet(width=4), lambda: _images(3)),
    "wide_resnet": (lambda: wide_resnet(10, 1, norm="group"), lambda: _images(3)),
    "vgg11": (lambda: vgg11(), lambda: _images(3)),
    "gpt": (lambda: GPT(TINY_GPT), lambda: torch.randint(13, (3, 7))),
}


@pytest.fixture(params=INDEPENDENT)
def model_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, draw = INDEPENDENT[request.param]
    return build().double(), draw()


def test_output_of_a_sample_ignores_the_others(
    model_and_input: tuple[nn.Module, torch.Tensor],
) -> None:
    model, x = model_and_input
    with torch.no_grad():
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(model(x), alone, rtol=1e-10, atol=1e-10)


def test_gradient_norm_matches_a_directional_difference(
    model_and_input: tuple[nn.Module, torch.Tensor],
) -> None:
    # d loss / d (step along g) = ||g||^2 at step 0: one number that needs every parameter's
    # gradient to be right and every parameter to be registered.
    model, x = model_and_input
    parameters = list(model.parameters())
    loss = model(x).square().mean()
    grads = torch.autograd.grad(loss, parameters)
    expected = sum(g.square().sum() for g in grads)
    step = 1e-5 / expected.sqrt()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, g in zip(parameters, grads):
                p += sign * step * g
            values.append(model(x).square().mean())
    difference = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (lambda: resnet18(10, "batch"), 11_173_962),
        (lambda: vgg11(10), 9_225_610),
        (lambda: wide_resnet(16, 4, 10, "batch"), 2_748_890),
        (lambda: wide_resnet(28, 10, 10, "batch"), 36_479_194),
    ],
    ids=["resnet18", "vgg11", "wrn-16-4", "wrn-28-10"],
)
def test_parameter_counts(build: Callable[[], nn.Module], published: int) -> None:
    # On the meta device: counting needs no memory.
    with torch.device("meta"):
        assert _count(build()) == published


def test_gpt_counts_the_tied_head_once() -> None:
    c = TINY_GPT
    block = 12 * c.width**2 + 13 * c.width
    assert _count(GPT(c)) == (c.vocab + c.context) * c.width + c.layers * block + 2 * c.width


def test_gpt_is_causal() -> None:
    torch.manual_seed(0)
    model = GPT(TINY_GPT)
    tokens = torch.randint(13, (2, 7))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_gpt_head_gradient_is_the_sum_of_both_uses() -> None:
    torch.manual_seed(0)
    model = GPT(TINY_GPT).double()
    tokens = torch.randint(13, (2, 7))
    head = model.tokens.weight.detach().clone().requires_grad_()
    x = model.tokens(tokens) + model.positions
    untied = F.linear(model.norm(model.blocks(x)), head)
    embedding_part, head_part = torch.autograd.grad(
        untied.square().mean(), (model.tokens.weight, head)
    )
    (tied,) = torch.autograd.grad(model(tokens).square().mean(), (model.tokens.weight,))
    torch.testing.assert_close(tied, embedding_part + head_part)


def test_gpt_has_a_double_backward_under_math_attention() -> None:
    torch.manual_seed(0)
    model = GPT(TINY_GPT)
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(torch.randint(13, (2, 7))).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norms_of_the_residual_networks(norm: str) -> None:
    torch.manual_seed(0)
    model = small_resnet(width=4, norm=norm, in_channels=1)
    kinds = {
        name
        for name, kind in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm))
        if any(isinstance(m, kind) for m in model.modules())
    }
    assert kinds == {norm} - {"none"}
    assert (model.stem.bias is not None) == (norm == "none")
    assert model(torch.randn(2, 1, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: mlp((3,)), "mlp: sizes"),
        (lambda: mlp((3, 0, 2)), "mlp: sizes"),
        (lambda: mlp((3, 2), "step"), "mlp: activation"),
        (lambda: small_resnet(norm="layer"), "norm must be one of"),
        (lambda: wide_resnet(12, 1), "wide_resnet: depth"),
        (lambda: wide_resnet(10, 0), "wide_resnet: width"),
        (lambda: wide_resnet(10, 1, norm="x"), "wide_resnet: norm"),
        (lambda: GPTConfig(width=10, heads=3), "GPTConfig: width"),
        (lambda: GPTConfig(layers=0), "GPTConfig: layers"),
        (lambda: GPT(TINY_GPT)(torch.zeros(2, 8, dtype=torch.int64)), "GPT: tokens"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], object], named: str) -> None:
    with pytest.raises(FastregError, match=named):
        build()
