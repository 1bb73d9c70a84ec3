"""Penalties and monitor in Lightning's Trainer: gradients of its updates against plain float64 autograd."""

from __future__ import annotations

import doctest
import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from fastreg.errors import FastregError
from fastreg.optim import SAM, Regularized
from sam_oracle import sequential_gradient
from test_distributed import spawn

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

import fastreg.integrations.lightning
from fastreg.integrations.lightning import Kept, MonitorCallback, RegularizerCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WEIGHT, SIZE, BATCH, CLIP = 0.3, 2, 5, 0.05
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
Batch = tuple[Tensor, Tensor]

NOISE = "LeafSpec|num_workers|log_every_n_steps|no `val_dataloader`|exists"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*({NOISE}).*")


class Watched(torch.optim.SGD):
    """Notes weights, and the gradients that it is given."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, lr=0.1)
        self.weights: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def step(self, closure: object = None) -> object:
        loss = None if closure is None else closure()
        parameters = self.param_groups[0]["params"]
        self.weights.append([p.detach().clone() for p in parameters])
        self.gradients.append([p.grad.clone() for p in parameters])
        super().step()
        return loss


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()


class Module(lightning.LightningModule):
    """What a user writes, and options for the tests."""

    def __init__(self, penalty: object = None, net: nn.Module | None = None, **options: object) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.reg = fastreg.Regularizer(self.net, penalty, micro_batch_size=SIZE, **options) if penalty else None
        self.optimizer = Watched(self.net.parameters())

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.net(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        return loss if self.reg is None else self.reg(loss, outputs)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Batch, number: int) -> None:
        self.log("seen", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def grad_norm() -> fastreg.Penalty:
    return fastreg.GradNorm(WEIGHT)


def batches(count: int, dtype: torch.dtype = torch.float64, size: int = BATCH) -> list[Batch]:
    draw = torch.Generator().manual_seed(4)
    x, y = torch.randn(count * size, 6, generator=draw).to(dtype), torch.randint(4, (count * size,), generator=draw)
    return list(zip(x.split(size), y.split(size)))


def loader(data: list[Batch]) -> DataLoader:
    x, y = (torch.cat(parts) for parts in zip(*data))
    return DataLoader(TensorDataset(x, y), batch_size=len(data[0][0]))


def fit(module: Module, data: list[Batch], *, resume: str | None = None, **options: object) -> lightning.Trainer:
    trainer = lightning.Trainer(**QUIET | {"accelerator": "cpu", "max_epochs": 1} | options)
    trainer.fit(module, loader(data), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def penalised(net: nn.Module, x: Tensor, y: Tensor, weight: float = WEIGHT) -> tuple[Tensor, Tensor]:
    """C + weight R, and R, one micro-batch after another."""
    squared = []
    for rows in (slice(start, start + SIZE) for start in range(0, len(x), SIZE)):
        own = torch.autograd.grad(F.cross_entropy(net(x[rows]), y[rows]), list(net.parameters()), create_graph=True)
        squared.append(sum(g.square().sum() for g in own))
    penalty = torch.stack(squared).mean()
    return F.cross_entropy(net(x), y) + weight * penalty, penalty.detach()


def explicit(net: nn.Module, update: list[Batch], divisor: int, weight: float = WEIGHT) -> list[Tensor]:
    """The gradient of ``(1/n) sum_j (C_j + weight R_j)``."""
    total = sum(penalised(net, x, y, weight)[0] for x, y in update) / divisor
    return list(torch.autograd.grad(total, list(net.parameters())))


def at(weights: list[Tensor]) -> nn.Module:
    net = network()
    nn.utils.vector_to_parameters(flat(weights).double(), net.parameters())
    return net


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    assert (flat(got) - flat(want)).norm() <= tolerance * flat(want).norm()


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("accumulated", [1, 4])
def test_updates_have_the_gradient_of_the_explicit_sum(accumulated: int, clip: float | None) -> None:
    """Six batches: under accumulation of four the last update has two, which Lightning divides by four."""
    module, data = Module(grad_norm()), batches(6)
    fit(module, data, accumulate_grad_batches=accumulated, gradient_clip_val=clip)
    starts = range(0, len(data), accumulated)
    assert len(module.optimizer.gradients) == len(starts)
    for start, weights, got in zip(starts, module.optimizer.weights, module.optimizer.gradients):
        net, update = at(weights), data[start : start + accumulated]
        want, plain = explicit(net, update, accumulated), explicit(net, update, accumulated, 0.0)
        assert (flat(want) - flat(plain)).norm() > 0.05 * flat(plain).norm()
        if clip:
            assert flat(want).norm() > 2 * clip
            want = [clip * g / (flat(want).norm() + 1e-6) for g in want]
        assert_close(got, want)


def test_bfloat16_rounds_as_plain_autograd_does() -> None:
    data = batches(1, torch.float32)
    module = Module(grad_norm(), network().float())
    fit(module, data, precision="bf16-mixed")
    want, got = flat(explicit(network(), batches(1), 1)), flat(module.optimizer.gradients[0])
    with torch.autocast("cpu", torch.bfloat16):
        plain = flat(explicit(network().float(), data, 1))
    assert got.dtype == torch.float32
    assert 1e-4 * want.norm() < (got - want).norm() < 1.5 * (plain - want).norm() < 0.1 * want.norm()


def half() -> MixedPrecision:
    """What ``precision="16-mixed"`` means; on CPU the Trainer would put bfloat16 in its place."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))


