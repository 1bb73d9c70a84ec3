"""The engine with the kernels of a GPU: compiled where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastreg
import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import UnsupportedOperation
from fastreg.kernels import _launch

SAMPLES, SIZE, WEIGHT = 6, 2, 0.7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Float32 against float64 through a double backward of a few layers.
FLOAT32 = 1e-4
PENALTIES = {"grad_norm": fastreg.GradNorm(weight=WEIGHT), "fisher_trace": fastreg.FisherTrace(weight=WEIGHT, seed=5)}
GPU_MARK = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def triton_preferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU too, choose Triton wherever it can run the call, as on a GPU."""
    monkeypatch.setattr(_launch, "_slower", lambda *_args: None)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def step_gradient(case: Case, penalty: fastreg.Penalty) -> tuple[oracle.Gradient, Tensor | None]:
    """Gradient of one regularized float32 step, in float64 on the CPU, and the labels that were drawn."""
    model = case.model(torch.float32).to(DEVICE)
    inputs, targets = (tensor.to(DEVICE) for tensor in case.batch(SAMPLES, torch.float32))
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=SIZE)
    outputs = model(inputs)
    reg(case.sample_losses(outputs, targets).mean(), outputs).backward()
    labels = getattr(penalty, "last_labels", None)
    return (
        {name: grad.cpu().double() for name, grad in oracle.collected_gradient(model).items()},
        None if labels is None else labels.cpu(),
    )


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=GPU_MARK) for c in CASES])
def test_a_float32_step_equals_the_oracle(case: Case) -> None:
    try:
        got, _ = step_gradient(case, PENALTIES["grad_norm"])
    except UnsupportedOperation:
        assert case.may_refuse
        return
    want = oracle.penalty_gradient(case.model(), case.loss_fn, *case.batch(SAMPLES), SIZE, weight=WEIGHT)
    assert oracle.relative_error(got, want) <= FLOAT32


@pytest.mark.parametrize("name", ["mlp_relu", "gpt_tied", "vit", "residual_conv"])
def test_a_float32_fisher_step_equals_the_oracle(name: str) -> None:
    case = BY_NAME[name]
    got, labels = step_gradient(case, PENALTIES["fisher_trace"])
    batch = case.batch(SAMPLES)
    want = oracle.penalty_gradient(
        case.model(), case.loss_fn, *batch, SIZE, weight=WEIGHT, penalty="fisher_trace", labels=labels
    )
    assert oracle.relative_error(got, want) <= FLOAT32


def test_the_kernels_of_a_gpu_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[tuple[str, str]] = set()
    run = fastreg.kernels.Op.run

    def note(op: fastreg.kernels.Op, *args: object) -> object:
        chosen = next(c.name for c in fastreg.kernels.explain(op.name, *args) if c.chosen)
        launched.add((op.name, chosen))
        return run(op, *args)

    monkeypatch.setattr(fastreg.kernels.Op, "run", note)
    step_gradient(BY_NAME["gpt_tied"], PENALTIES["grad_norm"])
    assert not {op for op, chosen in launched if chosen == "native"}
    expected = {"outer_apply", "segment_dot", "attention_backward", "attention_double_backward"}
    assert {(op, "triton") for op in expected} <= launched
    step_gradient(BY_NAME["residual_conv"], PENALTIES["grad_norm"])
    assert {("conv_outer", "triton"), ("conv_apply", "triton")} <= launched


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mlp_gelu", "gpt_tied", "residual_conv"])
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    case = BY_NAME[name]
    model = case.model(torch.float32).cuda()
    inputs, targets = (tensor.cuda() for tensor in case.batch(SAMPLES, torch.float32))
    reg = fastreg.Regularizer(model, [*PENALTIES.values()], micro_batch_size=SIZE)
    for warm in (False, True):
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            outputs = model(inputs)
            reg(case.sample_losses(outputs, targets).mean(), outputs).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("cudagraphs", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_compiled_step_equals_the_oracle(penalty: str, cudagraphs: bool) -> None:
    case = BY_NAME["gpt_tied"]
    model = case.model(torch.float32).to(DEVICE)
    inputs, targets = (tensor.to(DEVICE) for tensor in case.batch(SAMPLES, torch.float32))
    reg = fastreg.Regularizer(model, PENALTIES[penalty], micro_batch_size=SIZE)

    def step(x: Tensor, y: Tensor) -> None:
        outputs = model(x)
        reg(case.sample_losses(outputs, y).mean(), outputs).backward()

    compiled = fastreg.compile(step, model, options={"triton.cudagraphs": cudagraphs})
    for _ in range(5):
        model.zero_grad()
        compiled(inputs, targets)
    labels = getattr(PENALTIES[penalty], "last_labels", None)
    want = oracle.penalty_gradient(
        case.model(), case.loss_fn, *case.batch(SAMPLES), SIZE, weight=WEIGHT, penalty=penalty,
        labels=None if labels is None else labels.cpu(),
    )  # fmt: skip
    got = {name: grad.cpu().double() for name, grad in oracle.collected_gradient(model).items()}
    assert oracle.relative_error(got, want) <= FLOAT32
