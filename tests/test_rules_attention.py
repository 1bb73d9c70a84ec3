"""Attention: the function against torch's composite form, models against a loop over micro-batches, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

import layer_oracle
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.recording import Recorder
from fastreg.rules.attention import attend
from fastreg.rules.packed_attention import spans_of
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


def routed(*operands: Tensor, **settings: object) -> Tensor:
    """As a model calls it under a recorder."""
    model = Asks(settings)
    recorder = Recorder(model, 2, model.parameters(), lambda: True)
    try:
        return model(*operands)
    finally:
        recorder.remove()


class Asks(nn.Module):
    """Nothing but the function; its parameter is there because a recorder asks for one."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        self.settings, self.unused = settings, nn.Parameter(torch.zeros(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.settings)


def saved_sizes(function: Callable[[], object]) -> list[int]:
    """Numbers in each tensor that the graph of a result keeps."""
    sizes: list[int] = []

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return sizes


NO_DROPOUT = [name for name, (*_, settings) in CASES.items() if not settings.get("dropout_p")]


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_the_rule_is_the_composite(name: str) -> None:
    torch.manual_seed(1)
    *shapes, settings = CASES[name]
    if isinstance(settings.get("attn_mask"), str):
        settings = {**settings, "attn_mask": mask_of(settings["attn_mask"])}
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with sdpa_kernel(SDPBackend.MATH):
        want = derivatives(F.scaled_dot_product_attention, operands, settings)
    for got, expected in zip(derivatives(routed, operands, settings), want, strict=True):
        # With one key the softmax is constant: what is 0 in the one way is rounding in the other.
        size = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT * size)


LONG: dict[str, dict] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.arange(50) < torch.tensor([50, 20])[:, None, None, None]},
    "dropout": {"dropout_p": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LONG)
def test_nothing_of_the_size_of_the_scores_is_kept(name: str, dtype: torch.dtype) -> None:
    q = torch.randn(2, 4, 50, 3).to(dtype).requires_grad_()
    k = torch.randn(2, 2 if name == "grouped" else 4, 50, 3).to(dtype).requires_grad_()

    def twice() -> None:
        out = routed(q, k, k, **LONG[name])
        torch.autograd.grad(out.sum(), [q, k], create_graph=True)

    assert max(saved_sizes(twice)) == q.numel()


def test_dropout_follows_the_generator() -> None:
    q = torch.randn(2, 4, 50, 3, requires_grad=True)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(routed(q, q, q, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    torch.manual_seed(1)
    first = routed(q, q, q, dropout_p=0.5)
    assert not torch.equal(first, routed(q, q, q, dropout_p=0.5))
    torch.manual_seed(1)
    again = checkpoint(lambda x: routed(x, x, x, dropout_p=0.5), q, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), q)[0] for out in (first, again)))


