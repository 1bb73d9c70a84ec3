"""Embeddings against a loop over micro-batches with `create_graph=True`, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg.errors import UnsupportedOperation
from rule_oracle import (
    assert_same,
    check_exact,
    check_statistics,
    check_twice_differentiable,
    expected,
    received,
    recorded,
    single_precision_error,
)

SAMPLES, TOKENS, ENTRIES, WIDTH = 5, 4, 6, 3


class Words(nn.Module):
    """Token embeddings from `lookup`, a curved value per sample."""

    def __init__(self, lookup: Callable[[Tensor, Tensor], Tensor] = F.embedding) -> None:
        super().__init__()
        self.table, self.mix, self.lookup = nn.Parameter(torch.randn(ENTRIES, WIDTH)), nn.Linear(WIDTH, WIDTH), lookup

    def embed(self, x: Tensor) -> Tensor:
        return self.lookup(x, self.table)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(x))).flatten(1).square().sum(1)


class Tied(Words):
    """The table is the head as well."""

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(torch.tanh(self.mix(self.embed(x))), self.table)
        return logits.logsumexp(-1).sum(1)


class Positions(Words):
    """Words plus positions, looked up for all samples alike by an index of a given shape."""

    def __init__(self, index: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.positions, self.index = nn.Embedding(ENTRIES, WIDTH), index

    def embed(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table) + self.positions(self.index(x.shape[1]))


class Padded(Positions):
    """One of the positions is padding."""

    def __init__(self, index: Callable[[int], Tensor]) -> None:
        super().__init__(index)
        self.positions = nn.Embedding(ENTRIES, WIDTH, padding_idx=1)


def padded(x: Tensor, table: Tensor) -> Tensor:
    return F.embedding(x, table, padding_idx=2)


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Words,
    "padding": lambda: Words(padded),
    "negative_padding": lambda: Words(lambda x, w: F.embedding(x, w, -1)),
    "torch": lambda: Words(lambda x, w: torch.embedding(w, x, 2)),
    "twice": lambda: Words(lambda x, w: F.embedding(x, w) + F.embedding(x.flip(1), w, 1)),
    "view_of_the_table": lambda: Words(lambda x, w: F.embedding(x // 2, w[1:5])),
    "scaled_table": lambda: Words(lambda x, w: F.embedding(x, w * 0.5)),
    "tied": Tied,
    "tied_padding": lambda: Tied(padded),
    "positions": lambda: Positions(torch.arange),
    "positions_row": lambda: Positions(lambda n: torch.arange(n)[None]),
    "positions_padded": lambda: Padded(torch.arange),
    "positions_repeated": lambda: Positions(lambda n: torch.zeros(1, n, dtype=torch.int64)),
}


def build(name: str, samples: int = SAMPLES, tokens: int = TOKENS) -> tuple[nn.Module, Tensor]:
    """The net and a batch with repeats within and across samples."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return NETS[name]().double(), torch.randint(ENTRIES, (samples, tokens))


@pytest.mark.parametrize("size", [1, 2, 3, SAMPLES])
@pytest.mark.parametrize("name", NETS)
def test_norms_and_gradients(name: str, size: int) -> None:
    net, x = build(name)
    check_exact(net, x, size)


@pytest.mark.parametrize("size", [1, 2, SAMPLES])
@pytest.mark.parametrize("name", NETS)
def test_statistics_ride_on_the_backward(name: str, size: int) -> None:
    net, x = build(name)
    check_statistics(net, x, size)


@pytest.mark.parametrize("name", ["positions", "positions_row"])
def test_as_many_positions_as_samples(name: str) -> None:
    """An index 0 .. T - 1 of length T = B holds positions, not samples."""
    net, x = build(name, samples=TOKENS)
    check_exact(net, x, 3)


def test_one_token_per_sample() -> None:
    class Categories(Words):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.mix(self.embed(x))).square().sum(1)

    torch.manual_seed(0)
    net, x = Categories().double(), torch.tensor([3, 0, 3, 3, 5])
    check_exact(net, x, 2)


@pytest.mark.parametrize("name", NETS)
def test_recorded_operations_differentiate_twice(name: str) -> None:
    net, x = build(name)
    check_twice_differentiable(net, x)


@pytest.mark.parametrize("frozen", ["table", "mix"])
def test_frozen(frozen: str) -> None:
    net, x = build("tied_padding")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    check_exact(net, x, 2)


@pytest.mark.parametrize("name", ["plain", "padding", "tied", "positions"])
def test_float32_is_as_good_as_its_plain_form(name: str) -> None:
    net, x = build(name)
    want = expected(net, x, 2)
    assert_same(received(net.float(), x, 2), want, single_precision_error(net, x))


@pytest.mark.parametrize(("options", "remedy"), [
    ({"max_norm": 1.0}, "max_norm"),
    ({"sparse": True}, "use sparse=False"),
    ({"scale_grad_by_freq": True}, "use scale_grad_by_freq=False"),
])  # fmt: skip
def test_options_that_are_no_gradient_are_refused(options: dict[str, float], remedy: str) -> None:
    net = nn.Embedding(ENTRIES, WIDTH, **options)
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match=f"'weight'.*{remedy}"):
        net(torch.zeros(SAMPLES, TOKENS, dtype=torch.int64))


def test_an_index_without_samples_gives_no_data() -> None:
    net = nn.Sequential(nn.Embedding(ENTRIES, WIDTH), nn.Linear(WIDTH, 2))
    with recorded(net, 1), pytest.raises(UnsupportedOperation, match="derive from parameters alone"):
        net(torch.arange(SAMPLES))