def test_float16_scales_loss_and_penalty_alike() -> None:
    module = Module(grad_norm(), network().float())
    fit(module, batches(2, torch.float32), accumulate_grad_batches=2, plugins=[half()])
    want = flat(explicit(network(), batches(2), 2))
    error = (flat(module.optimizer.gradients[0]) - want).norm() / want.norm()
    assert 1e-6 < error < 4 * torch.finfo(torch.float16).eps


def test_logs_are_of_the_last_batch() -> None:
    module = Module(grad_norm())
    trainer = fit(module, batches(4), accumulate_grad_batches=2, callbacks=[RegularizerCallback(module.reg)])
    penalty = penalised(at(module.optimizer.weights[-1]), *batches(4)[-1])[1].item()
    found = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert found == pytest.approx({"fastreg/grad_norm": penalty, "fastreg/penalty": WEIGHT * penalty}, rel=1e-6)


def test_validation_is_that_of_the_plain_loss() -> None:
    module = Module(grad_norm())
    trainer = lightning.Trainer(**QUIET, accelerator="cpu")
    (seen,) = trainer.validate(module, loader(batches(1)), verbose=False)
    ((x, y),) = batches(1)
    assert seen["seen"] == pytest.approx(F.cross_entropy(network()(x), y).item(), rel=1e-6)
    assert all(p.grad is None for p in module.parameters())


def saving(folder: Path) -> dict[str, object]:
    """Lightning goes on exactly where an epoch ended: of four batches, one or two to an update."""
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    return {"max_steps": 6, "max_epochs": -1, "enable_checkpointing": True, "callbacks": [kept]}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def trained(resume: str | None = None, kept: bool = True) -> Tensor:
        module, options = Module([fastreg.FisherTrace(WEIGHT), grad_norm()], fraction=0.4, every=3), saving(tmp_path)
        options["callbacks"] += [RegularizerCallback(module.reg)] if kept else []
        fit(module, batches(4), resume=resume, accumulate_grad_batches=2, **options)
        return flat(list(module.parameters()))

    straight, file = trained(), str(tmp_path / "step=4.ckpt")
    assert torch.equal(straight, trained(file))
    assert not torch.equal(straight, trained(file, kept=False))


def sample_gradients(net: nn.Module, update: list[Batch]) -> Tensor:
    """``[S, D]``."""
    rows = []
    for x, y in ((x, y) for batch in update for x, y in zip(*batch)):
        rows.append(flat(list(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())))))
    return torch.stack(rows)


