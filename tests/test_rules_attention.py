"""Attention: the function against torch's composite form, models against a loop over micro-batches, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import layer_oracle
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.recording import Recorder
from fastreg.rules.attention import attend
from layer_oracle import EXACT, error

SAMPLES, WIDTH = 5, 8

# Shapes of query, key and value, and the settings of F.scaled_dot_product_attention.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict]] = {
    "plain": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), {}),
    "one_key": ((2, 1, 3, 4), (2, 1, 1, 4), (2, 1, 1, 4), {}),
    "three_dimensions": ((3, 5, 4), (3, 7, 4), (3, 7, 4), {"scale": 0.3}),
    "broadcast": ((2, 1, 5, 4), (3, 7, 4), (2, 3, 7, 4), {}),
    "causal": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"is_causal": True}),
    "causal_long_keys": ((2, 3, 4, 4), (2, 3, 7, 4), (2, 3, 7, 4), {"is_causal": True}),
    "causal_short_keys": ((2, 3, 7, 4), (2, 3, 4, 4), (2, 3, 4, 4), {"is_causal": True}),
    "float_mask": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), {"attn_mask": "float"}),
    "bool_mask": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), {"attn_mask": "bool"}),
    "dropout": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), {"dropout_p": 0.4}),
    "all_dropped": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), {"dropout_p": 1.0}),
    "grouped": ((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4), {"enable_gqa": True, "attn_mask": "bool"}),
    "grouped_causal": ((2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"enable_gqa": True, "is_causal": True}),
}


def mask_of(kind: str) -> Tensor:
    """Six rows with every kind of row: all keys, some, and (bool) none."""
    if kind == "float":
        return torch.randn(5, 7, dtype=torch.float64).masked_fill(torch.rand(5, 7) > 0.8, -math.inf)
    mask = torch.rand(2, 1, 5, 7) > 0.5
    mask[0, 0, 1], mask[1, 0, 4] = True, False
    return mask


def derivatives(function: Callable[..., Tensor], operands: list[Tensor], settings: dict) -> list[Tensor]:
    """Output, gradients, and the gradients of a fixed functional of those gradients."""
    torch.manual_seed(2)
    out = function(*operands, **settings)
    d = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out).requires_grad_()
    grads = torch.autograd.grad(out, operands, d, create_graph=True)
    functional = sum((g * (g.detach() + t.detach().cos())).sum() for g, t in zip(grads, operands))
    return [out, *grads, *torch.autograd.grad(functional, [d, *operands])]


def renamed(*operands: Tensor, **settings: object) -> Tensor:
    names = {"attn_mask": "mask", "dropout_p": "dropout"}
    return attend(*operands, **{names.get(name, name): value for name, value in settings.items()})[0]


@pytest.mark.parametrize("name", CASES)
def test_every_derivative_is_that_of_the_composite(name: str) -> None:
    torch.manual_seed(1)
    *shapes, settings = CASES[name]
    if isinstance(settings.get("attn_mask"), str):
        settings = {**settings, "attn_mask": mask_of(settings["attn_mask"])}
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with sdpa_kernel(SDPBackend.MATH):
        want = derivatives(F.scaled_dot_product_attention, operands, settings)
    for got, expected in zip(derivatives(renamed, operands, settings), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT * float(expected.detach().abs().max()))


NEEDED = [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]


@pytest.mark.parametrize("needed", NEEDED)
def test_operands_without_gradient(needed: tuple[bool, ...]) -> None:
    torch.manual_seed(1)
    operands = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=need) for need in needed]
    wanted = [t for t in operands if t.requires_grad]
    results = []
    for function in (attend, _composite):
        out = function(*operands)[0]
        d = out.detach().cos().requires_grad_()
        grads = torch.autograd.grad(out, wanted, d, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), [*wanted, d], materialize_grads=True)
        results.append(torch.cat([t.flatten() for t in (*grads, *second)]))
    assert error(*results) < EXACT


def test_returned_weights_carry_their_gradient() -> None:
    torch.manual_seed(1)
    operands = [torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for function in (attend, _composite):
        out, weights = function(*operands)
        grads = torch.autograd.grad(out.square().sum() + weights.sin().sum(), operands, create_graph=True)
        grads += torch.autograd.grad(sum(g.square().sum() for g in grads), operands)
        results.append(torch.cat([t.flatten() for t in grads]))
    assert error(*results) < EXACT


def _composite(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    return weights @ v, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_good_as_the_composite(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    low = [torch.randn(2, 3, 33, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact = derivatives(_composite_out, [t.detach().double().requires_grad_() for t in low], {})
    reference = derivatives(_composite_out, low, {})
    # One rounding of the result, and of each of its up to 33 summands' operands.
    rounding = torch.finfo(dtype).eps * math.sqrt(33)
    for got, same_dtype, want in zip(derivatives(renamed, low, {"is_causal": False}), reference, exact, strict=True):
        assert got.dtype == dtype
        assert error(got, want) < 2 * error(same_dtype, want) + rounding


def _composite_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _composite(q, k, v)[0]


class Pooled(nn.Module):
    """A body on [B, T, WIDTH] between two linear layers; the mean over time goes to the head."""

    def __init__(self, body: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.inward, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inward(x)).mean(1))


class MultiHead(nn.Module):
    """`nn.MultiheadAttention` on itself or on the first keys; its weights enter the output if they are asked for."""

    def __init__(self, keys: int | None = None, call: dict | None = None, **settings: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **settings)
        self.keys, self.call = keys, call or {}

    def forward(self, x: Tensor) -> Tensor:
        memory = x if self.keys is None else x[:, : self.keys]
        key = memory[..., : self.attention.kdim]
        key = memory if key.shape == memory.shape else key
        out, weights = self.attention(x, key, memory, **self.call)
        if weights is not None and weights.dim() == 3:
            out = out + weights.square().mean((1, 2), keepdim=True)
        return out


def encoder(**settings: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Decoder(nn.Module):
    """A decoder layer, causal over itself, attending to three memory tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x, x[:, :3].tanh(), tgt_mask=mask, tgt_is_causal=True)


