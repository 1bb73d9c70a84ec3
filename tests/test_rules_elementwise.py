"""Elementwise parameters against a loop over micro-batches with `create_graph=True`, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg.errors import UnsupportedOperation
from fastreg.rules.affine import Scale
from rule_oracle import (
    PerSample,
    assert_close,
    check_exact,
    check_float32,
    check_statistics,
    check_twice_differentiable,
    expected,
    received,
    recorded,
)

SAMPLES = 5
Use = Callable[[Tensor, Tensor], Tensor]


class Uses(nn.Module):
    """Activations [B, 4, 3] meet a parameter of a given shape."""

    def __init__(self, use: Use, *shape: int) -> None:
        super().__init__()
        self.w, self.use = nn.Parameter(torch.rand(shape) + 0.5), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


def net_of(use: Use, *shape: int) -> PerSample:
    return PerSample(nn.Linear(3, 3), Uses(use, *shape), nn.Tanh(), nn.Linear(3, 2))


def changed(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    """A copy of `x` after an in-place change whose result nobody takes."""
    copy = x.clone()
    change(copy)
    return copy


def tokens(x: Tensor, w: Tensor) -> Tensor:
    """A learned token in front of every sample."""
    return torch.cat([w.expand(x.shape[0], -1, -1), x], 1)


USES: dict[str, tuple[Use, tuple[int, ...]]] = {
    "add": (lambda x, w: x + w, (3,)),
    "radd": (lambda x, w: w + x, (4, 3)),
    "add_alpha": (lambda x, w: torch.add(x, w, alpha=-2), (1, 4, 3)),
    "add_alpha_data": (lambda x, w: w.add(x, alpha=3), (4, 1)),
    "add_scalar_parameter": (lambda x, w: x + w, ()),
    "add_one_entry": (lambda x, w: x + w, (1, 1, 1)),
    "sub": (lambda x, w: x - w, (3,)),
    "rsub": (lambda x, w: w - x, (4, 3)),
    "torch_rsub": (lambda x, w: torch.rsub(x, w, alpha=2), (3,)),
    "mul": (lambda x, w: x * w, (3,)),
    "rmul": (lambda x, w: w * x, (4, 3)),
    "mul_rows": (lambda x, w: x * w, (4, 1)),
    "mul_batch_of_one": (lambda x, w: x * w, (1, 4, 3)),
    "mul_middle": (lambda x, w: (x[:, :, None] * w)[:, :, 0], (4, 1, 3)),
    "mul_scalar_parameter": (lambda x, w: x * w, ()),
    "mul_one_entry": (lambda x, w: torch.mul(x, w), (1,)),
    "data_broadcasts": (lambda x, w: x[..., :1] * w + x.mean(1, keepdim=True) * w, (3,)),
    "data_broadcasts_to_a_sum": (lambda x, w: x[:, :1] + w, (4, 3)),
    "data_squared": (lambda x, w: x * x * w, (3,)),
    "residual_gate": (lambda x, w: x + w * x.sin(), (3,)),
    "divided_by_data": (lambda x, w: w / (x.square() + 1), (3,)),
    "divided_by_number": (lambda x, w: x * (w / 3), (3,)),
    "negative": (lambda x, w: x * -w, (3,)),
    "one_plus": (lambda x, w: x * (1 + w), (3,)),
    "one_minus": (lambda x, w: x * (1 - w), (3,)),
    "minus_one": (lambda x, w: x * (w - 1), (3,)),
    "masked": (lambda x, w: x @ (w * torch.eye(3).double()), (3, 3)),
    "constant_spreads": (lambda x, w: F.linear(x, w + torch.ones(3, 1).double()), (3,)),
    "scaled_twice": (lambda x, w: x * (2 * w) + x.cos() * (w / 2), (3,)),
    "shared_bias_and_scale": (lambda x, w: x * w + w, (3,)),
    "add_in_place": (lambda x, w: changed(x, lambda t: t.add_(w)), (3,)),
    "sub_in_place": (lambda x, w: changed(x, lambda t: t.sub_(w, alpha=2)), (3,)),
    "mul_in_place": (lambda x, w: changed(x, lambda t: t.mul_(w)), (3,)),
    "augmented": (lambda x, w: changed(x, lambda t: t.__iadd__(w).__imul__(w).__isub__(w)), (3,)),
    "part_in_place": (lambda x, w: changed(x, lambda t: t[:, :2].mul_(w)), (3,)),
    "class_token": (tokens, (1, 1, 3)),
    "class_tokens": (tokens, (1, 2, 3)),
    "spread_class_token": (tokens, (1, 3)),
    "repeated_class_token": (lambda x, w: torch.cat([x, w.repeat(len(x), 2, 1)], 1), (1, 2, 3)),
    "tiled_class_token": (lambda x, w: torch.cat([x, torch.tile(w, (len(x), 2, 1))], 1), (2, 3)),
    "broadcast_to": (lambda x, w: x * torch.broadcast_to(w, x.shape), (3,)),
    "expand_as": (lambda x, w: x.sin() + w.expand_as(x), (3,)),
    "expand_without_samples": (lambda x, w: x + w.expand(4, 3), (3,)),
    "repeat_without_samples": (lambda x, w: x * w.repeat(3), (1,)),
    "prelu": (F.prelu, (1,)),
    "prelu_channels": (F.prelu, (4,)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    use, shape = USES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return net_of(use, *shape).double(), torch.randn(SAMPLES, 4, 3, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, SAMPLES])
@pytest.mark.parametrize("name", USES)
def test_norms_and_gradients(name: str, size: int) -> None:
    net, x = build(name)
    x.requires_grad_()
    check_exact(net, x, size)


@pytest.mark.parametrize("size", [1, 2, SAMPLES])
@pytest.mark.parametrize("name", USES)
def test_statistics_ride_on_the_backward(name: str, size: int) -> None:
    net, x = build(name)
    check_statistics(net, x, size)


@pytest.mark.parametrize("name", USES)
def test_recorded_operations_differentiate_twice(name: str) -> None:
    net, x = build(name)
    check_twice_differentiable(net, x.requires_grad_())


@pytest.mark.parametrize("name", ["mul", "add", "class_token", "prelu_channels", "mul_middle"])
def test_float32_is_as_good_as_its_plain_form(name: str) -> None:
    net, x = build(name)
    check_float32(net, x)


@pytest.mark.parametrize("frozen", ["layers.0", "layers.1", "layers.3"])
@pytest.mark.parametrize("name", ["mul", "add", "prelu"])
def test_frozen_parameters_and_constant_input(name: str, frozen: str) -> None:
    net, x = build(name)
    for parameter_name, parameter in net.named_parameters():
        parameter.requires_grad_(not parameter_name.startswith(frozen))
    check_exact(net, x, 2)


def test_rows_folded_into_the_batch() -> None:
    """Tokens as rows [B * T, D] keep their samples: T rows each."""
    net = net_of(lambda x, w: (x.reshape(-1, 3) * w).view_as(x), 3).double()
    x = torch.randn(SAMPLES, 4, 3, dtype=torch.float64)
    check_exact(net, x, 2)


@pytest.mark.parametrize("use", [
    lambda x, w: x + (torch.ones(2 * SAMPLES, 4).double() * w).sum(0)[:, None],
    lambda x, w: x + w.expand(2 * SAMPLES, 4).sum(0)[:, None],
])  # fmt: skip
def test_a_table_with_a_multiple_of_the_samples_is_no_data(use: Use) -> None:
    """The table is not cut into micro-batches; what then has no rule is refused."""
    net = net_of(use, 4).double()
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match="sum.*no rule"):
        net(torch.randn(SAMPLES, 4, 3, dtype=torch.float64))


def test_a_masked_weight_with_a_multiple_of_the_samples() -> None:
    mask = torch.bernoulli(torch.full((2 * SAMPLES, 3), 0.5, dtype=torch.float64))
    net = net_of(lambda x, w: F.linear(x, w * mask)[..., :3], 2 * SAMPLES, 3).double()
    x = torch.randn(SAMPLES, 4, 3, dtype=torch.float64)
    check_exact(net, x, 2)


def test_prelu_at_zero() -> None:
    """torch gives the kink the slope w; its own second derivative there disagrees with that, so it is left out."""
    net = PerSample(nn.PReLU(), nn.Linear(3, 2)).double()
    x = torch.tensor([[0.0, -1.0, 1.0], [0.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    got, want = received(net, x, 1), expected(net, x, 1)
    assert_close([got.norms], [want.norms])
    assert_close(got.loss, want.loss)


def test_parameters_promote_as_torch_does() -> None:
    net = Uses(lambda x, w: x.float() * w, 3).double()
    with recorded(net, 2):
        assert net(torch.randn(SAMPLES, 3).double()).dtype == torch.float64


def test_scale_reads_a_broadcast_once_or_by_parts() -> None:
    """[4, 1, 3] is no (outer, channel, place) view of its rows, [4, 3] and [4, 1] are: the answers agree."""
    x = torch.randn(SAMPLES, 4, 2, 3, dtype=torch.float64)
    with recorded(nn.Linear(1, 1), 2) as recorder:
        recorder._open(recorder.model, (x,), {})
        cut = recorder.session.micro_batches
    for shape in [(4, 1, 3), (2, 3), (4, 1, 1), (4, 2, 1), (3,), (), (1, 4, 2, 3)]:
        got = Scale().dense(x, x, torch.empty(shape), cut)
        want = [(rows * rows).sum_to_size((1, *(1,) * (3 - len(shape)), *shape)[-4:]) for rows in x.split(2)]
        assert_close([got], [torch.stack(want).reshape(got.shape)])


@pytest.mark.parametrize(("use", "shape", "reason"), [
    (lambda x, w: x / w, (3,), "reciprocal"),
    (lambda x, w: 1 / w * x, (3,), "reciprocal"),
    (lambda x, w: x * (w * w), (3,), "both operands"),
    (lambda x, w: x + (w + w.flip(0)), (3,), "both operands"),
    (lambda x, w: x * w, (SAMPLES, 4, 3), "batch dimension"),
    (lambda x, w: x + w, (SAMPLES, 1, 1), "batch dimension"),
    (lambda x, w: x.mean() * w * x, (3,), "samples along dimension 0"),
    (lambda x, w: x * w.mul_(2), (3,), "in place"),
    (lambda x, w: torch.where(x > 0, x, w), (3,), "no rule"),
    (lambda x, w: torch.lerp(x, x.sin(), w), (3,), "no rule"),
    (lambda x, w: torch.addcmul(x, x, w), (3,), "no rule"),
    (lambda x, w: F.prelu(w[None], w[:1]) + x, (3,), "nonlinear"),
])  # fmt: skip
def test_refused(use: Use, shape: tuple[int, ...], reason: str) -> None:
    torch.manual_seed(0)
    net = net_of(use, *shape)
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match=f"'layers.1.w'.*{reason}"):
        net(torch.randn(SAMPLES, 4, 3))
