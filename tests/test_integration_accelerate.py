"""Loops of Accelerate: gradients against plain float64 autograd, checkpoints, mixed precision, the examples."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
from fastreg.errors import FastregError

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from fastreg.integrations.accelerate import own_outputs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WEIGHT, SIZE, ACCUMULATED = 0.3, 2, 2


class Own(nn.Module):
    """A model that computes its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return [
        (torch.randn(5, 6, generator=draw).to(dtype), torch.randint(4, (5,), generator=draw)) for _ in range(count)
    ]


def explicit(layers: nn.Module, update: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The gradient of the mean over batches of ``C + weight R``."""
    parameters, total = list(layers.parameters()), 0.0
    for x, y in update:
        squared = []
        for piece in (slice(start, start + SIZE) for start in range(0, len(x), SIZE)):
            own = F.cross_entropy(layers(x[piece]), y[piece])
            squared.append(sum(g.square().sum() for g in torch.autograd.grad(own, parameters, create_graph=True)))
        total = total + (F.cross_entropy(layers(x), y) + WEIGHT * torch.stack(squared).mean()) / len(update)
    return list(torch.autograd.grad(total, parameters))


def test_accumulated_updates_have_the_gradient_of_the_explicit_sum() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = Own().layers.double()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, plain)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE)
    found = []
    for x, y in batches(4):
        before = [p.detach().clone() for p in model.parameters()]
        with accelerator.accumulate(model):
            accelerator.backward(reg(F.cross_entropy(model(x), y)))
            if accelerator.sync_gradients:
                found.append((before, [p.grad.clone() for p in model.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
    assert len(found) == 2
    for number, (weights, got) in enumerate(found):
        layers = Own().layers.double()
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(weights), layers.parameters())
        want = explicit(layers, batches(4)[2 * number : 2 * number + 2])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_accelerate_keeps_the_state_in_its_checkpoints(tmp_path: Path) -> None:
    def gradients(steps: range, load: bool) -> Tensor:
        fresh_accelerator = Accelerator(cpu=True)
        model = fresh_accelerator.prepare(Own().layers)
        penalty = fastreg.FisherTrace(WEIGHT)
        reg = fastreg.Regularizer(model, penalty, micro_batch_size=SIZE, fraction=0.4, seed=7)
        fresh_accelerator.register_for_checkpointing(reg)
        if load:
            fresh_accelerator.load_state(str(tmp_path / "state"))
        for number in steps:
            x, y = batches(6, torch.float32)[number]
            model.zero_grad()
            outputs = model(x)
            fresh_accelerator.backward(reg(F.cross_entropy(outputs, y), outputs))
            if number == 2 and not load:
                fresh_accelerator.save_state(str(tmp_path / "state"))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    straight = gradients(range(6), load=False)
    assert gradients(range(3, 6), load=True).equal(straight)
    assert not gradients(range(5, 6), load=False).equal(straight)


def test_a_loss_of_the_models_own_under_mixed_precision() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(Own())
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE)
    ((x, y),) = batches(1, torch.float32)
    with pytest.raises(FastregError, match="loss must depend on the model's last outputs"):
        reg(model(x, y)["loss"])
    with own_outputs(model) as outputs:
        copies = model(x, y)
    assert outputs[0]["logits"].dtype == torch.bfloat16 and copies["logits"].dtype == torch.float32
    accelerator.backward(reg(copies["loss"], outputs[0]["logits"]))
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    want = torch.cat([g.flatten() for g in explicit(Own().layers.double(), batches(1))])
    assert (got - want).norm() < 4 * torch.finfo(torch.bfloat16).eps * want.norm()
    # Nothing stays behind on the model.
    assert model(x, y)["logits"].dtype == torch.float32 and len(outputs) == 1


def test_outputs_of_a_model_as_it_is() -> None:
    model, ((x, y),) = Own(), batches(1, torch.float32)
    with own_outputs(model) as outputs:
        found = model(x, y)
    model(x, y)
    assert len(outputs) == 1 and outputs[0] is found


@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FastregError, match=rf"{name} must be installed.*pip install 'fastreg\[integrations\]'"):
        runpy.run_path(str(ROOT / "fastreg" / "integrations" / f"{name}.py"))


def test_the_loop_of_the_example_lowers_the_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import accelerate_loop

    penalties = accelerate_loop.main(epochs=3)
    assert penalties[-1] < 0.5 * penalties[0]
    assert capsys.readouterr().out.count("mean ||g_k||^2") == 3


def test_the_example_of_the_trainer_lowers_the_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from examples import huggingface

    plain, penalised = huggingface.main(steps=5, weights=(0.0, 1.0)).values()
    assert penalised[-1]["fastreg/grad_norm"] < 0.5 * plain[-1]["fastreg/grad_norm"]
