"""Recurrent layers: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells.

A layer is unrolled. Its input product is one linear map over all time steps, and so is, for everything but the
chain, its recurrent product (:mod:`fastreg.rules.recurrence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.rules.activations import refuse_parameters
from fastreg.rules.linear import linear
from fastreg.rules.recurrence import RECURRENT, Enter, Handover, Leave, Step
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape
from fastreg.rules.use import Use


class Cell(NamedTuple):
    """One kind of recurrent layer.

    Attributes:
        name: as in error messages.
        joined: whether the recurrent term is simply added to the input term.
        step: ``(input term, recurrent term, state) -> state``, terms ``[B, gates * H]``; the recurrent term holds
            the input term already if ``joined``. A state begins with the hidden state ``[B, H]``.
    """

    name: str
    joined: bool
    step: Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


class Weights(NamedTuple):
    """Parameters of one direction of one layer: ``[G, I]``, ``[G, H]``, ``[G]``, ``[G]``."""

    input: Tensor
    recurrent: Tensor
    input_bias: Tensor | None = None
    recurrent_bias: Tensor | None = None


def _lstm_step(_: Tensor, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(given: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
    (h,) = state
    given_rz, given_n = given.tensor_split((2 * h.shape[-1],), -1)
    recurrent_rz, recurrent_n = recurrent.tensor_split((2 * h.shape[-1],), -1)
    r, z = (given_rz + recurrent_rz).sigmoid().chunk(2, -1)
    n = (given_n + r * recurrent_n).tanh()
    return (n + z * (h - n),)


LSTM = Cell("lstm", True, _lstm_step)
GRU = Cell("gru", False, _gru_step)
RNN_TANH = Cell("rnn_tanh", True, lambda _, term, state: (term.tanh(),))
RNN_RELU = Cell("rnn_relu", True, lambda _, term, state: (term.relu(),))


@route(torch.lstm, always=True)
def lstm(
    tape: Tape, input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *settings: Any
) -> tuple[Any, ...]:
    """``nn.LSTM``, batch first."""
    return _layers(tape, LSTM, input, hx, params, *settings)


@route(torch.gru, always=True)
def gru(tape: Tape, input: Tensor, hx: Tensor, params: Sequence[Tensor], *settings: Any) -> tuple[Any, ...]:
    """``nn.GRU``, batch first."""
    return _layers(tape, GRU, input, (hx,), params, *settings)


@route(torch.rnn_tanh, always=True)
def rnn_tanh(tape: Tape, input: Tensor, hx: Tensor, params: Sequence[Tensor], *settings: Any) -> tuple[Any, ...]:
    """``nn.RNN`` with tanh, batch first."""
    return _layers(tape, RNN_TANH, input, (hx,), params, *settings)


@route(torch.rnn_relu, always=True)
def rnn_relu(tape: Tape, input: Tensor, hx: Tensor, params: Sequence[Tensor], *settings: Any) -> tuple[Any, ...]:
    """``nn.RNN`` with relu, batch first."""
    return _layers(tape, RNN_RELU, input, (hx,), params, *settings)


def _layers(
    tape: Tape,
    cell: Cell,
    x: Tensor,
    initial: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """``(outputs [B, T, D H], final states [layers * D, B, H] ...)``, computed in the dtype of the parameters."""
    _check(cell, x, params, has_biases, batch_first)
    refuse_parameters(tape, x, *initial)
    directions = 2 if bidirectional else 1
    size = len(params) // (num_layers * directions)
    if size != (4 if has_biases else 2):
        raise UnsupportedOperation("proj_size has no rule; use a linear layer after the recurrent one")
    finals = []
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(params[0].dtype)
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = Weights(*params[index * size : (index + 1) * size])
                start = tuple(state[index].to(x.dtype) for state in initial)
                out, final = _run(tape, cell, x, start, weights, reverse=direction == 1)
                outputs.append(out)
                finals.append(final)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer + 1 < num_layers:
                x = F.dropout(x, dropout, train)
    return x, *(torch.stack(states) for states in zip(*finals))


def _check(cell: Cell, x: Tensor, params: object, has_biases: object, batch_first: object) -> None:
    if not isinstance(params, (list, tuple)) or not isinstance(has_biases, bool):
        raise UnsupportedOperation("packed sequences have no rule; pad them, and weight the loss by their lengths")
    if not batch_first:
        raise FastregError(
            f"{cell.name}: batch_first must be True, got False (samples lie along dimension 0; build the layer with "
            "batch_first=True and give it the batch first)"
        )
    if x.dim() != 3:
        raise UnsupportedOperation("an input without a batch dimension has no rule")


def _run(
    tape: Tape, cell: Cell, x: Tensor, state: tuple[Tensor, ...], weights: Weights, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one layer: its outputs ``[B, T, H]`` and its final state."""
    given = linear(tape, x, weights.input, weights.input_bias)
    given = given.flip(1) if reverse else given
    base = given if cell.joined else torch.zeros_like(given)
    use, handover = _use(tape, weights), Handover()
    product: Callable[[Tensor, Tensor], Tensor]
    if tape.differs(use):
        # At weights of its own in every micro-batch: each step is an operation like any other.
        terms, product = base, lambda term, h: term + tape.enter(use, h, *weights[1::2])
    else:
        terms = Enter.apply(use, handover, base, *weights[1::2], tape.root)
        product = lambda term, h: Step.apply(term, h, weights.recurrent)  # noqa: E731
    hidden = [state[0]]
    for given_t, term in zip(given.unbind(1), terms.unbind(1)):
        state = cell.step(given_t, product(term, state[0]), state)
        hidden.append(state[0])
    states, *others = Leave.apply(handover, torch.stack(hidden, 1), *state[1:])
    out = states[:, 1:]
    return out.flip(1) if reverse else out, (states[:, -1], *others)


def _use(tape: Tape, weights: Weights) -> Use:
    of_weight, of_bias = tape.lineage(weights.recurrent), tape.lineage(weights.recurrent_bias)
    tape.session.count_use(*(one.key for one in (of_weight, of_bias) if one is not None))
    return Use(tape.session, RECURRENT, of_weight, of_bias)


@route(torch.lstm_cell)
def lstm_cell(
    tape: Tape,
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``nn.LSTMCell``."""
    gates = linear(tape, input, w_ih, b_ih) + linear(tape, hx[0], w_hh, b_hh)
    return _lstm_step(gates, gates, tuple(hx))


@route(torch.gru_cell)
def gru_cell(
    tape: Tape,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``nn.GRUCell``."""
    return _gru_step(linear(tape, input, w_ih, b_ih), linear(tape, hx, w_hh, b_hh), (hx,))[0]