PADDING = torch.arange(4) >= torch.tensor([4, 3, 1, 2, 4])[:, None]
ABOVE = torch.ones(4, 4, dtype=torch.bool).triu(1)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": encoder,
    "encoder_pre_norm": lambda: encoder(norm_first=True, activation="gelu", bias=False),
    "decoder": Decoder,
    "weights": MultiHead,
    "weights_per_head": lambda: MultiHead(call={"average_attn_weights": False}),
    "no_weights": lambda: MultiHead(call={"need_weights": False}, bias=False),
    "padding": lambda: MultiHead(call={"key_padding_mask": PADDING, "need_weights": False}),
    "padding_and_mask": lambda: MultiHead(call={"key_padding_mask": PADDING, "attn_mask": ABOVE}),
    "mask_per_head": lambda: MultiHead(call={"attn_mask": torch.randn(2 * SAMPLES, 4, 4, dtype=torch.float64)}),
    "cross": lambda: MultiHead(keys=3),
    "separate_projections": lambda: MultiHead(keys=3, kdim=5, vdim=WIDTH),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Pooled(MODELS[name]()).double()
        return model, torch.randn(SAMPLES, 4, WIDTH, dtype=torch.float64), torch.randint(3, (SAMPLES,))


def per_sample_settings(name: str) -> bool:
    """Whether the model holds a mask of the whole batch, which the oracle's micro-batches do not fit."""
    return name in ("padding", "padding_and_mask", "mask_per_head")


@pytest.mark.parametrize("size", [1, 2, 3, SAMPLES])
@pytest.mark.parametrize("name", [name for name in MODELS if not per_sample_settings(name)])
def test_models_match_the_loop(name: str, size: int) -> None:
    model, x, y = build(name)
    x.requires_grad_(size != 2)
    layer_oracle.check_exact(model, x, y, size, check=size == 2)


@pytest.mark.parametrize("name", [name for name in MODELS if per_sample_settings(name)])
def test_masks_of_the_whole_batch(name: str) -> None:
    model, x, y = build(name)
    layer_oracle.check_exact(model, x, y, SAMPLES)


@pytest.mark.parametrize("name", ["encoder", "cross"])
def test_statistics_ride_on_the_plain_gradient(name: str) -> None:
    model, x, y = build(name)
    layer_oracle.check_statistics(model, x, y, 2)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj", "attention"])
def test_frozen_parts(frozen: str) -> None:
    model, x, y = build("cross")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    layer_oracle.check_exact(model, x, y, 2)


def test_float32() -> None:
    model, x, y = build("encoder")
    want_norms, want = layer_oracle.penalised(model, x, y, 2)
    norms, gradient = layer_oracle.regularized(model.float(), x.float(), y, 2)
    # The longest sums run over 20 rows and 12 features in some 12 layers; three derivatives follow each other.
    tolerance = 3 * torch.finfo(torch.float32).eps * math.sqrt(12 * 20 * 12)
    assert error(norms, want_norms) < tolerance
    assert error(gradient, want) < tolerance


def recorded(model: nn.Module, x: Tensor) -> Tensor:
    recorder = Recorder(model, 2, model.parameters(), lambda: True)
    try:
        return model(x)
    finally:
        recorder.remove()


def test_sequence_first_is_refused_with_the_remedy() -> None:
    layer = nn.MultiheadAttention(WIDTH, 2)
    x = torch.randn(5, 3, WIDTH)
    with pytest.raises(FastregError, match="batch_first=True"):
        recorded(Call(layer, lambda m, t: m(t, t, t)[0]), x)


class Call(nn.Module):
    """A module called in a given way."""

    def __init__(self, module: nn.Module, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.way = module, way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.module, x)


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "mask_with_gradient": (
        lambda m, x: F.scaled_dot_product_attention(m(x), x, x, attn_mask=m(x) @ m(x).mT),
        "attn_mask requires grad",
    ),
    "query_from_a_parameter": (
        lambda m, x: F.scaled_dot_product_attention(m.weight[None], m(x), x),
        "derives from parameters alone",
    ),
    "gelu_of_a_parameter": (lambda m, x: x * F.gelu(m.weight), "derives from parameters alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name: str) -> None:
    way, reason = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=reason):
        recorded(Call(nn.Linear(WIDTH, WIDTH), way), torch.randn(SAMPLES, WIDTH, WIDTH))


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_added_tokens_are_refused(settings: dict) -> None:
    with pytest.raises(UnsupportedOperation, match="add_bias_kv"):
        recorded(MultiHead(**settings), torch.randn(SAMPLES, 4, WIDTH))


def test_conflicting_arguments_are_refused() -> None:
    q, k = torch.randn(2, 4, 3, 5), torch.randn(2, 3, 3, 5)
    with pytest.raises(FastregError, match="attn_mask must be None"):
        attend(q, q, q, torch.ones(3, 3, dtype=torch.bool), is_causal=True)
    with pytest.raises(FastregError, match="divide those of query"):
        attend(q, k, k, enable_gqa=True)