def moments(rows: Tensor) -> dict[str, float]:
    return {"fastreg/grad_norm": rows.mean(0).norm().item(), "fastreg/noise_trace": rows.var(0).sum().item()}


def watching(module: Module, **options: object) -> MonitorCallback:
    given = {"metrics": ("noise_trace", "grad_norm", "sample_norms"), "ema": 0.0} | options
    return MonitorCallback(fastreg.Monitor(module.net, **given))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_monitor_reads_gradients_before_they_are_clipped(accumulated: int) -> None:
    module = Module()
    trainer = fit(
        module, batches(4), accumulate_grad_batches=accumulated, gradient_clip_val=1e-3, callbacks=[watching(module)]
    )
    found = {name: value.item() for name, value in trainer.logged_metrics.items()}
    rows = sample_gradients(at(module.optimizer.weights[-1]), batches(4)[-accumulated:])
    assert found == pytest.approx(moments(rows), rel=1e-6)
    assert flat(module.optimizer.gradients[-1]).norm() == pytest.approx(1e-3, rel=1e-2)


def test_the_monitor_of_whole_batches() -> None:
    module = Module()
    callback = watching(module, metrics=("noise_trace", "grad_norm"), micro_batch_size=None)
    fit(module, batches(3), accumulate_grad_batches=3, callbacks=[callback])
    means = torch.stack([flat(explicit(network(), [batch], 1, 0.0)) for batch in batches(3)])
    want = moments(means)
    want["fastreg/noise_trace"] *= BATCH
    assert {name: callback.one.metrics[name].item() for name in want} == pytest.approx(want, rel=1e-9)


def test_the_monitor_of_the_last_and_shorter_update() -> None:
    module = Module()
    callback = watching(module)
    fit(module, batches(3), accumulate_grad_batches=2, callbacks=[callback])
    rows = sample_gradients(at(module.optimizer.weights[-1]), batches(3)[2:])
    found = {name: callback.one.metrics[name].item() for name in moments(rows)}
    assert found == pytest.approx(moments(rows), rel=1e-9)


def test_the_monitor_knows_the_scale_of_a_grad_scaler() -> None:
    module = Module(net=network().float())
    callback = watching(module)
    fit(module, batches(2, torch.float32), accumulate_grad_batches=2, plugins=[half()], callbacks=[callback])
    want = moments(sample_gradients(network(), batches(2)))
    assert {name: callback.one.metrics[name].item() for name in want} == pytest.approx(want, rel=1e-2)


def test_a_resumed_monitor_goes_on_averaging(tmp_path: Path) -> None:
    def measured(resume: str | None = None) -> Tensor:
        module, options = Module(), saving(tmp_path)
        options["callbacks"].append(watching(module, ema=0.9))
        fit(module, batches(4), resume=resume, **options)
        return options["callbacks"][-1].one.metrics["fastreg/noise_trace"]

    assert torch.equal(measured(), measured(str(tmp_path / "step=4.ckpt")))


def share(rank: int) -> list[Batch]:
    return batches(8)[4 * rank : 4 * rank + 4]


def ranks_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), GROUP_RANK="0", LOCAL_WORLD_SIZE="2")

    def train(module: Module, callback: Kept, resume: str | None = None, **options: object) -> lightning.Trainer:
        options = {"strategy": DDPStrategy(cluster_environment=TorchElasticEnvironment(), **options), "devices": 2}
        options |= {"use_distributed_sampler": False, "accumulate_grad_batches": 2, "callbacks": [callback]}
        return fit(module, share(rank), resume=resume, **options)

    seeded, unseeded = Module(fastreg.FisherTrace(WEIGHT, seed=rank)), Module(fastreg.FisherTrace(WEIGHT))
    train(seeded, RegularizerCallback(seeded.reg)).save_checkpoint(f"{folder}/two.ckpt")
    train(unseeded, RegularizerCallback(unseeded.reg), f"{folder}/two.ckpt")
    exact, static, watched = Module(grad_norm()), Module(grad_norm()), Module()
    train(exact, RegularizerCallback(exact.reg))
    callback = watching(watched)
    train(watched, callback)
    with pytest.raises(FastregError, match="static_graph=True, got it"):
        train(static, RegularizerCallback(static.reg), static_graph=True)
    measured = [callback.one.metrics[name] for name in ("fastreg/grad_norm", "fastreg/noise_trace")]
    measured += [torch.tensor(unseeded.reg.state_dict()["penalties"][0]["seed"])]
    torch.save([measured, *exact.optimizer.gradients, *watched.optimizer.weights], Path(folder) / f"{rank}.pt")


