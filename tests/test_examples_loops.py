"""The loops in the style of torchtune and torchtitan: gradients of an update against plain float64 autograd."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastreg
from examples import torchtitan_style, torchtune_style
from fastreg.models import GPT, GPTConfig
from sharded import on_processes

WEIGHT, SIZE, CLOSE = 0.3, 2, {"rtol": 1e-10, "atol": 1e-12}
Pairs = list[tuple[Tensor, Tensor]]


def small() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(vocab=11, context=6, width=8, layers=2, heads=2)).double()


def pairs(count: int, samples: int = 5) -> Pairs:
    """Batches whose last micro-batch is short."""
    draw = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(11, (2, samples, 6), generator=draw)) for _ in range(count)]


def padded() -> list[dict[str, Tensor]]:
    """Batches in which sequences have 1 to 6 labels that count."""
    out = []
    for number, (tokens, labels) in enumerate(pairs(3)):
        lengths = torch.tensor([6, 1, 4, 2, 3]).roll(number) - int(number > 1)
        past = torch.arange(6) >= lengths.clamp(min=1)[:, None]
        out.append({"tokens": tokens, "labels": labels.masked_fill(past, torchtune_style.IGNORED)})
    return out


@sdpa_kernel(SDPBackend.MATH)
def explicit(model: nn.Module, update: list[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """The gradient of ``sum_j f_j (C_j + weight R_j)``, one micro-batch after another."""
    parameters, total = list(model.parameters()), 0.0

    def mean(tokens: Tensor, labels: Tensor) -> Tensor:
        kept = labels != torchtune_style.IGNORED
        return -model(tokens).log_softmax(-1)[kept].gather(1, labels[kept][:, None]).mean()

    for tokens, labels, share in update:
        losses = [mean(*piece) for piece in zip(tokens.split(SIZE), labels.split(SIZE), strict=True)]
        gradients = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in losses]
        squared = [sum(g.square().sum() for g in own) for own in gradients]
        total = total + share * (mean(tokens, labels) + WEIGHT * torch.stack(squared).mean())
    return list(torch.autograd.grad(total, parameters))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_tokens_are_the_weights_of_batches_in_the_loop_of_torchtune() -> None:
    model, batches = small(), padded()
    counts = [int(batch["labels"].ne(torchtune_style.IGNORED).sum()) for batch in batches]
    assert len(set(counts)) > 1
    update = [(b["tokens"], b["labels"], n / sum(counts)) for b, n in zip(batches, counts, strict=True)]
    want = explicit(model, update)
    torchtune_style.Recipe(model, WEIGHT, SIZE).accumulate(batches)
    torch.testing.assert_close(gradients(model), want, **CLOSE)


class Chunked(nn.Module):
    """Logits in two pieces of the sequence, as torchtune's models return them for its chunked loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = small()

    def forward(self, tokens: Tensor) -> list[Tensor]:
        return list(self.gpt(tokens).chunk(2, 1))


def test_logits_in_chunks() -> None:
    """The self-check of the first step cuts a micro-batch out of each."""
    ((tokens, labels),) = pairs(1)
    model = Chunked()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE)
    pieces = zip(model(tokens), labels.chunk(2, 1), strict=True)
    loss = sum(nn.functional.cross_entropy(p.flatten(0, 1), y.flatten(), reduction="sum") for p, y in pieces)
    reg(loss / labels.numel()).backward()
    torch.testing.assert_close(gradients(model), explicit(small(), [(tokens, labels, 1.0)]), **CLOSE)


def titan(batches: Pairs, *, compiled: bool = False) -> nn.Module:
    """A model after two updates with a rate of 0, which leave gradients that were not clipped."""
    model = torchtitan_style.parallelize(small())
    trainer = torchtitan_style.Trainer(model, WEIGHT, len(batches), compiled)
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *args: None)
        trainer.update(batches)
        trainer.update(batches)
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_updates_of_the_loop_of_torchtitan(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    # As traced: what Inductor makes of a graph is not what is tested here.
    monkeypatch.setattr(fastreg, "compile", partial(fastreg.compile, compiler=lambda graph, inputs: graph))
    batches = pairs(3)
    want = explicit(small(), [(*batch, 1 / 3) for batch in batches])
    torch.testing.assert_close(gradients(titan(batches, compiled=compiled)), want, **CLOSE)


def sharded(rank: int, count: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    model = titan(pairs(4)[rank::count])
    found = [p.grad.full_tensor() for p in model.parameters()]
    assert all(type(p) is not nn.Parameter for p in model.parameters())
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def test_the_loop_of_torchtitan_on_two_processes(tmp_path: Path) -> None:
    on_processes(2, sharded, tmp_path)
    want = explicit(small(), [(*batch, 1 / 4) for batch in pairs(4)])
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), want, **CLOSE)


@pytest.mark.parametrize("example", [torchtune_style, torchtitan_style], ids=["torchtune", "torchtitan"])
def test_they_learn_on_one_page(example: object, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main(steps=8)
    # Bytes that are all as likely have log 256 = 5.5.
    assert losses[0] > 5 and losses[-1] < 4.7
    assert capsys.readouterr().out.startswith("step   0  loss 5.")
    assert len(Path(example.__file__).read_text().splitlines()) <= 90
