"""Convolution rules against a loop over micro-batches with `create_graph=True`, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.micro_batches import MicroBatches
from fastreg.rules import conv_maps
from fastreg.rules.conv_gram import PixelGrid
from fastreg.rules.conv_implicit import Implicit
from fastreg.rules.conv_pointwise import Pointwise
from fastreg.session import Phase
from rule_oracle import learned, recorded

EXACT = 1e-10
SAMPLES = 5


class Net(nn.Module):
    """The layers, a curved head; squared outputs averaged over a sample, averaged over samples."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(x)).flatten(1).square().sum(1)


class Twice(nn.Module):
    """One kernel at two strides, and its bias once more on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(x))
        return torch.tanh(F.conv2d(y, self.conv.weight, self.conv.bias, stride=2, dilation=2, padding=2))


class Sliced(nn.Module):
    """A kernel that is a slice of a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w.transpose(0, 1)[:4])


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 9)),
    "1d_long_kernel": (lambda: nn.Conv1d(2, 3, 5, padding=4, bias=False), (2, 3)),
    "1d_same_even": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 6)),
    "1d_same_dilated": (lambda: nn.Conv1d(2, 3, 2, padding="same", dilation=3), (2, 7)),
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 4)),
    "2d_valid": (lambda: nn.Conv2d(3, 2, (2, 3), padding="valid"), (3, 4, 5)),
    "2d_same_even": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 3, 5)),
    "2d_uneven": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)), (2, 6, 7)),
    "2d_unread_border": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 4)),
    "2d_padding_beyond_reach": (lambda: nn.Conv2d(2, 3, 2, padding=3, stride=2), (2, 3, 4)),
    "2d_pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 3, 5)),
    "2d_pointwise_strided": (lambda: nn.Conv2d(4, 3, 1, stride=(2, 3), bias=False), (4, 5, 4)),
    "2d_pointwise_one_pixel": (lambda: nn.Conv2d(6, 5, 1), (6, 1, 1)),
    "2d_pointwise_padded": (lambda: nn.Conv2d(4, 3, 1, padding=1), (4, 2, 3)),
    "2d_only_padding_read": (lambda: nn.Conv2d(2, 3, 1, stride=2, padding=1), (2, 1, 3)),
    "2d_strided_dilated": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), dilation=(3, 2), padding=(3, 1)), (2, 6, 7)),
    "2d_one_pixel": (lambda: nn.Conv2d(6, 5, 3, padding=1), (6, 1, 1)),
    "2d_grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=(2, 1), padding=(1, 0)), (4, 5, 4)),
    "2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 4, 3)),
    "2d_circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 3)),
    "3d": (lambda: nn.Conv3d(2, 3, (2, 1, 3), padding=(0, 1, 1), stride=(1, 2, 1)), (2, 3, 2, 4)),
    "3d_grouped": (lambda: nn.Conv3d(2, 4, 2, groups=2), (2, 3, 3, 2)),
    "transposed_1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1), (3, 4)),
    "transposed_2d": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4)),
    "transposed_2d_dilated": (lambda: nn.ConvTranspose2d(2, 3, 2, dilation=(2, 3), padding=(0, 1)), (2, 3, 2)),
    "transposed_2d_grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, stride=2, bias=False), (4, 2, 3)),
    "transposed_3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 2, 3)),
    "twice": (Twice, (3, 4, 4)),
    "sliced": (Sliced, (3, 4, 4)),
}

