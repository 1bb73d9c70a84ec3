"""What a user's type checker must say of the main calls; checked by test_typing.py, never run.

Lines that end in ``# E: code`` are wrong uses, which must be reported with that code; no other line may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

import fastreg
from fastreg import curvature, noise, optim, sampling, weights
from fastreg.penalties import Step

Batch = tuple[Tensor, Tensor]


def penalties(model: nn.Module, x: Tensor, y: Tensor) -> None:
    reg = fastreg.Regularizer(model, [fastreg.GradNorm(0.1), fastreg.FisherTrace(0.1)], micro_batch_size=4, every=2)
    assert_type(reg(F.cross_entropy(model(x), y), model(x), scale=0.5), Tensor)
    assert_type(reg(lambda: F.cross_entropy(model(x), y)), Tensor)
    assert_type(reg.metrics, dict[str, Tensor])
    fastreg.Regularizer(model, "grad_norm", micro_batch_size=4)  # E: arg-type
    fastreg.Regularizer(model, fastreg.GradNorm(0.1))  # E: call-arg
    fastreg.GradNorm(weight="large")  # E: arg-type
    reg("loss")  # E: arg-type


@dataclass
class FourthPower(fastreg.Penalty):
    weight: float | weights.Weight
    centered: bool = False
    name: ClassVar[str] = "fourth_power"

    def value(self, step: Step) -> Tensor:
        return step.mean(step.sq_norms.square())


def policies(model: nn.Module, base: torch.optim.Optimizer) -> None:
    policy = weights.warm_up(weights.match_sgd(lr_target=0.1, lr=base), steps=100)
    assert_type(policy, weights.Weight)
    assert_type(policy.at(3), float)
    fastreg.NoiseTrace(policy)
    weights.schedule(0.1, 3)  # E: arg-type


def optimizers(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    sam: torch.optim.Optimizer = optim.SAM(base, model, rho=0.05, micro_batch_size=2)
    grafted = optim.Grafted(base, optim.MicroBatchNorm(model, micro_batch_size=2))
    assert_type(optim.SAM(base, model).backward(closure), Tensor)
    assert_type(grafted.step(closure), Tensor)
    torch.optim.lr_scheduler.StepLR(sam, 10)
    optim.SAM(model, base)  # E: arg-type
    optim.Grafted(base, 1.0)  # E: arg-type


def statistics(model: nn.Module, batch: Batch) -> None:
    assert_type(fastreg.micro_batch_grad_norms(model, F.cross_entropy, batch, 4), Tensor)
    by_name = fastreg.per_sample_grad_norms(model, F.cross_entropy, batch, per_parameter=True)
    assert_type(by_name, dict[str, Tensor])
    assert_type(fastreg.fisher_trace(model, None, batch, kind="exact"), Tensor)
    monitor = fastreg.Monitor(model, ("noise_trace",), every=10)
    assert_type(monitor.step(), dict[str, Tensor])
    by_name.mean()  # E: attr-defined
    fastreg.Monitor(model, every="often")  # E: arg-type


def products(model: nn.Module, batch: Batch) -> None:
    flat, named = torch.ones(8), {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    hessian = curvature.Hessian(model, F.cross_entropy, batch)
    assert_type(hessian @ flat, Tensor)
    assert_type(curvature.batched_hvp(model, F.cross_entropy, batch, flat), Tensor)
    assert_type(curvature.batched_hvp(model, F.cross_entropy, batch, named, 4), dict[str, Tensor])
    assert_type(curvature.batched_hvp(model, F.cross_entropy, batch, "grad", 4, reduce="mean"), dict[str, Tensor])
    assert_type(curvature.ggn_vp(model, F.cross_entropy, batch, [flat]), list[Tensor])
    assert_type(curvature.top_eigenvalues(hessian, 2), Tensor)
    assert_type(curvature.top_eigenvalues(hessian, 2, vectors=True), tuple[Tensor, Tensor])
    assert_type(curvature.trace(hessian).error, Tensor)
    assert_type(noise.modified_loss(model, F.cross_entropy, batch, 4, lr=0.1), Tensor)
    curvature.batched_hvp(model, F.cross_entropy, batch)  # E: call-overload
    curvature.batched_hvp(model, F.cross_entropy, batch, "gradient")  # E: type-var
    curvature.top_eigenvalues(model)  # E: call-overload


def steps(model: nn.Module, x: Tensor, y: Tensor) -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def block(x: Tensor) -> Tensor:
        return x.relu()

    assert_type(fastreg.compile(step, model)(x, y), Tensor)
    assert_type(fastreg.checkpoint(block, x), Tensor)
    assert_type(iter(sampling.Shuffled(100, 10, seed=1)), Iterator[list[int]])
    fastreg.checkpoint(block, "x")  # E: arg-type
    sampling.Shuffled("100", 10)  # E: arg-type
