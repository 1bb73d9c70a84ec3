"""Recurrent layers against a loop over micro-batches with `create_graph=True`, in float64."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastreg
import layer_oracle
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.recording import Recorder
from layer_oracle import EXACT, error

SAMPLES, LENGTH, WIDTH = 5, 4, 3


class Sequence(nn.Module):
    """A recurrent layer and a head on what `read` takes from it."""

    def __init__(
        self, layer: nn.RNNBase, read: Callable[[Tensor, Tensor | tuple], Tensor], features: int = 4
    ) -> None:
        super().__init__()
        self.layer, self.read, self.head = layer, read, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(*self.layer(x)))


class Cells(nn.Module):
    """A cell over all steps, the state starting from a linear map of the first input."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.start, self.cell, self.head = nn.Linear(WIDTH, 4), kind(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x[:, 0])
        state = (h, h.sin()) if isinstance(self.cell, nn.LSTMCell) else h
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Started(Sequence):
    """The initial state is a linear map of the first input."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(x[:, 0], (0, 1))[None]
        state = (h, h.sin()) if isinstance(self.layer, nn.LSTM) else h
        return self.head(self.read(*self.layer(x, state)))


class Tied(Sequence):
    """The same layer twice, the second time over its own outputs."""

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.layer(x)
        return self.head(self.read(*self.layer(first[..., :WIDTH] + x)))


class Checkpointed(Sequence):
    """The layer is run again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda t: self.read(*self.layer(t)), x, use_reentrant=False))


def last(outputs: Tensor, _: object) -> Tensor:
    return outputs[:, -1]


def mean(outputs: Tensor, _: object) -> Tensor:
    return outputs.mean(1)


def final(_: Tensor, states: Tensor | tuple) -> Tensor:
    """The final states alone: of an LSTM hidden and cell state."""
    return sum(s[-1] for s in states) if isinstance(states, tuple) else states[-1]


def rnn(kind: type[nn.RNNBase], **settings: object) -> nn.RNNBase:
    return kind(WIDTH, 4, batch_first=True, **settings)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Sequence(rnn(nn.LSTM), last),
    "lstm_final": lambda: Sequence(rnn(nn.LSTM), final),
    "lstm_deep_both_ways": lambda: Sequence(rnn(nn.LSTM, num_layers=2, bidirectional=True), mean, 8),
    "lstm_no_bias": lambda: Sequence(rnn(nn.LSTM, bias=False), mean),
    "lstm_started": lambda: Started(rnn(nn.LSTM), last),
    "lstm_tied": lambda: Tied(rnn(nn.LSTM), mean),
    "lstm_checkpointed": lambda: Checkpointed(rnn(nn.LSTM), mean),
    "gru": lambda: Sequence(rnn(nn.GRU), last),
    "gru_final_deep": lambda: Sequence(rnn(nn.GRU, num_layers=2), final),
    "gru_no_bias_both_ways": lambda: Sequence(rnn(nn.GRU, bias=False, bidirectional=True), mean, 8),
    "gru_started": lambda: Started(rnn(nn.GRU), mean),
    "rnn": lambda: Sequence(rnn(nn.RNN), last),
    "rnn_relu": lambda: Sequence(rnn(nn.RNN, nonlinearity="relu"), mean),
    "lstm_cell": lambda: Cells(nn.LSTMCell),
    "gru_cell": lambda: Cells(nn.GRUCell),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MODELS[name]().double()
        return model, torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64), torch.randint(3, (SAMPLES,))


@pytest.mark.parametrize("size", [1, 2, SAMPLES])
@pytest.mark.parametrize("name", MODELS)
def test_models_match_the_loop(name: str, size: int) -> None:
    model, x, y = build(name)
    x.requires_grad_(size != 2)
    layer_oracle.check_exact(model, x, y, size, check=size == 2)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_ride_on_the_plain_gradient(name: str) -> None:
    model, x, y = build(name)
    layer_oracle.check_statistics(model, x, y, 3)


@pytest.mark.parametrize("frozen", ["weight_hh", "bias_hh", "weight_ih", "_hh", "_ih", "layer.", "head"])
def test_frozen_parts(frozen: str) -> None:
    model, x, y = build("lstm_deep_both_ways")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    layer_oracle.check_exact(model, x, y, 2)


def test_a_fraction_of_the_micro_batches() -> None:
    model, x, y = build("lstm")
    want, _ = layer_oracle.penalised(model, x, y, 2)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(1.0), micro_batch_size=2, fraction=0.5, check=False, seed=0)
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    chosen = reg.sq_norms > 0
    assert chosen.sum() == 2
    assert error(reg.sq_norms[chosen], want[chosen]) < EXACT
    reg.remove()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_outputs_are_those_of_torch(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer = rnn(kind, num_layers=2, bidirectional=True)
    x = torch.randn(SAMPLES, LENGTH, WIDTH)
    want, states = layer(x)
    recorder = Recorder(layer, 2, layer.parameters(), lambda: True)
    got, got_states = layer(x)
    recorder.remove()
    # Sums of up to 8 products in each of 4 steps of 2 layers.
    tolerance = math.sqrt(8 * 4 * 2) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got_states, states, rtol=tolerance, atol=tolerance)


def test_float32() -> None:
    model, x, y = build("gru")
    want_norms, want = layer_oracle.penalised(model, x, y, 2)
    norms, gradient = layer_oracle.regularized(model.float(), x.float(), y, 2)
    # Sums over 8 products in 4 steps; three derivatives follow each other.
    tolerance = 3 * math.sqrt(8 * 4) * torch.finfo(torch.float32).eps
    assert error(norms, want_norms) < tolerance
    assert error(gradient, want) < tolerance


def test_a_step_leaves_nothing_behind() -> None:
    model, x, y = build("lstm")
    reg = fastreg.Regularizer(model, fastreg.GradNorm(1.0), micro_batch_size=2, check=False)
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    node = weakref.ref(outputs.grad_fn)
    reg.remove()
    del outputs, reg
    gc.collect()
    assert node() is None


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "sequence_first": (lambda: nn.LSTM(WIDTH, 4), FastregError, "batch_first=True"),
    "projected": (lambda: nn.LSTM(WIDTH, 4, proj_size=2, batch_first=True), UnsupportedOperation, "proj_size"),
    "packed": (lambda: Packed(), UnsupportedOperation, "packed sequences"),
    "learned_start": (lambda: LearnedStart(), UnsupportedOperation, "derives from parameters alone"),
}


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = rnn(nn.GRU)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(SAMPLES, 0, -1).clamp_max(LENGTH)
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]


class LearnedStart(nn.Module):
    """One initial state for all samples, a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.start = rnn(nn.GRU), nn.Parameter(torch.zeros(1, SAMPLES, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.start)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_with_the_remedy(name: str) -> None:
    make, kind, reason = REFUSED[name]
    model = make()
    recorder = Recorder(model, 2, model.parameters(), lambda: True)
    with pytest.raises(kind, match=reason):
        model(torch.randn(SAMPLES, LENGTH, WIDTH))
    recorder.remove()
