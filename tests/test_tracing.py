"""Compiled functions return what the functions return."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
from cases import BY_NAME, Case
from fastreg.curvature import batched_hvp, fisher_vp, ggn_vp
from fastreg.errors import FastregError

SAMPLES, SIZE, COUNT = 6, 2, 3
Function = Callable[[Tensor, Tensor, dict[str, Tensor]], dict[str, Tensor]]


def as_traced(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable:
    """What would be compiled."""
    return graph


def functions(model: nn.Module, case: Case) -> dict[str, Function]:
    loss_fn = case.loss_fn
    return {
        "many": lambda x, y, v: batched_hvp(model, loss_fn, (x, y), v),
        "summed": lambda x, y, v: batched_hvp(model, loss_fn, (x, y), v, SIZE, reduce="sum"),
        "apart": lambda x, y, v: batched_hvp(model, loss_fn, (x, y), v, SIZE),
        "gradient": lambda x, y, v: batched_hvp(model, loss_fn, (x, y), "grad", SIZE, reduce="mean"),
        "ggn": lambda x, y, v: ggn_vp(model, loss_fn, (x, y), v),
        "fisher": lambda x, y, v: fisher_vp(model, None, (x, y), v, seed=1),
    }


def vectors(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.randn(COUNT, *p.shape, dtype=p.dtype) for name, p in named.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert not got[name].requires_grad
        scale = max(float(want[name].norm()), 1e-12)
        assert float((got[name] - want[name]).norm()) <= tolerance * scale, name


KINDS = ("many", "summed", "apart", "gradient", "ggn", "fisher")
OTHERS = ("residual_conv", "batch_norm_train", "lstm")


@pytest.mark.parametrize(
    ("name", "of"), [*(("gpt_tied", kind) for kind in KINDS), *((n, k) for n in OTHERS for k in KINDS[:2])]
)
def test_the_traced_graph_computes_the_same(name: str, of: str) -> None:
    """Before and after the parameters change: they are inputs of the graph, not constants in it."""
    case = BY_NAME[name]
    model, batch = case.model(), case.batch(SAMPLES)
    function = functions(model, case)[of]
    compiled, given = fastreg.compile(function, model, compiler=as_traced), vectors(model)
    assert_same(compiled(*batch, given), function(*batch, given), 1e-12)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p)
    assert_same(compiled(*batch, given), function(*batch, given), 1e-12)


def test_inductor() -> None:
    case = BY_NAME["mlp_gelu"]
    model, batch = case.model(), case.batch(SAMPLES)
    function = functions(model, case)["summed"]
    given = vectors(model)
    assert_same(fastreg.compile(function, model)(*batch, given), function(*batch, given), 1e-11)


def test_one_graph_for_every_kind_of_call() -> None:
    case, calls = BY_NAME["batch_norm_train"], []
    model = case.model()
    original = model.forward
    model.forward = lambda x: calls.append(x.shape) or original(x)
    function = lambda x, y, v: batched_hvp(model, case.loss_fn, (x, y), v)  # noqa: E731
    compiled, given = fastreg.compile(function, model, compiler=as_traced), vectors(model)
    seen: set[tuple[int, bool]] = set()
    for samples, training in ((6, True), (6, True), (4, True), (6, False), (4, True), (6, False)):
        model.train(training)
        batch, before = case.batch(samples), len(calls)
        got = compiled(*batch, given)
        assert (len(calls) > before) == ((samples, training) not in seen)
        seen.add((samples, training))
        assert_same(got, function(*batch, given), 1e-12)


def test_the_model_stays_as_it_was() -> None:
    case = BY_NAME["batch_norm_train"]
    model, batch = case.model(), case.batch(SAMPLES)
    before, identities = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    compiled = fastreg.compile(functions(model, case)["apart"], model, compiler=as_traced)
    for _ in range(2):
        compiled(*batch, vectors(model))
    assert [id(p) for p in model.parameters()] == identities
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_of_nan_is_refused_when_it_is_traced() -> None:
    model = nn.Linear(3, 2)
    function = lambda x, y, v: batched_hvp(model, F.cross_entropy, (x, y), v)  # noqa: E731
    compiled = fastreg.compile(function, model, compiler=as_traced)
    with pytest.raises(FastregError, match="loss must be a number, got NaN"):
        compiled(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long), torch.ones(8))
    assert compiled(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(8)).shape == (8,)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(FastregError, match="model must be a torch.nn.Module, got function"):
        fastreg.compile(F.relu, F.relu)
