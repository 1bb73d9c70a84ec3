"""What takes no second derivative leaves alone what has none: fused attention, compiled code, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastreg
import oracle
from cases import BY_NAME, Case
from fastreg import Monitor
from fastreg.optim import SAM
from sam_oracle import sequential_gradient
from test_perturb import BOUNDS, SAMPLES, WEIGHT, exact, loss_gradient, perturbed
from test_sam import RHO, closure_of, sgd

SIZE, EXACT = 2, 1e-10
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Mode:
    """One way to use fastreg.

    Attributes:
        step: attaches to the model, makes the passes of one step of ``run() -> loss``, detaches; what it finds beside
            parameter gradients.
        want: the same found by loops over micro-batches, gradients included.
        bound: on errors relative to what the mode adds to a plain step.
    """

    name: str
    step: Callable[[nn.Module, Run], oracle.Gradient]
    want: Callable[[Case], oracle.Gradient]
    bound: float = EXACT


def sam(model: nn.Module, run: Run) -> oracle.Gradient:
    optimizer = SAM(sgd(model), model, rho=RHO, micro_batch_size=SIZE)
    optimizer.backward(closure_of(optimizer, model, run))
    optimizer.remove()
    return {}


def sam_want(case: Case) -> oracle.Gradient:
    return sequential_gradient(case.model(), case.loss_fn, *case.batch(SAMPLES), SIZE, RHO)


def perturb(model: nn.Module, run: Run, difference: str) -> oracle.Gradient:
    reg = perturbed(model, fastreg.GradNorm(WEIGHT), SIZE, difference=difference)
    reg(run).backward()
    reg.remove()
    return {}


def monitor(model: nn.Module, run: Run) -> oracle.Gradient:
    attached = Monitor(model, ("sample_norms",), micro_batch_size=1)
    run().backward()
    norms = attached.step()["fastreg/sample_norms"]
    attached.remove()
    return {"norms": norms}


def monitor_want(case: Case) -> oracle.Gradient:
    norms = oracle.sq_norms(case.model(), case.loss_fn, *case.batch(SAMPLES), 1).sqrt()
    return loss_gradient(case, SIZE) | {"norms": norms}


MODES = [
    Mode("sam", sam, sam_want),
    Mode("monitor", monitor, monitor_want),
    *(
        Mode(difference, partial(perturb, difference=difference), partial(exact, size=SIZE, weight=WEIGHT), bound)
        for difference, bound in BOUNDS.items()
    ),
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


def found(mode: Mode, run: Run, model: nn.Module, attach_to: nn.Module | None = None) -> oracle.Gradient:
    """What the mode finds, gradients included."""
    norms = mode.step(attach_to or model, run)
    return oracle.collected_gradient(model) | norms


def nodes(loss: Tensor) -> set[str]:
    """Names of the nodes of a graph."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


def error(got: oracle.Gradient, want: oracle.Gradient, plain: oracle.Gradient) -> float:
    """Relative to what a mode adds to the plain gradient."""
    parts = [{name: g - plain.get(name, 0) for name, g in one.items()} for one in (got, want)]
    return oracle.relative_error(*parts)


@pytest.mark.parametrize(
    "context", [nullcontext, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)], ids=["default", "flash"]
)
@every_mode
def test_fused_attention(mode: Mode, context: Callable[[], AbstractContextManager]) -> None:
    case, graphs = BY_NAME["gpt_tied"], []
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)

    def run() -> Tensor:
        loss = case.loss_fn(model(inputs), targets)
        graphs.append(nodes(loss))
        return loss

    with context():
        got = found(mode, run, model)
    assert graphs
    assert all("ScaledDotProductFlashAttentionForCpuBackward0" in names for names in graphs)
    with sdpa_kernel(SDPBackend.MATH):
        assert error(got, mode.want(case), loss_gradient(case, SIZE)) < mode.bound


class Counted:
    """A compiler backend that counts the graphs it compiles and the calls of what it makes of them."""

    def __init__(self, name: str) -> None:
        self.compile, self.graphs, self.calls = torch._dynamo.lookup_backend(name), 0, 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        code = self.compile(graph, inputs)

        def counted(*args: Tensor) -> object:
            self.calls += 1
            return code(*args)

        return counted


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_mode
def test_a_compiled_model(mode: Mode, backend: str) -> None:
    """It runs as it was written while it is recorded, and compiled as before when nothing is attached any more."""
    torch.compiler.reset()
    case, counted = BY_NAME["mlp_gelu"], Counted(backend)
    model, (inputs, targets) = case.model(), case.batch(SAMPLES)
    want = found(mode, lambda: case.loss_fn(model(inputs), targets), model)
    compiled = torch.compile(model, backend=counted)
    outputs = compiled(inputs)
    assert (counted.graphs, counted.calls) == (1, 1)
    got = found(mode, lambda: case.loss_fn(compiled(inputs), targets), model, compiled)
    assert (counted.graphs, counted.calls) == (1, 1)
    oracle.assert_same_gradient(got, want, EXACT)
    assert torch.equal(compiled(inputs), outputs)
    assert (counted.graphs, counted.calls) == (1, 2)


class Checkpointed(nn.Module):
    """A function of a layer, re-run in the backward if ``again``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again, self.runs = True, 0

    def inner(self, hidden: Tensor) -> Tensor:
        self.runs += 1
        return self.middle(hidden).tanh()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        hidden = checkpoint(self.inner, hidden, use_reentrant=False) if self.again else self.inner(hidden)
        return self.last(hidden)


@every_mode
def test_activation_checkpointing(mode: Mode) -> None:
    torch.manual_seed(0)
    model, runs = Checkpointed().double(), []
    x, y = BY_NAME["mlp_gelu"].batch(SAMPLES)
    gradients = []
    for model.again in (True, False):
        model.runs = 0
        gradients.append(found(mode, lambda: F.cross_entropy(model(x), y), model))
        runs.append(model.runs)
    oracle.assert_same_gradient(*gradients, EXACT)
    assert runs[0] == 2 * runs[1]