@pytest.mark.parametrize("settings", [{}, {"attn_mask": torch.ones(9, 9).tril().log()}, {"dropout_p": 0.2}])
def test_autocast_computes_in_its_dtype(settings: dict) -> None:
    torch.manual_seed(1)
    operands = [torch.randn(2, 3, 9, 16, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        got = routed(*operands, **settings)
        (grad,) = torch.autograd.grad(got.float().square().sum(), operands[0], create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), operands[1])
    assert got.dtype == torch.bfloat16 and grad.dtype == torch.float32
    low = [t.detach().bfloat16().double().requires_grad_() for t in operands]
    torch.manual_seed(2)
    want = routed(*low, **settings)
    (exact,) = torch.autograd.grad(want.square().sum(), low[0], create_graph=True)
    (twice,) = torch.autograd.grad(exact.square().sum(), low[1])
    # Every result is rounded once, and the third comes of two that are.
    step = torch.finfo(torch.bfloat16).eps
    assert error(got, want) < step
    assert error(grad, exact) < 2 * step
    assert error(second, twice) < 4 * step


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


class Packed(nn.Module):
    """Attention within documents, of which every sample holds several: packed, or by a mask of all pairs."""

    def __init__(self, packed: bool, window: tuple[int, int], grouped: bool) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(WIDTH, (3 - grouped) * WIDTH), nn.Linear(WIDTH, 3)
        self.packed, self.window, self.grouped = packed, window, grouped

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, WIDTH + 1]``: the last number of a token is that of its document."""
        x, document = x[..., :WIDTH], x[:, None, :, WIDTH]
        q, k, v = self.inward(x).split([WIDTH, *(WIDTH // (1 + self.grouped),) * 2], -1)
        q, k, v = (t.unflatten(2, (-1, WIDTH // 4)) for t in (q, k, v))
        if self.packed:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = varlen_attn(q, k, v, CUT, CUT, 6, 6, window_size=self.window, enable_gqa=self.grouped)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, self.near(document), enable_gqa=self.grouped).transpose(1, 2)
        return self.out(y.reshape(x.shape)).mean(1)

    def near(self, document: Tensor) -> Tensor:
        """Within the same document and the window: ``[B, 1, T, T]``."""
        position = torch.arange(document.shape[-1])
        behind = position[:, None] - position
        left, right = (len(position) if bound < 0 else bound for bound in self.window)
        return (document[..., :, None] == document[..., None, :]) & (behind <= left) & (-behind <= right)


# Four samples of six tokens.
CUT = torch.tensor([0, 2, 6, 12, 13, 17, 18, 24], dtype=torch.int32)


def packed_batch() -> Tensor:
    document = torch.bucketize(torch.arange(24), CUT, right=True).view(4, 6, 1)
    return torch.cat((torch.randn(4, 6, WIDTH, dtype=torch.float64), document), 2).requires_grad_()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("window, grouped", [((-1, -1), False), ((-1, 0), True), ((1, 0), False), ((2, 1), True)])
def test_packed_documents(window: tuple[int, int], grouped: bool, size: int) -> None:
    torch.manual_seed(3)
    packed, masked = (Packed(kind, window, grouped).double() for kind in (True, False))
    packed.load_state_dict(masked.state_dict())
    x, y = packed_batch(), torch.randint(3, (4,))
    got = layer_oracle.regularized(packed, x, y, size, check=True)
    assert all(error(a, b) < EXACT for a, b in zip(got, layer_oracle.penalised(masked, x, y, size), strict=True))


def test_packed_tokens_beyond_the_last_document_see_nothing() -> None:
    spans = spans_of(CUT[:4], 14)
    assert spans[:, 11:].tolist() == [[6, 12, 12], [12, 12, 12]]


def varlen(cut_q: Tensor, cut_k: Tensor, **settings: object) -> Callable[[nn.Module, Tensor], Tensor]:
    """A call of two samples of three tokens."""

    def way(module: nn.Module, x: Tensor) -> Tensor:
        q = module(x).view(6, 2, 4)
        return varlen_attn(q, q, q, cut_q, cut_k, 3, 3, **settings)

    return way


TWO, ACROSS = torch.tensor([0, 3, 6]), torch.tensor([0, 2, 4, 6])
PACKED_REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "across": (varlen(ACROSS, ACROSS), "every 3 tokens, got document 1 with tokens 2 to 3"),
    "keys": (varlen(TWO, TWO.clone()), "cu_seq_q and cu_seq_k must be one tensor"),
    "cache": (varlen(TWO, TWO, seqused_k=torch.tensor([3, 3])), "are for inference"),
}


@pytest.mark.parametrize("name", PACKED_REFUSED)
def test_documents_that_are_refused(name: str) -> None:
    way, reason = PACKED_REFUSED[name]
    with pytest.raises(FastregError, match=reason):
        recorded(Call(nn.Linear(WIDTH, WIDTH), way), torch.randn(2, 3, WIDTH))


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