FORMS = ["chosen", "gram", "stored", "implicit"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form is chosen by cost, or forced by a price on storing or on pixel pairs; or by the ops that a GPU has."""
    if request.param == "gram":
        for op in (conv_maps.Convolution, Pointwise):
            monkeypatch.setattr(op, "STORE_COST", 10**12)
    elif request.param != "chosen":
        monkeypatch.setattr(PixelGrid, "cost", lambda self, *sizes: 10**15)
    if request.param == "implicit":
        monkeypatch.setattr(Implicit, "serves", lambda x, axes, groups: axes <= 2 and groups == 1)
    return request.param


def build(name: str) -> tuple[Net, Tensor]:
    """The layer `name` under a curved head, and a batch for it."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Net(make()).double()
        return net, torch.randn(SAMPLES, *shape, dtype=torch.float64)


def expected(net: nn.Module, x: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """Squared norms [m] and the gradient of their sum, the loss being the mean over all samples."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    norms = []
    for rows in x.split(size):
        loss = net(rows).sum() / len(x)
        norms.append(sum(g.square().sum() for g in torch.autograd.grad(loss, parameters, create_graph=True)))
    return torch.stack(norms).detach(), list(torch.autograd.grad(sum(norms), learned(net, x)))


def received(net: nn.Module, x: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """The same through the recorder."""
    with recorded(net, size) as recorder:
        loss = net(x).mean()
        session = recorder.session
        with session.during(Phase.CHAIN):
            (norms,) = torch.autograd.grad(loss, session.probe, create_graph=True)
        return norms.detach(), list(torch.autograd.grad(norms.sum(), learned(net, x)))


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = EXACT) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.shape == w.shape
        assert float((g - w).norm()) <= tolerance * max(float(w.norm()), 1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, SAMPLES])
@pytest.mark.parametrize("name", LAYERS)
def test_norms_and_their_gradient(name: str, size: int, form: str) -> None:
    net, x = build(name)
    x.requires_grad_()
    norms, gradients = expected(net, x, size)
    got_norms, got_gradients = received(net, x, size)
    assert_close([got_norms], [norms])
    assert_close(got_gradients, gradients)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["2d", "2d_uneven", "2d_grouped", "2d_pointwise_strided", "3d", "transposed_2d"])
def test_micro_batches_of_one_size(name: str, size: int, form: str) -> None:
    """Several samples in each of several micro-batches and none ragged: products stay in their own layout."""
    net, x = build(name)
    x = torch.cat([x, 2 * x[:1]]).requires_grad_()
    norms, gradients = expected(net, x, size)
    got_norms, got_gradients = received(net, x, size)
    assert_close([got_norms], [norms])
    assert_close(got_gradients, gradients)


@pytest.mark.parametrize("extent", [1, 4])
def test_push_is_scaled_on_either_side(extent: int) -> None:
    """A stored kernel gradient larger than the image, and a smaller one."""
    cut = MicroBatches(4, 2)
    op = conv_maps.Convolution((3, 3), (1, 1), (1, 1), (1, 1), 1, False, (0, 0))
    x, d = torch.randn(2, 4, 2, extent, extent, dtype=torch.float64).unbind()
    memo = op.dense(x, d, torch.randn(2, 2, 3, 3, dtype=torch.float64), cut)
    assert (memo.numel() > x.numel()) == (extent == 1)
    kept, factors = memo.clone(), torch.tensor([2.0, -3.0], dtype=torch.float64)
    want = torch.cat([2 * op.push(x, d, memo, cut)[:2], -3 * op.push(x, d, memo, cut)[2:]])
    assert_close([op.scaled_push(x, d, memo, factors, cut), memo], [want, kept])


@pytest.mark.parametrize("frozen", ["none", "weight", "bias", "first"])
@pytest.mark.parametrize("size", [1, 3])
def test_frozen_parameters_and_constant_input(frozen: str, size: int, form: str) -> None:
    torch.manual_seed(0)
    net = Net(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Tanh(),
              nn.Conv2d(3, 3, 2)).double()  # fmt: skip
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not (name.endswith(frozen) or (frozen == "first" and name.startswith("layers.0"))))
    x = torch.randn(SAMPLES, 2, 4, 3, dtype=torch.float64)
    norms, gradients = expected(net, x, size)
    got_norms, got_gradients = received(net, x, size)
    assert_close([got_norms], [norms])
    assert_close(got_gradients, gradients)


@pytest.mark.parametrize("size", [1, 2, SAMPLES])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_ride_on_the_backward(name: str, size: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A block below one G_k and one of two G_k: the blocked sum is the same.
    monkeypatch.setattr(conv_maps, "BLOCK_ELEMENTS", 200)
    net, x = build(name)
    norms, _ = expected(net, x, size)
    plain = torch.autograd.grad(net(x).mean(), list(net.parameters()))
    with recorded(net, size) as recorder:
        loss = net(x).mean()
        with recorder.session.during(Phase.STATISTICS):
            loss.backward()
        assert_close([recorder.session.probe.grad], [norms])
    assert_close([p.grad for p in net.parameters()], list(plain))


@pytest.mark.parametrize("name", ["2d", "2d_uneven", "2d_pointwise_strided", "transposed_2d"])
def test_float32_is_as_good_as_its_plain_form(name: str, form: str) -> None:
    net, x = build(name)
    norms, gradients = expected(net, x, 2)
    got_norms, got_gradients = received(net.float(), x.float(), 2)
    # Every result is a composition of four sums of at most n products; errors grow as sqrt(n) with random signs.
    longest = max(x.numel(), max(p.numel() for p in net.parameters()))
    tolerance = 8 * 4 * longest**0.5 * torch.finfo(torch.float32).eps
    assert_close([got_norms.double()], [norms], tolerance)
    assert_close([g.double() for g in got_gradients], gradients, tolerance)


@pytest.mark.parametrize("name", ["2d", "2d_pointwise_strided"])
def test_channels_last(name: str, form: str) -> None:
    net, x = build(name)
    norms, gradients = expected(net, x, 2)
    net = net.to(memory_format=torch.channels_last)
    got_norms, got_gradients = received(net, x.to(memory_format=torch.channels_last), 2)
    assert_close([got_norms], [norms])
    assert_close(got_gradients, gradients)


def test_a_nan_stays_in_its_micro_batch(form: str) -> None:
    net, x = build("2d")
    x[1, 0, 0, 0] = torch.nan
    norms, _ = received(net, x, 1)
    assert norms.isnan().tolist() == [False, True, False, False, False]


def test_short_micro_batches_store_no_gradient() -> None:
    """256 channels on 4 x 4 pixels: the cost prefers pairs of pixels; 8 channels on 8 x 8 do not."""
    cut = MicroBatches(4, 1)
    for channels, extent, stored in [(256, 4, False), (8, 8, True)]:
        op = conv_maps.Convolution((3, 3), (1, 1), (1, 1), (1, 1), 1, False, (0, 0))
        x = torch.randn(4, channels, extent, extent)
        weight = torch.randn(channels, channels, 3, 3)
        _, _, memo = op.pull(x, x, weight, None, conv_maps.Parts(True, False), cut)
        assert (memo is not None) == stored


@pytest.mark.parametrize("name", ["2d", "2d_pointwise_strided"])
def test_bfloat16_autocast(name: str, form: str) -> None:
    """Norms under autocast agree with float64 within a few roundings to eight bits."""
    net, x = build(name)
    norms, _ = expected(net, x, 2)
    net, x = net.float(), x.float()
    with recorded(net, 2) as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(x).mean()
        with recorder.session.during(Phase.STATISTICS):
            loss.backward()
        got = recorder.session.probe.grad.double()
    assert_close([got], [norms], 8 * torch.finfo(torch.bfloat16).eps)


def test_unbatched_input_is_refused() -> None:
    net = nn.Conv2d(2, 3, 2)
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match="'weight'.*batch dimension"):
        net(torch.randn(2, 5, 5))


def test_same_padding_with_stride_is_refused() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.w, stride=2, padding="same")

    net = Strided()
    with recorded(net, 1), pytest.raises(FastregError, match="padding must be 'valid', or 'same' with stride 1"):
        net(torch.randn(2, 2, 5))