def test_two_processes(tmp_path: Path) -> None:
    """Penalty, monitor and checkpoints under DistributedDataParallel."""
    for rank, (measured, *found) in enumerate(spawn(ranks_worker, tmp_path)):
        first, _, _, last = found
        assert_close(first, explicit(network(), share(0)[:2] + share(1)[:2], 4))
        want = moments(sample_gradients(at(last), share(0)[2:] + share(1)[2:]))
        assert [value.item() for value in measured[:2]] == pytest.approx(list(want.values()), rel=1e-9)
        assert measured[2] == rank


class ByHand(Module):
    """Manual optimization of several closures' worth."""

    def __init__(self, optimizer: object) -> None:
        super().__init__()
        self.automatic_optimization, self.optimizer = False, optimizer(self.net)

    def training_step(self, batch: Batch, number: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("by_hand", [False, True])
def test_sharpness_aware_steps(by_hand: bool) -> None:
    make = lambda net: SAM(Watched(net.parameters()), net, rho=0.1, micro_batch_size=SIZE)  # noqa: E731
    module = ByHand(make) if by_hand else Module()
    module.optimizer = module.optimizer if by_hand else make(module.net)
    fit(module, batches(2))
    for (x, y), weights, got in zip(batches(2), module.optimizer.base.weights, module.optimizer.base.gradients):
        want = sequential_gradient(at(weights), F.cross_entropy, x, y, SIZE, 0.1)
        assert_close(got, list(want.values()))


def test_the_optimizer_that_takes_the_loss_as_it_is_refuses_one_that_lightning_divides() -> None:
    module = Module()
    reg = fastreg.Regularizer(module.net, grad_norm(), micro_batch_size=SIZE)
    module.optimizer = Regularized(Watched(module.net.parameters()), reg)
    with pytest.raises(FastregError, match="the loss must not end in a product or a quotient without scale"):
        fit(module, batches(2))


def test_the_monitor_leaves_manual_optimization_to_its_user() -> None:
    module = ByHand(lambda net: Watched(net.parameters()))
    with pytest.raises(FastregError, match=r"automatic_optimization=True, got False \(call monitor.step\(\)"):
        fit(module, batches(2), callbacks=[watching(module)])


def test_arguments_of_the_callbacks() -> None:
    module = Module()
    with pytest.raises(FastregError, match=r"argument must be a fastreg.Regularizer, got Monitor \(build it first"):
        RegularizerCallback(watching(module).one)
    module = Module()
    with pytest.raises(FastregError, match="must be attached to a module inside the .*, got Module itself"):
        MonitorCallback(fastreg.Monitor(module))


def test_a_checkpoint_of_other_processes() -> None:
    callback = watching(Module())
    state = callback.state_dict()
    with pytest.raises(FastregError, match="must be of 1 processes, as there are now, got one of 2"):
        callback.load_state_dict({"processes": 2 * state["processes"]})


def test_the_examples_of_the_docstrings_run() -> None:
    failed, tried = doctest.testmod(fastreg.integrations.lightning)
    assert tried > 10 and not failed


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FastregError, match=r"lightning must be installed.*pip install 'fastreg\[integrations\]'"):
        runpy.run_path(str(ROOT / "fastreg" / "integrations" / "lightning.py"))


def test_the_example_lowers_the_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import lightning_module

    plain, penalised = lightning_module.main().values()
    assert penalised["fastreg/grad_norm"] < 0.6 * plain["fastreg/grad_norm"]
    assert capsys.readouterr().out.count("mean ||g_k||^2") == 2
